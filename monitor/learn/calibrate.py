"""Scores to probabilities: Platt scaling, temperature scaling, isotonic regression.

Fit on scores that trained no probe, measure on others still, and let no prompt stand on two sides:
tokens of one response are no independent evidence.

Platt and temperature scaling are linear in the logit, so they fold into the probe and cost nothing
at serving time. What the probe feeds changes with it: evidence levels (kappa, theta) are in the new
logits, and a chain must be fitted after the folding. Isotonic regression is a step function that no
linear probe can hold. It is for reports and for choosing thresholds: it shows what is left to gain
over the linear maps, and what probability a score stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.learn.tokens import TrainingDataError
from midstream.measure import metrics
from midstream.probe import Probe

Floats = NDArray[np.float64]
Method = Literal["platt", "temperature", "isotonic"]

BINS = 15
"""Bins of the expected calibration error, as in Guo et al. (arXiv 1706.04599)."""

# Slopes of temperature scaling that are looked at, once the largest score is 1.
_LOG_SLOPE = 20.0


class Calibration(Protocol):
    """A map from scores to probabilities that does not fall."""

    def probability(self, scores: ArrayLike) -> Floats:
        """Probability of each score, of the same shape."""
        ...


@dataclass(frozen=True)
class Linear:
    """``P(harm) = sigmoid(slope z + intercept)``; temperature ``T`` is slope ``1 / T``."""

    slope: float
    intercept: float = 0.0

    def probability(self, scores: ArrayLike) -> Floats:
        """Probability of each score."""
        return _sigmoid(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept)

    def folded_into(self, probe: Probe) -> Probe:
        """Return the probe whose logit is ``slope z + intercept``.

        Where a read-out is the sum of several probes (``adds_to``), fold it into each of them: the
        parts take the slope, and the first one alone the intercept.
        """
        intercept = 0.0 if probe.adds_to else self.intercept
        return replace(
            probe,
            weight=(probe.weight.double() * self.slope).float(),
            bias=self.slope * probe.bias + intercept,
        )


@dataclass(frozen=True, eq=False)
class Isotonic:
    """A monotone map, linear between its knots and constant beyond them.

    Attributes
    ----------
    scores, probabilities : float64 [K]
        Knots, both ascending.
    """

    scores: Floats
    probabilities: Floats

    def probability(self, scores: ArrayLike) -> Floats:
        """Probability of each score."""
        values = np.asarray(scores, dtype=np.float64)
        return np.asarray(np.interp(values, self.scores, self.probabilities), dtype=np.float64)


AS_THEY_ARE = Linear(1.0)
"""Scores taken for log-odds: what a logistic probe says before any calibration."""


def platt(scores: ArrayLike, labels: ArrayLike) -> Linear:
    """Platt scaling: slope and intercept of a logistic regression on the score.

    With Platt's targets ``(N+ + 1) / (N+ + 2)`` and ``1 / (N- + 2)`` instead of 1 and 0, which keep
    the fit finite where the scores part the classes (Platt 1999). Linear in the number of scores.

    Parameters
    ----------
    scores : float [n]
    labels : bool [n]

    Raises
    ------
    TrainingDataError
        Scores that are not finite, a class that is missing, a score that falls with the label.
    ImportError
        Without scikit-learn, naming the extra to install.
    """
    z, y = _checked(scores, labels)
    sklearn = _sklearn()
    harm = int(y.sum())
    target = np.where(y, (harm + 1) / (harm + 2), 1 / (len(y) - harm + 2))
    center, spread = z.mean(), z.std()  # the solver wants scores of order one
    if spread == 0:
        raise _useless("all scores are the same")
    column = ((z - center) / spread)[:, None]
    model = sklearn.linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8)
    model.fit(
        np.concatenate([column, column]),
        np.repeat([1, 0], len(z)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(model.coef_[0, 0] / spread)
    if slope <= 0:
        raise _useless("the scores do not rise with the label")
    return Linear(slope, float(model.intercept_[0] - slope * center))


def temperature(scores: ArrayLike, labels: ArrayLike) -> Linear:
    """Temperature scaling ``sigmoid(z / T)``: the T of least log-loss (arXiv 1706.04599).

    It moves no decision at score 0. Parameters and errors as for `platt`, and also scores that part
    the classes: they are the better the smaller T is.
    """
    z, y = _checked(scores, labels)
    optimize = _scipy_optimize()
    scale = np.abs(z).max()
    wrong = np.where(y, -z, z) / scale if scale else z  # above 0 where score and label disagree
    if wrong.mean() >= 0:
        raise _useless("the scores do not rise with the label")
    if wrong.max() < 0:
        raise _useless("a threshold of 0 parts the classes, so no temperature is the best")

    def loss(log_slope: float) -> float:
        return float(np.logaddexp(0.0, wrong * np.exp(log_slope)).mean())

    # Convex in the slope, so there is one minimum.
    found = optimize.minimize_scalar(
        loss, bounds=(-_LOG_SLOPE, _LOG_SLOPE), method="bounded", options={"xatol": 1e-10}
    )
    return Linear(float(np.exp(found.x) / scale))


def isotonic(scores: ArrayLike, labels: ArrayLike) -> Isotonic:
    """Isotonic regression (Zadrozny and Elkan 2002) by scikit-learn; ``n log n``.

    Needs some thousand scores: on fewer it fits noise. Parameters and errors as for `platt`.
    """
    z, y = _checked(scores, labels)
    model = _sklearn().isotonic.IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(z, y.astype(np.float64))
    if len(model.y_thresholds_) == 0 or model.y_thresholds_[0] == model.y_thresholds_[-1]:
        raise _useless("the scores do not rise with the label")
    return Isotonic(
        np.asarray(model.X_thresholds_, dtype=np.float64),
        np.asarray(model.y_thresholds_, dtype=np.float64),
    )


FIT: dict[Method, Callable[[ArrayLike, ArrayLike], Calibration]] = {
    "platt": platt,
    "temperature": temperature,
    "isotonic": isotonic,
}


@dataclass(frozen=True)
class Calibrated:
    """How good probabilities are on held-out scores.

    Attributes
    ----------
    scores : int
        How many were held out.
    ece, brier : float
        See `expected_calibration_error` and `brier`.
    """

    scores: int
    ece: float
    brier: float


def measured(calibration: Calibration, scores: ArrayLike, labels: ArrayLike) -> Calibrated:
    """Measure a calibration on scores it was not fitted on; `AS_THEY_ARE` gives "before"."""
    z, y = _checked(scores, labels)
    p = calibration.probability(z)
    return Calibrated(len(z), expected_calibration_error(p, y), brier(p, y))


def compare(
    scores: ArrayLike,
    labels: ArrayLike,
    held_out_scores: ArrayLike,
    held_out_labels: ArrayLike,
    methods: tuple[Method, ...] = ("platt", "temperature", "isotonic"),
) -> dict[str, Calibrated]:
    """Fit each method on one set and measure it on the other; the key ``none`` is without any."""
    figures = {"none": measured(AS_THEY_ARE, held_out_scores, held_out_labels)}
    for method in methods:
        fitted = FIT[method](scores, labels)
        figures[method] = measured(fitted, held_out_scores, held_out_labels)
    return figures


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS
) -> float:
    """ECE: mean distance of stated and observed frequency over bins of equal width.

    Weighted by the scores in each bin (Naeini et al. 2015; arXiv 1706.04599). The last bin is
    closed.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    error = metrics.calibration_error(p, y, np.arange(len(p)), bins)
    return float(error(np.ones((1, len(p))))[0])


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of a probability (Brier 1950)."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    return float(np.mean((p - y) ** 2))


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    z, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if y.dtype != np.bool_:
        raise TrainingDataError(f"labels: expected bool, got {y.dtype}; leave unknown ones out")
    if z.ndim != 1 or z.shape != y.shape:
        raise TrainingDataError(
            f"expected one label per score, got scores {list(z.shape)}, labels {list(y.shape)}"
        )
    if bad := int((~np.isfinite(z)).sum()):
        raise TrainingDataError(f"{bad} of {len(z)} scores are not finite; leave unscored ones out")
    if y.all() or not y.any():
        held = "none" if len(y) == 0 else str(bool(y.all()))
        raise TrainingDataError(
            f"all {len(y)} labels are {held}; calibration needs scores of both classes"
        )
    return z, y


def _useless(why: str) -> TrainingDataError:
    return TrainingDataError(
        f"{why}; check that labels are not swapped and that the scores are those of other data "
        "than the probe was trained on"
    )


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0.0, -z)), dtype=np.float64)


def _sklearn() -> Any:
    try:
        import sklearn.isotonic
        import sklearn.linear_model
    except ImportError as error:
        raise ImportError(
            "calibration needs scikit-learn: pip install 'midstream[learn]'"
        ) from error
    return sklearn


def _scipy_optimize() -> Any:
    try:
        import scipy.optimize
    except ImportError as error:
        raise ImportError("calibration needs scipy: pip install 'midstream[learn]'") from error
    return scipy.optimize
