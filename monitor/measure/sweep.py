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
from midstream.kernels.tables import UNSCORED_CAUSE, Verdict
from midstream.measure.halting import NEVER
from midstream.measure.outcomes import Outcomes
from midstream.measure.recording import Judgement, Recording, RecordingError
from midstream.measure.rejudge import judge
from midstream.policy import Policy, Thresholds

HoldBackDepth = int | Literal["turn"]


@dataclass(frozen=True)
class Sweep:
    """T thresholds at G horizons with B hold-backs over E streams.

    Which streams are safe, violating, and located (it is known where they first violate) is said by
    `midstream.measure.outcomes.Outcomes`, for the hazards that the bundle looks for.

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
    safe, violating, located : int
        Streams.
    false_halts : int64 [G, T]
        Safe streams that are halted.
    caught : int64 [G, T]
        Violating streams that are halted.
    missed : int64 [G, T, B]
        Located streams of which a violating token leaves.
    leaked_tokens : int64 [G, T, B]
        Violating tokens that leave, under a policy that holds nothing for its risk.
    lead : float64 [G, T]
        Tokens from the halt to the first violating token, median over the located streams; 0 where
        the halt comes with it, later or never. NaN without such streams.
    """

    thresholds: NDArray[np.float64]
    horizons: tuple[int, ...]
    hold_backs: tuple[HoldBackDepth, ...]
    halted_at: NDArray[np.int32]
    safe: int
    violating: int
    located: int
    false_halts: NDArray[np.int64]
    caught: NDArray[np.int64]
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
        For thresholds that are no probabilities, negative horizons, hold-backs below 1; or as
        `rejudge`.
    MeasureError
        For labels that contradict each other.
    """
    levels = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if levels.ndim != 1 or not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise RecordingError(f"thresholds: expected numbers from 0 to 1, got {levels.tolist()}")
    if horizons is None:
        horizons = [bundle.policy.tiers[bundle.policy.default_tier].horizon]
    if not horizons or any(horizon < 0 for horizon in horizons):
        raise RecordingError(f"horizons: expected 0 or more tokens, got {list(horizons)}")
    depths = (bundle.policy.hold_back,) if hold_backs is None else tuple(hold_backs)
    if any(depth != "turn" and depth < 1 for depth in depths):
        raise RecordingError(f"hold_backs: expected 1 or more tokens, or 'turn'; got {depths}")

    streams, grid = len(recording), (len(horizons), len(levels))
    watched = [hazard for hazard in recording.hazards if hazard in bundle.bank.hazards]
    halts = np.empty((*grid, streams), np.int64)
    missed = np.zeros((*grid, len(depths)), np.int64)
    leaked_tokens = np.zeros((*grid, len(depths)), np.int64)
    safe, violating, located = np.zeros((3, streams), np.bool_)
    violates_at = np.zeros(streams, np.int64)
    for g, horizon in enumerate(horizons):
        policy = Policy(
            tiers={"moderate": Thresholds(horizon=horizon, halt_at=1.0)},
            default_tier="moderate",
            on_unscored=bundle.policy.on_unscored,
        )
        for judged in judge(recording, bundle, policy=policy, tier="moderate"):
            some = judged.streams
            part = _Part(recording.part(some), judged)
            truth = Outcomes.of(part.recording, judged, watched)
            halts[g, :, some] = halt = part.halts(levels)
            safe[some], violating[some] = truth.safe, truth.violating
            located[some] = truth.located
            violates_at[some] = truth.violates_at + recording.prompt_tokens[some]
            for b, depth in enumerate(depths):
                leaked = part.leaked(halt, depth, truth.label == 1)
                leaked_tokens[g, :, b] += leaked.sum(axis=1)
                missed[g, :, b] += (leaked[:, truth.located] > 0).sum(axis=1)
    early = np.maximum(violates_at[located] - halts[:, :, located], 0)
    return Sweep(
        thresholds=levels,
        horizons=tuple(horizons),
        hold_backs=depths,
        halted_at=np.where(halts == NEVER, -1, halts).astype(np.int32),
        safe=int(safe.sum()),
        violating=int(violating.sum()),
        located=int(located.sum()),
        false_halts=(halts[:, :, safe] != NEVER).sum(axis=2),
        caught=(halts[:, :, violating] != NEVER).sum(axis=2),
        missed=missed,
        leaked_tokens=leaked_tokens,
        lead=np.median(early, axis=2) if early.shape[2] else np.full(grid, np.nan),
    )


class _Part:
    """Streams of a recording, with their rows as sorted keys.

    A key has the number of the stream above, and below it what ascends inside the stream. So one
    running maximum serves all streams, and one sorted array all searches.
    """

    def __init__(self, recording: Recording, judged: Judgement) -> None:
        self.recording, self.judged = recording, judged
        self.starts = recording.starts
        self.stream = np.arange(len(recording), dtype=np.int64) << 32
        self.row_stream = np.repeat(self.stream, np.diff(self.starts))
        self.keys = self.row_stream | recording.position

    def halts(self, levels: NDArray[np.float64]) -> NDArray[np.int64]:
        """Position of the halt of each stream at each threshold, ``NEVER`` for none, [T, E]."""
        risk, position = self.judged.risk, self.recording.position
        reached = np.where(np.isnan(risk), 0, _bits(risk) + 1)
        peaks = np.maximum.accumulate(self.row_stream | reached)
        row = np.searchsorted(peaks, self.stream | (_bits(levels.astype(np.float32)) + 1)[:, None])
        where = np.append(position, np.int32(0)).astype(np.int64)[row]
        crossed = np.where(row < self.starts[1:], where, NEVER)
        # One that was halted for its risk of 1 by then is halted earlier by every threshold.
        unscored = self.judged.cause == UNSCORED_CAUSE
        return np.minimum(crossed, np.where(unscored, self.judged.halted_at, NEVER))

    def leaked(
        self, halt: NDArray[np.int64], depth: HoldBackDepth, violates: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Violating tokens that leave, [T, E], by the rule of `Outcomes.leaked`."""
        first, end = self.starts[:-1], self.starts[1:]
        allowed = self.judged.verdict == Verdict.CONTINUE
        newest = np.maximum.accumulate(
            self.row_stream | np.where(allowed, self.recording.position.astype(np.int64) + 1, 0)
        )
        newest = np.append(newest & 0xFFFFFFFF, 0) - 1  # position of the last CONTINUE so far
        before = np.searchsorted(self.keys, self.stream | halt)  # rows before the halt
        last_allowed = np.where(before > first, newest[before - 1], -1)
        last = np.append(self.recording.position, np.int32(-1))[end - 1]
        delivered = (halt == NEVER) & (last_allowed == np.where(end > first, last, -1))
        held_back = NEVER if depth == "turn" else depth
        stays = np.where(delivered, NEVER, np.maximum(last_allowed - held_back + 2, 0))
        upto = np.concatenate([[0], np.cumsum(violates)])
        return np.asarray(upto[np.searchsorted(self.keys, self.stream | stays)] - upto[first])


def _bits(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bits of numbers from 0 up, which ascend with them."""
    return np.abs(values).view(np.int32).astype(np.int64)  # abs: -0.0 is 0.0
