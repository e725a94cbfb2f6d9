"""Every op, every backend, and what one would use instead, over the grid of cases.py.

``make bench`` writes ``results/kernels-<device>.csv`` and a page of plots. On a CPU one thread up
to 64 rows, as beside a model that decodes, and all of torch's threads beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import cases
import ceiling
import contest
import pytest
import records
import timing
import torch
from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = torch.get_num_threads()
RESULTS = Path(__file__).resolve().parent.parent / "results"
SECONDS = 0.15  # per contestant and point; the grid has some 300
PAIRS = [(point, who) for point in cases.grid() for who in contest.contestants(point, DEVICE)]

Keep = Callable[[cases.Point, str, Sequence[float], int], None]


@pytest.fixture(scope="session")
def keep() -> Iterator[Keep]:
    """Collect the session's results, and write them at its end."""
    kept: list[records.Record] = []
    machine = records.Machine.here()

    def add(point: cases.Point, who: str, samples: Sequence[float], threads: int) -> None:
        top = ceiling.bytes_per_second(point.work.bytes, threads, DEVICE)
        kept.append(
            records.Record.of(
                point, who, samples, device=DEVICE, threads=threads, ceiling=top, machine=machine
            )
        )

    yield add
    if kept:
        records.write(RESULTS / f"kernels-{DEVICE}.csv", kept)


@lru_cache(maxsize=1)
def inputs_of(point: cases.Point) -> cases.Inputs:
    """Return the inputs that the contestants at a point share."""
    return cases.Inputs.of(point, DEVICE)


@pytest.mark.parametrize(("point", "who"), PAIRS, ids=lambda value: str(value))
def bench_op(benchmark: BenchmarkFixture, keep: Keep, point: cases.Point, who: str) -> None:
    """One contestant at one point."""
    threads = THREADS if point.rows > 64 else 1
    benchmark.group = str(point)
    torch.set_num_threads(threads)
    torch.compiler.reset()
    samples: list[float] = []
    try:
        with torch.inference_mode():
            block = contest.block(inputs_of(point), who)
            until = timing.interleaved({who: block}, device=DEVICE, seconds=0, least=3)
            rounds = max(5, min(200, int(SECONDS / (block.calls * min(until[who])))))
            benchmark.pedantic(
                lambda: samples.append(timing.seconds_of(block, DEVICE)), rounds=rounds
            )
            keep(point, who, samples, threads)
            if benchmark.stats:  # seconds per call, where it took the time of whole blocks
                benchmark.stats.stats.data[:] = samples
    finally:
        torch.set_num_threads(THREADS)
