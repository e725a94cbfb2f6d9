"""Anytime-valid halting: martingales against closed forms, bounds by simulation, where they break.

A bound that holds is tested on the safe side only, at a level that a correct one fails once in a
billion runs; where an assumption is broken on purpose the bound has to break visibly.
"""

import math

import numpy as np
import pytest
from kernel_cases import fresh_seed
from plain_filter import PlainStream, logit_in_bin, random_chain
from scipy.integrate import quad
from scipy.stats import beta, binomtest, norm

from midstream.chain import Chain
from midstream.learn.anytime import (
    TailPValues,
    bets,
    chance_of_violation,
    changepoint_process,
    halts_at,
    odds_process,
    risk_threshold,
    spending_process,
)
from midstream.learn.guarantee import GuaranteeError
from midstream.policy import Thresholds

ALARM = 1e-9


def above(count, times, share):
    """p-value of "each with probability ``share`` at most"."""
    return binomtest(int(count), times, share, alternative="greater").pvalue


# -- bets ------------------------------------------------------------------------------------------


def test_a_bet_is_the_mixture_of_powers_and_has_mean_one():
    for p in (1e-8, 1e-3, 0.05, 0.3, 0.9, 0.998, 0.9995, 1 - 1e-7, 1.0):
        mixture, _ = quad(lambda kappa, p=p: kappa * p ** (kappa - 1), 0, 1)
        assert bets(p) == pytest.approx(mixture, rel=1e-8)
    # over u = -ln p: the integral of f from a to 1 is 1 - (1 - a) / -ln a
    for a in (1e-3, 1e-9, 1e-30):
        whole, _ = quad(lambda u: float(bets(math.exp(-u))) * math.exp(-u), 0, -math.log(a))
        assert whole == pytest.approx(1 - (1 - a) / -math.log(a), rel=1e-6)


def test_a_p_value_that_underflows_bets_without_bound():
    assert bets([0.0, 5e-324]).tolist() == [math.inf, math.inf]
    assert halts_at(changepoint_process(bets([1.0, 0.0, 1.0])), 0.01) == 1


def test_processes_are_their_sums():
    rng = np.random.default_rng(fresh_seed())
    e = rng.exponential(size=(3, 12))
    w = [1 / (s * (s + 1)) for s in range(1, 13)]
    mixture, spent = changepoint_process(e), spending_process(e)
    for row in range(3):
        for t in range(12):
            products = sum(w[s] * np.prod(e[row, s : t + 1]) for s in range(t + 1))
            unspent = 1 - sum(w[: t + 1])
            assert mixture[row, t] == pytest.approx(products + unspent, rel=1e-12)
            assert spent[row, t] == pytest.approx(np.dot(w[: t + 1], e[row, : t + 1]), rel=1e-12)


def test_first_time_it_is_reached():
    process = [[1.0, 9.9, 10.0, 50.0], [1.0, math.nan, 2.0, 9.9], [math.inf, 0.0, 0.0, 0.0]]
    assert halts_at(process, 0.1).tolist() == [2, -1, 0]
    assert halts_at(np.empty((2, 0)), 0.1).tolist() == [-1, -1]


def test_a_process_that_overflows_stays_up():
    assert changepoint_process(np.full(400, 1e4))[-1] == math.inf


# -- Ville's inequality ----------------------------------------------------------------------------

STREAMS, TOKENS = 4000, 400


@pytest.mark.parametrize("process", [changepoint_process, spending_process])
def test_independent_tokens_are_halted_no_more_than_alpha(process):
    rng = np.random.default_rng(fresh_seed())
    for alpha in (0.05, 0.3):
        halted = halts_at(process(bets(rng.random((STREAMS, TOKENS)))), alpha) >= 0
        assert above(halted.sum(), STREAMS, alpha) > ALARM


def test_mixture_of_products_uses_its_bound():
    """It finds a lasting change of weak evidence, which the sum does not."""
    rng = np.random.default_rng(fresh_seed())
    p = rng.random((300, 160))
    p[:, 60:] **= 2
    at = halts_at(changepoint_process(bets(p)), 0.05)
    late = at[at >= 60]
    assert len(late) > 200
    assert np.median(late) < 110
    assert (halts_at(spending_process(bets(p)), 0.05) >= 60).mean() < 0.2


