"""The absorbing chain: closed forms, filter tables and fit, each against something else."""

import json
import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_filter import NAN, Kernel, PlainStream, logit_in_bin, random_chain

from midstream.absorbing import fundamental_matrix
from midstream.chain import Chain, ChainError, SingularChainError
from midstream.kernels.reference_advance import _predict
from midstream.kernels.tables import GAP_BITS
from midstream.learn.chains.counts import ObservedStream, fit_by_counts
from midstream.policy import Policy, Thresholds

SEEDS = range(5)

# calm, uneasy, violated
TINY = {
    "transition": [[0.9, 0.1, 0.0], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]],
    "ending": [0.1, 0.05, 0.3],
    "emission": [[0.8, 0.2], [0.3, 0.7], [0.1, 0.9]],
    "edges": [1.0],
    "prior": [0.9, 0.1, 0.0],
    "prompt_emission": [[1.0], [1.0], [1.0]],
    "prompt_edges": [],
}


def policy_table(chain, horizon, **levels):
    thresholds = {"horizon": horizon, "halt_at": 1.0, **levels}
    return Policy(tiers={"strict": thresholds}, default_tier="strict").table(chain)


def simulate(chain, streams, tokens, seed, *, states=None):
    """States before and at each token, [streams, tokens + 1]: K is violated, -1 has ended."""
    rng = np.random.default_rng(seed)
    k = chain.states
    transition, ending = np.cumsum(chain.transition, axis=1), np.array(chain.ending)
    if states is None:
        states = rng.choice(k + 1, size=streams, p=chain.prior)
    history = [states]
    for _ in range(tokens):
        ends = rng.random(streams) < ending[states]
        moved = (rng.random(streams)[:, None] > transition[states]).sum(axis=1).clip(max=k)
        states = np.where((states < 0) | ends, -1, moved)
        history.append(states)
    return np.stack(history, axis=1)


# -- closed forms ----------------------------------------------------------------------------------


def test_fixture_of_the_design():
    n = fundamental_matrix(np.array([[0.5, 0.3], [0.0, 0.4]]))
    np.testing.assert_allclose(n, [[2, 1], [0, 5 / 3]], rtol=1e-14)
    np.testing.assert_allclose(n.sum(axis=1), [3, 5 / 3], rtol=1e-14)


