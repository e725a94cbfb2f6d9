"""Grids on the simplex of beliefs, and piecewise linear interpolation between their points.

Freudenthal's triangulation, as Lovejoy (1991), Operations Research 39(1), lays it over beliefs:
any belief is a convex combination of at most n grid points, found by one sort. Between two
states alone the points can stand closer at the ends, where costs bend. A concave function that is
interpolated so is never overestimated, whence the bounds of `midstream.learn.stopping`.
"""

from __future__ import annotations

from functools import cached_property
from itertools import combinations_with_replacement
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class SimplexGrid:
    """Beliefs over n states whose entries are multiples of 1/M.

    Parameters
    ----------
    states : int
        n, at least 1.
    steps : int
        M, at least 1; there are C(M + n - 1, n - 1) points.
    """

    def __init__(self, states: int, steps: int) -> None:
        if states < 1 or steps < 1:
            raise ValueError(f"grid: {states} states, {steps} steps; needs 1 or more of each")
        self.states, self.steps = states, steps
        # C(a, b) for the rank of a point in the combinatorial number system
        self._choose = np.array(
            [[comb(a, b) for b in range(states)] for a in range(steps + states)], np.int64
        )

    def __len__(self) -> int:
        """Points."""
        return comb(self.steps + self.states - 1, self.states - 1)

    @cached_property
    def points(self) -> Floats:
        """All beliefs, [points, n], in the order that `weights` counts them."""
        tails = np.array(
            list(combinations_with_replacement(range(self.steps + 1), self.states - 1)), np.int64
        ).reshape(len(self), self.states - 1)[:, ::-1]
        tails = tails[np.argsort(self._rank(tails))]
        ends = np.zeros((len(self), 1), np.int64)
        sums = np.concatenate([ends + self.steps, tails, ends], axis=1)
        return -np.diff(sums, axis=1) / self.steps

    def weights(self, beliefs: Floats) -> tuple[Ints, Floats]:
        """Grid points around each belief and their barycentric weights, both [B, n].

        O(n log n) each; some weights are 0.

        Parameters
        ----------
        beliefs : [B, n]
            Rows that sum to one.
        """
        # x_i = M (pi_i + ... + pi_n) descends from M; x_1 = M is the same for all.
        x = self.steps * beliefs[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        x = np.minimum.accumulate(np.clip(x, 0.0, self.steps), axis=1)
        corner = np.floor(x)
        rest = x - corner
        order = np.argsort(-rest, axis=1, kind="stable")  # ties in order, so that corners descend
        sorted_rest = np.take_along_axis(rest, order, axis=1)
        ones, zeros = np.ones((len(x), 1)), np.zeros((len(x), 1))
        weights = -np.diff(np.concatenate([ones, sorted_rest, zeros], axis=1), axis=1)
        corners = np.repeat(corner.astype(np.int64)[:, None], self.states, axis=1)
        for k in range(1, self.states):
            corners[np.arange(len(x))[:, None], np.arange(k, self.states), order[:, [k - 1]]] += 1
        # one of weight 0 may lie a step outside
        return self._rank(np.minimum(corners, self.steps)), weights

    def _rank(self, sums: Ints) -> Ints:
        """Number of a point, given x_2 >= ... >= x_n as [..., n - 1]."""
        place = np.arange(self.states - 1, 0, -1)
        return np.asarray(self._choose[sums + place - 1, place].sum(axis=-1), dtype=np.int64)


class EdgeGrid:
    """Beliefs over two states, the closer the nearer they are to certainty.

    Where a rare violation shows at once the belief in it is of order 1e-3 and less, and that is
    where halting begins: even steps need 100 times as many points there.

    Parameters
    ----------
    points : int
        At least 2.
    """

    states = 2

    def __init__(self, points: int) -> None:
        even = np.linspace(0.0, 1.0, points)
        self._second = even**3 / (even**3 + (1 - even) ** 3)
        self.steps = points - 1

    def __len__(self) -> int:
        """Points."""
        return len(self._second)

    @property
    def points(self) -> Floats:
        """All beliefs, [points, 2], in the order that `weights` counts them."""
        return np.stack([1 - self._second, self._second], axis=1)

    def weights(self, beliefs: Floats) -> tuple[Ints, Floats]:
        """Grid points around each belief and their barycentric weights, both [B, 2]."""
        below = np.searchsorted(self._second, beliefs[:, 1], side="right") - 1
        below = np.clip(below, 0, len(self) - 2)
        low, high = self._second[below], self._second[below + 1]
        part = np.clip((beliefs[:, 1] - low) / (high - low), 0.0, 1.0)
        return np.stack([below, below + 1], axis=1), np.stack([1 - part, part], axis=1)


def finest_grid(states: int, points: int) -> SimplexGrid | EdgeGrid:
    """Finest grid over ``states`` that has at most ``points`` points, or one step if none has."""
    if states == 2:
        return EdgeGrid(max(points, 2))
    return SimplexGrid(states, 1 if states == 1 else max(_finest(states, points), 1))


def _finest(states: int, points: int) -> int:
    steps = 0
    while comb(steps + states, states - 1) <= points:
        steps += 1
    return steps
