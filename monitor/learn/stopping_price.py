"""What verdicts cost on streams whose end is known, and the thresholds that cost least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Array, Chain
from midstream.kernels.tables import Verdict
from midstream.learn.stopping import Costs, StoppingPolicy
from midstream.learn.stopping_streams import UNSCORED, Stakes, Streams
from midstream.policy import Thresholds

Verdicts = NDArray[np.uint8]

HORIZONS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Tokens to look ahead that are tried."""

_LEVELS = 200
_HOLD_LEVELS = 40
_HORIZONS_WITH_HOLD = 3


@dataclass(frozen=True)
class Price:
    """What verdicts did to E streams; the terms of `midstream.learn.stopping.Costs`.

    Attributes
    ----------
    halted : bool [E]
        By a verdict HALT, or held when it ended.
    false_halt : float64 [E]
        Whether it was, and would never have violated; or the chance of it.
    leaked : float64 [E]
        Violating tokens that left, or how many are expected to.
    held : int64 [E]
        Verdicts HOLD before the halt or the end.
    """

    halted: NDArray[np.bool_]
    false_halt: Array
    leaked: Array
    held: NDArray[np.int64]

    @classmethod
    def of(cls, streams: Streams, stakes: Stakes, verdicts: Verdicts) -> Price:
        """Obey verdicts [N] as `midstream.holdback.HoldBack` does with a hold-back of 1. O(N)."""
        begin, end, rows = streams.starts[:-1], streams.starts[1:], np.arange(len(verdicts))
        halt = np.minimum.reduceat(np.where(verdicts == Verdict.HALT, rows, len(rows)), begin)
        before = rows < np.repeat(halt, np.diff(streams.starts))
        holds = before & (verdicts == Verdict.HOLD)
        leaves = np.where(before & ~holds, _waiting(streams, stakes, holds) * stakes.violated, 0.0)
        by_halt, by_end = halt < end, (halt >= end) & holds[end - 1]
        return cls(
            halted=by_halt | by_end,
            false_halt=np.where(by_halt, stakes.harmless[np.minimum(halt, end - 1)], 0.0)
            + np.where(by_end, stakes.harmless_end[end - 1], 0.0),
            leaked=np.add.reduceat(leaves, begin),
            held=np.add.reduceat(holds.astype(np.int64), begin),
        )

    def cost(self, costs: Costs) -> Array:
        """Cost of each stream, [E]."""
        return (
            costs.false_halt * self.false_halt + costs.leak * self.leaked + costs.delay * self.held
        )


def _waiting(streams: Streams, stakes: Stakes, holds: NDArray[np.bool_]) -> Array:
    """Violating tokens that would leave at each row, if it is violated; [N]."""
    rows = np.arange(len(holds))
    let_go = np.maximum.accumulate(np.where(~holds | streams.first_rows, rows, -1))
    held_for = np.append(0, (rows - let_go)[:-1] + holds[:-1])  # rows held just before this one
    held_for[streams.starts[:-1]] = 0
    waiting = np.ones(len(holds))
    waiting[streams.starts[:-1]] = 0.0
    after = np.flatnonzero(held_for)
    after = after[np.argsort(held_for[after], kind="stable")]
    for run in np.split(after, np.flatnonzero(np.diff(held_for[after])) + 1):
        waiting[run] = 1.0 + stakes.stays[run - 1] * waiting[run - 1]
    return waiting


def policy_verdicts(policy: StoppingPolicy, streams: Streams, beliefs: Array) -> Verdicts:
    """Verdicts [N] of the optimal policy along streams. O(N O) for O bins.

    A token without evidence waits; the verdict on a prompt without evidence is CONTINUE.
    """
    ahead = policy.look_ahead(beliefs)
    verdicts = np.empty(len(beliefs), np.uint8)
    order = np.argsort(-streams.tokens, kind="stable")
    lengths = streams.tokens[order]
    waiting = np.zeros(len(order))
    for token in range(-1, int(lengths[0])):
        rows = streams.starts[order[lengths > token]] + token + 1
        waiting = waiting[: len(rows)]
        belief = beliefs[rows]
        now = policy.verdicts(belief, waiting, ahead[rows])
        unscored = Verdict.CONTINUE if token < 0 else Verdict.HOLD
        verdicts[rows] = now = np.where(streams.bins[rows] == UNSCORED, unscored, now)
        stays = policy.grid.waiting_next(belief, waiting)
        waiting = np.where(now == Verdict.CONTINUE, 1.0, stays)
    return verdicts


def threshold_verdicts(streams: Streams, risk: Array, thresholds: Thresholds) -> Verdicts:
    """Verdicts [N] of thresholds on a risk [N], hysteresis included.

    Without evidence as `policy_verdicts`, which is what ``on_unscored: hold`` does.
    """
    halt_at, hold_at, release_at = thresholds.levels
    first = streams.first_rows
    unscored = streams.bins == UNSCORED
    sets = (risk >= hold_at) | (unscored & ~first)
    # between the two levels a stream stays as it was when the risk was last outside of them
    decides = sets | (risk < release_at) | first
    held = sets[np.maximum.accumulate(np.where(decides, np.arange(len(risk)), 0))]
    verdicts = np.where(held, Verdict.HOLD, Verdict.CONTINUE)
    return np.where((risk >= halt_at) & ~unscored, Verdict.HALT, verdicts).astype(np.uint8)


