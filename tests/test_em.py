"""Filter, smoother and EM against sums over all paths, and against what is known of the data."""

from __future__ import annotations

import itertools
import math

import clause_chain
import numpy as np
import pytest
from event_enumeration import follows
from kernel_cases import fresh_seed
from plain_filter import PlainStream, logit_in_bin, random_chain

from midstream.chain import Chain, ChainError
from midstream.learn.chains import em, em_steps, packing
from midstream.learn.chains.choice import choose_states
from midstream.learn.chains.em import LikelihoodDecreasedError, fit_em
from midstream.learn.chains.filtering import (
    Parameters,
    as_served,
    forecasts,
    log_likelihood,
    posteriors,
    smooth,
)
from midstream.learn.chains.packing import pack
from midstream.learn.chains.symbols import SymbolStream
from midstream.policy import Thresholds
from midstream.testbed import grammar
from midstream.testbed.language import sample_dialogues

BINS, PROMPT_BINS = 4, 3
TRUE = Chain(
    transition=[[0.93, 0.06, 0.01], [0.10, 0.75, 0.15], [0.0, 0.0, 1.0]],
    ending=[0.08, 0.02, 0.2],
    emission=[[0.7, 0.2, 0.08, 0.02], [0.1, 0.2, 0.6, 0.1], [0.05, 0.05, 0.2, 0.7]],
    edges=[0.5, 1.5, 2.5],
    prior=[0.8, 0.2, 0.0],
    prompt_emission=[[0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]],
    prompt_edges=[0.5, 1.5],
)


def without_v_before(chain: Chain) -> Chain:
    """No stream has violated before its first token, as EM has it."""
    prior = np.array([*chain.prior[:-1], 0.0])
    return chain.model_copy(update={"prior": (prior / prior.sum()).tolist()})


def random_streams(rng: np.random.Generator, count: int, longest: int = 5) -> list[SymbolStream]:
    """Streams with every kind of label, cut off or ended."""
    streams = []
    for kind in itertools.islice(itertools.cycle(["tokens", True, False, None]), count):
        n = int(rng.integers(1, longest + 1))
        violated = np.arange(n) >= rng.integers(0, n + 2) if kind == "tokens" else None
        streams.append(
            SymbolStream(
                bins=rng.integers(0, BINS, n),
                violated=violated,
                violates=None if kind == "tokens" else kind,
                ended=bool(rng.random() < 0.6),
                prompt_bin=int(rng.integers(PROMPT_BINS)),
            )
        )
    return streams


def draw(chain: Chain, count: int, rng: np.random.Generator, longest: int = 400) -> list:
    """Sample ``(states, stream)`` by the words of the design, none without a token."""
    a, c = np.array(chain.transition), np.array(chain.ending)
    e, p = np.array(chain.emission), np.array(chain.prompt_emission)
    found = []
    while len(found) < count:
        state = int(rng.choice(len(c), p=chain.prior))
        prompt = int(rng.choice(p.shape[1], p=p[state]))
        states, bins = [state], []
        while len(bins) < longest and rng.random() >= c[states[-1]]:
            states.append(int(rng.choice(len(c), p=a[states[-1]])))
            bins.append(int(rng.choice(e.shape[1], p=e[states[-1]])))
        if bins:
            violated = np.array(states[1:]) == chain.states
            ended = len(bins) < longest
            found.append((states, SymbolStream(np.array(bins), violated, None, ended, prompt)))
    return found


def paths(chain: Chain, stream: SymbolStream):
    """Every path of states the labels allow, with its joint probability."""
    k, n = chain.states, len(stream.bins)
    for path in itertools.product(range(k + 1), repeat=n + 1):
        if stream.violated is not None and any(
            (s == k) != v for s, v in zip(path[1:], stream.violated, strict=True)
        ):
            continue
        if stream.violates is not None and (path[-1] == k) != stream.violates:
            continue
        chance = chain.prior[path[0]] * chain.prompt_emission[path[0]][stream.prompt_bin]
        for i, j, o in zip(path, path[1:], stream.bins, strict=False):
            chance *= (1 - chain.ending[i]) * chain.transition[i][j] * chain.emission[j][o]
        yield path, chance * (chain.ending[path[-1]] if stream.ended else 1.0)


