"""Made-up data to collect, and what other processes do with it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy

from midstream.learn.collect import collect
from midstream.learn.tokens import Tokens
from midstream.taps import Tap

TAPS = [Tap(0, "resid_pre"), Tap(0, "resid_mid"), Tap(0, "resid_post"), Tap(1, "resid_post")]

# Children of a server that has imported what takes seconds, and run nothing: they start at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["midstream.learn.collect", "midstream.monitor", "transformers.models.llama.modeling_llama"]
)


def tokens_of(sequences: Sequence[Sequence[int]], random: np.random.Generator) -> Tokens:
    """Random labels of two hazards; every example is its own group."""
    count, total = len(sequences), sum(map(len, sequences))
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    return Tokens(
        hazards=("harm", "höhe"),
        ids=tuple(f"text {n}" for n in range(count)),
        groups=tuple(f"gruppe ü{n}" if n % 3 else "" for n in range(count)),
        starts=starts,
        prompt_tokens=random.integers(0, 3, count).astype(np.int32),
        instruction_end=random.integers(-1, 3, count).astype(np.int32),
        special=random.random(total) < 0.1,
        labels=random.integers(-1, 2, (total, 2)).astype(np.int8),
        response_labels=random.integers(-1, 2, (count, 2)).astype(np.int8),
        prompt_labels=random.integers(-1, 2, (count, 2)).astype(np.int8),
        spans=np.array([[0, s, s + 1] for s, n in zip(starts, lengths, strict=False) if n]),
        contrast=random.integers(-1, 4, (count, 3)).astype(np.int32),
    )


def texts(count: int, seed: int, longest: int = 24) -> tuple[list[list[int]], Tokens]:
    """Sequences of the toy's words, one of them as long as can be, and their labels."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    lengths[random.integers(count)] = longest
    sequences = [random.integers(4, 23, length).tolist() for length in lengths]
    return sequences, tokens_of(sequences, random)


def run(
    folder: Path, sequences: Sequence[Sequence[int]], tokens: Tokens, **options: Any
) -> list[int]:
    """Collect with the toy in small shards and batches; returns the tokens done, as reported."""
    done: list[int] = []
    collect(
        toy.model(),
        toy.tokenizer(),
        sequences,
        tokens,
        **{"taps": TAPS, "batch_tokens": 64, "shard_bytes": 1 << 16, **options},
        folder=folder,
        progress=lambda now, total: done.append(now),
    )
    return done


def process(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a function of this module in another process."""
    started = PROCESSES.Process(target=target, args=arguments)
    started.start()
    return started


def collect_texts(folder: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    run(folder, *texts(count, seed))


def collect_until(folder: Path, count: int, seed: int, event: str, number: int) -> None:
    """Be killed at the n-th call of a function of `os`, by the kernel, without a farewell."""
    calls = 0
    original = getattr(os, event)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, event, counted)
    collect_texts(folder, count, seed)


def memory_of(
    folder: Path, sequences: Sequence[Sequence[int]], tokens: Tokens, options: Any, out: Any
) -> None:
    """Send by how many bytes the process grew at most while it collected."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    warm = [list(s) for s in sequences[:64]]
    # Loads what is loaded once, and what the largest batch makes the allocator keep.
    run(folder / "warm", warm, tokens_of(warm, random), **{**options, "shard_bytes": 1})
    before = peak()
    run(folder / "all", sequences, tokens, **options)
    out.put(peak() - before)


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
