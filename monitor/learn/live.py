"""Residuals computed as they are asked for, for sets that are too large to be stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch

from midstream.learn.activations import CHUNK_BYTES, Indices, chunked
from midstream.learn.forward import BATCH_TOKENS, ForwardPass, TokenIds
from midstream.learn.tokens import Chunk, Tokens
from midstream.taps import Tap


class Live:
    """Runs the model again on every pass over the data, and keeps one chunk in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    sequences : sequence of token ids
    tokens : Tokens
        What is known about them.
    taps : sequence of Tap
    batch_tokens : int
        Tokens per forward pass, padding included, unless one sequence alone has more.
    chunk_bytes : int
        A chunk holds no more than this, unless one example alone does. Sequences are sorted by
        length within a chunk: one that holds few is padded more.

    Raises
    ------
    TrainingDataError
        If the model cannot take a sequence.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[TokenIds],
        tokens: Tokens,
        taps: Sequence[Tap],
        *,
        batch_tokens: int = BATCH_TOKENS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.tokens = tokens
        self.taps = tuple(sorted(taps))
        self.chunk_bytes = chunk_bytes
        self._forward = ForwardPass(
            model, sequences, tokens.ids, self.taps, batch_tokens=batch_tokens
        )
        self.width = self._forward.width
        self._examples = np.arange(len(tokens))

    def select(self, examples: Sequence[int] | Indices) -> Self:
        """Return the same for some of the examples, in the order given."""
        chosen = np.asarray(examples, dtype=np.int64)
        selected = copy.copy(self)
        selected.tokens = self.tokens.select(chosen)
        selected._examples = self._examples[chosen]
        return selected

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        """Every example once: in order, or shuffled by ``seed``.

        Raises
        ------
        TrainingDataError
            Where a value is not finite.
        """
        bytes_per_token = 4 * self.width * len(self.taps)
        for examples in chunked(self.tokens, self.chunk_bytes // bytes_per_token, seed):
            rows = self.tokens.rows(examples)
            out = torch.empty(len(self.taps), len(rows), self.width)
            self._forward.read_into(out, self._examples[examples])
            yield Chunk(examples, rows, dict(zip(self.taps, out, strict=True)))