def test_dependent_tokens_break_products_and_not_sums():
    """Every token of a stream shares its stream's oddity: p-values right one by one, not in a row.

    The score is ``sqrt(.5) (u + noise)`` with one u per stream, so each is standard normal.
    """
    rng = np.random.default_rng(fresh_seed())
    alpha = 0.05
    shared, own = rng.normal(size=(STREAMS, 1)), rng.normal(size=(STREAMS, TOKENS))
    p = norm.sf(math.sqrt(0.5) * (shared + own))
    assert abs((p[:, 7] <= 0.1).mean() - 0.1) < 0.04  # marginally uniform
    assert (halts_at(changepoint_process(bets(p)), alpha) >= 0).mean() > 2 * alpha
    assert above((halts_at(spending_process(bets(p)), alpha) >= 0).sum(), STREAMS, alpha) > ALARM
    # given the past, here through u, they are right again, and so is the product
    conditional = norm.sf(own)
    halted = halts_at(changepoint_process(bets(conditional)), alpha) >= 0
    assert above(halted.sum(), STREAMS, alpha) > ALARM


# -- p-values from a calibration set ---------------------------------------------------------------


def test_tails_hold_at_once_with_the_confidence_stated():
    """Over calibrations: all limits of all contexts hold but for a share of delta, and not idly."""
    rng = np.random.default_rng(fresh_seed())
    delta, broken, spare = 0.2, 0, []
    for _ in range(400):
        z, context = rng.random(600), np.repeat([3, 8], [500, 100])
        found = TailPValues.fit(z, context, delta=delta)
        gaps = np.concatenate([found.tails[c] - (1 - found.levels[c]) for c in (3, 8)])
        broken += (gaps < 0).any()
        spare.append(float((gaps < 0).any()))
        assert [len(found.levels[c]) for c in (3, 8)] == [8, 6]  # 1 ... 128 of 250, 1 ... 32 of 50
        assert (np.diff(found.levels[3]) <= 0).all()
        assert (np.diff(found.tails[3]) > 0).all()
    assert above(broken, 400, delta) > ALARM
    assert np.mean(spare) > delta / 20  # Bonferroni over dependent levels loses some


def test_p_value_is_the_tail_of_the_level_passed():
    z = np.arange(1, 101, dtype=float)
    found = TailPValues.fit(z, np.zeros(100, dtype=int), delta=0.1)
    levels, tails = found.levels[0], found.tails[0]
    assert levels.tolist() == [100, 99, 97, 93, 85, 69]
    assert tails[0] == pytest.approx(1 - (0.1 / 6) ** (1 / 100))  # in closed form
    ranks = [1, 2, 4, 8, 16, 32]
    assert tails == pytest.approx([beta.ppf(1 - 0.1 / 6, k, 101 - k) for k in ranks])
    scores = [101, 100, 99.5, 99, 97.5, 70, 69, -5, math.nan, 101]
    contexts = [0] * 9 + [4]
    expected = [tails[0], tails[1], tails[1], tails[2], tails[2], tails[5], 1, 1, 1, 1]
    assert found(scores, contexts).tolist() == expected
    for z_new, p in zip(scores[:8], expected, strict=False):  # by the definition
        assert p == min([t for level, t in zip(levels, tails, strict=True) if z_new > level] + [1])


