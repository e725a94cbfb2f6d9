"""Thresholds with a guarantee: closed forms, brute force, simulated calibrations, the kernel."""

import math
from fractions import Fraction

import numpy as np
import pytest
import yaml
from calibration import repeated
from kernel_cases import fresh_seed
from plain_filter import Kernel, logit_in_bin, random_chain
from scipy.stats import binom, binomtest

from midstream.kernels.tables import UNSCORED_CAUSE, Verdict
from midstream.learn.guarantee import (
    GuaranteeError,
    binomial_tail,
    clopper_pearson,
    conformal_risk_control,
    halts_allowed,
    just_above,
    learn_then_test,
    peak_risks,
    responses_needed,
)
from midstream.learn.tiers import SAFE, tiers_for_false_halts, tiers_for_recall
from midstream.measure.recording import Judgement, Recording
from midstream.policy import TIERS, Policy, PolicyError, Provenance, Thresholds

CALIBRATIONS = 1000
ALARM = 1e-9  # chance that a simulation fails a test of a bound that holds


def ltt(peaks, alpha, delta):
    return learn_then_test(peaks, alpha=alpha, delta=delta, max_tokens=64, calibration_set="drawn")


def crc(peaks, alpha, delta):
    return conformal_risk_control(
        peaks, alpha=alpha, delta=delta, max_tokens=64, calibration_set="drawn"
    )


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "delta", "needed"), [(0.01, 0.05, 299), (0.05, 0.05, 59), (0.1, 0.1, 22)]
)
def test_responses_needed_with_none_halted(alpha, delta, needed):
    assert responses_needed(alpha, delta) == needed
    assert (1 - alpha) ** needed <= delta < (1 - alpha) ** (needed - 1)
    quiet = np.linspace(0.1, 0.2, needed)
    assert ltt(quiet, alpha, delta).threshold == just_above(np.float32(0.2))
    with pytest.raises(GuaranteeError):
        ltt(quiet[1:], alpha, delta)


def test_p_value_is_the_sum_of_the_binomial_terms():
    rng = np.random.default_rng(fresh_seed())
    for _ in range(20):
        n, alpha = int(rng.integers(1, 60)), float(rng.uniform(0.01, 0.9))
        k = int(rng.integers(0, n + 1))
        terms = (math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i) for i in range(k + 1))
        assert binomial_tail(k, n, alpha) == pytest.approx(sum(terms), rel=1e-9)


def test_clopper_pearson_inverts_the_p_value():
    rng = np.random.default_rng(fresh_seed())
    for _ in range(20):
        n, delta = int(rng.integers(1, 400)), float(rng.uniform(0.01, 0.5))
        k = int(rng.integers(0, n))
        limit = clopper_pearson(k, n, delta)
        assert binom.cdf(k, n, limit) == pytest.approx(delta, rel=1e-6)
        exact = binomtest(k, n).proportion_ci(1 - 2 * delta, method="exact")
        assert limit == pytest.approx(exact.high, rel=1e-6)
    assert clopper_pearson(5, 5, 0.1) == 1.0


@pytest.mark.parametrize("calibrate", [ltt, crc])
def test_every_fp32_threshold_tried_from_the_safest_down(calibrate):
    """The definition itself, on peaks that leave few fp32 numbers to walk over."""
    rng = np.random.default_rng(fresh_seed())
    for _ in range(30):
        n = int(rng.integers(30, 200))
        alpha, delta = float(rng.uniform(0.08, 0.4)), float(rng.uniform(0.1, 0.3))
        top = np.float32(0.75)
        grid = [top]
        for _ in range(40):
            grid.append(np.nextafter(grid[-1], np.float32(0)))
        peaks = rng.choice(np.array(grid[10:], dtype=np.float32), size=n)
        lowest = None
        for t in grid:  # descending
            reach = int((peaks >= t).sum())
            if calibrate is ltt:
                holds = binom.cdf(reach, n, alpha) <= delta
            else:
                holds = Fraction(reach + 1, n + 1) <= Fraction(str(alpha))
            if not holds:
                break
            lowest = t
        found = calibrate(peaks, alpha, delta)
        assert found.threshold == float(lowest)
        assert found.halted == int((peaks >= lowest).sum())


