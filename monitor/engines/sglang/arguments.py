"""SGLang: the server arguments that the monitor needs, and a clear refusal of others at start-up.

Forward hooks are found by module name, and a name that is not there only warns. So nothing is
taken on trust here: a tap that was not read in a pass, and a step that is sampled without its pass
having been read, stop the server (`watch.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from midstream.bundle import Bundle
from midstream.policy import Policy

UNTRIED = "MIDSTREAM_UNTRIED_SGLANG"
"""Environment variable: 1 says that you know this adapter was never run against SGLang itself."""

_HOOKS = "midstream.engines.sglang.hooks"

_GRAPHS = "CUDA graphs are captured before forward hooks are registered, and replay without them"
_LORA = "an adapter changes the residual stream that the probes were made for"
_SPECULATIVE = "speculative decoding feeds tokens that are thrown away, several rows to a stream"
_OFF = (False, None)

# Server argument, the values that can be watched, why no others, and what to pass.
_NEEDED: tuple[tuple[str, tuple[object, ...], str, str], ...] = (
    ("disable_cuda_graph", (True,), _GRAPHS, "--disable-cuda-graph"),
    (
        "enable_custom_logit_processor",
        (True,),
        "without custom logit processors nothing is halted",
        "--enable-custom-logit-processor",
    ),
    ("enable_torch_compile", _OFF, "compiled code skips hooks", "no --enable-torch-compile"),
    ("speculative_algorithm", (None,), _SPECULATIVE, "no --speculative-algorithm"),
    ("pp_size", (1, None), "in a pipeline no process sees all tapped rows", "--tp-size instead"),
    ("enable_dp_attention", _OFF, "DP attention splits rows over ranks", "--dp-size alone"),
    (
        "enable_two_batch_overlap",
        _OFF,
        "a step runs as two interleaved passes",
        "no --enable-two-batch-overlap",
    ),
    ("enable_lora", _OFF, _LORA, "a merged model and a bundle for it"),
    (
        "disaggregation_mode",
        ("null", None),
        "prompts that were computed elsewhere come in unwatched",
        "no --disaggregation-mode",
    ),
)


class UnsupportedEngineError(ValueError):
    """A way to run SGLang in which tokens would pass unwatched, or rows cannot be told apart."""


def server_arguments(bundle: str | Path, *, stop_id: int, max_running_requests: int) -> list[str]:
    """Return what to add to ``python -m sglang.launch_server --model-path MODEL``.

    Parameters
    ----------
    bundle : str or Path
        Folder of the bundle, on the server.
    stop_id : int
        A token of the vocabulary that the model is never to write; halted rows are given it.
    max_running_requests : int
        Streams at once; there are twice as many slots, for those that wait retracted.

    Raises
    ------
    UnsupportedEngineError
        For a policy or a tap that SGLang's seams cannot serve.
    """
    loaded = Bundle.load(bundle)
    check_policy(loaded.policy)
    config = {"bundle": str(Path(bundle).resolve()), "stop_id": stop_id}

    def spec(name: str, target: str, before: bool = False, **more: str) -> dict[str, Any]:
        timing = {"hook_type": "forward_pre", "with_kwargs": True} if before else {}
        return {
            "name": f"midstream {name}",
            "target_modules": [target],
            "hook_factory": f"{_HOOKS}:{name}",
            "config": {**config, **more},
            **timing,
        }

    specs = [spec("begin", "model", before=True), spec("end", "model")]
    for tap in loaded.bank.taps:
        if tap.site == "resid_mid":
            _refuse(
                f"tap {tap}: SGLang adds attention to the stream inside a fused norm, where it "
                "cannot be read",
                "train probes on resid_pre or resid_post",
            )
        name = "before_layer" if tap.site == "resid_pre" else "after_layer"
        before = tap.site == "resid_pre"
        specs.append(spec(name, f"model.layers.{tap.layer}", before, tap=str(tap)))
    specs.append(spec("after_logits", "logits_processor"))
    return [
        *("--forward-hooks", json.dumps(specs)),
        *("--max-running-requests", str(max_running_requests)),
        "--enable-custom-logit-processor",
        "--disable-cuda-graph",
    ]


def check_policy(policy: Policy) -> None:
    """Refuse a policy that can hold: no seam carries a HOLD to the front end, only a halt.

    Raises
    ------
    UnsupportedEngineError
    """
    holds = any(t.hold_at is not None for s in policy.thresholds_by_segment() for t in s.values())
    if holds or policy.on_unscored == "hold":
        _refuse(
            "the policy can HOLD (hold_at, or on_unscored: hold), and SGLang's seams tell the "
            "front end of a halt only",
            "leave hold_at out, and set on_unscored to halt or pass",
        )


def check_server(args: Any) -> None:
    """Refuse what cannot be watched in SGLang's ``ServerArgs``.

    Raises
    ------
    UnsupportedEngineError
        With the reason and the remedy.
    """
    if os.environ.get(UNTRIED) != "1":
        _refuse(
            "this adapter was written from SGLang's documentation and sources and never run "
            "against the engine itself",
            f"try it on your version with requests that must halt, then set {UNTRIED}=1",
        )
    for name, allowed, why, remedy in _NEEDED:
        value = getattr(args, name, None)
        if value not in allowed:
            _refuse(f"{name}={value!r}: {why}", f"pass {remedy}")
    if not getattr(args, "max_running_requests", None):
        _refuse("max_running_requests is not set, and each stream needs a slot", "pass it")


def _refuse(what: str, remedy: str) -> NoReturn:
    raise UnsupportedEngineError(f"{what}; {remedy}")