def test_everything_against_all_paths() -> None:
    """Likelihood, posteriors and expected moves, for every kind of label, to 1e-12."""
    seed = fresh_seed()
    for states in (1, 2, 3):
        chain = random_chain(seed + states, states, BINS, PROMPT_BINS, ending=0.2)
        streams = random_streams(np.random.default_rng(seed), 12, 5 if states < 3 else 4)
        some_token = math.log(np.array(chain.prior) @ (1 - np.array(chain.ending)))
        moves = np.zeros((states + 1, states + 1))
        likelihoods, smoothed = log_likelihood(chain, streams), posteriors(chain, streams)
        for stream, likelihood, posterior in zip(streams, likelihoods, smoothed, strict=True):
            every = list(paths(chain, stream))
            total = sum(chance for _, chance in every)
            assert likelihood == pytest.approx(math.log(total) - some_token, abs=1e-12)
            expected = np.zeros((len(stream.bins) + 1, states + 1))
            for path, chance in every:
                for t, state in enumerate(path):
                    expected[t, state] += chance / total
                for move in itertools.pairwise(path):
                    moves[move] += chance / total
            np.testing.assert_allclose(posterior, expected, atol=1e-12)
        expected = sum(smooth(Parameters.of(chain), part).moves for part in pack(streams))
        np.testing.assert_allclose(expected, moves, atol=1e-12)


def test_forecasts_are_the_risk_that_serving_shows() -> None:
    seed = fresh_seed()
    chain = random_chain(seed, 3, BINS, PROMPT_BINS)
    emission = np.array(chain.emission)
    emission[1] = [0.0, 0.5, 0.5, 0.0]  # below the kernels' floor
    chain = chain.model_copy(update={"emission": emission.tolist()})
    streams = random_streams(np.random.default_rng(seed), 12, 30)
    horizons = (0, 1, 7)
    for stream, found in zip(streams, forecasts(as_served(chain), streams, horizons), strict=True):
        for horizon, curve in zip(horizons, found, strict=True):
            plain = PlainStream(chain, Thresholds(horizon=horizon, halt_at=1.0), "pass")
            plain.prompt(logit_in_bin(stream.prompt_bin))
            expected = [plain.risk]
            for o in stream.bins:
                plain.token(logit_in_bin(o))
                expected.append(plain.risk)
            np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_a_stream_of_100000_tokens_against_sums_of_logs() -> None:
    seed = fresh_seed()
    chain = random_chain(seed, 2, BINS, PROMPT_BINS)
    rng = np.random.default_rng(seed)
    stream = SymbolStream(rng.integers(0, BINS, 100_000), None, None, True, 1)
    c = np.array(chain.ending)
    with np.errstate(divide="ignore"):
        onward = np.log((1 - c)[:, None] * np.array(chain.transition))
        emission = np.log(chain.emission).T
        now = np.log(np.array(chain.prior) * np.array(chain.prompt_emission)[:, 1])
    for o in stream.bins:
        now = np.logaddexp.reduce(now[:, None] + onward, axis=0) + emission[o]
    expected = np.logaddexp.reduce(now + np.log(c)) - np.log(np.array(chain.prior) @ (1 - c))
    smoothed = smooth(Parameters.of(chain), pack([stream])[0])
    assert smoothed.log_likelihood[0] == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(smoothed.belief.sum(axis=1), 1.0)
    assert smoothed.moves.sum() == pytest.approx(len(stream.bins))


def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    chain = random_chain(seed, 2, BINS, PROMPT_BINS)
    streams = random_streams(np.random.default_rng(seed), 40, 20)
    alone = [log_likelihood(chain, [stream])[0] for stream in streams]
    curves = [forecasts(chain, [stream], (3,))[0] for stream in streams]
    for size in (1, 50, 1 << 20):
        monkeypatch.setattr(packing, "_PART_TOKENS", size)
        np.testing.assert_allclose(log_likelihood(chain, streams), alone, rtol=1e-12)
        for one, curve in zip(forecasts(chain, streams, (3,)), curves, strict=True):
            np.testing.assert_allclose(one, curve, rtol=1e-12)