def test_conformal_count_is_exact_in_decimals():
    """0.29 * 100 is 28.999999999999996: one response too few if computed in floating point."""
    peaks = np.arange(99) / 128
    assert crc(peaks, 0.29, 0.1).halted == 28
    assert crc(peaks, 0.01, 0.1).halted == 0


# -- what is promised ------------------------------------------------------------------------------

CONTINUOUS = "continuous"
TIED = "tied"


def draws(kind, rng, shape):
    """Peaks and their true rate: P(peak >= t)."""
    if kind == CONTINUOUS:
        return rng.random(shape).astype(np.float32), lambda t: 1 - t
    values = np.array([0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=np.float32)
    chances = np.array([0.3, 0.3, 0.2, 0.08, 0.06, 0.04, 0.02])
    return rng.choice(values, size=shape, p=chances), lambda t: float(
        chances[values >= np.float32(t)].sum()
    )


def above(count, times, share):
    """p-value of "each is broken with probability ``share`` at most"."""
    return binomtest(count, times, share, alternative="greater").pvalue


@pytest.mark.parametrize("kind", [CONTINUOUS, TIED])
@pytest.mark.parametrize("calibrate", [ltt, crc])
def test_bound_is_broken_in_no_more_than_delta_of_all_calibrations(calibrate, kind):
    rng = np.random.default_rng(fresh_seed())
    alpha, delta, n = 0.11, 0.1, 150
    sets, rate = draws(kind, rng, (CALIBRATIONS, n))
    found = [calibrate(peaks, alpha, delta) for peaks in sets]
    rates = np.array([rate(each.threshold) for each in found])
    broken = int((rates > np.array([each.bound for each in found]) + 1e-6).sum())
    assert above(broken, CALIBRATIONS, delta) > ALARM
    if kind == CONTINUOUS:  # and it is not bought by being timid
        exact = binom.cdf(halts_allowed(n, alpha, delta), n, alpha) if calibrate is ltt else delta
        assert binomtest(broken, CALIBRATIONS, exact).pvalue > ALARM


@pytest.mark.parametrize("kind", [CONTINUOUS, TIED])
def test_conformal_risk_control_bounds_the_mean_and_not_each_calibration(kind):
    rng = np.random.default_rng(fresh_seed())
    alpha, n = 0.11, 150
    sets, rate = draws(kind, rng, (CALIBRATIONS, n))
    rates = np.array([rate(crc(peaks, alpha, 0.1).threshold) for peaks in sets])
    error = rates.std() / math.sqrt(CALIBRATIONS)
    assert rates.mean() <= alpha + 6 * error
    if kind == CONTINUOUS:
        assert rates.mean() == pytest.approx(math.floor(alpha * (n + 1)) / (n + 1), abs=6 * error)
        assert 0.3 < (rates > alpha).mean() < 0.6  # what it would be confused with


def test_figure_of_broken_promises_tends_to_its_closed_form():
    """bench/calibration.py on a pool with ties: shares, their expectation and its bound."""
    rng = np.random.default_rng(fresh_seed())
    pool = rng.integers(0, 180, 2000).astype(np.float32) ** 2 / 180**2
    result = repeated(
        pool, pool, size=300, times=CALIBRATIONS, alpha=0.05, delta=0.1, seed=fresh_seed()
    )
    for figures in result.values():
        assert figures["expected"] <= 0.1
        broken = round(figures["broken_share"] * CALIBRATIONS)
        assert binomtest(broken, CALIBRATIONS, figures["expected"]).pvalue > ALARM
        assert figures["mean_rate"] <= 0.05 + 0.003  # seven standard errors
    assert result["ltt"]["bound"] == 0.05 < result["crc"]["bound"]


# -- the kernel compares in fp32 -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernel_halts_just_what_was_counted(seed):
    """The highest peak that must be spared stays below, one ulp above it halts: on the kernel."""
    chain = random_chain(seed)

    def peak_and_verdict(halt_at):
        tiers = {"moderate": Thresholds(horizon=3, halt_at=halt_at)}
        table = Policy(tiers=tiers, default_tier="moderate").table(chain)
        kernel = Kernel(chain, table, slots=1)
        kernel.admit(0, row=0)
        for position in range(6):
            kernel.feed((0, position, logit_in_bin(position % 4)))
        return np.float32(kernel.slots.peak[0].item()), kernel.verdict()

    peak, _ = peak_and_verdict(1.0)
    found = ltt([peak] * 30, 0.1, 0.1)
    assert found.threshold == float(np.float32(found.threshold))
    assert peak_and_verdict(found.threshold)[1] == Verdict.CONTINUE
    assert peak_and_verdict(float(peak))[1] == Verdict.HALT
    written = Policy.from_yaml(
        Policy(
            tiers={"moderate": Thresholds(horizon=3, halt_at=found.threshold)},
            default_tier="moderate",
        ).to_yaml()
    )
    assert written.tiers["moderate"].halt_at == found.threshold


@pytest.mark.parametrize("peak", [0.0, 1e-45, 0.3, 0.1 + 0.2, 1 - 2**-24])
def test_next_threshold_after_a_peak(peak):
    found = ltt([peak] * 50, 0.1, 0.1)
    assert np.float32(found.threshold) > np.float32(peak)
    assert np.nextafter(np.float32(found.threshold), np.float32(0)) == np.float32(peak)
    assert found.threshold <= 1
    assert found.halted == 0


# -- bad input -------------------------------------------------------------------------------------


def test_a_set_too_small_says_how_many_more():
    with pytest.raises(
        GuaranteeError,
        match=r"^200 safe responses are too few for a false-halt rate of 0.01 with confidence "
        r"95 %: it takes at least 299 with none of them halted; add 99 more, or ask for less$",
    ):
        ltt([0.1] * 200, 0.01, 0.05)
    with pytest.raises(GuaranteeError, match=r"of 0.01 on average: .* 99 .*; add 19 more"):
        crc([0.1] * 80, 0.01, 0.05)
    with pytest.raises(GuaranteeError, match=r"^0 safe responses .* add 299 more"):
        ltt([], 0.01, 0.05)


@pytest.mark.parametrize("calibrate", [ltt, crc])
def test_no_threshold_when_too_many_reach_one(calibrate):
    with pytest.raises(GuaranteeError, match="30 of 100 safe responses reach a risk of 1"):
        calibrate([1.0] * 30 + [0.2] * 70, 0.1, 0.1)
    assert calibrate([1.0] * 2 + [0.2] * 98, 0.1, 0.1).halted >= 2


@pytest.mark.parametrize(
    ("peaks", "alpha", "delta", "message"),
    [
        ([0.1, math.nan] * 50, 0.1, 0.1, r"50 of 100 are not in \[0, 1\]"),
        ([1.1] * 100, 0.1, 0.1, r"100 of 100 are not in \[0, 1\]"),
        ([-0.1] * 100, 0.1, 0.1, r"not in \[0, 1\]"),
        (np.zeros((4, 2)), 0.1, 0.1, r"got shape \[4, 2\]"),
        ([0.1] * 100, 0.0, 0.1, "alpha: expected a number between 0 and 1, got 0.0"),
        ([0.1] * 100, 0.1, 1.0, "delta: expected .*, got 1.0"),
    ],
)
def test_bad_input(peaks, alpha, delta, message):
    for calibrate in (ltt, crc):
        with pytest.raises(GuaranteeError, match=message):
            calibrate(peaks, alpha, delta)


def test_a_length_below_one():
    with pytest.raises(GuaranteeError, match="max_tokens: expected 1 or more, got 0"):
        learn_then_test([0.1] * 99, alpha=0.1, delta=0.1, max_tokens=0, calibration_set="x")


# -- peaks of a recording --------------------------------------------------------------------------


def recording_of(rng, streams):
    prompt = rng.integers(1, 4, streams).astype(np.int32)
    rows = prompt + rng.integers(0, 9, streams)
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    position = np.concatenate([np.arange(n) for n in rows]).astype(np.int32)
    risk = rng.random(starts[-1]).astype(np.float32)
    risk[position < np.repeat(prompt - 1, rows)] = np.nan
    recording = Recording(
        bundle="",
        probes=("p",),
        hazards=(),
        streams=tuple(f"s{i}" for i in range(streams)),
        starts=starts,
        prompt_tokens=prompt,
        ended=np.ones(streams, dtype=bool),
        position=position,
        logits=np.zeros((starts[-1], 1), dtype=np.float32),
        labels=np.zeros((starts[-1], 0), dtype=np.int8),
        response_labels=np.zeros((streams, 0), dtype=np.int8),
        characters=None,
        texts=None,
        columns={},
    )
    nothing = np.zeros(streams, dtype=np.int32)
    judgement = Judgement(
        risk, np.zeros(starts[-1], np.uint8), nothing, nothing.astype(np.int16), nothing
    )
    return recording, judgement


def test_peaks_within_the_first_tokens():
    rng = np.random.default_rng(fresh_seed())
    recording, judgement = recording_of(rng, 40)
    before = None
    for cap in (1, 3, 99):
        peaks = peak_risks(recording, judgement, max_tokens=cap)
        for e, (a, b) in enumerate(zip(recording.starts, recording.starts[1:], strict=False)):
            end = min(b, a + recording.prompt_tokens[e] + cap)
            assert peaks[e] == np.nanmax(judgement.risk[a:end])
        assert before is None or (peaks >= before).all()  # a shorter cap is covered
        before = peaks
    judgement.risk[recording.starts[7] : recording.starts[8]] = np.nan
    with pytest.raises(GuaranteeError, match=r"1 of 40 streams were not judged .*'s7'"):
        peak_risks(recording, judgement, max_tokens=9)


def test_a_halt_for_a_missing_score_is_a_halt_at_any_threshold():
    rng = np.random.default_rng(fresh_seed())
    recording, judgement = recording_of(rng, 30)
    before = peak_risks(recording, judgement, max_tokens=3)
    judgement.halted_at[:] = recording.prompt_tokens + np.resize([-1, 1, 2, 3], 30)
    judgement.halted_at[::5] = -1
    judgement.cause[:] = UNSCORED_CAUSE
    judgement.cause[::7] = 0
    blind = next(e for e in range(30) if e % 5 and e % 7 and e % 4 == 1)
    judgement.risk[recording.starts[blind] : recording.starts[blind + 1]] = np.nan
    peaks = peak_risks(recording, judgement, max_tokens=3)
    for e in range(30):
        for_that = e % 5 and e % 7 and e % 4 != 3
        assert peaks[e] == (1 if for_that else before[e])


# -- in words, in the policy -----------------------------------------------------------------------


def test_sentences_and_promises():
    peaks = np.arange(1000) / 1024
    found = ltt(peaks, 0.05, 0.1)
    assert found.sentence == (
        "at most 5 % of safe responses of up to 64 tokens are falsely halted, with confidence 90 % "
        f"(learn-then-test; {found.halted} of 1000 safe responses were halted in calibration)"
    )
    promise = found.promise(24)
    assert (promise.bound, promise.confidence, promise.mean_bound) == (0.05, 0.9, None)
    other = crc(peaks, 0.05, 0.1)
    assert other.promise(24).mean_bound == 0.05 < other.promise(24).bound
    assert "on average over calibration sets" in other.sentence

    tiers = {"moderate": Thresholds(horizon=24, halt_at=found.threshold)}
    promised = Provenance(guarantee=found.sentence, false_halts={"moderate": promise})
    policy = Policy(tiers=tiers, default_tier="moderate", provenance=promised)
    assert Policy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"halt_at": 0.7}, None),
        ({"halt_at": 0.6000000238}, None),  # 0.6 in fp32, as written by hand
        ({"horizon": 3}, None),
        ({"halt_at": 0.5}, r"holds for halt_at 0.6\S* or above .* tiers.moderate has 0.5 and 24"),
        ({"horizon": 25}, r"horizon of 24 or less; tiers.moderate has 0.6\S* and 25"),
        ({"segments": True}, r"false_halts.moderate: speaks of responses .* as a whole"),
        ({"tier": "loose"}, r"false_halts.loose: no tier 'loose'"),
    ],
)
def test_a_policy_that_breaks_its_promise_is_refused(change, fault):
    level = float(np.float32(0.6))
    found = ltt([np.nextafter(np.float32(0.6), np.float32(0))] * 60, 0.05, 0.05)
    assert found.threshold == level
    tiers = {
        "moderate": {"horizon": change.get("horizon", 24), "halt_at": change.get("halt_at", level)}
    }
    segment = {"opens": ["<a>"], "closes": ["<b>"]}
    named = change.get("tier", "moderate")
    content = {
        "tiers": tiers,
        "default_tier": "moderate",
        "segments": {"reasoning": segment} if change.get("segments") else {},
        "provenance": {"false_halts": {named: found.promise(24).model_dump(exclude_none=True)}},
    }
    text = yaml.safe_dump(content)
    if fault is None:
        assert Policy.from_yaml(text).provenance.false_halts["moderate"].bound == 0.05
    else:
        with pytest.raises(PolicyError, match=fault):
            Policy.from_yaml(text)


