"""Fits by counts and what is said about them: intervals, categories, the order, the report."""

from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import fresh_seed
from plain_filter import random_chain

from midstream.chain import Chain, ChainError
from midstream.learn.chains.categories import best_concentration, fit_categories
from midstream.learn.chains.counts import (
    Counts,
    ObservedStream,
    Posterior,
    count,
    fit_by_counts,
    fit_symbols_by_counts,
)
from midstream.learn.chains.fit import fit_streams
from midstream.learn.chains.intervals import (
    risk_intervals,
    sample_chains,
    violation_frequencies,
    wilson,
)
from midstream.learn.chains.order import order_test
from midstream.learn.chains.report import FitReport, category_file
from midstream.learn.chains.symbols import SymbolStream


def symbols(states, k, *, ended=True, **known):
    """A stream by its states, ``k`` for violated, which emit the last bin then."""
    states = np.array(states)
    return SymbolStream(
        bins=np.minimum(states, k - 1), violated=states == k, violates=None, ended=ended, **known
    )


def sampled(chain, streams, rng, *, longest=200, **known):
    """Streams of a chain that shows its states; those that reach ``longest`` are cut off."""
    k = chain.states
    transition, ending = np.cumsum(chain.transition, axis=1), np.array(chain.ending)
    found = []
    for start in rng.choice(k + 1, streams, p=chain.prior):
        path, ended = [start], False
        while len(path) < longest and not (ended := rng.random() < ending[path[-1]]):
            path.append(min(int((rng.random() > transition[path[-1]]).sum()), k))
        found.append(symbols(path, k, ended=ended, **known))
    return found


def showing(chain):
    """The same chain, a bin per state."""
    k = chain.states
    return chain.model_copy(
        update={
            "emission": [*np.eye(k).tolist(), np.eye(k)[-1].tolist()],
            "edges": [o + 0.5 for o in range(k - 1)],
            "prompt_emission": [[1.0]] * (k + 1),
            "prompt_edges": [],
        }
    )


V = [[0.0, 0.0, 1.0]]
# calm and uneasy, with chances that are seen in a few hundred streams
KNOWN = Chain(
    transition=[[0.8, 0.15, 0.05], [0.3, 0.5, 0.2], [0, 0, 1]],
    ending=[0.1, 0.05, 0.3],
    emission=[[1, 0], [0, 1], [0, 1]],
    edges=[0.5],
    prior=[0.6, 0.4, 0.0],
    prompt_emission=[[1.0]] * 3,
    prompt_edges=[],
)


# -- counts ----------------------------------------------------------------------------------------


def test_levels_and_evidence_are_counted_by_the_same_code():
    rng = np.random.default_rng(fresh_seed())
    edges = [0.5, 2.0, 7.0]
    observed = []
    for _ in range(20):
        n = int(rng.integers(1, 30))
        violated = np.arange(n) >= (rng.integers(0, 40) if observed else n - 1)  # one does
        hazard, prompt = rng.exponential(3.0, n), float(rng.exponential(1.0))
        observed.append(ObservedStream(hazard, violated, bool(rng.random() < 0.5), prompt))
    streams = [stream.symbols(edges, [1.0]) for stream in observed]
    of_evidence = fit_by_counts(observed, edges, prompt_edges=[1.0], prior_count=0.7)
    of_levels = fit_symbols_by_counts(streams, 4, prior_count=0.7)
    assert of_levels.edges == [0.5, 1.5, 2.5]
    assert of_levels.prompt_edges == [0.5]
    for name in ("transition", "ending", "emission", "prior", "prompt_emission"):
        assert getattr(of_levels, name) == getattr(of_evidence, name)
    assert np.array_equal(np.searchsorted(of_levels.edges, range(4), side="right"), range(4))


