"""What a method learns from: a token, the mean of a response, or the last token of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Evidence, Last, Mean
from midstream.learn.examples import Level
from midstream.learn.methods.checks import labels_of, require_finite
from midstream.learn.tokens import UNKNOWN, Chunk, Source, Tokens, TrainingDataError
from midstream.probe import Reads
from midstream.taps import Tap

RESPONSE_WINDOW = 32
"""Tokens over which a response's logits are averaged at serving time: as many as HARC pools."""

SERVED: dict[Level, tuple[Reads, Evidence]] = {
    "token": ("response", Last()),
    # A linear read-out of a mean is the mean of the read-outs.
    "response": ("response", Mean(window=RESPONSE_WINDOW)),
    "prompt": ("prompt", Last()),
}
"""Which tokens the probe reads that was trained on labels of a level, and its evidence rule."""


@dataclass(frozen=True)
class Units:
    """n vectors with a class each, every one the mean of some rows of one example.

    Attributes
    ----------
    of_row : int64 [N]
        Unit of each row; -1 where the row is not read.
    classes : int64 [n]
    """

    of_row: NDArray[np.int64]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        """Units."""
        return len(self.classes)


def units_of(method: str, tokens: Tokens, hazard: str, level: Level) -> Units:
    """Units of one hazard with classes 0 and 1: all whose label of this level is known.

    Raises
    ------
    TrainingDataError
        As `labels_of`; also when a labelled response or prompt has no token.
    """
    labels = labels_of(method, tokens, hazard, level)
    known = labels != UNKNOWN
    if level == "token":
        of_row = np.where(known, np.cumsum(known) - 1, -1)
    elif level == "response":
        of_row = of_examples(method, tokens, known, response_rows(tokens), "response")
    else:
        of_row = of_examples(method, tokens, known, prompt_end_rows(tokens), "prompt")
    return Units(of_row, labels[known].astype(np.int64))


def of_examples(
    method: str,
    tokens: Tokens,
    wanted: NDArray[np.bool_],
    rows: NDArray[np.bool_],
    what: str,
) -> NDArray[np.int64]:
    """Unit of each row where every wanted example [E] is one: the mean of its chosen rows [N].

    A TrainingDataError names the first wanted example without such a row; ``what`` it should have.
    """
    example = tokens.example_of
    empty = wanted & (np.bincount(example[rows], minlength=len(tokens)) == 0)
    if empty.any():
        raise TrainingDataError(
            f"{method}: {int(empty.sum())} labelled examples have no {what} token, first "
            f"{tokens.ids[int(np.argmax(empty))]!r}; take their {what} label away or give the text"
        )
    unit = np.where(wanted, np.cumsum(wanted) - 1, -1)
    return np.where(rows, unit[example], -1)


def response_rows(tokens: Tokens, first: int | None = None) -> NDArray[np.bool_]:
    """Rows [N] of the responses; of each the ``first`` tokens, if given."""
    if first is None:
        return tokens.in_response
    end = np.repeat(tokens.prompt_tokens + first, np.diff(tokens.starts))
    return tokens.in_response & (tokens.position < end)


def prompt_end_rows(tokens: Tokens) -> NDArray[np.bool_]:
    """Rows [N] of the last prompt token, t_post, where the monitor reads prompt probes."""
    return _at(tokens, tokens.prompt_tokens - 1)


def instruction_end_rows(tokens: Tokens) -> NDArray[np.bool_]:
    """Rows [N] of the last instruction token, t_inst."""
    return _at(tokens, tokens.instruction_end)


def _at(tokens: Tokens, positions: NDArray[np.int32]) -> NDArray[np.bool_]:
    rows = np.zeros(tokens.starts[-1], dtype=np.bool_)
    inside = (positions >= 0) & (positions < np.diff(tokens.starts))
    rows[(tokens.starts[:-1] + positions)[inside]] = True
    return rows


def read(
    method: str, tokens: Tokens, chunk: Chunk, units: Units
) -> tuple[NDArray[np.int64], dict[Tap, Tensor]]:
    """Units of a chunk, int64 [u], and their vectors, fp32 [u, d] per tap.

    Raises
    ------
    TrainingDataError
        When a residual that is read is not finite.
    """
    of_row = units.of_row[chunk.rows]
    inside = of_row >= 0
    found, place, rows = np.unique(of_row[inside], return_inverse=True, return_counts=True)
    keep = torch.from_numpy(np.flatnonzero(inside))
    vectors = {}
    for tap, hidden in chunk.hidden.items():
        values = hidden[keep]
        require_finite(method, tokens, tap, chunk.rows[inside], values)
        if len(found) == len(values):  # one row each, and the rows of a chunk may be in any order
            vectors[tap] = values[torch.from_numpy(np.argsort(place))]
        else:
            sums = torch.zeros(len(found), values.shape[1], dtype=torch.float64)
            sums.index_add_(0, torch.from_numpy(place), values.double())
            vectors[tap] = (sums / torch.from_numpy(rows)[:, None]).float()
    return found, vectors


def gather_units(method: str, source: Source, *wanted: Units) -> list[dict[Tap, Tensor]]:
    """Read the vectors of units, of one kind or several, at every tap: fp32 [n, d].

    One pass; ``4 n d`` bytes a tap.
    """
    found = [{tap: torch.empty(len(u), source.width) for tap in source.taps} for u in wanted]
    for chunk in source.chunks():
        for units, into in zip(wanted, found, strict=True):
            which, vectors = read(method, source.tokens, chunk, units)
            to = torch.from_numpy(which)
            for tap, values in vectors.items():
                into[tap][to] = values
    return found
