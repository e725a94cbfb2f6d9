"""vLLM: which configurations can be watched, and a clear refusal of the others at start-up."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from midstream.engines.vllm.settings import (
    ANY_VERSION,
    PROCESSOR,
    SCHEDULER,
    WORKER,
    UnsupportedEngineError,
    runs_any_version,
)

VERSIONS = ("0.32.",)
"""Beginnings of the versions that the plugin was read and tried against."""

_WHOLE = "start the server with `midstream vllm serve`, or pass it"


def check_version(version: str) -> None:
    """Refuse a vLLM whose internals may be others than those the plugin hooks into.

    Raises
    ------
    UnsupportedEngineError
    """
    if not version.startswith(VERSIONS) and not runs_any_version():
        _refuse(
            f"vLLM {version}: the plugin was tried with {', '.join(v + 'x' for v in VERSIONS)}",
            f"install one of them, or set {ANY_VERSION}=1 and run its tests first",
        )


def check_config(config: Any) -> None:
    """Refuse what cannot be watched in a ``VllmConfig``.

    Raises
    ------
    UnsupportedEngineError
        With the reason and the remedy.
    """
    model, parallel, scheduler = (
        config.model_config,
        config.parallel_config,
        config.scheduler_config,
    )
    if model.runner_type != "generate":
        _refuse(f"a model that runs as {model.runner_type!r} writes nothing", "serve one that does")
    if model.is_encoder_decoder:
        _refuse("an encoder-decoder model", "serve a decoder-only one")
    if model.enable_prompt_embeds:
        _refuse("--enable-prompt-embeds hides which tokens are fed", "leave it out")
    if config.speculative_config is not None:
        _refuse(
            "speculative decoding feeds tokens that are thrown away, and vLLM takes no logits "
            "processor beside it",
            "leave --speculative-config out",
        )
    if config.lora_config is not None:
        _refuse(
            "--enable-lora changes the residual stream that the probes were made for",
            "merge the adapter and make a bundle for the merged model",
        )
    for what, ways in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
    ):
        if ways > 1:
            _refuse(
                f"{what} parallel over {ways}: no process sees all tapped rows of a step",
                "use tensor or data parallel",
            )
    if parallel.enable_dbo:
        _refuse("--enable-dbo runs a step as two interleaved passes", "leave it out")
    if parallel.enable_batch_sharded_sampling:
        _refuse(
            "--enable-batch-sharded-sampling gives every rank a part of the rows", "leave it out"
        )
    if config.kv_transfer_config is not None:
        _refuse(
            "--kv-transfer-config brings prompts that were computed elsewhere, unwatched",
            "leave it out",
        )
    if model.is_diffusion:
        _refuse("a diffusion model writes its tokens in no order", "serve an autoregressive one")
    if config.weight_transfer_config is not None:
        _refuse(
            "--weight-transfer-config replaces the weights that the probes were made for",
            "leave it out",
        )
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        _refuse(
            "VLLM_USE_RUST_FRONTEND=1: vLLM's Rust front end loads no plugins, so clients would "
            "not be told of a halt",
            "unset it",
        )
    if scheduler.policy != "fcfs":
        _refuse(
            f"--scheduling-policy {scheduler.policy}: streams that wait half-written are not "
            "bounded by --max-num-seqs, and each needs its slot",
            "use fcfs",
        )
    _check_seams(config)


def _check_seams(config: Any) -> None:
    worker, scheduler = config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls
    processors = [str(name) for name in config.model_config.logits_processors or ()]
    if worker != WORKER:
        _refuse(f"--worker-cls is {worker}, not the plugin's", f"{_WHOLE}: --worker-cls {WORKER}")
    if scheduler != SCHEDULER:
        _refuse(
            f"--scheduler-cls is {scheduler}, so tokens would leave before they are judged",
            f"{_WHOLE}: --scheduler-cls {SCHEDULER}",
        )
    if PROCESSOR not in processors[-1:]:
        _refuse(
            f"--logits-processors are {', '.join(processors) or 'none'}: another one after the "
            "plugin's could undo a halt",
            f"{_WHOLE} as the last: --logits-processors {PROCESSOR}",
        )


def _refuse(what: str, remedy: str) -> NoReturn:
    raise UnsupportedEngineError(f"{what}; {remedy}")