def test_a_step_of_em_is_that_of_the_enumerated_counts() -> None:
    seed = fresh_seed()
    chain = without_v_before(random_chain(seed, 2, BINS, PROMPT_BINS, ending=0.2))
    streams = random_streams(np.random.default_rng(seed), 16)
    k, prior_count = 2, 1.5
    first, moves, ends = np.zeros(k), np.zeros((k, k + 1)), np.zeros((k + 1, 2))
    emitted, prompts = np.zeros((k + 1, BINS)), np.zeros((k + 1, PROMPT_BINS))
    for stream in streams:
        every = list(paths(chain, stream))
        total = sum(chance for _, chance in every)
        for path, chance in every:
            weight = chance / total
            if weight == 0:
                continue
            first[path[0]] += weight
            prompts[path[0], stream.prompt_bin] += weight
            for i, j in itertools.pairwise(path):
                if i < k:
                    moves[i, j] += weight
            for state, o in zip(path[1:], stream.bins, strict=True):
                emitted[state, o] += weight
            for state in path[1:-1]:
                ends[state, 1] += weight
            ends[path[-1], 0] += weight * stream.ended

    def rows(counts: np.ndarray) -> np.ndarray:
        mass = counts + prior_count / counts.shape[-1]
        return mass / mass.sum(axis=-1, keepdims=True)

    counts, _ = em_steps.expect(Parameters.of(chain), pack(streams))
    found = em_steps.maximise(counts, prior_count, Parameters.of(chain))
    ending = rows(ends)[:, 0]
    prior = rows(first) / (1 - ending[:k])
    np.testing.assert_allclose(found.transition[:k], rows(moves), atol=1e-12)
    np.testing.assert_allclose(found.ending, ending, atol=1e-12)
    np.testing.assert_allclose(found.emission, rows(emitted), atol=1e-12)
    np.testing.assert_allclose(found.prompt_emission, rows(prompts), atol=1e-12)
    np.testing.assert_allclose(found.prior, [*(prior / prior.sum()), 0.0], atol=1e-12)


@pytest.mark.parametrize("prior_count", [0.0, 1.0])
def test_the_posterior_never_falls_and_ends_at_a_maximum(prior_count: float) -> None:
    seed = fresh_seed()
    streams = random_streams(np.random.default_rng(seed), 60, 12)
    fit = fit_em(
        streams, 3, bins=BINS, prompt_bins=PROMPT_BINS, seed=seed, prior_count=prior_count,
        restarts=3,
    )  # fmt: skip
    assert fit.converged
    assert fit.iterations == len(fit.log_posteriors) == len(fit.log_likelihoods)
    assert (np.diff(fit.log_posteriors) >= -1e-9 * abs(fit.log_posteriors[0])).all()
    assert fit.log_posteriors[-1] == max(run.log_posterior for run in fit.restarts)
    assert fit.log_likelihoods[-1] == pytest.approx(log_likelihood(fit.chain, streams).sum())
    if prior_count == 0:
        assert fit.log_posteriors == fit.log_likelihoods
    # No small step in any direction leads much higher.
    here = Parameters.of(fit.chain)
    rng = np.random.default_rng(seed)

    def posterior(at: Parameters) -> float:
        return em_steps.expect(at, pack(streams))[1] + em_steps.log_prior(at, prior_count)

    for _ in range(20):
        near = [table * np.exp(1e-3 * rng.standard_normal(table.shape)) for table in
                (here.transition, here.emission, here.prompt_emission)]  # fmt: skip
        near = [table / table.sum(axis=1, keepdims=True) for table in near]
        moved = Parameters(here.prior, near[0], here.ending, near[1], near[2])
        assert posterior(moved) < posterior(here) + 0.01


