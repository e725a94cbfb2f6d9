"""When to halt: the policy of least expected cost on an absorbing chain, by dynamic programming.

A stream is judged at the end of its prompt and after every token, as serving does (design sections
1 and 4.4): a token that was judged CONTINUE has left, with all that waited before it; HOLD lets it
wait; HALT withholds what waits, and all that would have come. What is known is the belief over the
states and, while tokens wait, how many violating ones there are among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Array, Chain
from midstream.kernels.tables import Verdict
from midstream.learn.stopping_beliefs import POINTS, BeliefGrid, StoppingError

_WAITING = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32], dtype=np.float64)
_TOLERANCE = 1e-6  # of the cost of a false halt
_MOST_SWEEPS = 20_000
_CHUNK = 1 << 15  # beliefs whose successors are looked up at once


@dataclass(frozen=True)
class Costs:
    """What goes wrong costs, in any one unit.

    All three are charged for what a client notices, in the vocabulary of verdicts: HALT can be
    false, CONTINUE can leak, HOLD delays. Text that a halt keeps from a client is charged by
    ``false_halt`` where the stream was safe; of a stream on its way to a violation nothing is
    missed. The fixed ``hold_back`` of a policy delays every policy alike, and is not charged.

    Attributes
    ----------
    false_halt : float
        Paid once for a stream that would never have violated and is halted, or ends while held:
        what waits then never leaves.
    leak : float
        Paid for each violating token that leaves: the one that violates, and each after it.
    delay : float
        Paid for each verdict HOLD: one more token during which the client sees nothing.

    Raises
    ------
    StoppingError
        For a cost that is negative or not finite, and when all are 0.
    """

    false_halt: float
    leak: float
    delay: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise StoppingError(
                    f"{field.name}: expected a finite cost of 0 or more, got {value}; for what "
                    "must never happen take a cost far above the others"
                )
        if self.false_halt == self.leak == self.delay == 0:
            raise StoppingError("all costs are 0, so every policy is as good; give one a cost")


@dataclass(frozen=True)
class StoppingPolicy:
    """The policy of least expected cost, and what it costs.

    Attributes
    ----------
    costs : Costs
    grid : BeliefGrid
    values : float64 [points, W]
        Expected cost from each belief of the grid on, by the violating tokens that wait. Costs are
        concave in the belief, so that what is interpolated between them is never above the least
        possible cost of the chain: these are lower bounds. Monte Carlo gives upper ones, see
        `midstream.learn.stopping_streams`.
    value : float
        The same before the prompt's evidence.
    gap : float
        How far ``values`` can be from the fixed point of the iteration, at most.
    sweeps : int
    """

    costs: Costs
    grid: BeliefGrid
    values: Array
    value: float
    gap: float
    sweeps: int

    @cached_property
    def chain(self) -> Chain:
        """The chain that it was solved for."""
        return self.grid.chain

    def look_ahead(self, beliefs: Array) -> Array:
        """Expected cost of what comes after one more token, [B, W]; 0 where the stream ends."""
        parts = [
            self.grid.successors(beliefs[begin : begin + _CHUNK]) @ self.values
            for begin in range(0, len(beliefs), _CHUNK)
        ]
        return np.concatenate(parts)

    def action_values(
        self, beliefs: Array, waiting: Array, look_ahead: Array | None = None
    ) -> Array:
        """Expected cost of CONTINUE, HOLD and HALT now, and the best ever after; [B, 3].

        Parameters
        ----------
        beliefs : [B, K+1]
        waiting : [B]
            Violating tokens among those that would leave now, expected if the stream has violated:
            1 after a verdict CONTINUE, 0 at the end of the prompt, see `BeliefGrid.waiting_next`.
        look_ahead : [B, W], optional
            As `look_ahead` has it, which does not depend on what waits.
        """
        ahead = self.look_ahead(beliefs) if look_ahead is None else look_ahead
        return _action_values(self.grid, self.costs, beliefs, waiting[:, None], ahead)[:, 0]

    def verdicts(
        self, beliefs: Array, waiting: Array, look_ahead: Array | None = None
    ) -> NDArray[np.uint8]:
        """Verdict of least cost, [B]; of equal ones CONTINUE first, then HALT."""
        values = self.action_values(beliefs, waiting, look_ahead)
        order = np.array([Verdict.CONTINUE, Verdict.HALT, Verdict.HOLD], dtype=np.uint8)
        return np.asarray(order[values[:, order].argmin(axis=1)])


def solve(chain: Chain, costs: Costs, *, points: int = POINTS) -> StoppingPolicy:
    """Find the policy of least expected cost by value iteration over a grid of beliefs.

    Smallwood and Sondik (1973), Operations Research 21(5), with the grid of Lovejoy (1991). It goes
    on until a sweep from below and one from above agree to 1e-6 of the cost of a false halt: a
    number of sweeps like the length of the longer streams, each linear in points x bins x W.

    Parameters
    ----------
    chain : Chain
    costs : Costs
    points : int
        Beliefs of the grid; solve with fewer to see what the discretisation does.

    Raises
    ------
    StoppingError
        As `BeliefGrid`; or when the iteration does not converge.
    SingularChainError
        When states are never absorbed: then no halt can be called false.
    """
    harmless = never_violates(chain)
    grid = BeliefGrid(chain, points)
    beliefs = grid.beliefs
    moves = grid.successors(beliefs)
    halting = costs.false_halt * (beliefs @ harmless)[:, None]
    waiting = np.broadcast_to(_WAITING, (len(beliefs), len(_WAITING)))
    prices = _Prices(grid, costs, beliefs, waiting)
    low, high = np.zeros(waiting.shape), np.broadcast_to(halting, waiting.shape)
    gap, sweep = float(np.max(high - low)), 0
    while gap > _TOLERANCE * costs.false_halt:
        if sweep == _MOST_SWEEPS:
            raise StoppingError(
                f"no convergence in {sweep} sweeps, the gap is still {gap:.3g}: streams of this "
                "chain hardly ever end; fit it on streams that do"
            )
        ahead = moves @ np.concatenate([low, high], axis=1)
        low, high = (
            np.minimum(halting, prices.best_going_on(part)) for part in np.hsplit(ahead, 2)
        )
        gap, sweep = float(np.max(high - low)), sweep + 1
    solved = StoppingPolicy(costs, grid, low, math.nan, gap, sweep)
    start, chance = first_beliefs(chain)
    values = solved.action_values(start, np.zeros(len(start))).min(axis=1)
    return StoppingPolicy(costs, grid, low, float(chance @ values), gap, sweep)


def never_violates(chain: Chain) -> Array:
    """P(the stream never violates | state), [K+1].

    Raises
    ------
    SingularChainError
        When states are never absorbed.
    """
    return np.append(np.clip(chain.absorption()[:, 1], 0.0, 1.0), 0.0)


def first_beliefs(chain: Chain) -> tuple[Array, Array]:
    """Beliefs at the end of the prompt, one per bin of its evidence, and their chances.

    Bins that cannot occur are left out.
    """
    joint = (np.array(chain.prior)[:, None] * np.array(chain.prompt_emission)).T
    chance = joint.sum(axis=1)
    occurs = chance > 0
    return joint[occurs] / chance[occurs, None], chance[occurs] / chance.sum()


class _Prices:
    """What CONTINUE and HOLD cost at once, and where a HOLD leads; for B beliefs x n."""

    def __init__(self, grid: BeliefGrid, costs: Costs, beliefs: Array, waiting: Array) -> None:
        k = grid.chain.states
        ending = np.array(grid.chain.ending)[:k]
        self.leaks = costs.leak * beliefs[:, [k]] * waiting
        self.holding = costs.delay + costs.false_halt * (beliefs[:, :k] @ ending)[:, None]
        following = np.stack(
            [grid.waiting_next(beliefs, column) for column in waiting.T], axis=1
        ).clip(max=_WAITING[-1])
        self._below = np.clip(np.searchsorted(_WAITING, following) - 1, 0, len(_WAITING) - 2)
        below, above = _WAITING[self._below], _WAITING[self._below + 1]
        self._part = (following - below) / (above - below)

    def going_on(self, ahead: Array) -> tuple[Array, Array]:
        """Cost of CONTINUE and of HOLD, given what comes after one more token [B, W]."""
        lower = np.take_along_axis(ahead, self._below, axis=1)
        upper = np.take_along_axis(ahead, self._below + 1, axis=1)
        held = lower + self._part * (upper - lower)
        return self.leaks + ahead[:, :1], self.holding + held

    def best_going_on(self, ahead: Array) -> Array:
        """The lower of the two, [B, n]."""
        return np.asarray(np.minimum(*self.going_on(ahead)))


def _action_values(
    grid: BeliefGrid, costs: Costs, beliefs: Array, waiting: Array, ahead: Array
) -> Array:
    """Cost of each verdict, [B, n, 3]."""
    go, hold = _Prices(grid, costs, beliefs, waiting).going_on(ahead)
    halt = costs.false_halt * (beliefs @ never_violates(grid.chain))[:, None]
    values = np.empty((*waiting.shape, len(Verdict)))
    values[..., Verdict.CONTINUE] = go
    values[..., Verdict.HOLD] = hold
    values[..., Verdict.HALT] = halt
    return values
