"""The ratios that matter, in under five minutes on a CPU or a GPU, as one JSON object.

    python bench/quick.py

``asked`` and the meaning of each name: FIGURES below, and docs/kernels.md. What cannot be measured
here is null, and ``reasons`` says why. Progress goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import ceiling
import contest
import plain
import records
import torch
from cases import Inputs, Point
from timing import Block, Quantiles, interleaved, loop, ratio, sized

from midstream.kernels import ops

COMMAND = "python bench/quick.py"


class Figure(NamedTuple):
    """What a name means: its unit and what was asked for."""

    unit: str
    asked: str | None


FIGURES = {
    "cpu_step_vs_eager": Figure("ratio", "≥ 10"),
    "cpu_step_vs_compile": Figure("ratio", "≥ 10"),
    "cpu_prefill_vs_read": Figure("ratio", "≤ 1.3"),
    "cpu_amx_vs_avx512": Figure("ratio", None),
    "cpu_call_us": Figure("us", "≤ 3"),
    "gpu_decode_vs_empty": Figure("ratio", "≤ 2"),
    "gpu_decode_vs_compile": Figure("ratio", "≥ 1"),
    "gpu_decode_vs_cublas": Figure("ratio", "≥ 1"),
    "gpu_prefill_vs_copy": Figure("share of the copy bandwidth", "≥ 0.9"),
    "gpu_norm_score_vs_norm": Figure("ratio", "≤ 1.05"),
    "gpu_llm_step_ratio": Figure("ratio", "≤ 1.003"),
}


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    decode_rows: tuple[int, ...] = (1, 8, 64)
    prefill_rows: int = 16384
    width: int = 4096
    seconds: float = 2.0
    compiled: tuple[tuple[str, str], ...] = plain.TO_COMPILE
    llm_batches: tuple[int, ...] = (1, 16, 64, 256)


Result = dict[str, Any]


def measure(size: Size | None = None, devices: Sequence[str] = ("cpu", "cuda")) -> Result:
    """Measure everything that this machine can on the devices; return what is printed."""
    size = size or Size()
    result: Result = dict.fromkeys(FIGURES)
    result |= {"reasons": {}, "detail": {}, "machine": asdict(records.Machine.here())}
    with torch.inference_mode():
        if "cpu" not in devices:
            _explain(result, "cpu_", "not asked for")
        elif "cpu" not in contest.backends("cpu"):
            _explain(result, "cpu_", ops.capabilities()["cpu"].reason)
        else:
            _cpu(result, size)
        if "cuda" not in devices:
            _explain(result, "gpu_", "not asked for")
        elif torch.cuda.is_available():
            from quick_gpu import measure_gpu

            measure_gpu(result, size)
        else:
            _explain(result, "gpu_", "torch sees no CUDA device")
    return result


def figures(result: Mapping[str, Any]) -> dict[str, tuple[float, str, str | None, str]]:
    """Return ``{name: (value, unit, asked, command)}`` of what was measured in ``result``."""
    return {
        name: (result[name], figure.unit, figure.asked, COMMAND)
        for name, figure in FIGURES.items()
        if result[name] is not None
    }


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def keep(result: Result, name: str, samples: Mapping[str, list[float]]) -> dict[str, float]:
    """Note all quantiles in microseconds; return the medians in seconds."""
    taken = {who: Quantiles.of(times) for who, times in samples.items()}
    result["detail"][name] = {
        who: {part: round(t * 1e6, 3) for part, t in q._asdict().items()}
        for who, q in taken.items()
    }
    return {who: q.median for who, q in taken.items()}


def _explain(result: Result, prefix: str, reason: str) -> None:
    for name in FIGURES:
        if name.startswith(prefix):
            result["reasons"][name] = reason


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu(result: Result, size: Size) -> None:
    threads = torch.get_num_threads()
    with _threads(1):
        say("cpu: what a call costs")
        result["cpu_call_us"] = _call_us(result, size)
        _steps(result, size)
    say(f"cpu: prefill, {threads} threads")
    with _threads(threads):
        result["cpu_prefill_vs_read"] = _prefill(result, size, threads)
    with _threads(1):
        say("cpu: amx")
        _amx(result, size)


def _call_us(result: Result, size: Size) -> float:
    """Time the whole bound ``score_advance`` of one row, one probe and d=1.

    All that a large call does is in it, kernel included, on the least data there can be. So it is
    an upper bound of what a call costs above its kernel.
    """
    inputs = Inputs.of(Point("score_advance", 1, 1, 1), "cpu")
    blocks = {"score_advance": contest.block(inputs, "cpu")}
    samples = interleaved(blocks, seconds=size.seconds / 2)
    return keep(result, "call", samples)["score_advance"] * 1e6


def step_blocks(rows: int, size: Size, device: str = "cpu") -> dict[str, Block]:
    """Return ``score_advance`` and every plain form of the same step."""
    inputs = Inputs.of(Point("score_advance", rows, width=size.width), device)
    slot, hidden = inputs.slot.long(), inputs.hidden[0]
    blocks = {"ours": contest.block(inputs, ops.resolve(device))}

    def add(name: str, form: str, wrap: Callable[..., Any] | None = None) -> None:
        step = plain.PlainStep(inputs.weight, inputs.bias, *inputs.tables, rows)
        call = getattr(step, form)
        call = wrap(call) if wrap else call
        blocks[name] = sized(lambda calls: loop(call, [(hidden, slot)] * calls))

    for form in plain.EAGER:
        add(f"eager {form}", form)
    torch.compiler.reset()
    for form, how in size.compiled:
        say(f"cpu: N={rows}, compiling {form}, {how}")
        add(f"compile {form} {how}", form, lambda call, how=how: plain.compiled(call, how))
    return blocks


def _steps(result: Result, size: Size) -> None:
    worst: dict[str, float] = {}
    for rows in size.decode_rows:
        samples = interleaved(step_blocks(rows, size), seconds=size.seconds)
        keep(result, f"step N={rows}", samples)
        for kind in ("eager", "compile"):
            if names := [who for who in samples if who.startswith(kind)]:
                gain = ratio(samples, names, ["ours"])
                worst[kind] = min(worst.get(kind, gain), gain)
                say(f"cpu: N={rows}, best {kind} / ours {gain:.2f}")
    result["cpu_step_vs_eager"] = worst.get("eager")
    result["cpu_step_vs_compile"] = worst.get("compile")


def _prefill(result: Result, size: Size, threads: int) -> float:
    point = Point("score", size.prefill_rows, 16, size.width)
    inputs = Inputs.of(point, "cpu")
    blocks = {"score": contest.block(inputs, "cpu"), "F.linear": contest.block(inputs, "F.linear")}
    reads = ceiling.read_blocks(inputs.hidden[0].nbytes, threads)
    samples = interleaved({**blocks, **reads}, seconds=2 * size.seconds)
    keep(result, f"prefill N={point.rows} threads={threads}", samples)
    return ratio(samples, ["score"], list(reads))


def _amx(result: Result, size: Size) -> None:
    """Where there is AMX: the same call bound at the widest set below it, and with it."""
    from midstream.kernels import _cpu

    below = "avx512bf16"
    if _cpu.detected_isa() != "amx":
        result["reasons"]["cpu_amx_vs_avx512"] = f"no AMX here, {_cpu.detected_isa()} at most"
        return
    before = _cpu.isa()
    inputs = Inputs.of(Point("score", 512, 64, size.width), "cpu")
    blocks = {}
    try:
        for isa in (below, "amx"):
            _cpu.set_isa_cap(isa)
            # A binding keeps the instruction set that it was made with.
            blocks[isa] = contest.block(inputs, "cpu")
    finally:
        _cpu.set_isa_cap(before)
    samples = interleaved(blocks, seconds=size.seconds)
    keep(result, "amx N=512 P=64", samples)
    result["cpu_amx_vs_avx512"] = ratio(samples, [below], ["amx"])


if __name__ == "__main__":
    print(json.dumps(measure(), ensure_ascii=False))
