"""Metrics of scores, spans and responses, as statistics that a bootstrap over streams can resample.

Each takes what was measured and returns a `midstream.measure.bootstrap.Statistic`. Elements are
tokens or streams; ``stream`` [n] says which stream each belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midstream.measure.bootstrap import Floats, Statistic, ratio

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def auroc(scores: Floats, labels: Bools, stream: Ints) -> Statistic:
    """Area under the ROC curve: P(score of a positive > that of a negative), ties count half.

    Equals scikit-learn's ``roc_auc_score`` with the counts as ``sample_weight``, which would sort
    once per resample. NaN with one class only.
    """
    ranks = _Ranks(scores, labels, stream)

    def statistic(counts: Floats) -> Floats:
        positive, below = ranks.drawn(counts)
        area = (positive * below[:, ranks.first_negative]).sum(axis=1)
        if (ranks.first_negative != ranks.last_negative).any():
            area = (area + (positive * below[:, ranks.last_negative]).sum(axis=1)) / 2
        return ratio(area, positive.sum(axis=1) * below[:, -1])

    return statistic


def auprc(scores: Floats, labels: Bools, stream: Ints) -> Statistic:
    """Average precision: the step-wise area under the precision-recall curve.

    Equals scikit-learn's ``average_precision_score``. NaN without a positive.
    """
    ranks = _Ranks(scores, labels, stream)

    def statistic(counts: Floats) -> Floats:
        positive, below = ranks.drawn(counts)
        before = np.cumsum(positive, axis=1) - positive  # positives ranked lower
        total = positive.sum(axis=1, keepdims=True)
        hits = total - before[:, ranks.first_positive]
        flagged = hits + below[:, -1:] - below[:, ranks.first_negative]
        precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
        return ratio((positive * precision).sum(axis=1), total[:, 0])

    return statistic


class _Ranks:
    """Positives in ascending order of score, and where each stands among the negatives."""

    def __init__(self, scores: Floats, labels: Bools, stream: Ints) -> None:
        order = np.argsort(scores, kind="stable")
        positive = order[labels[order]]
        negative = order[~labels[order]]
        self._positive, self._negative = stream[positive], stream[negative]
        self.first_negative = np.searchsorted(scores[negative], scores[positive], side="left")
        self.last_negative = np.searchsorted(scores[negative], scores[positive], side="right")
        self.first_positive = np.searchsorted(scores[positive], scores[positive], side="left")

    def drawn(self, counts: Floats) -> tuple[Floats, Floats]:
        """Counts of the positives [B, n], and of the lowest 0, 1, ... negatives [B, m + 1]."""
        below = np.zeros((len(counts), len(self._negative) + 1))
        np.cumsum(counts[:, self._negative], axis=1, out=below[:, 1:])
        return counts[:, self._positive], below


def f1(flagged: Bools, labels: Bools, stream: Ints, streams: int) -> Statistic:
    """F1 of the positive class, pooled over all elements: 2 TP / (2 TP + FP + FN).

    NaN where nothing is positive and nothing flagged.
    """
    hit, one_sided = (
        np.bincount(stream[which], minlength=streams).astype(np.float64)
        for which in (flagged & labels, flagged ^ labels)
    )
    return lambda counts: ratio(2 * (counts @ hit), 2 * (counts @ hit) + counts @ one_sided)


def macro_f1(flagged: Bools, labels: Bools, stream: Ints, streams: int) -> Statistic:
    """Mean of the F1 of both classes; NaN where one of them is not defined."""
    violating = f1(flagged, labels, stream, streams)
    safe = f1(~flagged, ~labels, stream, streams)
    return lambda counts: (violating(counts) + safe(counts)) / 2


def character_f1(gold: Bools, predicted: Bools) -> float:
    """F1 of one text's characters, the rule of SemEval-2021 Task 5.

    With nothing in ``gold`` [characters] it is 1 if nothing is predicted, else 0 (Da San Martino et
    al. 2019, EMNLP; Pavlopoulos et al. 2021). The score of a set is the mean over its texts.
    """
    if not gold.any():
        return float(not predicted.any())
    return float(2 * (gold & predicted).sum() / (gold.sum() + predicted.sum()))


def covered(length: int, tokens: NDArray[np.int32], flagged: Bools) -> Bools:
    """Characters of a text that flagged tokens cover, bool [length].

    What lies between two neighbouring tokens that are both flagged, a space as a rule, is covered,
    too: a span is contiguous. Tokens [n, 2] without characters are negative.
    """
    inside = np.zeros(length, dtype=bool)
    previous = -1  # end of the token before, when it was flagged
    for (start, end), flag in zip(tokens.tolist(), flagged.tolist(), strict=True):
        if start < 0:
            continue
        if flag:
            inside[start if previous < 0 else min(previous, start) : end] = True
        previous = end if flag else -1
    return inside


def recall_at(peaks: Floats, in_time: Floats, safe: Bools, rate: float) -> Statistic:
    """Share of the violating streams that reach the threshold of a false-halt rate.

    The threshold is the lowest that halts at most ``rate`` of the safe streams, chosen anew in each
    resample (`midstream.measure.halting.threshold_for`).

    Parameters
    ----------
    peaks : float64 [E]
        Largest risk of each stream, -inf where there is none; of the safe ones the threshold is
        taken.
    in_time : float64 [E]
        Risk to be compared with it: the peak, or the largest up to the violating token; NaN for
        streams that do not count.
    safe : bool [E]
    rate : float
    """
    order = np.flatnonzero(safe)[np.argsort(-peaks[safe], kind="stable")]
    ranked = peaks[order]
    counted = np.flatnonzero(~safe & ~np.isnan(in_time))

    def statistic(counts: Floats) -> Floats:
        if not len(order) or not len(counted):
            return np.full(len(counts), np.nan)
        upto = np.cumsum(counts[:, order], axis=1)
        # a rate of 29 % of 100 streams is 28.999999999999996 in floating point
        allowed = np.floor(rate * upto[:, -1:] + 1e-9)
        spared = upto > allowed  # the first of them must not be halted
        threshold = np.where(spared.any(axis=1), ranked[np.argmax(spared, axis=1)], -np.inf)
        caught = in_time[counted] > threshold[:, None]
        drawn = counts[:, counted]
        found = ratio((drawn * caught).sum(axis=1), drawn.sum(axis=1))
        return np.where(upto[:, -1] > 0, found, np.nan)

    return statistic


def bins_of(risk: Floats, bins: int) -> Ints:
    """Bin of each risk among ``bins`` of equal width over [0, 1]."""
    places: Ints = np.minimum((risk * bins).astype(np.int64), bins - 1)
    return places


def calibration_error(risk: Floats, came_true: Bools, stream: Ints, bins: int = 10) -> Statistic:
    """Expected calibration error: mean over tokens of a bin's |mean risk - share come true|.

    Naeini, Cooper and Hauskrecht (2015), AAAI; bins of equal width.
    """
    place = bins_of(risk, bins)
    gap = risk - came_true

    def statistic(counts: Floats) -> Floats:
        drawn = counts[:, stream]
        total = drawn.sum(axis=1)
        error = np.zeros(len(counts))
        for b in range(bins):
            inside = place == b
            error += np.abs(drawn[:, inside] @ gap[inside])
        return ratio(error, total)

    return statistic


def squared_error(risk: Floats, came_true: Bools, stream: Ints) -> Statistic:
    """Brier score over tokens; its plain value is `midstream.measure.halting.brier`."""
    error = (risk - came_true) ** 2

    def statistic(counts: Floats) -> Floats:
        drawn = counts[:, stream]
        return ratio(drawn @ error, drawn.sum(axis=1))

    return statistic


def reliability(risk: Floats, came_true: Bools, bins: int = 10) -> list[dict[str, float]]:
    """Points of a reliability diagram: bins that hold a token, with their means and counts."""
    place = bins_of(risk, bins)
    return [
        {
            "risk": float(risk[inside].mean()),
            "came_true": float(came_true[inside].mean()),
            "tokens": int(inside.sum()),
        }
        for inside in (place == b for b in range(bins))
        if inside.any()
    ]


def thinned(x: Sequence[float] | Floats, y: Sequence[float] | Floats, most: int = 400) -> Floats:
    """At most about ``most`` points of a curve [n] to draw, ends included, [n', 2]."""
    points: Floats = np.column_stack([x, y]).astype(np.float64)
    if len(points) <= most:
        return points
    kept: Floats = points[np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))]
    return kept