def test_a_trace_of_levels_by_hand():
    streams = [
        symbols([0, 0, 1, 2, 2], 2),
        symbols([0, 1, 0], 2, ended=False),
        SymbolStream(np.array([1]), None, False, True),
    ]
    chain = fit_symbols_by_counts(streams, 2, prior_count=0)
    assert chain.transition == [[1 / 3, 2 / 3, 0], [0.5, 0, 0.5], [0, 0, 1]]
    np.testing.assert_allclose(chain.ending, [0, 1 / 3, 1 / 2])
    assert chain.emission == [[1, 0], [0, 1], [0, 1]]
    np.testing.assert_allclose(chain.prior, [2 / 3, 1 / 3, 0])


def test_counts_add_up_and_are_taken_away():
    rng = np.random.default_rng(fresh_seed())
    chain = showing(random_chain(3))
    parts = [sampled(chain, n, rng) for n in (7, 5)]
    both = count(parts[0] + parts[1], 3)
    for name in ("moves", "ends", "emission", "first"):
        one, other = (getattr(count(part, 3), name) for part in parts)
        np.testing.assert_array_equal(getattr(both, name), one + other)
        np.testing.assert_array_equal(getattr(both - count(parts[1], 3), name), one)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (SymbolStream(np.array([0, 3]), None, False, True), "stream 1: has bin 3, expected bins b"),
        (SymbolStream(np.array([0]), None, True, True), "stream 1: violates, but nobody knows whe"),
        (SymbolStream(np.array([0]), None, None, True), "stream 1: may violate or not; to fit by"),
        (SymbolStream(np.array([0]), None, False, True, 5), "stream 1: its prompt's bin is 5, exp"),
    ],
)
def test_a_stream_that_cannot_be_counted_is_named(stream, message):
    with pytest.raises(ChainError, match=message):
        fit_symbols_by_counts([symbols([0, 3], 3), stream], 3, prompt_edges=[0.5])


# -- intervals -------------------------------------------------------------------------------------


def test_credible_and_wilson_intervals_cover_the_known_risk_as_often_as_they_say():
    rng = np.random.default_rng(1)  # a claim about shares, which some draws miss
    horizons, level, trials = [1, 4, 12], 0.9, 120
    known = np.stack([KNOWN.horizon(h)[:2] for h in horizons])
    credible, frequency = np.zeros((2, 3, 2))
    for trial in range(trials):
        streams = sampled(KNOWN, 150, rng)
        posterior = count(streams, 2).posterior(1.0)
        found = risk_intervals(posterior, horizons, draws=300, seed=trial, level=level)
        credible += (found.low[:, :2] <= known) & (known <= found.high[:, :2])
        seen = violation_frequencies(streams, 2, horizons, level=level)
        assert (seen.unknown == 0).all()
        frequency += (seen.low <= known) & (known <= seen.high)
    # 3.5 standard errors of a share of 120; Wilson's own coverage wavers by about 0.03 beside it
    reach = 3.5 * np.sqrt(level * (1 - level) / trials)
    assert (abs(credible / trials - level) < reach + 0.02).all(), credible / trials
    assert (abs(frequency / trials - level) < reach + 0.03).all(), frequency / trials


