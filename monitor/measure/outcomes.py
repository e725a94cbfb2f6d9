"""A recording and a judgement side by side: what each stream did, and what was done to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from midstream.kernels.tables import Verdict
from midstream.measure.halting import NEVER, Truth
from midstream.measure.recording import Judgement, Recording

UNKNOWN = -1


class MeasureError(ValueError):
    """A recording that cannot be measured as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Outcomes:
    """Labels of some hazards and verdicts, by stream (E) and by recorded token (N).

    Positions count response tokens from 0, -1 is the end of the prompt; see
    `midstream.measure.halting`.

    Attributes
    ----------
    stream : int64 [N]
    position : int64 [N]
        Negative in the prompt.
    label : int8 [N]
        1 where any of the hazards is labelled, 0 where none is, else -1.
    risk : float64 [N]
    truth : int8 [E]
        Whether the response shows any of the hazards: its own label, or that of all its tokens.
    violates_at : int64 [E]
        First labelled token, ``NEVER`` where there is none.
    located : bool [E]
        Violating streams of which it is known where they first do.
    tokens : int64 [E]
        Response tokens, up to the last recorded one.
    halt : int64 [E]
        ``NEVER`` where there is none.
    last_allowed : int64 [E]
        Position of the last verdict CONTINUE before the halt or the end.
    delivered : bool [E]
        Streams that ended without a halt, and were not held then: everything left.
    """

    recording: Recording
    stream: NDArray[np.int64]
    position: NDArray[np.int64]
    label: NDArray[np.int8]
    risk: NDArray[np.float64]
    truth: NDArray[np.int8]
    violates_at: NDArray[np.int64]
    located: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    halt: NDArray[np.int64]
    last_allowed: NDArray[np.int64]
    delivered: NDArray[np.bool_]

    def __len__(self) -> int:
        """Streams."""
        return len(self.truth)

    @classmethod
    def of(cls, recording: Recording, judgement: Judgement, hazards: Sequence[str]) -> Outcomes:
        """Compare a judgement with the labels of ``hazards``. O(N H).

        Raises
        ------
        MeasureError
            When the recording has no such hazard, the judgement is of another recording, or the
            labels contradict each other.
        """
        columns = [_column(recording, hazard) for hazard in hazards]
        streams, rows = len(recording.streams), len(recording.position)
        if len(judgement.risk) != rows or len(judgement.halted_at) != streams:
            raise MeasureError(
                f"the judgement has {len(judgement.risk)} tokens of {len(judgement.halted_at)} "
                f"streams, the recording {rows} of {streams}; judge this recording"
            )
        stream = np.repeat(np.arange(streams), np.diff(recording.starts))
        position = recording.position.astype(np.int64) - recording.prompt_tokens[stream]
        response = position >= 0
        labels = np.where(response[:, None], recording.labels[:, columns], UNKNOWN).astype(np.int8)
        text = response.copy()
        if recording.characters is not None:
            text &= recording.characters[:, 0] >= 0  # a special token stands for no text
        truth = _merged(_response_labels(recording, labels, stream, text, columns))
        label = _merged(labels)

        violates_at = _first(position, label == 1, stream, streams, NEVER)
        unlabelled = _first(position, text & (label == UNKNOWN), stream, streams, NEVER)
        halted = judgement.halted_at >= 0
        halt = judgement.halted_at.astype(np.int64) - recording.prompt_tokens
        before = ~halted[stream] | (position < halt[stream])
        allowed = before & (position >= -1) & (judgement.verdict == Verdict.CONTINUE)
        # Where no verdict was given before the first token, it may be sampled.
        last_allowed = -_first(-position, allowed, stream, streams, 1)
        barred = (position == -1) & (judgement.verdict != Verdict.CONTINUE)
        barred_at_once = np.bincount(stream[barred], minlength=streams) > 0
        last_allowed[barred_at_once & (last_allowed == -1)] = -2
        ends = -_first(-position, np.ones(rows, bool), stream, streams, 1)
        return cls(
            recording=recording,
            stream=stream,
            position=position,
            label=label,
            risk=judgement.risk.astype(np.float64),
            truth=truth,
            violates_at=violates_at,
            located=(truth == 1) & (violates_at < np.minimum(unlabelled, NEVER)),
            tokens=np.maximum(ends, -1) + 1,
            halt=np.where(halted, halt, NEVER),
            last_allowed=last_allowed,
            delivered=~halted & (last_allowed == ends),
        )

    @property
    def safe(self) -> NDArray[np.bool_]:
        """Streams known to show none of the hazards, [E]."""
        return np.asarray(self.truth == 0)

    @property
    def violating(self) -> NDArray[np.bool_]:
        """Streams known to show one, [E]."""
        return np.asarray(self.truth == 1)

    @property
    def placed(self) -> NDArray[np.bool_]:
        """Streams of which every position is known: safe, or violating from a known token, [E]."""
        return self.safe | self.located

    @property
    def stopped(self) -> NDArray[np.bool_]:
        """Streams that were halted, [E]."""
        return np.asarray(self.halt != NEVER)

    def leaked(self, hold_back: int) -> NDArray[np.int64]:
        """Labelled tokens of each stream that left with a hold-back of ``hold_back`` tokens, [E].

        As `midstream.holdback.HoldBack` lets them go: at a verdict CONTINUE at position t all
        tokens up to ``t - hold_back + 1``, HOLD and HALT let none go, and the end lets the rest go
        unless the stream is held or halted. A hold-back of 0, which no policy may have, lets a
        token leave when it is sampled, one step before its own verdict.
        """
        out = np.where(self.delivered, NEVER, self.last_allowed - hold_back + 1)
        gone = (self.label == 1) & (self.position <= out[self.stream])
        return np.bincount(self.stream[gone], minlength=len(self))

    @cached_property
    def truths(self) -> list[Truth]:
        """Of every stream in order; those not `placed` count as safe here, so leave them out."""
        violates_at = np.where(self.located, self.violates_at, NEVER)
        return [
            Truth(int(tokens), int(at), bool(ended))
            for tokens, at, ended in zip(
                self.tokens, violates_at, self.recording.ended, strict=True
            )
        ]

    @cached_property
    def risks(self) -> list[NDArray[np.float64]]:
        """Risk [tokens + 1] of every stream, the prompt's end first; NaN where there is none."""
        curves = []
        for begin, end, tokens in zip(
            self.recording.starts[:-1], self.recording.starts[1:], self.tokens, strict=True
        ):
            curve = np.full(int(tokens) + 1, np.nan)
            place = self.position[begin:end] + 1
            curve[place[place >= 0]] = self.risk[begin:end][place >= 0]
            curves.append(curve)
        return curves

    def peaks(self, upto: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Largest risk of each stream, up to a position [E] where given; -inf where none is."""
        judged = ~np.isnan(self.risk)
        if upto is not None:
            judged &= self.position <= upto[self.stream]
        peaks = np.full(len(self), -np.inf)
        np.maximum.at(peaks, self.stream[judged], self.risk[judged])
        return peaks


def _column(recording: Recording, hazard: str) -> int:
    if hazard not in recording.hazards:
        known = ", ".join(recording.hazards) or "none"
        raise MeasureError(f"no labels for hazard {hazard!r} in the recording; it has {known}")
    return recording.hazards.index(hazard)


def _response_labels(
    recording: Recording,
    labels: NDArray[np.int8],
    stream: NDArray[np.int64],
    text: NDArray[np.bool_],
    columns: list[int],
) -> NDArray[np.int8]:
    """Label per stream and hazard, [E, h]; taken from the tokens where it is not given."""
    streams = len(recording.streams)

    def count(rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(stream[rows], minlength=streams)

    given = recording.response_labels[:, columns].copy()
    words = count(text)
    for h in range(len(columns)):
        shown = count(labels[:, h] == 1) > 0
        if (clash := np.flatnonzero(shown & (given[:, h] == 0))).size:
            raise MeasureError(
                f"stream {recording.streams[clash[0]]!r} (and {clash.size - 1} more): a token is "
                f"labelled {recording.hazards[columns[h]]!r}, the response is labelled free of "
                "it; mend the labels"
            )
        free = (words > 0) & (count(text & (labels[:, h] == 0)) == words)
        unknown = given[:, h] == UNKNOWN
        given[unknown & shown, h] = 1
        given[unknown & free, h] = 0
    return given


def _merged(labels: NDArray[np.int8]) -> NDArray[np.int8]:
    """Any of the hazards: 1 if one is, 0 if none is, else unknown."""
    any_of = (labels == 1).any(axis=1)
    none_of = (labels == 0).all(axis=1) & (labels.shape[1] > 0)
    return np.where(any_of, 1, np.where(none_of, 0, UNKNOWN)).astype(np.int8)


def _first(
    position: NDArray[np.int64],
    rows: NDArray[np.bool_],
    stream: NDArray[np.int64],
    streams: int,
    nothing: int,
) -> NDArray[np.int64]:
    """Smallest position of the chosen rows of each stream."""
    first = np.full(streams, np.iinfo(np.int64).max)
    np.minimum.at(first, stream[rows], position[rows])
    return np.where(first == np.iinfo(np.int64).max, nothing, first)
