"""Confidence intervals by resampling streams.

Tokens of one stream depend on each other, so a stream is drawn as a whole. A resample is written as
how often each stream was drawn: statistics take such counts, and a plain value is the one where
every stream was drawn once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Statistic = Callable[[Floats], Floats]
"""Counts [B, E] to values [B]; NaN where a resample leaves a value undefined."""

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 23  # counts x elements held at once: 64 MiB of float64


@dataclass(frozen=True)
class Figure:
    """A measured value with its interval.

    Attributes
    ----------
    value : float, optional
        None where it is not defined; ``reason`` says why.
    low, high : float, optional
        Bounds at the confidence level; None without an interval.
    n : int
        What it was measured on: streams, or tokens where the name says so.
    reason : str
        Why there is no value, or what to keep in mind about it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    reason: str = ""


@lru_cache(maxsize=1)
def draws(streams: int, resamples: int, seed: int) -> Floats:
    """Draw ``resamples`` samples of E streams with replacement; counts [B, E], each row sums to E.

    O(B E) time and memory.
    """
    random = np.random.default_rng(seed)
    counts = random.multinomial(streams, np.full(streams, 1 / streams), resamples)
    drawn = counts.astype(np.float64)
    drawn.flags.writeable = False  # shared by all who ask for the same
    return drawn


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap (Efron 1979) over streams.

    Parameters
    ----------
    resamples : int
    seed : int
    level : float
        Confidence; 0.95 takes the quantiles 0.025 and 0.975.

    Notes
    -----
    One statistic over M elements (streams or tokens) costs O(B M) time after what it does once, and
    at most 64 MiB or one row of M beside the counts, which take 8 B E bytes.
    """

    resamples: int = RESAMPLES
    seed: int = 0
    level: float = LEVEL

    def __post_init__(self) -> None:
        if self.resamples < 2 or not 0 < self.level < 1:
            raise ValueError(
                f"bootstrap: {self.resamples} resamples at level {self.level}; needs 2 or more, "
                "and a level between 0 and 1"
            )

    def values(self, statistic: Statistic, streams: int, elements: int) -> Floats:
        """Values of a statistic over the resamples, [B]; ``elements`` says how large a row gets."""
        step = max(1, _CHUNK // max(1, elements))
        counts = draws(streams, self.resamples, self.seed)
        return np.concatenate(
            [statistic(counts[at : at + step]) for at in range(0, self.resamples, step)]
        )

    def figure(
        self,
        statistic: Statistic,
        streams: int,
        *,
        n: int,
        elements: int | None = None,
        undefined: str = "nothing to measure it on",
    ) -> Figure:
        """Value and interval of a statistic over ``streams`` streams.

        Parameters
        ----------
        statistic : Statistic
        streams : int
            E.
        n : int
            Shown beside the value.
        elements : int, optional
            Elements that the statistic spreads a row of counts over; E when not given.
        undefined : str
            The reason given when the value is not defined.
        """
        if streams == 0:
            return Figure(None, n=n, reason=undefined)
        value = float(statistic(np.ones((1, streams)))[0])
        if math.isnan(value):
            return Figure(None, n=n, reason=undefined)
        values = self.values(statistic, streams, elements or streams)
        defined = values[~np.isnan(values)]
        if not len(defined):
            return Figure(value, n=n, reason="no resample defines it, so there is no interval")
        tail = (1 - self.level) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        lost = len(values) - len(defined)
        reason = f"not defined in {lost} of {len(values)} resamples" if lost else ""
        return Figure(value, float(low), float(high), n, reason)

    def rate(self, flags: NDArray[np.bool_], among: NDArray[np.bool_], *, undefined: str) -> Figure:
        """Share of the streams ``among`` [E] that have ``flags`` [E].

        Where none or all have it every resample is the same; the bound is then the exact one of
        Clopper and Pearson (1934), Biometrika 26, which has a closed form there.
        """
        n = int(among.sum())
        return self.exact_at_ends(
            self.figure(share(flags, among), len(flags), n=n, undefined=undefined)
        )

    def exact_at_ends(self, rate: Figure) -> Figure:
        """Give a share of ``n`` streams that is 0 or 1 in every resample its exact interval."""
        if rate.value not in (0.0, 1.0) or rate.low != rate.high:
            return rate
        reach = 1 - ((1 - self.level) / 2) ** (1 / rate.n)
        low, high = (0.0, reach) if rate.value == 0 else (1 - reach, 1.0)
        note = f"exact interval: {'none' if rate.value == 0 else 'all'} of {rate.n}"
        return Figure(rate.value, low, high, rate.n, note)


def share(flags: NDArray[np.bool_], among: NDArray[np.bool_]) -> Statistic:
    """Share of the streams ``among`` that have ``flags``, both bool [E]."""
    hits, base = (flags & among).astype(np.float64), among.astype(np.float64)
    return lambda counts: ratio(counts @ hits, counts @ base)


def mean(values: Floats, among: NDArray[np.bool_]) -> Statistic:
    """Mean of ``values`` [E] over the streams ``among``."""
    held = np.where(among, values, 0.0)
    return lambda counts: ratio(counts @ held, counts @ among.astype(np.float64))


def median(values: NDArray[np.int64] | Floats, among: NDArray[np.bool_]) -> Statistic:
    """Median of ``values`` [E] over the streams ``among``."""
    chosen = np.flatnonzero(among)
    order = chosen[np.argsort(values[chosen], kind="stable")]
    ranked = values[order].astype(np.float64)

    def statistic(counts: Floats) -> Floats:
        if not len(order):
            return np.full(len(counts), np.nan)
        upto = np.cumsum(counts[:, order], axis=1)
        total = upto[:, -1:]
        lower, upper = (
            ranked[np.argmax(upto > np.floor(middle / 2), axis=1)] for middle in (total - 1, total)
        )
        return np.where(total[:, 0] > 0, (lower + upper) / 2, np.nan)

    return statistic


def ratio(part: Floats, whole: Floats) -> Floats:
    """``part / whole``, NaN where the whole is 0."""
    shares: Floats = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return shares
