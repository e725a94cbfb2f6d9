"""The ceiling: how fast this machine reads so many bytes, measured in the same run.

On a CPU the fastest of three plain reads with the same threads: ``torch.sum``, a dot product of
the bytes with themselves, and the C library's ``memchr`` for a byte that is not there, one slice
per thread. On a GPU a device copy, which reads and writes: bytes moved are twice those copied.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from timing import Block, Quantiles, captured, interleaved, loop, sized

_GRAIN = 64  # bytes; a buffer is made of whole vectors


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay; ctypes lets them run side by side."""
    return ThreadPoolExecutor(threads)


def read_blocks(nbytes: int, threads: int) -> dict[str, Block]:
    """Return plain reads of ``nbytes`` bytes, each as a block."""
    count = max(1, nbytes // _GRAIN) * _GRAIN // 4
    buffer = torch.zeros(count)
    total = torch.zeros(())
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memchr.restype = ctypes.c_void_p
    start, size = buffer.data_ptr(), 4 * count
    edges = [size * i // threads for i in range(threads + 1)]
    slices = [(start + a, 1, b - a) for a, b in pairwise(edges)]
    others = pool(threads - 1) if threads > 1 else None

    def scan() -> None:
        waiting = [others.submit(memchr, *row) for row in slices[1:]] if others else []
        memchr(*slices[0])
        for job in waiting:
            job.result()

    reads = {
        "sum": lambda: torch.sum(buffer, dim=0, out=total),
        "dot": lambda: torch.dot(buffer, buffer, out=total),
        "memchr": scan,
    }
    return {
        name: sized(lambda calls, call=call: loop(call, [()] * calls))
        for name, call in reads.items()
    }


def copy_block(nbytes: int) -> Block:
    """Return copies on the GPU of rotated buffers: ``nbytes`` moved by each, half of them read."""
    half = max(_GRAIN, nbytes // 2)
    l2 = int(torch.cuda.get_device_properties(0).L2_cache_size)
    copies = min(64, max(2, -(-3 * l2 // half)))
    sources = [torch.zeros(half, dtype=torch.int8, device="cuda") for _ in range(copies)]
    targets = [torch.zeros_like(source) for source in sources]
    calls = 20 if nbytes > 1 << 26 else 200
    rows = [(targets[i % copies], sources[i % copies]) for i in range(calls)]
    return captured(torch.Tensor.copy_, rows)


@cache
def bytes_per_second(nbytes: int, threads: int, device: str = "cpu") -> float:
    """Measure the ceiling for so many bytes; the same question is measured once in a run."""
    if device == "cuda":
        samples = interleaved({"copy": copy_block(nbytes)}, device=device, seconds=0.2)
    else:
        samples = interleaved(read_blocks(nbytes, threads), seconds=0.15, warm_up=0.05)
    return nbytes / min(Quantiles.of(taken).median for taken in samples.values())
