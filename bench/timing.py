"""The one way in which the bench takes time: blocks of calls, interleaved, with quantiles.

A sample is the time of a block of calls, divided by their number. Contestants take turns (A B A B
...), so that what disturbs the machine disturbs all of them. On a GPU a block is a CUDA graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LEAST_BLOCK = 5e-4  # seconds: 10^4 times the resolution of the clock
MOST_CALLS = 400
GRAPH_CALLS = 200
# Clocks that a GPU is kept busy for while the host launches what is timed, or a block without
# `prepare` would be charged for its launch, and one with it would not.
HEAD_START = 200_000
WARM_UP = 0.2  # seconds, by time and not by count: clocks of GPUs rise slowly

Call = Callable[..., object]


class Quantiles(NamedTuple):
    """Seconds per call."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Take them from the samples; of a single one all three are that one."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3])


def ratio(samples: Mapping[str, list[float]], over: Sequence[str], under: Sequence[str]) -> float:
    """Return the ratio of the fastest by median of ``over`` to the fastest of ``under``.

    It is the median of the ratios within each round: a neighbour that slows some rounds down slows
    both sides of them.
    """
    above, below = (
        samples[min(names, key=lambda name: statistics.median(samples[name]))]
        for names in (over, under)
    )
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Block:
    """``calls`` calls as one function; ``prepare`` runs before it, outside the time."""

    run: Callable[[], object]
    calls: int
    prepare: Callable[[], object] = nothing


def loop(call: Call, arguments: Sequence[tuple[Any, ...]], prepare: Call = nothing) -> Block:
    """Return a block that calls with each of ``arguments`` in turn, from Python."""

    def run() -> None:
        for row in arguments:
            call(*row)

    return Block(run, len(arguments), prepare)


def captured(call: Call, arguments: Sequence[tuple[Any, ...]], prepare: Call = nothing) -> Block:
    """Return the same as one CUDA graph, captured on a side stream after a few plain calls."""
    prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for row in arguments[:3]:  # compiles, tunes and allocates what the call keeps
            call(*row)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for row in arguments:
            call(*row)
    return Block(graph.replay, len(arguments), prepare)


def sized(make: Callable[[int], Block], least: float = LEAST_BLOCK) -> Block:
    """Return ``make(calls)`` with so many calls that a block lasts ``least`` seconds."""
    block = make(1)
    _host_seconds(block)  # compiles, and touches the memory
    if _host_seconds(block) >= least:
        return block
    block = make(8)
    fastest = min(_host_seconds(block) for _ in range(3))
    calls = max(1, min(MOST_CALLS, math.ceil(least / fastest)))
    return make(calls)


def _host_seconds(block: Block) -> float:
    block.prepare()
    begin = time.perf_counter_ns()
    block.run()
    return (time.perf_counter_ns() - begin) * 1e-9 / block.calls


def _device_seconds(block: Block) -> float:
    block.prepare()
    torch.cuda._sleep(HEAD_START)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    block.run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / block.calls


def seconds_of(block: Block, device: str = "cpu") -> float:
    """Seconds per call in one run of the block: host clock, or events on a GPU."""
    return _device_seconds(block) if device == "cuda" else _host_seconds(block)


def interleaved(
    blocks: Mapping[str, Block],
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    warm_up: float = WARM_UP,
    least: int = 9,
) -> dict[str, list[float]]:
    """Run the blocks in turn for ``seconds``, and ``least`` rounds or more; return the samples."""
    until = time.perf_counter() + warm_up
    while True:
        for block in blocks.values():
            seconds_of(block, device)
        if time.perf_counter() >= until:
            break
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < until:
        for name, block in blocks.items():
            samples[name].append(seconds_of(block, device))
        rounds += 1
    return samples
