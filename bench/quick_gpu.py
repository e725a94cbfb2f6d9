"""The GPU's part of quick.py. Everything is timed as CUDA graphs of some 200 calls, cold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import cases
import ceiling
import contest
import plain
import torch
from cases import Inputs, Point
from quick import keep, say
from timing import GRAPH_CALLS, Block, captured, interleaved, ratio

from midstream.kernels import ops

if TYPE_CHECKING:
    from quick import Result, Size

DEVICE = "cuda"


def measure_gpu(result: Result, size: Size) -> None:
    """Fill in the ``gpu_`` figures; one that fails is null with the error as its reason."""
    for name, part in {
        "gpu_decode_vs_empty": _decode,
        "gpu_prefill_vs_copy": _prefill,
        "gpu_norm_score_vs_norm": _norm,
        "gpu_llm_step_ratio": _llm,
    }.items():
        say(f"gpu: {name}")
        try:
            part(result, size)
        except Exception as error:  # the other figures are still worth having
            result["reasons"][name] = f"{type(error).__name__}: {error}"
            if part is _decode:
                for other in ("gpu_decode_vs_compile", "gpu_decode_vs_cublas"):
                    result["reasons"][other] = result["reasons"][name]
        torch.cuda.empty_cache()


def _rival(result: Result, blocks: dict[str, Block], name: str, make: Callable[[], Block]) -> None:
    """Add a contestant that is not ours; one that cannot run is left out, with its reason."""
    try:
        blocks[name] = make()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        result["reasons"][f"left out: {name}"] = reason
        say(f"gpu: without {name}, {reason}")


def _decode(result: Result, size: Size) -> None:
    """The fused step against an empty kernel, the compiled step, and cuBLAS's read-out alone."""
    worst_empty, least_compile, least_cublas = 0.0, float("inf"), float("inf")
    uncompiled: list[int] = []
    for rows in size.decode_rows:
        inputs = Inputs.of(Point("score_advance", rows, width=size.width), DEVICE)
        blocks = {
            "ours": contest.block(inputs, ops.resolve(DEVICE)),
            # spins for no cycle at all: a launch and nothing else
            "empty": captured(torch.cuda._sleep, [(0,)] * GRAPH_CALLS, inputs.rewind),
            "cublas": contest.block(inputs, "F.linear"),
        }
        slot = inputs.slot.long()
        arguments = [(hidden, slot) for hidden in inputs.rotated(GRAPH_CALLS)]
        torch.compiler.reset()
        for form, how in plain.TO_COMPILE_CUDA:
            step = plain.PlainStep(inputs.weight, inputs.bias, *inputs.tables, rows)
            call = plain.compiled(getattr(step, form), how)
            make = partial(captured, call, arguments, inputs.rewind)
            _rival(result, blocks, f"compile {form}", make)
        samples = interleaved(blocks, device=DEVICE, seconds=size.seconds)
        keep(result, f"gpu decode N={rows}", samples)
        compiled = [who for who in samples if who.startswith("compile")]
        worst_empty = max(worst_empty, ratio(samples, ["ours"], ["empty"]))
        if compiled:
            least_compile = min(least_compile, ratio(samples, compiled, ["ours"]))
        else:
            uncompiled.append(rows)
        least_cublas = min(least_cublas, ratio(samples, ["cublas"], ["ours"]))
    result["gpu_decode_vs_empty"] = worst_empty
    result["gpu_decode_vs_cublas"] = least_cublas
    if uncompiled:
        result["reasons"]["gpu_decode_vs_compile"] = f"no form was compiled for N = {uncompiled}"
    else:
        result["gpu_decode_vs_compile"] = least_compile


def _prefill(result: Result, size: Size) -> None:
    point = Point("score", size.prefill_rows, 16, size.width)
    inputs = Inputs.of(point, DEVICE)
    blocks = {
        "score": contest.block(inputs, ops.resolve(DEVICE)),
        "copy": ceiling.copy_block(point.work.bytes),
    }
    samples = interleaved(blocks, device=DEVICE, seconds=size.seconds)
    keep(result, f"gpu prefill N={point.rows}", samples)
    # Both move the same bytes by the model, so bandwidths are as times turned round.
    result["gpu_prefill_vs_copy"] = ratio(samples, ["copy"], ["score"])


def _norm(result: Result, size: Size) -> None:
    """With 8 probes riding along, against the fastest add + RMSNorm that is importable."""
    worst = 0.0
    for rows in (*size.decode_rows, 1024, size.prefill_rows):
        inputs = Inputs.of(Point("add_rms_norm_score", rows, width=size.width), DEVICE)
        blocks = {"ours": contest.block(inputs, ops.resolve(DEVICE))}
        gamma = torch.full((size.width,), 1e-3, dtype=inputs.hidden.dtype, device=DEVICE)
        pairs = [(copy.clone(), copy) for copy in inputs.hidden]
        arguments = [(*pairs[i % len(pairs)], gamma, cases.NORM_EPS) for i in range(GRAPH_CALLS)]
        torch.compiler.reset()
        for name, call in _norms().items():
            make = partial(captured, call, arguments, inputs.rewind)
            _rival(result, blocks, f"norm {name}", make)
        samples = interleaved(blocks, device=DEVICE, seconds=size.seconds)
        keep(result, f"gpu norm N={rows}", samples)
        norms = [who for who in samples if who.startswith("norm")]
        worst = max(worst, ratio(samples, ["ours"], norms))
    result["gpu_norm_score_vs_norm"] = worst


def _norms() -> dict[str, Any]:
    """Return every add + RMSNorm in place that can be had: ``(x, residual, gamma, eps)``."""
    found: dict[str, Any] = {"compile": plain.compiled(plain.add_rms_norm_new)}
    found["eager"] = plain.add_rms_norm
    # Engines built for another torch raise more than ImportError; theirs is a row less, no more.
    with suppress(Exception):
        from vllm import _custom_ops

        found["vllm"] = _custom_ops.fused_add_rms_norm
    with suppress(Exception):
        from flashinfer.norm import fused_add_rmsnorm

        found["flashinfer"] = fused_add_rmsnorm
    return found


def _llm(result: Result, size: Size) -> None:
    from llm import LEAST_MEMORY, Decoder

    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < LEAST_MEMORY:
        raise MemoryError(f"the model takes {LEAST_MEMORY >> 30} GiB, the card has {memory >> 30}")
    decoder = Decoder()
    worst = 0.0
    for batch in size.llm_batches:
        say(f"gpu: decoding, batch {batch}")
        blocks: dict[str, Block] = decoder.blocks(batch)
        samples = interleaved(blocks, device=DEVICE, seconds=3 * size.seconds, least=30)
        keep(result, f"gpu llm batch={batch}", samples)
        worst = max(worst, ratio(samples, ["monitored"], ["plain"]))
        del blocks
        torch.cuda.empty_cache()
    result["gpu_llm_step_ratio"] = worst
