"""Tokens of many examples side by side, with their labels, and where their residuals come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from midstream.taps import Tap

UNKNOWN = -1
"""A label that is not known, beside 0 and 1."""


class TrainingDataError(ValueError):
    """The data cannot teach what was asked; the message says what is missing and what to do."""


class MissingLabelsError(TrainingDataError):
    """A method's labels are not there, or of one class alone; another method may do without."""


@dataclass(frozen=True)
class Tokens:
    """Labels of N fed tokens of E examples.

    Rows of an example are contiguous and in order; special tokens have rows, too, with unknown
    labels.

    Attributes
    ----------
    hazards : tuple of str
        H of them; columns of the labels.
    ids, groups : tuple of str
        [E]
    starts : int64 [E + 1]
        Example e owns the rows ``starts[e]:starts[e + 1]``.
    prompt_tokens : int32 [E]
        Tokens before the response.
    instruction_end : int32 [E]
        Position of the last token of the last user message's content; -1 where there is none.
    special : bool [N]
        Tokens that the tokenizer puts around a plain text, such as [CLS]. Serving never scores
        them.
    labels : int8 [N, H]
        1, 0 or `UNKNOWN`. Prompt and special tokens are unknown.
    response_labels, prompt_labels : int8 [E, H]
    spans : int64 [S, 3]
        Hazard, first row, row after the last, of each labelled span.
    contrast : int32 [E, 3]
        Pair, negated, answer (see `midstream.learn.examples.Contrast`); -1 in all where there is
        none.
    """

    hazards: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    starts: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    instruction_end: NDArray[np.int32]
    special: NDArray[np.bool_]
    labels: NDArray[np.int8]
    response_labels: NDArray[np.int8]
    prompt_labels: NDArray[np.int8]
    spans: NDArray[np.int64]
    contrast: NDArray[np.int32]

    def __len__(self) -> int:
        """Examples."""
        return len(self.ids)

    def column(self, hazard: str) -> int:
        """Column of a hazard; a TrainingDataError names those there are."""
        if hazard not in self.hazards:
            raise TrainingDataError(
                f"no hazard {hazard!r} in the labels; there are {', '.join(self.hazards) or 'none'}"
            )
        return self.hazards.index(hazard)

    @property
    def example_of(self) -> NDArray[np.int64]:
        """Example of each row, [N]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @property
    def position(self) -> NDArray[np.int64]:
        """Position of each row in what was fed, [N]."""
        return np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], np.diff(self.starts))

    @property
    def in_response(self) -> NDArray[np.bool_]:
        """Whether each row is a token of the response, [N]."""
        after = self.position >= np.repeat(self.prompt_tokens, np.diff(self.starts))
        return after & ~self.special

    @property
    def response_tokens(self) -> NDArray[np.int64]:
        """Tokens of each response, the special ones left out, [E]."""
        return np.bincount(self.example_of[self.in_response], minlength=len(self))

    def rows(self, examples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of some of the examples, one example after the other."""
        chosen = np.asarray(examples, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(np.diff(self.starts)[chosen])])
        return _within(self.starts[chosen], ends)

    def select(self, examples: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the same for some of the examples, in the order given."""
        chosen = np.asarray(examples, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[chosen])])
        # Spans by example; those of one stay in their order.
        owner = np.searchsorted(self.starts, self.spans[:, 1], side="right") - 1
        order = np.argsort(owner, kind="stable")
        first = np.searchsorted(owner[order], chosen, side="left")
        count = np.searchsorted(owner[order], chosen, side="right") - first
        spans = self.spans[order[_within(first, np.concatenate([[0], np.cumsum(count)]))]]
        spans[:, 1:] += np.repeat(starts[:-1] - self.starts[chosen], count)[:, None]
        return type(self)(
            hazards=self.hazards,
            ids=tuple(self.ids[e] for e in chosen),
            groups=tuple(self.groups[e] for e in chosen),
            starts=starts,
            prompt_tokens=self.prompt_tokens[chosen],
            instruction_end=self.instruction_end[chosen],
            special=self.special[self.rows(chosen)],
            labels=self.labels[self.rows(chosen)],
            response_labels=self.response_labels[chosen],
            prompt_labels=self.prompt_labels[chosen],
            spans=spans,
            contrast=self.contrast[chosen],
        )


def _within(first: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each i in turn the numbers from ``first[i]``, ``ends[i + 1] - ends[i]`` of them."""
    counted: NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(first - ends[:-1], np.diff(ends))
    return counted


@dataclass(frozen=True)
class Chunk:
    """Whole examples with their residuals.

    Attributes
    ----------
    examples : int64 [n]
        Indices into the `Tokens` of the source.
    rows : int64 [m]
        Rows of these tokens, example by example.
    hidden : dict of Tap to fp32 Tensor [m, d]
    """

    examples: NDArray[np.int64]
    rows: NDArray[np.int64]
    hidden: dict[Tap, Tensor]


class Source(Protocol):
    """Residuals of labelled tokens: in memory, on disk, or computed as they are asked for."""

    @property
    def tokens(self) -> Tokens:
        """What is known about every row."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where the residuals were read."""

    @property
    def width(self) -> int:
        """``d``."""

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        """Every example once: in order, or shuffled by ``seed``. A chunk fits into memory."""


def gather(source: Source, rows: NDArray[np.bool_]) -> dict[Tap, Tensor]:
    """Read the residuals of the rows where ``rows`` [N] is true, in order: fp32 [n, d] per tap."""
    import torch

    place = np.cumsum(rows) - 1
    found = {tap: torch.empty(int(rows.sum()), source.width) for tap in source.taps}
    for chunk in source.chunks():
        wanted = rows[chunk.rows]
        to = torch.from_numpy(place[chunk.rows[wanted]])
        keep = torch.from_numpy(wanted)
        for tap in source.taps:
            found[tap][to] = chunk.hidden[tap][keep]
    return found
