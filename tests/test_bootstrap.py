"""Intervals hold what they promise, over streams; statistics are those of the resampled data."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import fresh_seed
from scipy.stats import binomtest

from midstream.measure import bootstrap
from midstream.measure.bootstrap import Bootstrap, Figure, draws, mean, median, ratio, share


def drawn(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sample that a row of counts stands for."""
    return np.repeat(values, counts.astype(int))


def test_draws_are_samples_with_replacement() -> None:
    counts = draws(50, 400, fresh_seed())
    assert counts.shape == (400, 50)
    assert (counts.sum(axis=1) == 50).all()
    # each count is binomial(50, 1/50): variance 0.98, its mean over 20,000 within 6 sigma
    assert abs(counts.var() - 0.98) < 0.1
    assert (draws(50, 400, 3) == draws(50, 400, 3)).all()
    assert (draws(50, 400, 3) != draws(50, 400, 4)).any()


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_those_of_the_resample(seed: int) -> None:
    random = np.random.default_rng(fresh_seed() + seed)
    values = random.integers(0, 6, 15)
    among, flags = random.random(15) < 0.6, random.random(15) < 0.5
    counts = draws(15, 200, seed)
    found = [
        statistic(counts)
        for statistic in (mean(values, among), median(values, among), share(flags, among))
    ]
    for b, row in enumerate(counts):
        sample = drawn(values[among], row[among])
        marks = drawn(flags[among], row[among])
        if len(sample):
            expected = [sample.mean(), np.median(sample), marks.mean()]
            assert [each[b] for each in found] == pytest.approx(expected)
        else:
            assert np.isnan([each[b] for each in found]).all()


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Means of 60 exponential streams: about 93 % for a nominal 95 % (skew costs some)."""
    random = np.random.default_rng(fresh_seed())
    everybody = np.ones(60, bool)
    hits = 0
    for trial in range(300):
        values = random.exponential(size=60)
        figure = Bootstrap(400, seed=trial).figure(mean(values, everybody), 60, n=60)
        assert figure.low <= figure.value <= figure.high
        hits += figure.low <= 1.0 <= figure.high
    # binomial(300, 0.93) leaves these less than once in 10^8 runs
    assert 246 <= hits <= 299


def test_tokens_of_a_stream_are_no_evidence_of_their_own() -> None:
    """A hundred equal tokens per stream leave the interval as wide as one does."""
    random = np.random.default_rng(fresh_seed())
    values = random.normal(size=20)

    def pooled(tokens: int) -> Figure:
        token_values = np.repeat(values, tokens)
        stream = np.repeat(np.arange(20), tokens)

        def statistic(counts: np.ndarray) -> np.ndarray:
            weights = counts[:, stream]
            return ratio(weights @ token_values, weights.sum(axis=1))

        return Bootstrap(seed=1).figure(statistic, 20, n=20 * tokens, elements=20 * tokens)

    one, many = pooled(1), pooled(100)
    assert (many.low, many.high) == pytest.approx((one.low, one.high))
    assert one.high - one.low > 0.15


@pytest.mark.parametrize("hits", [0, 17])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_none_or_all_get_the_exact_interval(hits: int, level: float) -> None:
    flags = np.arange(30) < hits
    among = np.arange(30) < 17
    figure = Bootstrap(level=level).rate(flags, among, undefined="-")
    exact = binomtest(hits, 17).proportion_ci(level, method="exact")
    assert (figure.low, figure.high) == pytest.approx((exact.low, exact.high))
    assert figure.value == hits / 17
    assert "exact" in figure.reason


def test_a_mixed_rate_gets_the_bootstrap() -> None:
    flags = np.arange(40) < 10
    figure = Bootstrap(4000).rate(flags, np.ones(40, bool), undefined="-")
    spread = 1.96 * np.sqrt(0.25 * 0.75 / 40)
    assert figure.value == 0.25
    assert (figure.low, figure.high) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.03)
    assert figure.reason == ""


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = Bootstrap(100).figure(median(values, np.ones(30, bool)), 30, n=30)
    monkeypatch.setattr(bootstrap, "_CHUNK", 90)
    assert Bootstrap(100).figure(median(values, np.ones(30, bool)), 30, n=30) == whole


def test_what_is_not_defined_says_why() -> None:
    nobody = np.zeros(5, bool)
    figure = Bootstrap().rate(np.ones(5, bool), nobody, undefined="no safe response")
    assert figure == Figure(None, n=0, reason="no safe response")
    assert Bootstrap().figure(mean(np.empty(0), np.empty(0, bool)), 0, n=0).value is None
    # defined for the set, but not in every resample: the stream is left out of (1 - 1/5)^5 = 33 %
    one = np.array([True, False, False, False, False])
    found = Bootstrap().figure(mean(np.ones(5), one), 5, n=1)
    assert found.value == 1.0
    assert "not defined in 3" in found.reason


@pytest.mark.parametrize("wrong", [{"resamples": 1}, {"level": 0.0}, {"level": 95}])
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bootstrap"):
        Bootstrap(**wrong)
