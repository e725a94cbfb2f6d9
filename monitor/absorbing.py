"""Matrix algebra of absorbing chains, in fp64 and without loss of mass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NEGLIGIBLE = 1e-12  # chances that lead nowhere when absorption is checked
_STOCHASTIC_TOLERANCE = 1e-6


class ChainError(ValueError):
    """A chain that is no chain: wrong shapes, rows that are no distributions, unreadable."""


class SingularChainError(ChainError):
    """Some states are never absorbed: ``I - Q`` has no inverse, finite horizons still work."""


def fundamental_matrix(transient: Array) -> Array:
    """Expected visits ``N = (I - Q)^-1`` of an absorbing chain.

    ``N[i, j]`` is the expected number of tokens in ``j`` when started in ``i`` (Kemeny and Snell
    1960, theorem 3.2.1); ``transient`` is ``Q`` [K, K], the moves among the transient states.
    A SingularChainError names the states from which absorption cannot be reached.

    States are eliminated one by one and put back without a subtraction (Grassmann, Taksar and
    Heyman 1985), so that a chance of 1e-16 is as exact as one of 0.5: an inverse is exact only
    beside its largest entries.
    """
    leaving = np.maximum(1.0 - transient.sum(axis=1), 0.0)
    reaches = leaving > _NEGLIGIBLE
    for _ in reaches:
        reaches = reaches | ((transient > _NEGLIGIBLE) & reaches).any(axis=1)
    if not reaches.all():
        stuck = np.flatnonzero(~reaches)
        never_left = [int(s) for s in stuck if 1 - transient[s, s] <= _NEGLIGIBLE]
        held = f" ({never_left} are never left)" if never_left else ""
        raise SingularChainError(
            f"states {stuck.tolist()} are never absorbed{held}, so I - Q is singular and expected "
            "times are infinite; use a finite horizon, or fit with a prior count above 0"
        )
    moves = np.array(transient, dtype=np.float64)
    left = np.empty(len(moves))  # chance to leave each state for an earlier one or for good
    for k in reversed(range(len(moves))):
        left[k] = leaving[k] + moves[k, :k].sum()
        through = moves[:k, k] / left[k]
        moves[:k, :k] += through[:, None] * moves[k, :k]
        leaving[:k] += through * leaving[k]
    visits = np.zeros_like(moves)
    for k in range(len(moves)):
        visits[:k, k] = visits[:k, :k] @ moves[:k, k] / left[k]
        visits[k, :k] = moves[k, :k] @ visits[:k, :k] / left[k]
        visits[k, k] = (1.0 + moves[k, :k] @ visits[:k, k]) / left[k]
    return visits


def check_distributions(name: str, rows: Array) -> None:
    """Raise a ChainError that names the first row of [n, m] which is no distribution."""
    for row in np.flatnonzero(~(rows >= 0).all(axis=1))[:1]:
        value = rows[row][~(rows[row] >= 0)][0]
        raise ChainError(f"{name}: row {row} holds {value:.6g}; probabilities are 0 or more")
    total = rows.sum(axis=1)
    for row in np.flatnonzero(abs(total - 1) > _STOCHASTIC_TOLERANCE)[:1]:
        raise ChainError(f"{name}: row {row} sums to {total[row]:.9g}, expected 1")


def power(p: Array, exponent: int) -> Array:
    """Power of stochastic matrices [..., n, n], whose rows still sum to 1 after 2^30 steps."""
    result = np.broadcast_to(np.eye(p.shape[-1]), p.shape)
    while exponent:
        if exponent & 1:
            result = normalised(result @ p)
        exponent >>= 1
        if exponent:
            p = normalised(p @ p)
    return result


def orbit(p: Array, values: Array, count: int) -> Array:
    """``P^i v`` for i = 0 ... count - 1, [count, n]; each product with a power doubles them."""
    found = np.empty((count, len(values)))
    found[:1] = values
    done = 1
    while done < count:
        more = min(done, count - done)
        found[done : done + more] = found[:more] @ p.T  # p is P^done
        done += more
        p = normalised(p @ p)
    return found


def normalised(rows: Array | list[list[float]]) -> Array:
    """Rows [..., n] scaled to sum to 1."""
    values = np.asarray(rows, dtype=np.float64)
    return np.asarray(values / values.sum(axis=-1, keepdims=True))
