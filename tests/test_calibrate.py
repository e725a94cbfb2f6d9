"""Scores to probabilities: against scikit-learn's own calibration, closed forms, and on a probe."""

import numpy as np
import pytest
import torch
from kernel_cases import fresh_seed
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss

from midstream.learn.calibrate import (
    AS_THEY_ARE,
    Isotonic,
    Linear,
    brier,
    compare,
    expected_calibration_error,
    isotonic,
    measured,
    platt,
    temperature,
)
from midstream.learn.tokens import TrainingDataError
from midstream.probe import Probe
from midstream.taps import Tap

TAP = Tap(1, "resid_post")


class Scores(ClassifierMixin, BaseEstimator):
    """The estimator of scikit-learn whose decision is the score itself."""

    classes_ = np.array([False, True])

    def fit(self, x, y):
        return self

    def predict(self, x):
        return x[:, 0] > 0

    def decision_function(self, x):
        return x[:, 0]

    def __sklearn_is_fitted__(self):
        return True


def by_scikit_learn(method, z, y, at):
    model = CalibratedClassifierCV(FrozenEstimator(Scores()), method=method, cv=2)
    return model.fit(z[:, None], y).predict_proba(at[:, None])[:, 1]


def drawn(rng, n, slope=1.0, intercept=0.0, spread=3.0):
    """Scores, and labels with ``P = sigmoid(slope z + intercept)``."""
    z = spread * (rng.normal(size=n) + 0.3 * rng.normal())
    return z, rng.random(n) < 1 / (1 + np.exp(-(slope * z + intercept)))


@pytest.mark.parametrize("spread", [0.01, 3.0, 400.0])
def test_platt_is_that_of_scikit_learn(spread):
    rng = np.random.default_rng(fresh_seed())
    z, y = drawn(rng, 3000, slope=1.5 / spread, intercept=-1.0, spread=spread)
    at = spread * np.linspace(-3, 3, 50)
    expected = by_scikit_learn("sigmoid", z, y, at)
    assert platt(z, y).probability(at) == pytest.approx(expected, abs=2e-4)


def test_platt_minimises_its_loss_where_the_scores_part_the_classes():
    """With Platt's targets there is a finite slope, where a plain logistic fit has none."""
    z = np.array([-2.0, -1.0, -0.5, 1.0, 2.0])
    y = z > 0
    target = np.where(y, 3 / 4, 1 / 5)

    def loss(ab):
        u = ab[0] * z + ab[1]
        return (np.logaddexp(0, u) - target * u).sum()

    best = minimize(loss, [1.0, 0.0], tol=1e-12).x
    found = platt(z, y)
    assert [found.slope, found.intercept] == pytest.approx(best, abs=1e-4)


def test_temperature_minimises_the_log_loss():
    rng = np.random.default_rng(fresh_seed())
    for spread in (1e-3, 3.0, 1e4):
        z, y = drawn(rng, 2000, slope=0.7 / spread, spread=spread)
        found = temperature(z, y)
        assert found.intercept == 0
        p = found.probability(z)
        # zero of the derivative of the log-loss by the slope
        gradient = (z * (p - y)).mean() / np.abs(z).mean()
        assert abs(gradient) < 1e-6


def test_temperature_finds_the_one_that_scaled_the_scores():
    rng = np.random.default_rng(fresh_seed())
    z, y = drawn(rng, 200_000)
    assert temperature(4.0 * z, y).slope == pytest.approx(1 / 4, rel=0.05)


def test_isotonic_is_that_of_scikit_learn():
    rng = np.random.default_rng(fresh_seed())
    z, y = drawn(rng, 2000)
    at = np.linspace(-15, 15, 200)
    found = isotonic(z, y)
    assert found.probability(at) == pytest.approx(by_scikit_learn("isotonic", z, y, at), abs=1e-9)
    assert (np.diff(found.probability(at)) >= 0).all()


def test_isotonic_by_hand():
    """Pool adjacent violators: the pair out of order shares its mean."""
    found = isotonic([1.0, 2.0, 3.0, 4.0], np.array([False, True, False, True]))
    assert found.probability([0.0, 1.0, 2.0, 2.5, 3.0, 3.5, 9.0]).tolist() == [
        *(0.0, 0.0, 0.5, 0.5, 0.5, 0.75, 1.0)
    ]
    assert isinstance(found, Isotonic)


