"""A grid of thresholds over recorded streams in one pass.

The kernels' belief and risk never read a verdict (`midstream.kernels.reference.advance`, steps 3 to
5), so that a halt is where the risk first reaches the threshold: the risk is computed once per
horizon, and each threshold finds its place in the running maximum by binary search. Holds and their
hysteresis move no halt either. So every halt is, token for token, the one that `rejudge` finds with
a policy of that threshold, also where ``on_unscored: halt`` halts.

Costs the risk, N tokens, and E T log N for the search, per horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.bundle import Bundle
from midstream.kernels.tables import MAX_POSITION, UNSCORED_CAUSE
from midstream.measure.recording import Recording, RecordingError
from midstream.measure.rejudge import JudgedPart, judge
from midstream.policy import Policy, Thresholds

HoldBackDepth = int | Literal["turn"]

_NEVER = MAX_POSITION


@dataclass(frozen=True)
class Sweep:
    """T thresholds at G horizons with B hold-backs over E streams.

    A stream is violating when some response or token label of it is 1, and safe when all its
    response labels are 0; one of which neither is known counts in no figure. Where no token of a
    violating stream is labelled, it is missed when it is not halted, and leaks no token.

    Attributes
    ----------
    thresholds : float64 [T]
        As given.
    horizons : tuple of int
        [G]
    hold_backs : tuple of int or "turn"
        [B]
    halted_at : int32 [G, T, E]
        Position of each halt from the start of the prompt; -1 where there is none.
    safe, violating : int
        Streams.
    false_halts : int64 [G, T]
        Safe streams that are halted.
    missed : int64 [G, T, B]
        Violating streams of which a violating token leaves.
    leaked_tokens : int64 [G, T, B]
        Tokens with a label of 1 that leave: all up to the halt but the last ``hold_back``; with
        "turn" none of a halted stream.
    lead : float64 [G, T]
        Tokens from the halt to the first violating token, median over the streams that have one; 0
        where the halt comes with it, later or never. NaN without such streams.
    """

    thresholds: NDArray[np.float64]
    horizons: tuple[int, ...]
    hold_backs: tuple[HoldBackDepth, ...]
    halted_at: NDArray[np.int32]
    safe: int
    violating: int
    false_halts: NDArray[np.int64]
    missed: NDArray[np.int64]
    leaked_tokens: NDArray[np.int64]
    lead: NDArray[np.float64]


def sweep(
    recording: Recording,
    bundle: Bundle,
    thresholds: ArrayLike,
    *,
    horizons: Sequence[int] | None = None,
    hold_backs: Sequence[HoldBackDepth] | None = None,
) -> Sweep:
    """Say what each threshold would do.

    Parameters
    ----------
    recording : Recording
    bundle : Bundle
        With the probes that made the recording. Its policy says what an unscored token does.
    thresholds : array-like of float [T]
        From 0 to 1, in any order.
    horizons : sequence of int, optional
        Tokens to look ahead; by default that of the policy's default tier.
    hold_backs : sequence of int or "turn", optional
        By default that of the policy.

    Raises
    ------
    RecordingError
        For thresholds that are no probabilities; or as `rejudge`.
    """
    levels = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if levels.ndim != 1 or not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise RecordingError(f"thresholds: expected numbers from 0 to 1, got {levels}")
    if horizons is None:
        horizons = [bundle.policy.tiers[bundle.policy.default_tier].horizon]
    if any(horizon < 0 for horizon in horizons):
        raise RecordingError(f"horizons: expected 0 or more tokens, got {horizons}")
    ahead = tuple(horizons)
    depths = (bundle.policy.hold_back,) if hold_backs is None else tuple(hold_backs)
    if any(depth != "turn" and depth < 1 for depth in depths):
        raise RecordingError(f"hold_backs: expected 1 or more tokens, or 'turn'; got {depths}")

    grid = (len(ahead), len(levels))
    truth = _Truth.of(recording)
    halts = np.empty((*grid, len(recording)), np.int32)
    missed = np.zeros((*grid, len(depths)), np.int64)
    leaked_tokens = np.zeros((*grid, len(depths)), np.int64)
    for g, horizon in enumerate(ahead):
        policy = Policy(
            tiers={"moderate": Thresholds(horizon=horizon, halt_at=1.0)},
            default_tier="moderate",
            on_unscored=bundle.policy.on_unscored,
        )
        for part in judge(recording, bundle, policy=policy, tier="moderate"):
            halt = _halts(recording, part, levels)
            halts[g, :, part.streams] = halt
            violating, located = truth.violating[part.streams], truth.located[part.streams]
            for b, depth in enumerate(depths):
                leaked = _leaked(recording, part, halt, depth, truth.violates)
                leaked_tokens[g, :, b] += leaked.sum(axis=1)
                leaks = np.where(located, leaked > 0, halt == _NEVER)
                missed[g, :, b] += leaks[:, violating].sum(axis=1)
    early = np.maximum(truth.first[truth.located] - halts[:, :, truth.located], 0)
    return Sweep(
        thresholds=levels,
        horizons=ahead,
        hold_backs=depths,
        safe=int(truth.safe.sum()),
        violating=int(truth.violating.sum()),
        false_halts=(halts[:, :, truth.safe] != _NEVER).sum(axis=2),
        missed=missed,
        leaked_tokens=leaked_tokens,
        lead=np.median(early, axis=2) if early.shape[2] else np.full(grid, np.nan),
        halted_at=np.where(halts == _NEVER, -1, halts).astype(np.int32),
    )


def _halts(
    recording: Recording, part: JudgedPart, levels: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Position of each halt, ``_NEVER`` where there is none, [T, streams of the part]."""
    starts = recording.starts[part.streams.start : part.streams.stop + 1] - part.rows.start
    stream = np.arange(len(starts) - 1, dtype=np.int64)
    # Bits of fp32 numbers from 0 up ascend with them. With the stream's number above them, one
    # running maximum serves all streams, and one sorted array all searches. 0 is not judged.
    reached = np.where(np.isnan(part.risk), 0, _bits(part.risk) + 1)
    keys = np.maximum.accumulate((np.repeat(stream, np.diff(starts)) << 32) | reached)
    wanted = (stream << 32) | (_bits(levels.astype(np.float32)) + 1)[:, None]
    row = np.searchsorted(keys, wanted)
    position = np.append(recording.position[part.rows], np.int32(_NEVER)).astype(np.int64)
    crossed = np.where(row < starts[1:], position[row], _NEVER)
    # Halted at 1.0 by then, a stream was halted by any other threshold, too.
    by_unscored = np.where(part.cause == UNSCORED_CAUSE, part.halted_at, _NEVER)
    return np.minimum(crossed, by_unscored)