def test_dependent_stream_with_its_context_is_bounded_and_without_is_not():
    """A safe stream of two moods that last: scores depend on the past through the mood alone."""
    rng = np.random.default_rng(fresh_seed())
    alpha, delta, streams = 0.05, 0.01, 1500
    start = rng.random((2, streams, 1)) < 0.1
    flips = np.cumsum(rng.random((2, streams, TOKENS)) < 0.004, axis=2) % 2 == 1
    mood = (start ^ flips).astype(int)
    scores = rng.normal(size=mood.shape) + 2.5 * mood
    fit_scores, fit_mood = scores[0], mood[0]

    first = [  # of each stream the first visit to each mood
        (fit_scores[i, at[0]], c)
        for i in range(streams)
        for c in (0, 1)
        if len(at := np.flatnonzero(fit_mood[i] == c))
    ]
    z, context = map(np.array, zip(*first, strict=True))
    right = TailPValues.fit(z, context, delta=delta)
    halted = halts_at(changepoint_process(bets(right(scores[1], mood[1]))), alpha) >= 0
    assert above(halted.sum(), streams, alpha) > ALARM / 10

    blind = TailPValues.fit(fit_scores[:, 0], np.zeros(streams, dtype=int), delta=delta)
    nowhere = np.zeros_like(mood[1])
    assert (halts_at(changepoint_process(bets(blind(scores[1], nowhere))), alpha) >= 0).mean() > 0.2


def test_places_in_the_stream_as_contexts_need_no_independence():
    rng = np.random.default_rng(fresh_seed())
    alpha, streams, chunks = 0.2, 2000, 8

    def peaks_of_chunks():
        z = rng.normal(size=(streams, 1)) + rng.normal(size=(streams, 2**chunks - 1)).cumsum(1) / 9
        return np.stack([z[:, 2**c - 1 : 2 ** (c + 1) - 1].max(1) for c in range(chunks)], axis=1)

    where = np.broadcast_to(np.arange(chunks), (streams, chunks))
    found = TailPValues.fit(peaks_of_chunks().ravel(), where.ravel(), delta=0.01)
    halted = halts_at(spending_process(bets(found(peaks_of_chunks(), where))), alpha) >= 0
    assert above(halted.sum(), streams, alpha) > ALARM


@pytest.mark.parametrize(
    ("scores", "contexts", "message"),
    [
        ([], [], "at least one"),
        ([1.0, 2.0], [0], r"one length, .* got \[2\] and \[1\]"),
        ([1.0, math.nan], [0, 0], "1 of 2 scores are not finite"),
    ],
)
def test_nothing_to_fit_on(scores, contexts, message):
    with pytest.raises(GuaranteeError, match=message):
        TailPValues.fit(scores, contexts, delta=0.1)


# -- odds of a risk that is right ------------------------------------------------------------------


def small_chain(seed):
    return random_chain(seed, states=2, bins=2, ending=0.08)


def ever(chain):
    return np.append(chain.absorption()[:, 0], 1.0)


def leaves(chain, halt_at, depth=9):
    """Every story of a chain, by exact enumeration: (P(so and safe), P(so and violated), halted).

    Ends at a halt, at the end of the stream, or at ``depth`` tokens.
    """
    a, c, e = map(np.array, (chain.transition, chain.ending, chain.emission))

    def grow(joint, left, judged):
        violates = float(joint @ ever(chain))
        safe = float(joint.sum()) - violates
        halted = judged and violates / (violates + safe) >= halt_at
        if halted or not left:
            yield safe, violates, halted
            return
        yield float((joint * c)[:-1].sum()), float((joint * c)[-1]), False
        for o in range(e.shape[1]):
            yield from grow(((joint * (1 - c)) @ a) * e[:, o], left - 1, True)

    return list(grow(np.array(chain.prior), depth, False))


@pytest.mark.parametrize("trial", range(3))
def test_odds_are_a_martingale_on_safe_streams(trial):
    """Whatever the rule to stop, here a halt, their mean over safe streams is 1."""
    chain = small_chain(fresh_seed())
    chance = chance_of_violation(chain)
    for alpha in (0.2, 1 - 1e-9):
        safe, violates, _ = np.array(leaves(chain, risk_threshold(chance, alpha))).T
        e = odds_process(violates / (safe + violates), chance)
        keep = safe > 0
        # where no story is surely violated there is nothing else
        assert (safe * e)[keep].sum() / safe.sum() == pytest.approx(
            violates[keep].sum() / violates.sum(), rel=1e-9
        )
        assert safe.sum() == pytest.approx(1 - chance)