def test_a_falling_posterior_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong M-step: everything is pulled towards even rows after each."""
    streams = [stream for _, stream in draw(TRUE, 100, np.random.default_rng(fresh_seed()))]

    def wrong(counts, prior_count, otherwise):
        found = em_steps.maximise(counts, prior_count, otherwise)
        even = np.full_like(found.emission, 1 / BINS)
        return Parameters(found.prior, found.transition, found.ending, even, found.prompt_emission)

    monkeypatch.setattr(em, "maximise", wrong)
    with pytest.raises(LikelihoodDecreasedError, match="fell"):
        fit_em(streams, 2, bins=BINS, prompt_bins=PROMPT_BINS)


@pytest.mark.parametrize("labels", ["tokens", "responses", "mixed"])
def test_a_small_chain_is_recovered(labels: str) -> None:
    """Calm first; from labels of tokens, of streams alone, and of a third of the streams each."""
    rng = np.random.default_rng(1)  # an estimate is near the truth mostly, not for every draw
    streams = []
    for number, (_, stream) in enumerate(draw(TRUE, 2000, rng)):
        kind = number % 3 if labels == "mixed" else ["tokens", "responses"].index(labels)
        violates = bool(stream.violated[-1])
        streams.append(
            stream
            if kind == 0
            else SymbolStream(
                stream.bins, None, violates if kind == 1 else None, stream.ended, stream.prompt_bin
            )
        )
    fit = fit_em(streams, 2, bins=BINS, prompt_bins=PROMPT_BINS, restarts=4)
    assert fit.converged
    # About five standard errors where nothing but the evidence says who has violated.
    for name, tolerance in (
        ("transition", 0.05), ("ending", 0.04), ("emission", 0.07), ("prior", 0.1),
    ):  # fmt: skip
        np.testing.assert_allclose(
            getattr(fit.chain, name), getattr(TRUE, name), atol=tolerance, err_msg=name
        )
    np.testing.assert_allclose(fit.chain.prompt_emission[:2], TRUE.prompt_emission[:2], atol=0.12)
    # The maximum is above the truth, by about half the number of parameters.
    gained = fit.log_likelihoods[-1] - log_likelihood(TRUE, streams).sum()
    assert 0 < gained < 40
    assert (np.diff(fit.chain.horizon(8)) > 0).all()


def test_the_first_token_is_no_evidence_about_endings() -> None:
    """Short streams, all of which have a token: its going on must not count against endings."""
    rng = np.random.default_rng(2)  # as above
    short = TRUE.model_copy(update={"ending": [0.5, 0.5, 0.5]})
    streams = [stream for _, stream in draw(short, 3000, rng)]
    fit = fit_em(streams, 2, bins=BINS, prompt_bins=PROMPT_BINS, restarts=2)
    share = len(streams) / sum(len(stream.bins) for stream in streams)
    visits = np.array(fit.chain.ending) @ np.full(3, 1 / 3)
    assert share == pytest.approx(0.5, abs=0.03)
    assert visits == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("prior_count", [0.0, 1.0])
@pytest.mark.parametrize(
    "streams",
    [
        [SymbolStream(np.array([2]), np.array([True]), None, True)],
        [SymbolStream(np.array([0, 0]), None, True, False)],
        [SymbolStream(np.array([o]), np.array([o == 1]), None, True) for o in (0, 1, 0, 1)],
        [SymbolStream(np.array([0] * 9), np.array([False] * 8 + [True]), None, True)] * 3,
        [SymbolStream(np.array([0, 1]), None, v, e) for v in (True, False) for e in (True, False)],
    ],
    ids=["one token", "one stream", "one token each", "one bin", "two bins"],
)
def test_poor_data_still_makes_a_chain(streams: list[SymbolStream], prior_count: float) -> None:
    """Empty rows, states nobody is in, bins nobody saw, nobody who ends: no NaN, no warning."""
    fit = fit_em(streams, 4, bins=BINS, prompt_bins=2, prior_count=prior_count, restarts=4)
    assert Chain.from_json(fit.chain.to_json()) == fit.chain
    assert np.isfinite(fit.log_posteriors).all()
    assert fit.log_likelihoods[-1] <= 1e-9
    assert all(np.isfinite(curve).all() for curve in forecasts(fit.chain, streams, (0, 5)))
    assert fit.chain.prior[-1] == 0.0
    if prior_count > 0:
        unseen = [SymbolStream(np.array([3, 0, 3]), None, None, True, 1)]
        assert np.isfinite(log_likelihood(fit.chain, unseen)).all()


def test_what_cannot_happen_is_refused_and_named() -> None:
    never = TRUE.model_copy(update={"emission": [[1.0, 0, 0, 0]] * 2 + [[0, 1.0, 0, 0]]})
    possible = SymbolStream(np.array([0, 0, 1]), None, None, True)
    impossible = SymbolStream(np.array([0, 1, 0]), None, None, True)
    with pytest.raises(ChainError, match=r"stream 1 cannot happen .* token 3 has likelihood 0"):
        log_likelihood(never, [possible, impossible])
    assert np.isfinite(log_likelihood(as_served(never), [possible, impossible])).all()
    immortal = TRUE.model_copy(update={"ending": [0.0, 0.0, 0.0]})
    with pytest.raises(ChainError, match=r"stream 0 cannot happen .* its end"):
        log_likelihood(immortal, [possible])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": 0}, "states: expected 1 or more, got 0"),
        ({"bins": 3}, "stream 0: has bin 3"),
        ({"prompt_bins": 0}, "prompt_bins: expected 1 or more"),
        ({"restarts": 0}, "restarts: expected 1 or more"),
        ({"prior_count": -1.0}, "prior_count: expected 0 or more"),
        ({"prior_count": math.nan}, "prior_count: expected 0 or more"),
        ({"tolerance": 0.0}, "tolerance: expected more than 0"),
        ({"streams": []}, "streams: expected at least one"),
        (
            {"streams": [SymbolStream(np.array([0]), None, False, True)]},
            "no stream violates, so nothing can be learnt",
        ),
        ({"edges": [1.0]}, "edges: expected 3 ascending, got 1"),
        ({"edges": [1.0, 3.0, 2.0]}, "edges: expected 3 ascending, got 3"),
        ({"prompt_edges": [1.0]}, "prompt_edges: expected 0 ascending, got 1"),
    ],
)
def test_bad_arguments_are_named(settings: dict, message: str) -> None:
    good = {"streams": [SymbolStream(np.array([3, 0]), None, True, True)], "states": 2}
    with pytest.raises(ChainError, match=message):
        fit_em(**{**good, "bins": BINS, **settings})


def test_held_out_likelihood_chooses_the_true_number_of_states() -> None:
    rng = np.random.default_rng(3)  # as above
    streams = [stream for _, stream in draw(TRUE, 600, rng)]
    settings = {
        "bins": BINS,
        "prompt_bins": PROMPT_BINS,
        "restarts": 2,
        "folds": 3,
        "max_iterations": 60,
    }
    found = choose_states(streams, [3, 1, 2], rivals={"truth": lambda _: TRUE}, **settings)
    assert found.states == 2
    assert found.behind[1] > 3 * found.behind_error[1]
    assert found.behind[found.best] == found.behind_error[found.best] == 0
    assert found.rivals["truth"] == pytest.approx(log_likelihood(TRUE, streams).mean())
    assert abs(found.rivals["truth"] - found.held_out[2]) < 0.05
    with pytest.raises(ChainError, match="expected at least one number"):
        choose_states(streams, [], **settings)
    with pytest.raises(ChainError, match="prior_count"):
        choose_states(streams, [2], **settings, prior_count=0.0)
    with pytest.raises(ChainError, match="folds: 3 need"):
        choose_states(streams[:1] * 2, [2], **settings)


def test_the_clauses_of_the_testbed_are_those_of_its_tables() -> None:
    """What is read off the text: moves and symbols by hidden state."""
    truth = clause_chain.true_chain()
    bins = clause_chain.BINS
    moves = np.zeros((len(grammar.STATES), len(grammar.STATES)))
    seen = np.zeros((len(grammar.STATES), bins))
    for dialogue in sample_dialogues(2000, fresh_seed()):
        symbols = clause_chain.parse(dialogue)
        assert len(symbols) == len(dialogue.states)
        np.add.at(moves, (dialogue.states[:-1], dialogue.states[1:]), 1)
        np.add.at(seen, (dialogue.states[1:], symbols[1:]), 1)
    for counts, table in ((moves, truth.transition), (seen, truth.emission)):
        assert all(map(follows, counts, table))