# -- tiers -----------------------------------------------------------------------------------------


def population(rng, n):
    """Severities, and peaks that grow with them."""
    names = np.array(["benign", "low", "moderate", "high", "extreme"])
    which = rng.integers(0, 5, n)
    return names[which], (rng.random(n) * (1 + which) / 5).astype(np.float32)


def rate_of(name, t):
    """Exact P(peak >= t | the tier lets it pass) of `population`."""
    return float(np.mean([max(0, 1 - 5 * t / (1 + s)) for s in range(len(SAFE[name]))]))


def missed_of(name, t):
    severities = range(len(SAFE[name]), 5)
    return float(np.mean([min(1, 5 * t / (1 + s)) for s in severities]))


def test_tiers_hold_together_and_are_in_order():
    rng = np.random.default_rng(fresh_seed())
    targets = {"loose": 0.05, "strict": 0.1, "moderate": 0.1}
    broken = 0
    for _ in range(300):
        severities, peaks = population(rng, 800)
        found = tiers_for_false_halts(
            dict.fromkeys(TIERS, peaks),
            severities,
            targets,
            delta=0.15,
            max_tokens=64,
            calibration_set="drawn",
        )
        assert list(found) == list(TIERS)
        levels = [found[name].threshold for name in TIERS]
        assert levels == sorted(levels)
        broken += any(rate_of(name, found[name].threshold) > targets[name] for name in TIERS)
        Policy(
            tiers={n: Thresholds(horizon=4, halt_at=g.threshold) for n, g in found.items()},
            default_tier="loose",
            provenance=Provenance(false_halts={n: g.promise(4) for n, g in found.items()}),
        )
    assert above(broken, 300, 0.15) > ALARM