def test_sampled_chains_have_the_moments_of_their_dirichlets_small_counts_included():
    moves = np.array([[0.02, 0.3, 2.0], [5.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    ends = np.array([[0.1, 0.4], [3.0, 9.0], [1.0, 1.0]])
    p = sample_chains(Posterior(moves, ends), 40_000, seed=fresh_seed() % 2**32)
    np.testing.assert_allclose(p.sum(axis=2), 1, atol=1e-12)
    going_on = 1 - p[:, :2, -1:]
    for drawn, alphas in (
        (np.where(going_on > 0, p[:, :2, :3] / np.maximum(going_on, 1e-300), np.nan), moves[:2]),
        (np.concatenate([p[:, :2, -1:], going_on], axis=2), ends[:2]),
    ):
        total = alphas.sum(axis=1, keepdims=True)
        mean = alphas / total
        np.testing.assert_allclose(np.nanmean(drawn, axis=0), mean, atol=0.01)
        variance = mean * (1 - mean) / (total + 1)
        np.testing.assert_allclose(np.nanvar(drawn, axis=0), variance, rtol=0.06, atol=2e-3)


def test_intervals_are_seeded_and_shrink_with_the_root_of_the_streams():
    rng = np.random.default_rng(2)  # shrink about so, and not in every draw
    few, many = (count(sampled(KNOWN, n, rng), 2).posterior(1.0) for n in (150, 2400))
    one, same, other = (risk_intervals(few, [3], draws=500, seed=seed) for seed in (4, 4, 5))
    assert one.low.tolist() == same.low.tolist()
    assert one.low.tolist() != other.low.tolist()
    narrow = risk_intervals(many, [3], draws=500)
    ratio = (one.high - one.low)[0, :2] / (narrow.high - narrow.low)[0, :2]
    assert (abs(np.log2(ratio) - 2) < 0.6).all(), ratio


def test_a_horizon_far_off_comes_by_squaring():
    posterior = count([symbols([0, 1, 2], 2), symbols([1, 0], 2)], 2).posterior(1.0)
    step, far = (risk_intervals(posterior, h, draws=50) for h in (range(300), [299, 10**6]))
    np.testing.assert_allclose(far.mean[0], step.mean[-1], rtol=1e-10)
    assert (far.high[1] <= 1 + 1e-12).all()


def test_first_visits_by_hand():
    streams = [
        symbols([0, 0, 1, 2], 2),  # 0 at 0, violated at 3; 1 at 2
        symbols([0, 1, 1, 0], 2),  # ends without
        symbols([0, 1], 2, ended=False),  # cut off
        symbols([2, 2], 2),
    ]
    seen = violation_frequencies(streams, 2, [0, 1, 2, 3])
    assert seen.visits.tolist() == [[3, 3], [3, 2], [2, 2], [2, 2]]
    assert seen.violated.tolist() == [[0, 0], [0, 1], [0, 1], [1, 1]]
    assert seen.unknown.tolist() == [[0, 0], [0, 1], [1, 1], [1, 1]]


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    rng = np.random.default_rng(fresh_seed())
    trials = rng.integers(1, 60, 30)
    hits = rng.binomial(trials, rng.random(30))
    low, high = wilson(hits, trials, level=0.9)
    for k, n, *ours in zip(hits.tolist(), trials.tolist(), low, high, strict=True):
        theirs = binomtest(k, n).proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose(ours, [theirs.low, theirs.high], atol=1e-12)
    assert wilson(np.array([0]), np.array([0])) == (0, 1)


def test_intervals_that_make_no_sense_are_refused():
    posterior = count([symbols([0, 2], 2)], 2).posterior(1.0)
    for horizons in ([], [3, 2], [-1, 2], [1, 1]):
        with pytest.raises(ChainError, match="horizons: expected ascending ones of 0 or more"):
            risk_intervals(posterior, horizons)
    with pytest.raises(ChainError, match="level: expected between 0 and 1, got 1"):
        risk_intervals(posterior, [1], level=1)
    with pytest.raises(ChainError, match="draws: expected 2 or more, got 1"):
        risk_intervals(posterior, [1], draws=1)
    with pytest.raises(ChainError, match="a parameter is 0; fit with a prior count above 0"):
        risk_intervals(count([symbols([0, 2], 2)], 2).posterior(0), [1])


# -- categories ------------------------------------------------------------------------------------


def test_the_concentration_of_rows_that_were_drawn_with_one_is_found():
    rng = np.random.default_rng(3)  # an estimate, near the truth mostly
    center = np.array([0.5, 0.3, 0.15, 0.05])
    for concentration in (3.0, 60.0):
        rows = rng.dirichlet(concentration * center, 400)
        counts = np.array([rng.multinomial(150, row) for row in rows], float)
        found = best_concentration(counts, np.broadcast_to(center, counts.shape))
        assert found == pytest.approx(concentration, rel=0.3)
    alike = rng.multinomial(50, center, 400).astype(float)
    assert best_concentration(alike, np.broadcast_to(center, alike.shape)) > 200


def test_shrinkage_beats_both_the_pooled_and_the_raw_chains_on_new_streams():
    rng = np.random.default_rng(4)  # on average, and not in every draw
    base, odd = (showing(random_chain(seed, states=3)) for seed in (1, 2))
    mixed = np.array(base.transition) * 0.8 + np.array(odd.transition) * 0.2
    chains = {f"c{i}": base for i in range(4)} | {
        "odd": base.model_copy(update={"transition": mixed.tolist()})
    }
    counts = {name: count(sampled(c, 12, rng), 3) for name, c in chains.items()}
    edges = [0.5, 1.5]
    found = fit_categories(counts, edges=edges)

    def loss(chains_of):
        """Mean over categories and states of the Kullback-Leibler divergence of the moves."""
        total = 0.0
        for name, chain in chains.items():
            p = np.array(chain.transition)[:3]
            q = np.array(chains_of(name).transition)[:3]
            total += float((p * np.log(p / np.maximum(q, 1e-12))).sum())
        return total

    raw = {name: fit_symbols_by_counts_of(part, edges) for name, part in counts.items()}
    assert loss(found.of) < loss(raw.__getitem__)
    many = {name: count(sampled(c, 800, rng), 3) for name, c in chains.items()}
    found = fit_categories(many, edges=edges)
    assert loss(found.of) < loss(lambda _: found.pooled)
    assert found.concentration["transition"] < 1e5


def fit_symbols_by_counts_of(counts, edges):
    from midstream.learn.chains.counts import chain_of

    return chain_of(counts, edges=edges, prior_count=0.01)


def test_one_category_is_the_pooled_chain():
    rng = np.random.default_rng(fresh_seed())
    counts = count(sampled(showing(random_chain(5)), 40, rng), 3)
    found = fit_categories({"only": counts}, edges=[0.5, 1.5])
    assert found.of("only") == found.pooled
    assert set(found.concentration.values()) == {np.inf}


def test_categories_that_cannot_be_compared_are_refused():
    counts = count([symbols([0, 1, 2], 2)], 2)
    with pytest.raises(ChainError, match="no category given"):
        fit_categories({}, edges=[0.5])
    with pytest.raises(ChainError, match="prior_count: expected more than 0"):
        fit_categories({"a": counts}, edges=[0.5], prior_count=0)
    calm = count([symbols([0, 1], 2)], 2)
    with pytest.raises(ChainError, match="no stream violates"):
        fit_categories({"a": calm}, edges=[0.5])


# -- the order -------------------------------------------------------------------------------------


def test_the_order_test_by_hand():
    # all triples round state 0: (before, after) in (0, 1) x (0, 1), and from 1 to 0 to 1
    streams = [symbols(path, 2, ended=False) for path in ([0, 0, 0], [0, 0, 1], [1, 0, 1])]
    found = order_test([*streams, symbols([1, 0, 2], 2, ended=False)], 2)
    from scipy.stats import chi2_contingency

    table = np.array([[1, 1, 0], [0, 1, 1]])
    expected = chi2_contingency(table, correction=False)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.degrees == expected.dof == 2
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.triples, found.cells, found.small_cells) == (4, 6, 6)
    assert "6 of 6 expected counts are below 5" in found.note


def test_the_order_test_keeps_its_level_under_order_one():
    rng = np.random.default_rng(5)  # a test of level 5 % is above its level in some draws
    values = np.array([order_test(sampled(KNOWN, 200, rng), 2).p_value for _ in range(200)])
    # Binomial(200, 0.05), and not all of them near 1
    assert (values < 0.05).sum() <= 22
    assert 0.35 < values.mean() < 0.65


def test_the_order_test_sees_a_chain_of_order_two():
    rng = np.random.default_rng(6)  # mostly, as its power is below 1
    found = []
    for _ in range(20):
        streams = []
        for _ in range(100):
            path = [0, int(rng.integers(2))]
            while len(path) < 20 and path[-1] < 2:
                again = 0.65 if path[-1] == path[-2] else 0.35  # momentum
                stays = rng.random() < again
                violates = rng.random() < 0.1
                path.append(2 if violates else path[-1] if stays else 1 - path[-1])
            streams.append(symbols(path, 2, ended=False))
        found.append(order_test(streams, 2))
    assert all(test.p_value < 1e-3 for test in found)
    assert all(test.note == "" for test in found)


def test_where_nothing_can_be_compared_it_is_said():
    found = order_test([symbols([0, 0, 0], 2)], 2)
    assert (found.p_value, found.degrees) == (None, 0)
    assert "nothing can be compared" in found.note
    with pytest.raises(ChainError, match="no streams"):
        order_test([], 2)


# -- the report ------------------------------------------------------------------------------------


def test_a_fit_of_steps_tells_its_categories_apart_and_reads_back():
    rng = np.random.default_rng(7)  # better held out, and closer, in most draws
    calm, wild = KNOWN, KNOWN.model_copy(update={"transition": [[0.5, 0.5, 0], [0, 0.5, 0.5], *V]})
    streams = sampled(calm, 150, rng, category="calm/ly") + sampled(wild, 150, rng, category="wild")
    streams += sampled(calm, 5, rng)
    fit = fit_streams(streams, edges=[0.5], categories=True, clock="step", draws=200)
    files = fit.files()
    assert set(files) == {"chain.json", "chain-calm%2Fly.json", "chain-wild.json", "fit.json"}
    assert Chain.from_json(files[category_file("wild")].decode()) == fit.categories["wild"]
    report = FitReport.from_json(files["fit.json"].decode())
    assert report == fit.report
    assert (report.clock, report.streams, report.by) == ("step", 305, "counts")
    assert report.categories["wild"].streams == 150
    assert report.held_out["by_category"] > report.held_out["pooled"]
    low, high = report.intervals.at(5)
    assert all(a <= b <= c for a, b, c in zip(low, fit.chain.horizon(5), high, strict=True))
    assert report.intervals.at(33) is None
    for name, chain in (("calm/ly", calm), ("wild", wild)):
        own = fit.categories[name].horizon(10) - chain.horizon(10)
        pooled = fit.chain.horizon(10) - chain.horizon(10)
        assert abs(own).mean() < abs(pooled).mean()


def test_a_fit_by_em_chooses_its_states_and_needs_no_labels_of_tokens():
    rng = np.random.default_rng(fresh_seed())
    streams = [
        replace(stream, violated=None, violates=bool(stream.violated[-1]))
        for stream in sampled(KNOWN, 60, rng, longest=15)
    ]
    fit = fit_streams(streams, edges=[0.5], by="em", states=2, draws=100)
    assert fit.chain.states == 2
    assert fit.report.intervals is None
    assert fit.report.em["choice"] is None
    assert np.isfinite(fit.report.held_out["pooled"])


def test_what_does_not_go_together_is_refused():
    streams = [symbols([0, 1, 2], 2)]
    with pytest.raises(ChainError, match="no stream given"):
        fit_streams([], edges=[0.5])
    with pytest.raises(ChainError, match="by counts the bins are the states"):
        fit_streams(streams, edges=[0.5], states=3)
    with pytest.raises(ChainError, match="chains per category are fitted by counts"):
        fit_streams(streams, edges=[0.5], by="em", states=2, categories=True)
    with pytest.raises(ChainError, match=r"fit\.json: by: Field required"):
        FitReport.from_json("{}")


def test_counts_have_no_negative_prior():
    nothing = np.zeros((3, 3))
    with pytest.raises(ChainError, match="prior_count: expected 0 or more, got -2"):
        Counts(nothing, np.zeros(3), np.zeros((3, 2)), np.zeros((3, 1))).posterior(-2)