def test_figures_by_hand():
    p = np.array([0.05, 0.15, 0.15, 0.95, 1.0])
    y = np.array([False, True, False, True, False])
    # two bins: {.05, .15, .15} with one of three, {.95, 1} with one of two
    expected = 3 / 5 * abs(0.35 / 3 - 1 / 3) + 2 / 5 * abs(1.95 / 2 - 1 / 2)
    assert expected_calibration_error(p, y, bins=2) == pytest.approx(expected)
    assert brier(p, y) == pytest.approx(brier_score_loss(y, p))


def test_ece_is_the_sum_over_its_bins():
    rng = np.random.default_rng(fresh_seed())
    p = rng.random(500)
    y = rng.random(500) < 1 - p  # too low in some bins, too high in others
    total = 0.0
    for b in range(15):
        inside = (p >= b / 15) & (p < (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert expected_calibration_error(p, y) == pytest.approx(total)


def test_calibration_helps_on_held_out_scores():
    rng = np.random.default_rng(fresh_seed())
    z, y = drawn(rng, 40_000)
    z = 5 * z + 4  # overconfident and shifted
    figures = compare(z[:20_000], y[:20_000], z[20_000:], y[20_000:])
    assert list(figures) == ["none", "platt", "temperature", "isotonic"]
    assert figures["none"] == measured(AS_THEY_ARE, z[20_000:], y[20_000:])
    assert all(figure.scores == 20_000 for figure in figures.values())
    for method in ("platt", "isotonic"):  # the truth is within their reach
        assert figures[method].ece < 0.03
        assert figures[method].ece < figures["none"].ece / 2
        assert figures[method].brier < figures["none"].brier
    assert figures["temperature"].brier < figures["none"].brier


@pytest.mark.parametrize("adds_to", [None, "first"])
def test_folding_into_a_probe(adds_to):
    """A part of a larger read-out takes the slope alone: the first one has the intercept."""
    generator = torch.Generator().manual_seed(fresh_seed())
    probe = Probe(
        "p",
        "h",
        TAP,
        torch.randn(16, generator=generator),
        0.3,
        norm="rms",
        eps=1e-4,
        reads="prompt",
        adds_to=adds_to,
    )
    map_ = Linear(slope=0.37, intercept=-1.2)
    folded = map_.folded_into(probe)
    hidden = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    before, after = (hidden @ p.weight.double() + p.bias for p in (probe, folded))
    intercept = 0.0 if adds_to else -1.2
    assert after.numpy() == pytest.approx((0.37 * before + intercept).numpy(), abs=1e-6)
    if not adds_to:
        expected = map_.probability(before.numpy())
        assert torch.sigmoid(after).numpy() == pytest.approx(expected, abs=1e-6)
    kept = ("name", "hazard", "tap", "norm", "eps", "evidence", "reads", "adds_to")
    assert all(getattr(folded, key) == getattr(probe, key) for key in kept)


@pytest.mark.parametrize("fit", [platt, temperature, isotonic])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan, np.inf, 2.0], [True, False, True, False], "2 of 4 scores are not finite"),
        ([1.0, 2.0], [True, True], "all 2 labels are True; calibration needs scores of both"),
        ([1.0, 2.0], [False, False], "all 2 labels are False"),
        ([], [], "all 0 labels are none|expected bool"),
        ([1.0, 2.0], [1, 0], "labels: expected bool, got int64; leave unknown ones out"),
        ([1.0, 2.0, 3.0], [True, False], r"got scores \[3\], labels \[2\]"),
        ([2.0, 1.0, -1.0, -2.0], [False, False, True, True], "do not rise with the label"),
        ([0.0, 0.0, 0.0], [False, True, True], "do not rise with the label|are the same"),
    ],
)
def test_bad_input(fit, scores, labels, message):
    with pytest.raises(TrainingDataError, match=message):
        fit(scores, np.array(labels))


def test_no_temperature_where_zero_parts_the_classes():
    with pytest.raises(TrainingDataError, match="a threshold of 0 parts the classes"):
        temperature([-1.0, -2.0, 0.5], np.array([False, False, True]))
