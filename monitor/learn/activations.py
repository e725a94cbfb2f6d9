"""Residuals of labelled tokens, kept: in memory, or in a folder on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from midstream.learn.tokens import Chunk, Tokens, TrainingDataError
from midstream.taps import Tap

Indices = NDArray[np.int64]

CHUNK_BYTES = 1 << 26  # of fp32, over all taps


class InMemory:
    """Residuals in memory, for sets that are small.

    Parameters
    ----------
    tokens : Tokens
        N rows.
    hidden : mapping of Tap to floating Tensor [N, d]
        One or more taps, all of one width.
    chunk_bytes : int
        A chunk holds no more than this, unless one example alone does.

    Raises
    ------
    TrainingDataError
        Without taps, or where a tensor's shape does not fit to the tokens or to the other taps.
    """

    def __init__(
        self, tokens: Tokens, hidden: Mapping[Tap, Tensor], *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        if not hidden:
            raise TrainingDataError("residuals of no tap: give at least one")
        self.tokens = tokens
        self.taps = tuple(hidden)
        self.width = next(iter(hidden.values())).shape[-1]
        self.chunk_bytes = chunk_bytes
        self._hidden = dict(hidden)
        expected = (int(tokens.starts[-1]), self.width)
        for tap, values in hidden.items():
            if values.shape != expected:
                raise TrainingDataError(
                    f"residuals at {tap} have shape {list(values.shape)}, the tokens and the other "
                    f"taps ask for {list(expected)}"
                )

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        """Every example once: in order, or shuffled by ``seed``."""
        bytes_per_token = 4 * self.width * len(self.taps)
        for examples in chunked(self.tokens, self.chunk_bytes // bytes_per_token, seed):
            rows = rows_of(self.tokens, examples)
            yield Chunk(
                examples, rows, {tap: values[rows].float() for tap, values in self._hidden.items()}
            )

    def select(self, examples: Sequence[int] | Indices) -> Self:
        """Return the same for some of the examples, in the order given."""
        rows = rows_of(self.tokens, np.asarray(examples, dtype=np.int64))
        return type(self)(
            self.tokens.select(examples),
            {tap: values[rows] for tap, values in self._hidden.items()},
            chunk_bytes=self.chunk_bytes,
        )


def chunked(tokens: Tokens, chunk_tokens: int, seed: int | None = None) -> Iterator[Indices]:
    """Every example once, in groups of at most ``chunk_tokens`` tokens or of one example."""
    order = np.arange(len(tokens))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    ends = np.cumsum(np.diff(tokens.starts)[order])
    begin = 0
    while begin < len(order):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + chunk_tokens, side="right")))
        yield order[begin:end]
        begin = end


def rows_of(tokens: Tokens, examples: Indices) -> Indices:
    """Rows of the examples, one example after the other."""
    lengths = np.diff(tokens.starts)[examples]
    ends = np.cumsum(lengths)
    rows: Indices = np.arange(lengths.sum()) + np.repeat(
        tokens.starts[:-1][examples] - (ends - lengths), lengths
    )
    return rows
