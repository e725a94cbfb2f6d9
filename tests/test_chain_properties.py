"""The algebra of the chain, for any chain: properties and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plain_filter import Kernel, logit_in_bin, random_chain

from midstream.absorbing import fundamental_matrix, power
from midstream.chain import (
    MAX_CURVE,
    MAX_HORIZON,
    Chain,
    ChainError,
    SingularChainError,
    Zone,
)
from midstream.kernels import reference
from midstream.kernels.reference_advance import _normalise
from midstream.learn.chains.categories import fit_categories, log_evidence, shrunk
from midstream.learn.chains.counts import Counts, chain_of
from midstream.learn.chains.intervals import risk_intervals, wilson
from midstream.policy import Policy

FIXTURE = {
    "transition": [[0.5, 0.3, 0.2], [0, 0.4, 0.6], [0, 0, 1]],
    "ending": [0, 0, 0],
    "emission": [[1.0]] * 3,
    "edges": [],
    "prior": [1.0, 0.0, 0.0],
    "prompt_emission": [[1.0]] * 3,
    "prompt_edges": [],
}

horizons = st.integers(0, 400)


@st.composite
def chains(draw):
    """Chains with zeros, rare moves and states that only lead to each other or to themselves."""
    k = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    spread = draw(st.sampled_from([0.05, 0.3, 1.0]))
    rows = rng.dirichlet(np.full(k + 1, spread), k)
    rows[rows < draw(st.sampled_from([0.0, 1e-6, 0.05]))] = 0.0
    rows /= rows.sum(axis=1, keepdims=True)
    ending = rng.uniform(0, 1, k + 1) ** draw(st.sampled_from([1, 4, 30]))
    ending[rng.random(k + 1) < 0.3] = 0.0
    return Chain(
        transition=[*rows.tolist(), [0.0] * k + [1.0]],
        ending=ending.tolist(),
        emission=rng.dirichlet(np.ones(3), k + 1).tolist(),
        edges=[1.0, 2.0],
        prior=rng.dirichlet(np.ones(k + 1)).tolist(),
        prompt_emission=[[1.0]] * (k + 1),
        prompt_edges=[],
    )


def absorbed(chain):
    """B [K, 2], of chains whose absorption is well conditioned."""
    try:
        found = chain.absorption()
    except SingularChainError:
        assume(False)
    assume(chain.expected_tokens().max() < 1e8)
    return found


# -- closed forms ----------------------------------------------------------------------------------


def test_the_fixture_to_1e_12():
    chain = Chain(**FIXTURE)
    exactly = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(chain.visits(), [[2, 1], [0, 5 / 3]], **exactly)
    np.testing.assert_allclose(chain.expected_tokens(), [3, 5 / 3], **exactly)
    np.testing.assert_allclose(chain.absorption(), [[1, 0], [1, 0]], **exactly)
    # by hand: with x = 0.5^h and y = 0.4^h, P^h[0, 1] = 0.3 (x - y) / 0.1
    h = np.arange(61)
    x, y = 0.5**h, 0.4**h
    by_hand = np.stack([1 - x - 3 * (x - y), 1 - y, np.ones(61)], axis=1)
    np.testing.assert_allclose(chain.horizon_curve(60), by_hand, **exactly)
    passage = np.diff(by_hand[:, :2], axis=0).T
    np.testing.assert_allclose(chain.first_passage(60), passage, **exactly)
    np.testing.assert_allclose(chain.first_passage_tail(7), 1 - by_hand[7, :2], **exactly)
    assert chain.zones() == [Zone.NO_RETURN, Zone.NO_RETURN]
    assert chain.zones(1) == [Zone.SAFE, Zone.WATCH]
    assert chain.points_of_no_return(0.84, 2) == [1]
    assert chain.points_of_no_return(0.85, 2) == []


def test_a_zone_begins_at_its_level():
    levels = [0.2999999, 0.3, 0.8499999, 0.85]
    rows = [[*np.eye(4)[i] * (1 - level), level] for i, level in enumerate(levels)]
    chain = Chain(
        transition=[*(list(map(float, row)) for row in rows), [0.0] * 4 + [1.0]],
        ending=[0.0] * 5,
        emission=[[1.0]] * 5,
        edges=[],
        prior=[0.2] * 5,
        prompt_emission=[[1.0]] * 5,
        prompt_edges=[],
    )
    np.testing.assert_allclose(chain.risk(1), levels)
    zones = [Zone.SAFE, Zone.WATCH, Zone.WATCH, Zone.NO_RETURN]
    assert [str(zone) for zone in chain.zones(1)] == [str(zone) for zone in zones]


@given(chains())
def test_absorption_sums_to_one(chain):
    ends = absorbed(chain)
    assert (ends >= 0).all()
    np.testing.assert_allclose(ends.sum(axis=1), 1, rtol=1e-7)


@given(chains(), horizons)
def test_horizon_risk_grows_and_stays_below_the_chance_to_end_violated(chain, tokens):
    curve = chain.horizon_curve(tokens)
    assert curve.shape == (tokens + 1, chain.states + 1)
    assert (np.diff(curve, axis=0) >= -1e-15).all()
    assert curve.min() >= 0
    assert curve.max() <= 1 + 1e-15
    assert (curve[:, :-1] <= absorbed(chain)[:, 0] + 1e-7).all()


@given(chains(), horizons)
def test_the_curve_is_the_horizon_at_each_h(chain, tokens):
    curve = chain.horizon_curve(tokens)
    for h in {0, 1, tokens // 2, tokens}:
        if h <= tokens:
            np.testing.assert_allclose(curve[h], chain.horizon(h), rtol=1e-12, atol=1e-300)


@given(chains(), horizons)
def test_first_passage_sums_to_the_horizon_and_its_tail_is_the_rest(chain, tokens):
    passage = chain.first_passage(tokens)
    assert (passage >= 0).all()
    horizon = chain.horizon(tokens)[:-1]
    np.testing.assert_allclose(passage.sum(axis=1), horizon, rtol=1e-11, atol=1e-300)
    ends = absorbed(chain)[:, 0]
    np.testing.assert_allclose(horizon + chain.first_passage_tail(tokens), ends, rtol=1e-6)


@given(chains(), horizons, horizons)
def test_chapman_kolmogorov(chain, m, n):
    p = chain.absorbing
    together = power(p, m) @ power(p, n)
    np.testing.assert_allclose(together, power(p, m + n), rtol=1e-11, atol=1e-300)
    risk = np.append(chain.horizon(n), 0.0)
    np.testing.assert_allclose((power(p, m) @ risk)[:-1], chain.horizon(m + n), rtol=1e-11)


@given(chains(), st.randoms(use_true_random=False))
def test_states_may_be_named_as_one_likes(chain, random):
    k = chain.states
    order = list(range(k))
    random.shuffle(order)
    order.append(k)
    renamed = chain.model_copy(
        update={
            "transition": np.array(chain.transition)[np.ix_(order, order)].tolist(),
            "ending": np.array(chain.ending)[order].tolist(),
        }
    )
    np.testing.assert_allclose(renamed.horizon(23), chain.horizon(23)[order], rtol=1e-12)
    ends = absorbed(chain)
    np.testing.assert_allclose(renamed.absorption(), ends[order[:k]], rtol=1e-6, atol=1e-12)


@given(chains(), st.integers(0, 60), st.integers(0, 2**32))
def test_a_forecast_is_linear_in_the_belief(chain, tokens, seed):
    beliefs = np.random.default_rng(seed).dirichlet(np.ones(chain.states + 1), (2, 3))
    found = chain.forecast(beliefs, tokens)
    assert found.shape == (2, 3)
    expected = sum(beliefs[..., j] * a for j, a in enumerate(chain.horizon(tokens)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for state in range(chain.states + 1):
        unit = np.eye(chain.states + 1)[state]
        assert chain.forecast(unit, tokens) == chain.horizon(tokens)[state]


# -- horizons that trap ----------------------------------------------------------------------------


def test_a_million_tokens_ahead_nothing_is_lost():
    rate = 1e-6  # in a million tokens most, and not all, have gone
    chain = Chain(
        **FIXTURE
        | {
            "transition": [[1 - rate, 0, rate], [0.3, 0.7 - rate / 2, rate / 2], [0, 0, 1]],
            "ending": [rate, 0.0, 0.0],
        }
    )
    million = 10**6
    leaves = -np.expm1(million * (np.log1p(-rate) + np.log1p(-rate)))
    violates = leaves * (1 - rate) * rate / (rate + (1 - rate) * rate)
    assert chain.horizon(million)[0] == pytest.approx(violates, rel=1e-9)
    np.testing.assert_allclose(power(chain.absorbing, million).sum(axis=1), 1, atol=1e-15)
    np.testing.assert_allclose(power(chain.absorbing, MAX_HORIZON).sum(axis=1), 1, atol=1e-15)
    ends = chain.absorption()[:, 0]
    np.testing.assert_allclose(chain.horizon(MAX_HORIZON)[:2], ends, rtol=1e-6)
    curve = chain.horizon_curve(MAX_CURVE)
    assert len(curve) == million + 1
    np.testing.assert_allclose(curve[-1], chain.horizon(million), rtol=1e-9)
    assert chain.first_passage(million).sum(axis=1) == pytest.approx(chain.horizon(million)[:2])


def test_a_horizon_of_nothing():
    chain = Chain(**FIXTURE)
    assert chain.horizon(0).tolist() == [0, 0, 1]
    assert chain.horizon_curve(0).tolist() == [[0, 0, 1]]
    assert chain.first_passage(0).shape == (2, 0)
    np.testing.assert_array_equal(chain.first_passage_tail(0), chain.absorption()[:, 0])
    assert chain.risk(0).tolist() == [0, 0]


@pytest.mark.parametrize("form", ["horizon", "horizon_curve", "first_passage", "risk"])
def test_a_horizon_out_of_range_is_refused(form):
    ask = getattr(Chain(**FIXTURE), form)
    with pytest.raises(ChainError, match="horizon: expected 0 or more tokens, got -1"):
        ask(-1)
    most = MAX_HORIZON if form in ("horizon", "risk") else MAX_CURVE
    with pytest.raises(
        ChainError, match=f"horizon: expected at most {most} tokens, got {most + 1}"
    ):
        ask(most + 1)


def test_a_belief_that_is_none_is_refused():
    chain = Chain(**FIXTURE)
    for belief, message in [
        ([0.5, 0.5], r"belief: expected \[\.\.\., 3\] for 2 states"),
        ([0.5, 0.4, 0.0], r"belief: row 0 sums to 0\.9, expected 1"),
        ([[1, 0, 0], [1.5, -0.5, 0]], r"belief: row 1 holds -0\.5; probabilities are 0 or more"),
        ([0.5, np.nan, 0.5], "belief: row 0 holds nan"),
    ]:
        with pytest.raises(ChainError, match=message):
            chain.forecast(np.array(belief), 3)
    for level in (0.0, 1.1):
        with pytest.raises(ChainError, match="level: expected more than 0"):
            chain.points_of_no_return(level)


def test_a_state_never_left_is_told_from_a_closed_class():
    held = np.array([[0.5, 0.2, 0.1, 0.1], [0, 1, 0, 0], [0, 0, 0.3, 0.7], [0, 0, 0.6, 0.4]])
    message = r"states \[1, 2, 3\] are never absorbed \(\[1\] are never left\)"
    with pytest.raises(SingularChainError, match=message):
        fundamental_matrix(held)


# -- the filter ------------------------------------------------------------------------------------

likelihoods = arrays(np.float32, 4, elements=st.floats(0.015625, 1.0, width=32))


@given(likelihoods, st.integers(-20, 20), st.integers(0, 2**32))
def test_the_filter_is_invariant_to_the_scale_of_a_likelihood(likelihood, exponent, seed):
    belief = np.random.default_rng(seed).dirichlet(np.ones(4)).astype(np.float32)

    def weighed(by):
        mass = torch.from_numpy(belief * by)[None]
        return _normalise(mass, torch.from_numpy(belief)[None]).numpy()

    np.testing.assert_allclose(
        weighed(likelihood * np.float32(2.0**exponent)), weighed(likelihood), rtol=1e-6
    )


def belief_after(chain, *rows):
    kernel = Kernel(chain, Policy(**STRICT).table(chain))
    kernel.admit(0)
    for position, logit in enumerate(rows):
        kernel.feed((0, position, logit))
    return kernel.belief()


STRICT = {"tiers": {"strict": {"horizon": 3, "halt_at": 1.0}}, "default_tier": "strict"}


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.floats(1e-3, 1e3))
def test_scaled_emissions_of_a_bin_leave_the_served_belief_as_it_is(seed, scaled_bin, scale):
    """Only ratios of P(bin | state) count: scale one bin, and let another take up the rest."""
    chain = random_chain(seed, bins=4)
    emission = np.array(chain.emission)
    other = (scaled_bin + 1) % 4
    room = emission[:, scaled_bin] + emission[:, other]
    factor = min(scale, float((room / emission[:, scaled_bin]).min()) * 0.999)
    factor = max(factor, 2e-4 / emission[:, scaled_bin].min())
    emission[:, scaled_bin] *= factor
    emission[:, other] = room - emission[:, scaled_bin]
    assume(emission.min() > 1.1e-4)
    again = chain.model_copy(update={"emission": emission.tolist()})
    logit = logit_in_bin(scaled_bin)
    np.testing.assert_allclose(belief_after(again, logit), belief_after(chain, logit), rtol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_evidence_within_a_token_does_not_matter_and_between_tokens_it_does(seed):
    """Probes of one token add up, in whatever order; tokens are steps of a chain."""
    rng = np.random.default_rng(seed)
    chain = random_chain(seed, states=3, bins=5)
    logits = rng.normal(0, 1, 3)
    beliefs = []
    for order in itertools.permutations(logits):
        kernel = Kernel(chain, Policy(**STRICT).table(chain))
        evidence = kernel.evidence
        kernel.evidence = type(evidence)(
            *(getattr(evidence, name)[[1, 1, 1]] for name in evidence.__dataclass_fields__)
        )
        kernel.slots = type(kernel.slots).allocate(1, 3, chain.states)
        kernel.admit(0)
        reference.advance(
            torch.tensor([order], dtype=torch.float32),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            kernel.slots,
            kernel.evidence,
            kernel.chain,
            kernel.policy,
        )
        beliefs.append(kernel.belief())
    edges = np.array(chain.edges)
    total = np.logaddexp(0, logits).sum()
    assume(abs(edges - total).min() > 1e-4)
    np.testing.assert_allclose(beliefs, np.broadcast_to(beliefs[0], np.shape(beliefs)), rtol=1e-5)
    there, back = (belief_after(chain, *map(logit_in_bin, bins)) for bins in ((0, 3), (3, 0)))
    assert abs(there - back).max() > 1e-6


# -- counts, intervals, categories -----------------------------------------------------------------


@st.composite
def counted(draw, least=0, states=None):
    """Counts of a chain of K states whose states are its bins."""
    k = draw(st.integers(1, 4)) if states is None else states
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    many = draw(st.sampled_from([1, 20, 500]))
    moves = rng.integers(least, many + least + 1, (k + 1, k + 1)).astype(float)
    moves[k, :k] = 0
    emission = np.zeros((k + 1, k))
    emission[:k] = np.diag(rng.integers(least, many + least + 1, k))
    emission[k] = rng.integers(1, many + 2, k)
    ends, first = rng.integers(least, many + least + 1, (2, k + 1)).astype(float)
    return Counts(moves, ends, emission, first[:, None])


def edges_of(counts):
    return [o + 0.5 for o in range(counts.states - 1)]


@settings(max_examples=40, deadline=None)
@given(counted(least=2), st.integers(0, 2**32))
def test_intervals_contain_the_mean_and_the_risk_of_the_fitted_chain(counts, seed):
    found = risk_intervals(counts.posterior(1.0), [0, 1, 2, 7, 40], draws=400, seed=seed)
    chain = chain_of(counts, edges=edges_of(counts))
    risk = np.stack([chain.horizon(h) for h in found.horizons.tolist()])
    for inside in (found.mean, risk):
        assert (found.low <= inside + 1e-9).all()
        assert (inside <= found.high + 1e-9).all()
    assert found.mean[0].tolist() == [0] * counts.states + [1]
    assert (np.diff(found.low, axis=0) >= -1e-12).all()


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.5, 0.999))
def test_wilson_contains_the_share_and_is_symmetric(hits, misses, level):
    low, high = wilson(np.array([hits]), np.array([hits + misses]), level=level)
    other_low, other_high = wilson(np.array([misses]), np.array([hits + misses]), level=level)
    assert 0 <= low[0] <= high[0] <= 1
    if hits + misses:
        assert low[0] - 1e-12 <= hits / (hits + misses) <= high[0] + 1e-12
    np.testing.assert_allclose([low, high], [1 - other_high, 1 - other_low], atol=1e-12)


@given(st.data())
def test_shrinkage_has_the_pooled_row_and_the_raw_one_for_limits(data):
    counts = data.draw(counted())
    others = data.draw(counted(states=counts.states))
    center = np.array(others.moves + 1.0)
    center /= center.sum(axis=1, keepdims=True)
    rows = counts.moves
    np.testing.assert_allclose(shrunk(rows, center, np.inf), center, rtol=0)
    np.testing.assert_allclose(shrunk(rows, center, 1e15), center, rtol=1e-9)
    seen = rows.sum(axis=1) > 0
    raw = rows[seen] / rows[seen].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shrunk(rows, center, 1e-15)[seen], raw, atol=1e-12)
    np.testing.assert_allclose(shrunk(rows, center, 0.0)[~seen], center[~seen])
    between = shrunk(rows, center, 3.0)
    np.testing.assert_allclose(between.sum(axis=1), 1)
    low, high = np.minimum(raw, center[seen]), np.maximum(raw, center[seen])
    assert ((between[seen] >= low - 1e-12) & (between[seen] <= high + 1e-12)).all()


@given(counted(), st.floats(0.01, 1e4))
def test_the_evidence_is_the_chance_of_the_sequence_count_by_count(counts, concentration):
    """Against Polya's urn: draw by draw, each draw's chance given those before."""
    assume(counts.moves.sum() < 200)
    center = np.full_like(counts.moves, 1 / counts.moves.shape[1])
    expected = 0.0
    for row, mean in zip(counts.moves, center, strict=True):
        urn = concentration * mean
        for j in np.repeat(np.arange(len(row)), row.astype(int)):
            expected += np.log(urn[j] / urn.sum())
            urn[j] += 1
    found = log_evidence(counts.moves, center, concentration)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(counted())
def test_a_category_without_data_has_the_pooled_chain(counts):
    empty = counts - counts
    found = fit_categories({"here": counts, "nowhere": empty}, edges=edges_of(counts))
    assert found.of("unheard of") is found.pooled
    for table in ("transition", "ending", "emission", "prior"):
        np.testing.assert_allclose(
            getattr(found.of("nowhere"), table), getattr(found.pooled, table), rtol=1e-12
        )
