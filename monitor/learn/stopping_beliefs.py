"""The beliefs that a chain can come to, as points of grids, and where its tokens lead from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from midstream.chain import Array, Chain
from midstream.learn.stopping_grid import EdgeGrid, SimplexGrid, finest_grid

POINTS = 6000
"""Beliefs of all grids together, unless asked otherwise."""

_FEWEST_STEPS = 8  # a coarser grid says little


class StoppingError(ValueError):
    """A question that has no answer here: wrong costs, or a chain with too many states."""


class BeliefGrid:
    """Grids over the beliefs that a chain can come to, and where its tokens lead.

    After a token with evidence in bin o only states that emit o are left, so each bin has a grid
    over these alone. A chain fitted by counts, whose transient states are the bins, comes to no
    other beliefs than {o, V}: exact on 27 states. Latent states share all their bins, and six of
    them, V included, are what a grid can hold.

    Parameters
    ----------
    chain : Chain
        Its emission is taken as it is, without the floor that serving puts under it.
    points : int
        Of all grids together.

    Raises
    ------
    StoppingError
        When a bin can be emitted by too many states.
    """

    def __init__(self, chain: Chain, points: int = POINTS) -> None:
        emission = np.array(chain.emission)
        self.chain = chain
        self._emission = emission / emission.sum(axis=1, keepdims=True)
        self.bins = [tuple(np.flatnonzero(column > 0)) for column in emission.T]
        supports = sorted({support for support in self.bins if support})
        share = points // len(supports)
        self.grids: dict[tuple[Any, ...], SimplexGrid | EdgeGrid] = {}
        self._offset: dict[tuple[Any, ...], int] = {}
        beliefs = []
        size = 0
        for support in supports:
            grid = finest_grid(len(support), share)
            if grid.steps < _FEWEST_STEPS and len(support) > 1:
                raise StoppingError(
                    f"evidence bin {self.bins.index(support)} can come from {len(support)} states, "
                    f"and {share} points are too few for a grid over these; fit a chain with "
                    "fewer latent states, or by counts, where every bin is a state, or give "
                    "more points"
                )
            self.grids[support], self._offset[support] = grid, size
            size += len(grid)
            whole = np.zeros((len(grid), chain.states + 1))
            whole[:, support] = grid.points
            beliefs.append(whole)
        self.beliefs: Array = np.concatenate(beliefs)

    def successors(self, beliefs: Array) -> Any:
        """Chances of each grid point after one more token, a sparse matrix [B, points].

        Rows sum to the chance that the stream goes on. O(B O n log n) for O bins of n states.
        """
        sparse = _sparse()
        p = self.chain.absorbing
        k = self.chain.states
        going = np.zeros((k + 1, k + 1))
        going[:k] = p[:k, : k + 1]
        going[k, k] = 1 - self.chain.ending[k]
        coming = beliefs @ going
        rows, columns, chances = [], [], []
        for o, support in enumerate(self.bins):
            if not support:
                continue
            joint = coming[:, support] * self._emission[support, o]
            total = joint.sum(axis=1)
            some = np.flatnonzero(total > 0)
            column, weight = self.grids[support].weights(joint[some] / total[some, None])
            rows.append(np.repeat(some, len(support)))
            columns.append((column + self._offset[support]).ravel())
            chances.append((weight * total[some, None]).ravel())
        entries = np.concatenate(chances), (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix(entries, shape=(len(beliefs), len(self.beliefs)))

    def waiting_next(self, beliefs: Array, waiting: Array) -> Array:
        """Violating tokens that wait after a HOLD and one more token, expected if violated.

        They are the same for every evidence, since all of V emits alike; [B], at least 1.
        """
        k = self.chain.states
        stays = beliefs[:, k] * (1 - self.chain.ending[k])
        enters = beliefs[:, :k] @ self.chain.absorbing[:k, k]
        total = stays + enters
        share = np.divide(stays, total, out=np.zeros_like(total), where=total > 0)
        return np.asarray(1 + share * waiting)


def _sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError("optimal stopping needs scipy: pip install 'midstream[learn]'") from error
    return sparse