def test_each_tier_is_certified_at_its_share_of_delta():
    rng = np.random.default_rng(fresh_seed())
    severities, peaks = population(rng, 900)
    found = tiers_for_false_halts(
        dict.fromkeys(TIERS, peaks),
        severities,
        dict.fromkeys(TIERS, 0.1),
        delta=0.15,
        max_tokens=64,
        calibration_set="drawn",
    )
    for name in TIERS:
        alone = ltt(peaks[[s in SAFE[name] for s in severities]], 0.1, 0.05)
        assert found[name].threshold == alone.threshold  # in order already
        assert found[name].delta == pytest.approx(0.05)


def test_a_looser_tier_is_raised_to_the_stricter_one():
    peaks = np.linspace(0, 0.9, 400)
    found = tiers_for_false_halts(
        {"strict": peaks, "loose": peaks / 4},
        ["benign"] * 400,
        {"strict": 0.02, "loose": 0.5},
        delta=0.1,
        max_tokens=64,
        calibration_set="drawn",
    )
    assert found["loose"].threshold == found["strict"].threshold
    assert found["loose"].halted == 0


def test_recall_holds_together_and_is_in_order():
    rng = np.random.default_rng(fresh_seed())
    targets = {"strict": 0.9, "moderate": 0.8, "loose": 0.8}
    broken = 0
    for _ in range(300):
        severities, peaks = population(rng, 800)
        found = tiers_for_recall(dict.fromkeys(TIERS, peaks), severities, targets, delta=0.15)
        levels = [found[name].threshold for name in TIERS]
        assert levels == sorted(levels)
        for name in TIERS:
            unsafe = np.array([s not in SAFE[name] for s in severities])
            assert (
                found[name].missed == (peaks[unsafe] < np.float32(levels[TIERS.index(name)])).sum()
            )
        broken += any(missed_of(name, found[name].threshold) > 1 - targets[name] for name in TIERS)
    assert above(broken, 300, 0.15) > ALARM


