"""How far a chain fitted by counts can be trusted: credible and Wilson intervals of its risks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from midstream.absorbing import normalised, power
from midstream.chain import Array, ChainError
from midstream.learn.chains.counts import Posterior, state_path
from midstream.learn.chains.symbols import SymbolStream

DRAWS, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class RiskIntervals:
    """Posterior of the horizon risk of every state.

    Attributes
    ----------
    horizons : int64 [H]
    mean, low, high : float64 [H, K+1]
        Of ``a_h``; ``low`` and ``high`` are quantiles with equal tails.
    """

    horizons: NDArray[np.int64]
    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Frequencies:
    """How often streams came to violate after they were first in a state.

    Attributes
    ----------
    horizons : int64 [H]
    violated, visits : int64 [H, K]
        Streams that were in the state and violated within the horizon, and all of which that is
        known.
    unknown : int64 [H, K]
        Streams that were cut off too early to know, and are left out.
    low, high : float64 [H, K]
        Wilson's interval; 0 and 1 where no stream was in the state.
    """

    horizons: NDArray[np.int64]
    violated: NDArray[np.int64]
    visits: NDArray[np.int64]
    unknown: NDArray[np.int64]
    low: Array
    high: Array


def risk_intervals(
    posterior: Posterior,
    horizons: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> RiskIntervals:
    """Credible intervals of every ``a_h`` by sampling chains from their posterior.

    Rows of moves and chances of ending are independent Dirichlets. Takes ``draws`` x K^2 per
    horizon where horizons follow each other, ``draws`` x K^3 x log2(gap) where they do not.

    Parameters
    ----------
    posterior : Posterior
        Of a fit with a prior, `Counts.posterior`: without one, a state that was never seen has
        none.
    horizons : sequence of int
        Ascending, 0 or more.
    draws : int
        1,000 fix the ends of a 95 % interval to about a tenth of its half-width.
    seed : int
    level : float
        Credibility.
    """
    ahead = _ascending(horizons)
    _check_level(level)
    if draws < 2:
        raise ChainError(f"draws: expected 2 or more, got {draws}")
    p = sample_chains(posterior, draws, seed=seed)
    risk = np.zeros(p.shape[:2])
    risk[:, -2] = 1.0
    tail = (1 - level) / 2
    mean, low, high = (np.empty((len(ahead), p.shape[1] - 1)) for _ in range(3))
    for row, gap in enumerate(np.diff(ahead, prepend=0).tolist()):
        risk = (power(p, gap) @ risk[..., None])[..., 0]
        of_states = risk[:, :-1]
        mean[row] = of_states.mean(axis=0)
        low[row], high[row] = np.quantile(of_states, [tail, 1 - tail], axis=0)
    return RiskIntervals(ahead, mean, low, high)


def sample_chains(posterior: Posterior, draws: int, *, seed: int = 0) -> Array:
    """Draw chains from their posterior: ``P`` over ``0 ... K-1, V, C``, [draws, K+2, K+2]."""
    k = len(posterior.ends) - 1
    moves, ends = posterior.moves[:k], posterior.ends[:k]
    if min(moves.min(), ends.min()) <= 0:
        raise ChainError("posterior: a parameter is 0; fit with a prior count above 0")
    random = np.random.default_rng(seed)
    ending = _dirichlet(random, ends, draws)[..., :1]
    p = np.zeros((draws, k + 2, k + 2))
    p[:, :k, : k + 1] = (1 - ending) * _dirichlet(random, moves, draws)
    p[:, :k, k + 1 :] = ending
    p[:, [k, k + 1], [k, k + 1]] = 1.0
    return p


def _dirichlet(random: np.random.Generator, alphas: Array, draws: int) -> Array:
    """Draw each row of [R, M] anew, [draws, R, M].

    In logs, by G(a) = G(a + 1) U^(1/a): a gamma of a small parameter is 0 in fp64, and a row of
    zeros is no distribution.
    """
    shape = (draws, *alphas.shape)
    logs = np.log(random.standard_gamma(alphas + 1, shape))
    logs -= random.standard_exponential(shape) / alphas
    return normalised(np.exp(logs - logs.max(axis=-1, keepdims=True)))


def violation_frequencies(
    streams: Sequence[SymbolStream],
    states: int,
    horizons: Sequence[int],
    *,
    level: float = LEVEL,
) -> Frequencies:
    """P(violated within h | state) as it was seen, with Wilson's intervals (SafetyDrift).

    A stream counts once per state, from its first token there: later ones depend on it, and would
    make the interval too narrow. The first visit is a stopping time, so that what follows has the
    chance ``a_h``; streams cut off before it is known are left out, which makes the frequency too
    large where they are many. O(tokens + streams K H).

    Parameters
    ----------
    streams : sequence of SymbolStream
        As for `midstream.learn.chains.counts.count`.
    states : int
        K.
    horizons : sequence of int
        Ascending, 0 or more.
    level : float
        Confidence.
    """
    ahead = _ascending(horizons)
    _check_level(level)
    violated, visits, unknown = (np.zeros((len(ahead), states), np.int64) for _ in range(3))
    for index, stream in enumerate(streams):
        path = state_path(stream, states, index)
        state, first = np.unique(path, return_index=True)
        if state[-1] == states:
            within = first[-1] <= first[:-1] + ahead[:, None]
            known = np.ones_like(within)
            state = state[:-1]
        else:
            known = (first + ahead[:, None] < len(path)) | stream.ended
            within = np.zeros_like(known)
        violated[:, state] += within
        visits[:, state] += known
        unknown[:, state] += ~known
    return Frequencies(ahead, violated, visits, unknown, *wilson(violated, visits, level=level))


def wilson(
    hits: NDArray[np.int64], trials: NDArray[np.int64], *, level: float = LEVEL
) -> tuple[Array, Array]:
    """Wilson's score interval of a chance (1927, JASA 22:209), element by element; 0 to 1 for none.

    ``hits`` of ``trials`` came true; low and high have their shape.
    """
    _check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = np.maximum(trials, 1)
    share = hits / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low = np.where(hits > 0, np.maximum(center - reach, 0.0), 0.0)
    high = np.where(hits < trials, np.minimum(center + reach, 1.0), 1.0)
    return low, high


def _ascending(horizons: Sequence[int]) -> NDArray[np.int64]:
    ahead = np.asarray(horizons, dtype=np.int64)
    if ahead.ndim != 1 or not len(ahead) or ahead[0] < 0 or (np.diff(ahead) <= 0).any():
        raise ChainError(f"horizons: expected ascending ones of 0 or more, got {list(horizons)}")
    return ahead


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ChainError(f"level: expected between 0 and 1, got {level}")
