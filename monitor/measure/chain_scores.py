"""Forecasts against what came: whom they are told of, Brier score, reliability, first passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Array
from midstream.measure.bootstrap import Bootstrap, Figure, ratio
from midstream.measure.forecast_plots import Reliability
from midstream.measure.halting import Truth
from midstream.measure.metrics import bins_of
from midstream.measure.outcomes import MeasureError

_BINS = 10
_LEAST = 1e-6  # the kernels' risk is fp32: less is rounding

Told = tuple[Array, NDArray[np.bool_], NDArray[np.int64]]
"""Chances said [n], whether they came true [n], and the stream of each [n]."""


def served_risks(truths: Sequence[Truth], risks: Sequence[Array], tokens: int) -> Told:
    """Risk that is served, at every response token of which it is known what came."""
    parts = []
    for truth, risk in zip(truths, risks, strict=True):
        label, known = truth.within(tokens)
        known = (known | label) & ~np.isnan(risk)
        known[0] = False
        parts.append((risk[known], label[known]))
    return _joined(parts)


def new_violations(
    truths: Sequence[Truth], risks: Sequence[Array], now: Sequence[Array], tokens: int
) -> Told:
    """P(violated within ``tokens`` | evidence, and not violated yet), at tokens that are not.

    The risk holds the chance that the stream is violated already, ``now``, which these tokens rule
    out: what is left is (risk - now) / (1 - now).
    """
    parts = []
    for truth, risk, violated in zip(truths, risks, now, strict=True):
        label, known = truth.within(tokens)
        known &= ~np.isnan(risk)
        known[0] = False
        left = np.maximum(1 - violated[known], _LEAST)
        parts.append((np.clip((risk[known] - violated[known]) / left, 0.0, 1.0), label[known]))
    return _joined(parts)


def _joined(parts: list[tuple[Array, NDArray[np.bool_]]]) -> Told:
    risk, label = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return risk, label, np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])


def scores(
    tokens: int,
    risk: Array,
    came_true: NDArray[np.bool_],
    stream: NDArray[np.int64],
    streams: int,
) -> tuple[dict[str, Any], Reliability]:
    """Scores at one horizon; sums are taken per stream once, so that resampling is cheap."""
    if not len(risk):
        raise MeasureError(f"at horizon {tokens} it is known of no token what came")
    place = bins_of(risk, _BINS)

    def by_stream(values: Array) -> Array:
        """Sums by stream and bin, [E, bins]."""
        sums = np.bincount(stream * _BINS + place, weights=values, minlength=streams * _BINS)
        return sums.reshape(streams, _BINS).astype(np.float64)

    label = came_true.astype(np.float64)
    total = by_stream(np.ones(len(risk)))
    said, true, error = (by_stream(of) for of in (risk, label, (risk - label) ** 2))
    bootstrap = Bootstrap()

    def figure(statistic: Any, n: int = streams) -> Figure:
        return bootstrap.figure(statistic, streams, n=n)

    brier = figure(lambda counts: ratio(counts @ error.sum(axis=1), counts @ total.sum(axis=1)))
    gap = figure(
        lambda counts: ratio(np.abs(counts @ (said - true)).sum(axis=1), counts @ total.sum(axis=1))
    )
    bins = [
        bootstrap.exact_at_ends(
            figure(
                lambda counts, b=b: ratio(counts @ true[:, b], counts @ total[:, b]),
                int((total[:, b] > 0).sum()),
            )
        )
        for b in range(_BINS)
        if total[:, b].any()
    ]
    filled = total.any(axis=0)
    count = total.sum(axis=0)[filled].astype(np.int64)
    mean_risk = said.sum(axis=0)[filled] / count
    value, low, high = (
        np.array([getattr(one, name) for one in bins], dtype=float)
        for name in ("value", "low", "high")
    )
    base = float(came_true.mean())
    found = {
        "tokens": len(risk),
        "base_rate": base,
        "mean_risk": float(risk.mean()),
        "brier": [brier.value, brier.low, brier.high],
        "brier_of_base_rate": base * (1 - base),
        "calibration_error": [gap.value, gap.low, gap.high],
        "reliability": [
            {
                "risk": float(said_here),
                "came_true": one.value,
                "low": one.low,
                "high": one.high,
                "streams": one.n,
                "tokens": int(tokens_here),
            }
            for said_here, one, tokens_here in zip(mean_risk, bins, count, strict=True)
        ],
    }
    return found, Reliability(tokens, mean_risk, value, low, high, count)


def cumulative_incidence(truths: Sequence[Truth], tokens: int, weights: Array) -> Array:
    """Share of streams violated within n tokens of the prompt's end, n = 0 ... ``tokens``.

    By Aalen and Johansen (1978): a stream that was cut off counts as long as it was seen, one that
    ended can violate no more. ``weights`` [E] say how often each stream counts.
    """
    violates = np.array([truth.violates for truth in truths])
    ends = np.array([truth.ended for truth in truths]) & ~violates
    # The end comes one step after the last token; a stream cut off is seen up to its last.
    last = np.array(
        [t.violates_at + 1 if t.violates else t.tokens + t.ended for t in truths], dtype=np.int64
    )
    steps = tokens + 2
    leaving = np.bincount(last, weights=weights, minlength=steps)[:steps]
    at_risk = leaving[::-1].cumsum()[::-1]
    violated, ended = (
        np.bincount(last[which], weights=weights[which], minlength=steps)[:steps]
        for which in (violates, ends)
    )
    share = np.divide(1.0, at_risk, out=np.zeros(steps), where=at_risk > 0)
    staying = np.cumprod(1 - (violated + ended) * share)
    before = np.concatenate([[1.0], staying[:-1]])
    return np.asarray(np.cumsum(before * violated * share)[: tokens + 1])