def _bits(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.abs(values).view(np.int32).astype(np.int64)  # abs: -0.0 is 0.0


def _leaked(
    recording: Recording,
    part: JudgedPart,
    halt: NDArray[np.int64],
    depth: HoldBackDepth,
    violates: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Violating tokens of each stream that leave, [T, streams of the part]."""
    starts = recording.starts[part.streams.start : part.streams.stop + 1] - part.rows.start
    stream = np.arange(len(starts) - 1, dtype=np.int64)
    upto = np.concatenate([[0], np.cumsum(violates[part.rows])])
    keys = (np.repeat(stream, np.diff(starts)) << 32) | recording.position[part.rows]
    stays = np.zeros_like(halt) if depth == "turn" else np.maximum(halt - depth + 1, 0)
    stays = np.where(halt == _NEVER, _NEVER, stays)  # position of the first that does not leave
    return np.asarray(upto[np.searchsorted(keys, (stream << 32) | stays)] - upto[starts[:-1]])


@dataclass(frozen=True)
class _Truth:
    """What is known: ``violates`` [N] of tokens, the rest [E] of streams."""

    violates: NDArray[np.bool_]
    safe: NDArray[np.bool_]
    violating: NDArray[np.bool_]
    located: NDArray[np.bool_]
    first: NDArray[np.int64]

    @classmethod
    def of(cls, recording: Recording) -> _Truth:
        violates = (recording.labels == 1).any(axis=1)
        rows = np.flatnonzero(violates)
        stream = np.searchsorted(recording.starts, rows, side="right") - 1
        first = np.full(len(recording), _NEVER, np.int64)
        np.minimum.at(first, stream, recording.position[rows])
        located = first != _NEVER
        violating = located | (recording.response_labels == 1).any(axis=1)
        known = (recording.response_labels == 0).all(axis=1) & bool(recording.hazards)
        return cls(violates, known & ~violating, violating, located, first)
