"""SGLang: the server arguments that the monitor needs, and a clear refusal of others at start-up.

Forward hooks are found by module name, and a name that is not there only warns. So nothing is
taken on trust here: a tap that was not read in a pass, and a step that is sampled without its pass
having been read, stop the server (`watch.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from midstream.bundle import Bundle
from midstream.policy import Policy

UNTRIED = "MIDSTREAM_UNTRIED_SGLANG"
"""Environment variable: 1 says that you know this adapter was never run against SGLang itself."""

_HOOKS = "midstream.engines.sglang.hooks"
_OFF = (False, None)

# Server argument, the values that can be watched, and why no others.
_NEEDED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("disable_cuda_graph", (True,), "a captured graph replays without hooks"),
    ("enable_custom_logit_processor", (True,), "without it nothing is halted"),
    ("enable_torch_compile", _OFF, "compiled code skips hooks"),
    ("speculative_algorithm", (None,), "it feeds tokens that are thrown away"),
    ("tp_size", (1, None), "nobody tried whether all ranks see and sample the same rows"),
    ("pp_size", (1, None), "in a pipeline no process sees all tapped rows"),
    ("enable_dp_attention", _OFF, "it splits rows over ranks"),
    ("enable_two_batch_overlap", _OFF, "a step runs as two interleaved passes"),
    ("enable_lora", _OFF, "an adapter changes the stream that the probes were made for"),
    ("disaggregation_mode", ("null", None), "prompts computed elsewhere come in unwatched"),
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
            raise UnsupportedEngineError(
                f"tap {tap}: SGLang adds attention to the stream inside a fused norm, where it "
                "cannot be read; train probes on resid_pre or resid_post"
            )
        before = tap.site == "resid_pre"
        name = "before_layer" if before else "after_layer"
        specs.append(spec(name, f"model.layers.{tap.layer}", before, tap=str(tap)))
    specs.append(spec("after_logits", "logits_processor"))
    return [
        *("--forward-hooks", json.dumps(specs)),
        *("--max-running-requests", str(max_running_requests)),
        "--enable-custom-logit-processor",
        "--disable-cuda-graph",
    ]


def check_policy(policy: Policy) -> None:
    """Refuse a policy that can hold, or that has segments.

    Raises
    ------
    UnsupportedEngineError
    """
    if policy.segments:
        raise UnsupportedEngineError("segments are not told apart in SGLang; leave them out")
    if policy.on_unscored == "hold" or any(t.hold_at is not None for t in policy.tiers.values()):
        raise UnsupportedEngineError(
            "the policy can HOLD (hold_at, or on_unscored: hold), and SGLang's seams tell the "
            "front end of a halt only; leave hold_at out, and set on_unscored to halt or pass"
        )


def check_server(args: Any) -> None:
    """Refuse what cannot be watched in SGLang's ``ServerArgs``.

    Raises
    ------
    UnsupportedEngineError
        Naming every argument at fault.
    """
    if os.environ.get(UNTRIED) != "1":
        raise UnsupportedEngineError(
            "this adapter was written from SGLang's documentation and sources and never run "
            f"against the engine itself; try it with requests that must halt, with {UNTRIED}=1 set"
        )
    faults = [
        f"{name}={value!r}: {why}; expected {allowed[0]!r}"
        for name, allowed, why in _NEEDED
        if (value := getattr(args, name, None)) not in allowed
    ]
    if not getattr(args, "max_running_requests", None):
        faults.append("max_running_requests is not set: each stream needs a slot; pass it")
    if faults:
        raise UnsupportedEngineError("cannot be watched: " + "; ".join(faults))