@dataclass(frozen=True)
class Choice:
    """The cheapest thresholds on some streams.

    Attributes
    ----------
    thresholds : Thresholds
    cost : float
        Per stream, on those that they were chosen on.
    halting_only : Thresholds
        The cheapest of those that never hold.
    levels : float64 [L]
        Values of ``halt_at``, ascending.
    sweep : dict of horizon to float64 [L]
        Cost of each without HOLD.
    """

    thresholds: Thresholds
    cost: float
    halting_only: Thresholds
    levels: Array
    sweep: dict[int, Array]


def risks(chain: Chain, beliefs: Array, horizons: Sequence[int] = HORIZONS) -> dict[int, Array]:
    """Risk [N] at each horizon."""
    return {horizon: beliefs @ chain.horizon(horizon) for horizon in sorted(set(horizons))}


def choose_thresholds(
    streams: Streams, stakes: Stakes, risk: Mapping[int, Array], costs: Costs
) -> Choice:
    """Find the horizon and the levels that cost least on these streams.

    ``halt_at`` alone is swept over some 200 levels at every horizon. At the three best of these
    ``hold_at`` and ``halt_at`` then move in turn, which finds no worse a pair but not always the
    best. Linear in tokens, some 400 passes over them.
    """
    levels = _levels(streams, risk)
    sweep, best = {}, []
    for horizon, curve in risk.items():
        sweep[horizon] = costs_of_halting(streams, stakes, curve, levels, costs)
        halt_at = float(levels[_last_best(sweep[horizon])])
        only = Thresholds(horizon=horizon, halt_at=halt_at)
        best.append((float(sweep[horizon].min()), only))
    halting_only = min(best, key=_cost)[1]
    for cost, thresholds in sorted(best, key=_cost)[:_HORIZONS_WITH_HOLD]:
        curve = risk[thresholds.horizon]
        best.append(_with_hold(streams, stakes, curve, costs, levels, cost, thresholds))
    cost, thresholds = min(best, key=_cost)
    return Choice(thresholds, cost, halting_only, levels, sweep)


def costs_of_halting(
    streams: Streams, stakes: Stakes, risk: Array, levels: Array, costs: Costs
) -> Array:
    """Mean cost of halting at each level, and never holding, [L]. O(N log N + L E log N)."""
    values, rank = np.unique(risk, return_inverse=True)
    stream = np.arange(len(streams)) * (len(values) + 1)
    # ranks of one stream lie below those of the next, so one running maximum serves them all
    ranks = np.where(streams.bins == UNSCORED, 0, rank + 1)
    peaks = np.maximum.accumulate(ranks + np.repeat(stream, np.diff(streams.starts)))
    begin, end = streams.starts[:-1], streams.starts[1:]
    leaves = np.where(streams.first_rows, 0.0, stakes.violated)
    leaked = np.append(0.0, leaves.cumsum())
    found = np.empty(len(levels))
    for at, level in enumerate(levels):
        reached = stream + np.searchsorted(values, level) + 1
        halt = np.minimum(np.searchsorted(peaks, reached), end)
        false = stakes.harmless[halt[halt < end]].sum()
        left = (leaked[halt] - leaked[begin]).sum()
        found[at] = (costs.false_halt * false + costs.leak * left) / len(streams)
    return found


def _with_hold(
    streams: Streams,
    stakes: Stakes,
    risk: Array,
    costs: Costs,
    levels: Array,
    cost: float,
    thresholds: Thresholds,
) -> tuple[float, Thresholds]:
    """Hold at what halted, and halt above; then move either level in turn, where that pays."""
    some = levels[:: max(1, len(levels) // _HOLD_LEVELS)]
    horizon, halted_at = thresholds.horizon, thresholds.halt_at
    for moves in ("halt_at", "hold_at", "halt_at", "hold_at"):
        for level in some.tolist():
            halt_at = level if moves == "halt_at" else thresholds.halt_at
            hold_at = level if moves == "hold_at" else thresholds.hold_at or halted_at
            if hold_at >= halt_at:
                continue
            tried = Thresholds(horizon=horizon, halt_at=halt_at, hold_at=hold_at)
            price = Price.of(streams, stakes, threshold_verdicts(streams, risk, tried))
            now = float(price.cost(costs).mean())
            if now < cost:
                cost, thresholds = now, tried
    return cost, thresholds


def _levels(streams: Streams, risk: Mapping[int, Array]) -> Array:
    """Levels that part the streams: quantiles of their peaks, and of all risks; and 1."""
    parts: list[Array] = [np.ones(1)]
    share = np.linspace(0.0, 1.0, max(2, _LEVELS // (2 * len(risk))))
    for curve in risk.values():
        peaks = np.maximum.reduceat(curve, streams.starts[:-1])
        parts += [np.quantile(peaks, share), np.quantile(curve, share)]
    # what is written down is what was tried; at 0 the prompt itself would halt every stream
    some = np.unique(np.clip(np.concatenate(parts), 1e-9, 1.0)).tolist()
    return np.unique([float(f"{level:.4g}") for level in some])


def _last_best(costs: Array) -> int:
    """Highest of the levels that cost least: what halts the fewest streams."""
    return len(costs) - 1 - int(np.argmin(costs[::-1]))


def _cost(pair: tuple[float, Thresholds]) -> float:
    return pair[0]