def test_fixture_as_a_chain():
    chain = Chain(
        **TINY | {"transition": [[0.5, 0.3, 0.2], [0, 0.4, 0.6], [0, 0, 1]], "ending": [0, 0, 1]}
    )
    np.testing.assert_allclose(chain.visits(), [[2, 1], [0, 5 / 3]], rtol=1e-14)
    np.testing.assert_allclose(chain.expected_tokens(), [3, 5 / 3], rtol=1e-14)
    np.testing.assert_allclose(chain.absorption(), [[1, 0], [1, 0]], atol=1e-14)
    np.testing.assert_allclose(chain.horizon(2), [0.2 + 0.5 * 0.2 + 0.3 * 0.6, 0.84, 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_closed_forms_are_the_limits_of_powers(seed):
    chain = random_chain(seed)
    k = chain.states
    p = chain.absorbing
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-15)
    visits, power = np.zeros((k, k)), np.eye(k + 2)
    for n in range(3000):
        if n < 40:
            np.testing.assert_allclose(chain.horizon(n), power[: k + 1, k], atol=1e-12)
        visits += power[:k, :k]
        power = power @ p
    np.testing.assert_allclose(chain.visits(), visits, rtol=1e-9)
    np.testing.assert_allclose(chain.expected_tokens(), visits.sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(chain.absorption(), power[:k, k:], rtol=1e-9)
    np.testing.assert_allclose(chain.horizon(3000)[:k], chain.absorption()[:, 0], rtol=1e-9)


def check(samples, expected):
    error = 4.5 * samples.std(axis=0) / math.sqrt(len(samples)) + 1e-12
    assert (abs(samples.mean(axis=0) - expected) <= error).all(), expected


def test_closed_forms_agree_with_simulation():
    chain, streams, tokens = Chain(**TINY), 10_000, 150
    for start in range(chain.states):
        history = simulate(chain, streams, tokens, seed=10 + start, states=np.full(streams, start))
        k = chain.states
        violated = (history == k).any(axis=1)
        first = np.where(violated, (history == k).argmax(axis=1), tokens + 1)
        # looking ahead, violated absorbs: what follows does not count
        before = np.arange(tokens + 1) < first[:, None]
        visits = np.stack([((history == j) & before).sum(axis=1) for j in range(k)], axis=1)

        check(visits, chain.visits()[start])
        check(visits.sum(axis=1), chain.expected_tokens()[start])
        check(violated.astype(float), chain.absorption()[start, 0])
        for n in range(1, 8):
            check((first == n).astype(float), chain.first_passage(8)[start, n - 1])
            check((first <= n).astype(float), chain.horizon(n)[start])


@pytest.mark.parametrize("seed", SEEDS)
def test_horizon_grows_from_the_unit_vector_of_violated(seed):
    chain = random_chain(seed)
    curve = np.stack([chain.horizon(h) for h in range(60)])
    np.testing.assert_array_equal(curve[0], [*[0.0] * chain.states, 1.0])
    assert (np.diff(curve, axis=0) >= -1e-15).all()
    assert (curve[1:, -1] == 1.0).all()
    assert (curve <= 1 + 1e-15).all()


def test_a_small_chance_is_as_exact_as_a_large_one():
    transient = np.array([[0.7, 2e-8, 4e-19], [1e-12, 0.1, 1e-4], [0.4, 0.55, 1e-15]])
    exactly = sympy.eye(3) - sympy.Matrix(3, 3, lambda i, j: sympy.Rational(transient[i, j]))
    expected = np.array(exactly.inv(), dtype=np.float64)
    assert expected.min() < 1e-11
    np.testing.assert_allclose(fundamental_matrix(transient), expected, rtol=1e-14)


@given(seed=st.integers(0, 2**32), tokens=st.integers(0, 300))
def test_first_passage_sums_to_the_horizon(seed, tokens):
    chain = random_chain(seed, states=seed % 4 + 1)
    passage = chain.first_passage(tokens)
    assert passage.shape == (chain.states, tokens)
    assert (passage >= 0).all()
    np.testing.assert_allclose(passage.sum(axis=1), chain.horizon(tokens)[:-1], atol=1e-12)


def test_one_state():
    chain = Chain(
        transition=[[0.75, 0.25], [0, 1]],
        ending=[0.5, 0.5],
        emission=[[1.0], [1.0]],
        edges=[],
        prior=[1.0, 0.0],
        prompt_emission=[[1.0], [1.0]],
        prompt_edges=[],
    )
    np.testing.assert_allclose(chain.absorption(), [[0.2, 0.8]])
    np.testing.assert_allclose(chain.expected_tokens(), [1.6])


def test_a_singular_chain_is_refused_by_its_states_and_looks_ahead_all_the_same():
    transition = [
        [0.5, 0.2, 0.2, 0.1],
        [0.0, 0.3, 0.7, 0.0],  # 1 and 2 only lead to each other
        [0.0, 0.6, 0.4, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
    chain = Chain(
        transition=transition,
        ending=[0.1, 0.0, 0.0, 0.0],
        emission=[[1.0]] * 4,
        edges=[],
        prior=[1.0, 0.0, 0.0, 0.0],
        prompt_emission=[[1.0]] * 4,
        prompt_edges=[],
    )
    for closed_form in (chain.visits, chain.absorption, chain.expected_tokens):
        with pytest.raises(SingularChainError, match=r"states \[1, 2\] .*use a finite horizon"):
            closed_form()
    np.testing.assert_allclose(chain.horizon(1), [0.09, 0, 0, 1])
    assert chain.first_passage(5)[1:].sum() == 0


def test_rounding_of_a_row_is_no_way_out_of_a_closed_class():
    almost = 1 - 5e-7  # within the tolerance for hand-written files
    transition = [[0.9, 0.1, 0], [0, almost, 0], [0, 0, 1]]
    chain = Chain(**TINY | {"transition": transition, "ending": [0.1, 0.0, 0.3]})
    with pytest.raises(SingularChainError, match=r"\[1\]"):
        chain.visits()
    assert chain.absorbing.sum(axis=1) == pytest.approx(1, abs=1e-15)


def test_chances_below_rounding_lead_nowhere():
    with pytest.raises(SingularChainError, match=r"\[0\]"):
        fundamental_matrix(np.array([[1.0, 1e-18], [0.0, 0.5]]))


def test_horizon_refuses_to_look_back():
    with pytest.raises(ChainError, match="horizon: expected 0 or more tokens, got -1"):
        Chain(**TINY).horizon(-1)


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_json_round_trip_is_exact(seed):
    chain = random_chain(seed)
    text = chain.to_json()
    again = Chain.from_json(text)
    assert again == chain
    assert again.to_json() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition": [[0.9, 0.1], [0, 1]]}, "emission: expected 2 x 2"),
        ({"transition": [[1.0]]}, "transition: .*at least 2"),
        ({"transition": [[0.9, 0.1], [0, 1, 0], [0, 0, 1]]}, "transition: expected 3 x 3"),
        ({"transition": [[0.9, 0.2, 0], [0, 1, 0], [0, 0, 1]]}, r"transition: row 0 sums to 1\.1"),
        ({"transition": [[1, 0, 0], [1.1, -0.1, 0], [0, 0, 1]]}, r"transition: row 1 holds -0\.1;"),
        ({"transition": [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]}, "transition: .*absorbing"),
        ({"transition": [[1, 0, 0], [0, "x", 0], [0, 0, 1]]}, r"transition\.1\.1: .*number"),
        ({"ending": [0.1, 0.1]}, "ending: expected 3 probabilities"),
        ({"ending": [0.1, 0.1, 1.5]}, r"ending: that of state 2 is 1\.5"),
        ({"ending": [0.1, NAN, 0.5]}, r"ending\.1: .*finite"),
        ({"emission": [[0.5, 0.6], [0.5, 0.5], [0.5, 0.5]]}, r"emission: row 0 sums to 1\.1"),
        ({"emission": [[0.5, 0.5], [0.5, 0.5]]}, "emission: expected 3 x 2"),
        ({"edges": [1.0, 2.0]}, "emission: expected 3 x 3"),
        ({"edges": [2.0, 2.0], "emission": [[0.5, 0.2, 0.3]] * 3}, "edges: must ascend"),
        ({"edges": [math.inf]}, r"edges\.0: .*finite"),
        ({"prior": [0.5, 0.5]}, "prior: expected 1 x 3"),
        ({"prior": [0.5, 0.4, 0.0]}, r"prior: row 0 sums to 0\.9"),
        ({"prompt_emission": [[1.0]] * 2}, "prompt_emission: expected 3 x 1"),
        ({"prompt_edges": [1.0]}, "prompt_emission: expected 3 x 2"),
        ({"colour": 1}, "colour: unknown key"),
        ({"prior": None}, "prior: .*valid array"),
    ],
)
def test_a_fault_is_named_by_its_key(change, message):
    with pytest.raises(ChainError, match=rf"^my\.json: {message}"):
        Chain.from_json(json.dumps(TINY | change), "my.json")


def test_a_missing_key_and_broken_json_are_named():
    without = {key: value for key, value in TINY.items() if key != "prior"}
    with pytest.raises(ChainError, match=r"^chain\.json: prior: Field required$"):
        Chain.from_json(json.dumps(without))
    with pytest.raises(ChainError, match=r"^chain\.json: Invalid JSON"):
        Chain.from_json(json.dumps(TINY)[:-3])


# -- the belief filter -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_filter_with_unscored_tokens_and_gaps(seed):
    """The kernel, from the chain's tables, against loops in fp64."""
    rng = np.random.default_rng(seed)
    chain = random_chain(seed, states=seed + 1, bins=seed + 2)
    thresholds = Thresholds(horizon=seed, halt_at=1.0)
    kernel = Kernel(chain, policy_table(chain, seed))
    kernel.admit(0, start=3)
    plain = PlainStream(chain, thresholds, "hold")
    for position in range(3):
        logit = float(rng.normal(1, 2))
        kernel.feed((0, position, logit))
    plain.prompt(logit)  # only the last prompt token counts
    np.testing.assert_allclose(kernel.belief(), plain.belief, atol=2e-6)
    position = 3
    for _ in range(80):
        for _ in range(rng.choice([0, 0, 0, 1, 7])):  # tokens that were never shown
            plain.token(NAN)
            position += 1
        logit = NAN if rng.random() < 0.2 else float(rng.normal(1, 2))
        plain.token(logit)
        kernel.feed((0, position, logit))
        position += 1
        np.testing.assert_allclose(kernel.belief(), plain.belief, atol=2e-6)
        assert kernel.risk() == pytest.approx(plain.risk, abs=2e-6)
    assert int(kernel.slots.scored) + int(kernel.slots.unscored) == position


def test_long_streams_do_not_underflow():
    chain = random_chain(7, ending=0.4)  # 400 tokens have a chance of 1e-80 to 1e-200
    kernel = Kernel(chain, policy_table(chain, 8))
    kernel.admit(0)
    plain = PlainStream(chain, Thresholds(horizon=8, halt_at=1.0), "hold")
    logits = np.random.default_rng(0).normal(1, 2, 400).tolist()
    kernel.feed(*((0, position, logit) for position, logit in enumerate(logits)))
    for logit in logits:
        plain.token(logit)
    np.testing.assert_allclose(kernel.belief(), plain.belief, atol=5e-6)


@pytest.mark.parametrize("tokens", [2, 1023, 1024, 2**17 + 12_345, 2**GAP_BITS - 1])
def test_a_gap_of_any_length_is_bridged_exactly(tokens):
    """Two states that swap slowly: P(first after n steps) = (1 + (1 - 2e)^n) / 2."""
    e = 2.0**-18
    chain = Chain(
        **TINY | {"transition": [[1 - e, e, 0], [e, 1 - e, 0], [0, 0, 1]], "ending": [0.5] * 3}
    ).model_copy(update={"prior": [1.0, 0.0, 0.0]})
    kernel = Kernel(chain, policy_table(chain, 0))
    kernel.admit(0)
    kernel.feed((0, tokens - 1, NAN))
    first = (1 + (1 - 2 * e) ** tokens) / 2
    np.testing.assert_allclose(kernel.belief(), [first, 1 - first, 0], atol=1e-5)
    assert int(kernel.slots.unscored) == tokens


def test_going_on_is_evidence():
    """Two states alike but for how often they end: survivors are in the one that lasts."""
    chain = Chain(**TINY | {"transition": np.eye(3).tolist(), "ending": [0.5, 0.0, 1.0]})
    kernel = Kernel(chain, policy_table(chain, 0))
    kernel.admit(0)
    kernel.feed((0, 4, NAN))
    calm, uneasy = 0.9 * 0.5**5, 0.1
    expected = np.array([calm, uneasy, 0]) / (calm + uneasy)
    np.testing.assert_allclose(kernel.belief(), expected, atol=1e-6)


def test_no_token_rules_a_state_out():
    never = {"transition": np.eye(3).tolist(), "emission": [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]}
    chain = Chain(**TINY | never | {"ending": [0.0] * 3})
    kernel = Kernel(chain, policy_table(chain, 0))
    kernel.admit(0)
    kernel.feed((0, 0, logit_in_bin(1)))  # which a calm stream never emits
    assert 0 < kernel.belief()[0] < 0.001
    kernel.feed((0, 1, logit_in_bin(0)), (0, 2, logit_in_bin(0)))
    assert kernel.belief()[0] > 0.999


def test_a_stream_goes_on_though_its_state_always_ends_and_never_emits_this():
    chain = Chain(
        **TINY
        | {
            "transition": np.eye(3).tolist(),
            "ending": [1.0, 1.0, 1.0],
            "emission": [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]],
            "prior": [1.0, 0.0, 0.0],
        }
    )
    kernel = Kernel(chain, policy_table(chain, 0))
    kernel.admit(0)
    for position in range(200):
        kernel.feed((0, position, logit_in_bin(1)))
    np.testing.assert_allclose(kernel.belief(), [1, 0, 0])


@pytest.mark.parametrize(("horizon", "token"), [(0, 6), (5, 3), (40, 4)])
def test_risk_is_calibrated_on_the_chains_own_streams(horizon, token):
    """Of the streams given a risk of r, r are violated within the horizon, to sampling error."""
    chain, streams = random_chain(3, states=3, bins=5), 6000
    rng = np.random.default_rng(99)
    history = simulate(chain, streams, token + horizon, seed=horizon)
    history = history[history[:, token] >= 0]
    kernel = Kernel(chain, policy_table(chain, horizon), slots=len(history))
    for slot in range(len(history)):
        kernel.admit(slot)
    emission = np.cumsum(chain.emission, axis=1)
    for position in range(token):
        drawn = rng.random(len(history))[:, None]
        bins = (drawn > emission[history[:, position + 1]]).sum(axis=1).clip(max=4)
        kernel.feed(*((slot, position, logit_in_bin(o)) for slot, o in enumerate(bins.tolist())))
    risk = kernel.slots.risk.double().numpy()
    violated = (history[:, token:] == chain.states).any(axis=1)
    order = np.argsort(risk)
    assert np.ptp(risk) > 0.1
    for group in np.array_split(order, 8):
        expected = risk[group].mean()
        error = math.sqrt((risk[group] * (1 - risk[group])).sum()) / len(group)
        assert abs(violated[group].mean() - expected) < 4 * error


# -- fit by counts ---------------------------------------------------------------------------------


def observed(values, *, violated=0, ended=True, prompt=0.0):
    """A stream with these log-hazards whose last ``violated`` tokens are violated."""
    n = len(values)
    return ObservedStream(np.array(values, float), np.arange(n) >= n - violated, ended, prompt)


HAND_MADE = [
    observed([0.1, 0.2, 1.0, 5.0], violated=1),  # 0 0 1 V, ends
    observed([0.1, 3.0, 0.9], ended=False),  # 0 1 0, cut off
    observed([0.5], prompt=2.0),  # 0, ends
]


def test_counts_by_hand():
    chain = fit_by_counts(HAND_MADE, [1.0], prompt_edges=[1.5], prior_count=0)
    third = 1 / 3
    assert chain.transition == [[third, 2 * third, 0], [0.5, 0, 0.5], [0, 0, 1]]
    assert chain.ending == [1 / 4, 0, 1]
    assert chain.emission == [[1, 0], [0, 1], [0, 1]]
    assert chain.prior == [1, 0, 0]
    # 1 and V were never first: nothing is known about their prompts
    assert chain.prompt_emission == [[2 * third, third], [0.5, 0.5], [0.5, 0.5]]
    assert (chain.edges, chain.prompt_edges) == ([1.0], [1.5])


def test_counts_with_a_prior():
    chain = fit_by_counts(HAND_MADE, [1.0], prompt_edges=[1.5], prior_count=3.0)
    # the moves of both states together are 2, 2 and 1; the prior's 3 counts are centred on them
    np.testing.assert_allclose(
        chain.transition, [[13 / 36, 19 / 36, 4 / 36], [13 / 30, 7 / 30, 10 / 30], [0, 0, 1]]
    )
    # of the tokens of both states one was a last one and five were not
    share = 1.5 / 7
    ending = [(1 + 3 * share) / 7, 3 * share / 5, (1 + 3 * share) / 4]
    np.testing.assert_allclose(chain.ending, ending)
    np.testing.assert_allclose(chain.emission, [[1, 0], [0, 1], [1.5 / 4, 2.5 / 4]])
    np.testing.assert_allclose(chain.prior, [4 / 6, 1 / 6, 1 / 6])
    np.testing.assert_allclose(chain.prompt_emission, [[3.5 / 6, 2.5 / 6], [0.5, 0.5], [0.5, 0.5]])


def test_a_cut_off_stream_does_not_count_as_ending():
    cut, ended = (
        [observed([0.0, 0.0], ended=ended)] * 9 + [observed([0.0, 5.0], violated=1)]
        for ended in (False, True)
    )
    assert fit_by_counts(cut, [1.0], prior_count=0).ending[0] == 0
    assert fit_by_counts(ended, [1.0], prior_count=0).ending[0] == 9 / (9 + 10)


def test_without_a_prior_a_state_never_visited_stays_where_it_is():
    chain = fit_by_counts(HAND_MADE, [1.0, 7.0], prompt_edges=[1.0, 2.0, 3.0], prior_count=0)
    assert chain.transition[2] == [0, 0, 1, 0]
    assert chain.ending[2] == 0
    # as many prompt bins as states: a square table is no identity
    assert chain.prompt_emission[2] == [0.25] * 4
    with pytest.raises(SingularChainError, match=r"states \[2\].*prior count above 0"):
        chain.visits()
    assert chain.horizon(1)[2] == 0
    fit_by_counts(HAND_MADE, [1.0, 7.0], prior_count=0.1).visits()


def test_prompt_bins_tell_the_state_before_the_response():
    calm = [observed([0.0], prompt=0.2)] * 8 + [observed([0.0], prompt=3.0)] * 2
    tense = [observed([2.0], prompt=3.0)] * 5 + [observed([2.0, 4.0], violated=1, prompt=3.0)]
    chain = fit_by_counts(calm + tense, [1.0], prompt_edges=[1.0], prior_count=0)
    np.testing.assert_allclose(chain.prompt_emission, [[0.8, 0.2], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(chain.prior, [10 / 16, 6 / 16, 0])


def fitted_from(chain, count, seed):
    """Fit to streams of a chain whose transient states show themselves; half are cut off at 8."""
    history = simulate(chain, count, 60, seed)
    lasting = [states[states >= 0] for states in history]
    streams = []
    for n, states in enumerate(lasting):
        seen = states[: 8 if n % 2 else 60]
        streams.append(
            ObservedStream(
                log_hazard=np.minimum(seen, chain.states - 1) + 0.5,
                violated=seen == chain.states,
                ended=len(seen) == len(states),
            )
        )
    return fit_by_counts(streams, chain.edges)


def test_a_known_chain_is_recovered_and_better_so_from_more_streams():
    known = random_chain(11, states=3, bins=3)
    errors = []
    for streams in (60, 600, 6000):
        fits = [fitted_from(known, streams, seed=streams + trial) for trial in range(2)]
        errors.append(
            np.mean(
                [
                    abs(np.array(getattr(fit, name)) - getattr(known, name)).max()
                    for fit in fits
                    for name in ("transition", "ending", "prior")
                ]
            )
        )
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 0.03


def test_streams_that_teach_nothing_are_refused():
    calm = observed([0.0, 0.1])
    for streams in ([], [calm]):
        with pytest.raises(ChainError, match="no stream violates"):
            fit_by_counts(streams, [1.0])
    with pytest.raises(ChainError, match="prior_count: expected 0 or more, got -1"):
        fit_by_counts(HAND_MADE, [1.0], prior_count=-1)
    with pytest.raises(ValueError, match="edges: must ascend"):
        fit_by_counts(HAND_MADE, [2.0, 1.0])


@pytest.mark.parametrize(
    ("log_hazard", "violated", "message"),
    [
        ([], [], "at least one"),
        ([0.0, 1.0], [True], "one label per log_hazard"),
        ([0.0, NAN], [False, True], "log_hazard: holds a NaN"),
        ([0.0, 1.0, 0.0], [False, True, False], "stays violated"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(log_hazard, violated, message):
    with pytest.raises(ChainError, match=message):
        ObservedStream(np.array(log_hazard), np.array(violated, dtype=bool), ended=True)


@pytest.mark.parametrize("gap", [126, 255, 256, 100_000])
def test_a_long_gap_moves_a_belief_in_a_state_that_mostly_ends(gap: int) -> None:
    """Beside a state that goes on, its row of a step power must not underflow to nothing."""
    chain = Chain(
        transition=[[0.99, 0.01, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]],
        ending=[0.01, 0.0, 0.6],
        emission=[[1.0], [1.0], [1.0]],
        edges=[],
        prior=[0.0, 1.0, 0.0],
        prompt_emission=[[1.0], [1.0], [1.0]],
        prompt_edges=[],
    )
    step = (1 - np.array(chain.ending))[:, None] * np.array(chain.transition)
    belief = np.array(chain.prior)
    for _ in range(gap):
        belief = belief @ step
        belief /= belief.sum()
    found = _predict(
        torch.tensor([chain.prior]), torch.tensor([gap], dtype=torch.int32), chain.table()
    )
    np.testing.assert_allclose(found[0].numpy(), belief, atol=1e-5)