@pytest.mark.parametrize("trial", range(3))
def test_safe_streams_are_ever_halted_no_more_than_alpha_exactly(trial):
    chain = small_chain(fresh_seed())
    chance = chance_of_violation(chain)
    some = 0.0
    for alpha in (0.1, 0.3, 0.6, 0.9):
        safe, _, halted = np.array(leaves(chain, risk_threshold(chance, alpha))).T
        share = safe[halted == 1].sum() / safe.sum()
        assert share <= alpha + 1e-9
        some = max(some, share)
    assert some > 0


def test_threshold_and_process_agree():
    rng = np.random.default_rng(fresh_seed())
    for chance, alpha in rng.uniform(0.01, 0.99, (50, 2)):
        level = np.float32(risk_threshold(chance, alpha))
        below = np.nextafter(level, np.float32(0))
        assert float(level) == risk_threshold(chance, alpha)  # fp32, as the kernels compare
        at = odds_process([float(below), float(level)], chance)
        assert at[0] < 1 / alpha <= at[1] * (1 + 1e-12)
    process = odds_process([0.25, math.nan, 1.0], 0.5)
    assert process[0] == pytest.approx(1 / 3)
    assert math.isnan(process[1])
    assert process[2] == math.inf


def halted_share_of_safe(chain, rng, streams, alpha, sticky):
    """Draw streams and filter them; with ``sticky`` a token may repeat the bin before it, a memory
    that the chain knows nothing of."""
    a, c, e = map(np.array, (chain.transition, chain.ending, chain.emission))
    level, violates_from = risk_threshold(chance_of_violation(chain), alpha), ever(chain)
    safe = halts = 0
    for _ in range(streams):
        state, o, halted, violated = rng.choice(len(a), p=chain.prior), None, False, False
        plain = PlainStream(chain, Thresholds(horizon=0, halt_at=1.0), "pass")
        while True:
            violated |= state == len(a) - 1
            if rng.random() < c[state]:
                break
            state = rng.choice(len(a), p=a[state] / a[state].sum())
            if o is None or rng.random() >= sticky:
                o = int(rng.choice(e.shape[1], p=e[state] / e[state].sum()))
            plain.token(logit_in_bin(o))
            halted |= float(plain.belief @ violates_from) >= level
        safe += not violated
        halts += halted and not violated
    return halts, safe


# Two states that look much alike at each token and lead to different ends.
DRIFTING = Chain(
    transition=[[0.97, 0.03, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]],
    ending=[0.04, 0.04, 0.04],
    emission=[[0.6, 0.4], [0.2, 0.8], [0.2, 0.8]],
    edges=[1.0],
    prior=[1.0, 0.0, 0.0],
    prompt_emission=[[1.0], [1.0], [1.0]],
    prompt_edges=[],
)


def test_bound_holds_where_the_chain_is_right_and_breaks_where_tokens_have_more_memory():
    rng = np.random.default_rng(fresh_seed())
    alpha = 0.05
    halts, safe = halted_share_of_safe(DRIFTING, rng, 600, alpha, sticky=0.0)
    assert above(halts, safe, alpha) > ALARM
    # about a sixth is halted, which not every draw of so few streams shows
    halts, safe = halted_share_of_safe(DRIFTING, np.random.default_rng(1), 400, alpha, sticky=0.95)
    assert above(halts, safe, alpha) < 1e-3


def test_chance_of_violation_by_hand():
    chain = DRIFTING.model_copy(update={"prior": [0.5, 0.25, 0.25]})
    # by hand: state 1 violates w.p. .96 * .1 / (1 - .96 * .9), state 0 moves there likewise
    from_1 = 0.96 * 0.1 / (1 - 0.96 * 0.9)
    from_0 = 0.96 * 0.03 * from_1 / (1 - 0.96 * 0.97)
    assert chance_of_violation(chain) == pytest.approx(0.5 * from_0 + 0.25 * from_1 + 0.25)


@pytest.mark.parametrize(("chance", "alpha"), [(0.0, 0.1), (1.0, 0.1), (0.2, 0.0), (0.2, 1.0)])
def test_chances_that_are_none(chance, alpha):
    with pytest.raises(GuaranteeError, match="expected a number between 0 and 1"):
        risk_threshold(chance, alpha)