def test_highest_threshold_for_recall_by_brute_force():
    rng = np.random.default_rng(fresh_seed())
    peaks = rng.integers(1, 1000, 200) / 1024
    found = tiers_for_recall({"loose": peaks}, ["high"] * 200, {"loose": 0.8}, delta=0.1)["loose"]
    lowest = 0.0
    for t in np.arange(1025) / 1024:  # between two of these nothing changes
        if binom.cdf((peaks < t).sum(), 200, 1 - 0.8) > 0.1:
            break
        lowest = t
    assert found.threshold == lowest


def test_each_tier_has_its_share_of_delta_for_recall():
    rng = np.random.default_rng(fresh_seed())
    peaks = dict.fromkeys(TIERS, rng.random(900))
    targets = dict.fromkeys(TIERS, 0.8)
    together = tiers_for_recall(peaks, ["extreme"] * 900, targets, delta=0.15)
    for name in TIERS:
        alone = tiers_for_recall(peaks, ["extreme"] * 900, {name: 0.8}, delta=0.05)[name]
        assert together[name].threshold == alone.threshold
        assert together[name].delta == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("severities", "targets", "message"),
    [
        (["benign"] * 60 + ["mild"] * 40, {"strict": 0.1}, "severities: 'mild' is not one of"),
        (["benign"] * 99, {"strict": 0.1}, "tier strict: 100 peaks and 99 severities"),
        (["benign"] * 100, {"lax": 0.1}, "targets: expected some of strict, .* got lax"),
        (["benign"] * 100, {}, "got none"),
        (["benign"] * 100, {"loose": 0.1}, "peaks: none for the tiers loose"),
        (["benign"] * 9 + ["high"] * 91, {"strict": 0.1}, "tier strict: 9 safe .* add 13 more"),
    ],
)
def test_bad_tiers(severities, targets, message):
    with pytest.raises(GuaranteeError, match=message):
        tiers_for_false_halts(
            {"strict": [0.1] * 100, "moderate": [0.1] * 100},
            severities,
            targets,
            delta=0.1,
            max_tokens=64,
            calibration_set="drawn",
        )


def test_too_few_for_a_recall():
    with pytest.raises(GuaranteeError, match=r"tier loose: 9 responses .* at least 22 .* add 13 "):
        tiers_for_recall({"loose": [0.9] * 9}, ["high"] * 9, {"loose": 0.9}, delta=0.1)
