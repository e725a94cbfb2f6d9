"""Optimal stopping: closed forms, brute force, an independent 1-D programme, and the limits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from click.testing import Result
from kernel_cases import fresh_seed
from recordings import HAZARD, random_bundle, random_recording
from typer.testing import CliRunner

from midstream.chain import Chain, SingularChainError
from midstream.cli import app
from midstream.holdback import HoldBack
from midstream.kernels.tables import Verdict
from midstream.learn.stopping import Costs, never_violates, solve
from midstream.learn.stopping_beliefs import BeliefGrid, StoppingError
from midstream.learn.stopping_grid import EdgeGrid, SimplexGrid
from midstream.learn.stopping_price import (
    Price,
    choose_thresholds,
    costs_of_halting,
    policy_verdicts,
    risks,
    threshold_verdicts,
)
from midstream.learn.stopping_streams import UNSCORED, Stakes, Streams, follow, recorded, simulate
from midstream.measure.halting import NEVER
from midstream.measure.outcomes import MeasureError, Outcomes
from midstream.measure.rejudge import rejudge
from midstream.policy import Policy, Thresholds

NO_HOLD = 1e9
_SHARES = (0.5, 0.7, 0.97)
CONTINUE, HOLD, HALT = Verdict


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


@pytest.fixture
def drawn() -> np.random.Generator:
    """For means of simulated streams, which come near what they estimate in most draws only."""
    return np.random.default_rng(4)


def make_chain(transition, ending, emission, prior) -> Chain:
    emission = np.asarray(emission)
    return Chain(
        transition=np.asarray(transition).tolist(),
        ending=np.asarray(ending).tolist(),
        emission=emission.tolist(),
        edges=list(range(emission.shape[1] - 1)),
        prior=np.asarray(prior).tolist(),
        prompt_emission=[[1.0]] * len(ending),
        prompt_edges=[],
    )


def random_latent(rng: np.random.Generator, states: int, bins: int) -> Chain:
    transition = rng.dirichlet(np.ones(states + 1), states + 1)
    transition[states] = np.eye(states + 1)[states]
    return make_chain(
        transition,
        rng.uniform(0.05, 0.3, states + 1),
        rng.dirichlet(np.ones(bins), states + 1),
        [*rng.dirichlet(np.ones(states)), 0.0],
    )


def random_costs(rng: np.random.Generator) -> Costs:
    return Costs(1.0, *np.exp(rng.uniform(-2, 2, 2)))


@pytest.mark.parametrize(("states", "steps"), [(1, 1), (2, 7), (3, 5), (4, 6), (6, 3)])
def test_a_belief_is_the_weighted_mean_of_the_nearest_grid_points(rng, states, steps):
    grid = SimplexGrid(states, steps)
    assert len(np.unique(grid.points.round(9), axis=0)) == len(grid) == len(grid.points)
    beliefs = np.concatenate([rng.dirichlet(np.ones(states) / 2, 500), grid.points])
    at, weight = grid.weights(beliefs)
    assert (weight >= -1e-12).all()
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    np.testing.assert_allclose(
        (grid.points[at] * weight[..., None]).sum(axis=1), beliefs, atol=1e-12
    )
    used = weight > 1e-9
    assert (abs(grid.points[at] - beliefs[:, None]).max(axis=2)[used] < 1 / steps + 1e-9).all()
    assert (used[500:].sum(axis=1) == 1).all()  # a grid point is itself


def test_an_edge_has_close_points_at_its_ends(rng):
    grid = EdgeGrid(50)
    beliefs = rng.dirichlet(np.ones(2) / 4, 500)
    at, weight = grid.weights(beliefs)
    np.testing.assert_allclose(
        (grid.points[at] * weight[..., None]).sum(axis=1), beliefs, atol=1e-12
    )
    steps = np.diff(grid.points[:, 1])
    assert steps.min() > 0
    assert max(steps[0], steps[-1]) < 1e-4
    assert steps.sum() == pytest.approx(1)


def test_who_sees_the_state_pays_nothing_and_halts_at_the_violation(rng):
    """The violating token is judged before it leaves, so full sight costs nothing."""
    k = int(rng.integers(1, 6))
    chain = random_latent(rng, k, k + 1)
    seen = chain.model_copy(update={"emission": np.eye(k + 1).tolist()})
    policy = solve(seen, random_costs(rng), points=200)
    assert policy.value == pytest.approx(0, abs=1e-12)
    streams = simulate(seen, 300, 1)
    verdicts = policy_verdicts(policy, streams, follow(seen, streams, floor=0.0))
    price = Price.of(streams, Stakes.known(streams), verdicts)
    assert (price.halted == ~streams.safe).all()
    assert price.cost(policy.costs).sum() == 0


def test_blind_streams_follow_the_closed_form_of_policy_iteration(rng):
    """One bin: the belief moves by itself, so only the time of the halt is to be chosen.

    Without HOLD the cost of halting after n tokens is a sum, and the best n its minimum.
    """
    k = int(rng.integers(1, 4))
    chain = random_latent(rng, k, 1)
    costs = Costs(1.0, float(np.exp(rng.uniform(-4, 1))), NO_HOLD)
    step = (1 - np.array(chain.ending))[:, None] * np.array(chain.transition)
    alive, leaked, best = np.array(chain.prior), 0.0, np.inf
    for token in range(2000):
        best = min(best, leaked + alive @ never_violates(chain))
        if token:
            leaked += costs.leak * alive[k]
        alive = alive @ step
    best = min(best, leaked)
    # one belief in 6000 points of a simplex of up to 4 states
    policy = solve(chain, costs, points=6000)
    assert policy.value <= best + 1e-5
    assert policy.value == pytest.approx(best, rel=0.03, abs=1e-4)


def test_quickest_detection_agrees_with_an_independent_programme():
    """Shiryaev's problem (1963) with streams that end: halt when P(V) reaches one level.

    The check has its own coordinate (odds), its own interpolation and no HOLD at all.
    """
    rate, ending, leak = 0.05, 0.02, 0.15
    emission = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    chain = make_chain([[1 - rate, rate], [0, 1]], [ending] * 2, emission, [1, 0])
    false = float(never_violates(chain)[0])  # (1-c) p / (1 - (1-c)(1-p)) of all streams violate
    assert false == pytest.approx(1 - (1 - ending) * rate / (1 - (1 - ending) * (1 - rate)))

    odds = np.concatenate([[0.0], np.geomspace(1e-6, 1e6, 6001)])
    p = odds / (1 + odds)
    value = np.zeros(len(p))
    moved = p + (1 - p) * rate
    for _ in range(1500):
        going = 0.0
        for o in range(3):
            hit, other = moved * emission[1, o], (1 - moved) * emission[0, o]
            ratio = hit / np.maximum(other, 1e-300)
            later = np.interp(np.log1p(ratio), np.log1p(odds), value)
            going = going + (hit + other) * later
        cont = leak * p + (1 - ending) * going
        value = np.minimum(cont, false * (1 - p))
    level = p[np.argmax(value >= false * (1 - p) - 1e-12)]

    policy = solve(chain, Costs(1.0, leak, NO_HOLD))
    grid_p = policy.grid.beliefs[:, 1]
    np.testing.assert_allclose(policy.values[:, 0], np.interp(grid_p, p, value), atol=1e-4)
    fine = np.linspace(0, 1, 4001)
    halts = policy.verdicts(np.stack([1 - fine, fine], axis=1), np.ones(4001)) == HALT
    assert (np.diff(halts.astype(int)) >= 0).all()  # one threshold
    assert fine[halts.argmax()] == pytest.approx(level, abs=2e-3)
    # before the first token nothing can leak, so the first step is free
    going = (1 - ending) * sum(
        (m := rate * emission[1, o] + (1 - rate) * emission[0, o])
        * np.interp(rate * emission[1, o] / m, p, value)
        for o in range(3)
    )
    assert policy.value == pytest.approx(min(going, false), abs=2e-5)


def brute_force(chain: Chain, costs: Costs, tokens: int) -> float:
    """Least cost over all policies of a stream of at most ``tokens`` tokens, by enumeration.

    It walks the tree of evidence with the joint chance of state and of violating tokens that wait,
    written out as a table; nothing of the belief grid is in it.
    """
    k = chain.states
    c, a, e = (np.array(x) for x in (chain.ending, chain.transition, chain.emission))
    harmless = never_violates(chain)

    def best(joint: np.ndarray, left: int) -> float:
        """``joint[s, m]``: chance of this evidence, state s and m violating tokens waiting."""
        state, counts = joint.sum(axis=1), np.arange(joint.shape[1])
        halt = costs.false_halt * (state @ harmless)
        leak = costs.leak * (joint @ counts).sum()
        released = np.zeros_like(joint)
        released[:, 0] = state
        go = leak + onward(released, left)
        hold = costs.delay * state.sum() + costs.false_halt * (state[:k] @ c[:k])
        return min(halt, go, hold + onward(joint, left))

    def onward(joint: np.ndarray, left: int) -> float:
        if left == 0:
            return 0.0
        total = 0.0
        for o in range(e.shape[1]):
            after = np.einsum("sm,s,st->tm", joint, 1 - c, a) * e[:, [o]]
            after[k] = np.roll(after[k], 1)  # one more waits; the last column is never reached
            total += best(after, left - 1)
        return total

    start = np.zeros((k + 1, tokens + 2))
    start[:, 0] = chain.prior
    return best(start, tokens)


def test_a_short_tree_of_evidence_is_solved_to_the_brute_force_optimum(rng):
    """States count the tokens: by the third a stream is violated or ends, and V ends soon."""
    low, high = rng.uniform(0.1, 0.6, 2)
    # 0 -> 1 -> 2 -> end; a violation may come at any token, and V ends half of the time
    transition = np.zeros((4, 4))
    for s, slip in enumerate(rng.uniform(0.1, 0.5, 3)):
        transition[s, min(s + 1, 2)], transition[s, 3] = 1 - slip, slip
    transition[3, 3] = 1
    chain = make_chain(
        transition,
        [0.1, 0.2, 1.0, 0.9],
        [[1 - low, low], [1 - low, low], [1 - low, low], [high, 1 - high]],
        [1, 0, 0, 0],
    )
    costs = Costs(1.0, float(np.exp(rng.uniform(-1, 1.5))), float(np.exp(rng.uniform(-5, -1))))
    exact = brute_force(chain, costs, 7)
    cut = 0.1**5 * 10 * costs.leak  # what a V that lives longer can still leak, and more
    policy = solve(chain, costs, points=20_000)
    assert policy.value <= exact + cut
    # What the grid interpolates lies below: by 1.4 % at most in a dozen draws.
    assert policy.value == pytest.approx(exact, abs=0.04 * exact + cut)


def test_what_waits_is_counted_and_leaks_when_it_is_let_go(rng):
    """Against the joint chance of state and of 0 ... 6 violating tokens that wait, as a table."""
    chain, costs = random_latent(rng, 2, 3), random_costs(rng)
    joint = np.zeros((3, 9))
    joint[:2, 0] = rng.dirichlet(np.ones(2)) * 0.6
    joint[2, :7] = rng.dirichlet(np.ones(7)) * 0.4
    c, a, counts = np.array(chain.ending), np.array(chain.transition), np.arange(9)
    after = np.einsum("sm,s,st->tm", joint, 1 - c, a)
    after[2] = np.roll(after[2], 1)

    policy = solve(chain, costs, points=500)
    belief = joint.sum(axis=1)[None]
    waiting = np.array([joint[2] @ counts / joint[2].sum()])
    following = policy.grid.waiting_next(belief, waiting)
    np.testing.assert_allclose(following, after[2] @ counts / after[2].sum())
    now = policy.action_values(belief, waiting)[0]
    nothing = policy.action_values(belief, np.zeros(1))[0]
    assert now[CONTINUE] - nothing[CONTINUE] == pytest.approx(costs.leak * (joint[2] @ counts))
    assert now[HALT] == pytest.approx(costs.false_halt * (belief[0] @ never_violates(chain)))
    # what waits longer has more to lose
    many = policy.action_values(belief, waiting + 10)[0]
    assert nothing[HOLD] <= now[HOLD] <= many[HOLD]


def test_the_grid_bounds_the_least_cost_from_below_and_comes_closer_with_more_points(drawn):
    chain, costs = random_latent(drawn, 2, 3), random_costs(drawn)
    values = [solve(chain, costs, points=points).value for points in (60, 600, 6000)]
    assert (np.diff(values) >= -1e-5).all()
    policy = solve(chain, costs, points=6000)
    streams = simulate(chain, 6000, int(drawn.integers(1 << 30)))
    verdicts = policy_verdicts(policy, streams, follow(chain, streams, floor=0.0))
    cost = Price.of(streams, Stakes.expected(chain, streams), verdicts).cost(costs)
    noise = 5 * cost.std() / np.sqrt(len(cost))
    assert policy.value <= cost.mean() + noise
    assert cost.mean() <= policy.value + noise + 0.02 * policy.value


def test_no_threshold_is_cheaper_than_the_optimal_policy(drawn):
    chain, costs = random_latent(drawn, 2, 3), random_costs(drawn)
    policy = solve(chain, costs)
    streams = simulate(chain, 3000, int(drawn.integers(1 << 30)))
    stakes = Stakes.expected(chain, streams)
    exact = follow(chain, streams, floor=0.0)
    optimal = Price.of(streams, stakes, policy_verdicts(policy, streams, exact)).cost(costs)
    choice = choose_thresholds(streams, stakes, risks(chain, exact, (0, 2, 8)), costs)
    chosen = threshold_verdicts(
        streams, exact @ chain.horizon(choice.thresholds.horizon), choice.thresholds
    )
    theirs = Price.of(streams, stakes, chosen).cost(costs)
    assert theirs.mean() == pytest.approx(choice.cost)
    excess = theirs - optimal
    # chosen on these very streams, so it may be lucky by as much as the noise
    assert excess.mean() >= -5 * excess.std() / np.sqrt(len(excess)) - 0.01 * policy.value


def test_limits_of_the_costs(rng):
    chain = random_latent(rng, 2, 3)
    beliefs = rng.dirichlet(np.ones(3), 200)
    one = np.ones(len(beliefs))
    free = solve(chain, Costs(1.0, 0.0, 1.0), points=500)
    assert free.value == 0
    assert (free.verdicts(beliefs, one) == CONTINUE).all()
    dear = solve(chain, Costs(1.0, 1e9, NO_HOLD), points=500)
    assert (dear.verdicts(beliefs, one) == HALT).all()  # every one has some risk
    waits = solve(chain, Costs(1.0, 1e9, 1e-3), points=500)
    assert (waits.verdicts(beliefs, one) != CONTINUE).all()
    assert waits.value <= dear.value + 1e-5
    harmless_halts = solve(chain, Costs(0.0, 1.0, 1.0), points=500)
    assert harmless_halts.value == 0


def test_more_of_any_cost_never_costs_less(rng):
    chain, base = random_latent(rng, 2, 3), random_costs(rng)
    value = solve(chain, base, points=500).value
    for name, factor in itertools.product(("false_halt", "leak", "delay"), (1.5, 4.0)):
        costs = {**vars(base), name: factor * getattr(base, name)}
        more = solve(chain, Costs(**costs), points=500).value
        assert value - 1e-5 <= more <= factor * value + 1e-4


def test_a_price_is_what_the_hold_back_queue_lets_go(rng):
    lengths = rng.integers(0, 9, 200)
    starts = np.concatenate([[0], (lengths + 1).cumsum()])
    first = np.where(rng.random(200) < 0.5, rng.integers(0, 9, 200), NEVER)
    streams = Streams(
        starts,
        np.zeros(starts[-1], np.int64),
        np.where(first < lengths, first, NEVER),
    )
    verdicts = rng.choice([CONTINUE, HOLD, HALT], starts[-1], p=[0.6, 0.3, 0.1]).astype(np.uint8)
    price = Price.of(streams, Stakes.known(streams), verdicts)
    for e in range(len(streams)):
        queue: HoldBack[int] = HoldBack(1)
        rows = verdicts[starts[e] : starts[e + 1]].tolist()
        left, held, halted = list(queue.judge(0, Verdict(rows[0]))), rows[0] == HOLD, False
        halted = rows[0] == HALT
        for token, verdict in enumerate(rows[1:]):
            if halted:
                break
            queue.push(token + 1, token)
            left += queue.judge(token + 1, Verdict(verdict))
            held += verdict == HOLD
            halted = verdict == HALT
        withheld = halted or rows[-1] == HOLD
        left += queue.finish()
        safe = streams.violates_at[e] == NEVER
        assert price.held[e] == held
        assert price.halted[e] == withheld
        assert price.false_halt[e] == (withheld and safe)
        assert price.leaked[e] == sum(token >= streams.violates_at[e] for token in left)


def test_expected_and_known_stakes_have_the_same_mean(drawn):
    verdicts = np.array([Verdict.CONTINUE])
    while {*verdicts.tolist()} != {*Verdict}:  # the risk of some chains starts at its median
        chain = random_latent(drawn, 2, 3)
        streams = simulate(chain, 20_000, int(drawn.integers(1 << 30)))
        beliefs = follow(chain, streams, floor=0.0)
        risk = beliefs @ chain.horizon(3)
        hold, halt = np.quantile(risk, [0.5, 0.9]).tolist()
        verdicts = threshold_verdicts(
            streams, risk, Thresholds(horizon=3, halt_at=halt, hold_at=hold, release_at=hold / 2)
        )
    known, expected = (
        Price.of(streams, stakes, verdicts)
        for stakes in (Stakes.known(streams), Stakes.expected(chain, streams))
    )
    for name in ("leaked", "false_halt"):
        gap = getattr(known, name) - getattr(expected, name)
        assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(len(gap)), name
        assert getattr(expected, name).std() < getattr(known, name).std()


def test_simulated_streams_follow_the_closed_forms_of_the_chain(drawn):
    chain = random_latent(drawn, 3, 4)
    streams = simulate(chain, 20_000, int(drawn.integers(1 << 30)))
    violates = chain.prior[:3] @ chain.absorption()[:, 0]
    assert (~streams.safe).mean() == pytest.approx(violates, abs=0.02)
    # a violated stream has 1 / c[V] tokens from its violation on, with it
    left = (streams.tokens - streams.violates_at)[~streams.safe]
    assert left.mean() == pytest.approx(1 / chain.ending[3], rel=0.05)
    before = np.where(streams.safe, streams.tokens, np.minimum(streams.violates_at, 1 << 20))
    assert (before + 1).mean() == pytest.approx(chain.prior[:3] @ chain.expected_tokens(), rel=0.05)
    # forecasts come true as often as they say
    risk = follow(chain, streams, floor=0.0)[streams.starts[:-1]] @ chain.horizon(2)
    assert (streams.violates_at < 2).mean() == pytest.approx(risk.mean(), abs=0.02)


def test_a_sweep_of_levels_prices_each_as_its_own_verdicts_do(rng):
    chain, costs = random_latent(rng, 2, 3), random_costs(rng)
    streams = simulate(chain, 200, int(rng.integers(1 << 30)))
    streams.bins[rng.random(len(streams.bins)) < 0.1] = UNSCORED
    risk = follow(chain, streams) @ chain.horizon(4)
    levels = np.quantile(risk, [0.05, 0.3, 0.6, 0.9, 1.0])
    stakes = Stakes.known(streams)
    # the sweep never holds: an unscored token leaves with the next one, which no cost shows
    scored = dict.fromkeys(range(len(levels)), 0.0)
    for at, level in enumerate(levels.tolist()):
        verdicts = np.where((risk >= level) & (streams.bins != UNSCORED), HALT, CONTINUE)
        scored[at] = Price.of(streams, stakes, verdicts.astype(np.uint8)).cost(costs).mean()
    np.testing.assert_allclose(
        costs_of_halting(streams, stakes, risk, levels, costs), list(scored.values())
    )


def test_recorded_streams_have_the_risk_and_the_verdicts_of_the_kernels(rng):
    checked = held = 0
    for _ in range(20):  # some chains hold no stream, or tell no two risks apart
        one, other = checked_against_the_kernels(rng)
        checked, held = checked + one, held + other
        if min(checked, held) > 10:
            return
    raise AssertionError(f"{checked} rows checked, {held} held")


def checked_against_the_kernels(rng) -> tuple[int, int]:
    """Rows of a random recording that were compared, and those of them that are held."""
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle, 400)
    thresholds = Thresholds(horizon=5, halt_at=1.0)
    policy = Policy(tiers={"moderate": thresholds}, default_tier="moderate")
    risk = rejudge(recording, bundle, policy=policy).risk
    some = np.unique(risk[~np.isnan(risk)])
    apart = np.flatnonzero(np.diff(some) > 1e-4)  # the kernels compare in fp32
    if not len(apart):
        return 0, 0
    low, middle, high = (float(some[apart[int(q * len(apart))] :][:2].mean()) for q in _SHARES)
    thresholds = Thresholds(horizon=5, halt_at=high, hold_at=middle, release_at=low)
    policy = Policy(tiers={"moderate": thresholds}, default_tier="moderate", on_unscored="hold")
    judged = rejudge(recording, bundle, policy=policy)

    streams, used = recorded(recording, bundle)
    mine = follow(bundle.chain, streams) @ bundle.chain.horizon(5)
    verdicts = threshold_verdicts(streams, mine, thresholds)
    checked = held = 0
    for own, e in enumerate(np.flatnonzero(used)):
        rows = slice(recording.starts[e], recording.starts[e + 1])
        at = recording.position[rows] - recording.prompt_tokens[e]
        there = (at >= -1) & ~np.isnan(judged.risk[rows])
        place = streams.starts[own] + at[there] + 1
        np.testing.assert_allclose(mine[place], judged.risk[rows][there], atol=1e-5)
        if verdicts[streams.starts[own]] == HOLD and -1 not in at:
            continue  # held by its prior, in front of a prompt that was not recorded
        until = np.flatnonzero(verdicts[place] == HALT)
        upto = slice(until[0] + 1) if len(until) else slice(None)
        theirs = judged.verdict[rows][there][upto]
        np.testing.assert_array_equal(verdicts[place][upto], theirs)
        checked, held = checked + len(place), held + (theirs == HOLD).sum()
    truth = Outcomes.of(recording, judged, [HAZARD])
    np.testing.assert_array_equal(streams.tokens, truth.tokens[used])
    np.testing.assert_array_equal(streams.safe, truth.safe[used])
    return checked, held


def test_a_recording_of_which_nothing_is_known_is_refused(rng):
    bundle = random_bundle(rng)
    blank = random_recording(rng, bundle, 10)
    blank.labels[:] = -1
    blank.response_labels[:] = -1
    with pytest.raises(MeasureError, match="label the recording"):
        recorded(blank, bundle)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["chain", "stop", *map(str, arguments)])


COSTS = ("--false-halt", 1, "--leak", 2, "--delay", 0.1, "--streams", 200, "--points", 2400)


def test_the_command_writes_a_policy_figures_and_plots(rng, tmp_path):
    bundle = random_bundle(rng)
    bundle.save(tmp_path / "bundle")
    random_recording(rng, bundle, 60).save(tmp_path / "streams")
    out = tmp_path / "out"
    done = run(
        tmp_path / "bundle", *COSTS, "--recording", tmp_path / "streams", "--out", out, "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads((out / "stop.json").read_text())
    assert json.loads(done.stdout) == found
    policy = Policy.from_yaml((out / "policy.yaml").read_text())
    assert policy.tiers["moderate"].model_dump() == found["suggestion"]
    for part in ("simulated", "recorded"):
        rows = found[part]["policies"]
        assert rows["oracle"]["cost"]["value"] == 0
        assert rows["optimal"]["above_optimal"]["value"] == 0
        for row in rows.values():
            assert row["cost"]["low"] <= row["cost"]["value"] <= row["cost"]["high"]
    rows = found["recorded"]["policies"]
    assert rows["hindsight"]["cost"]["value"] <= rows["halting only"]["cost"]["value"] + 1e-9
    assert found["sentences"][0] == (
        "A violating token that leaves costs as much as 2 false halts, a token held as much as 0.1."
    )
    assert f"reaches {found['suggestion']['halt_at']:g}" in found["sentences"][1]
    assert any("recorded streams" in sentence for sentence in found["sentences"])
    for name in ("cost.svg", "regions.svg"):
        assert (out / name).read_text().startswith("<?xml")


def test_the_command_takes_a_chain_alone_and_prints_sentences(rng, tmp_path):
    (tmp_path / "chain.json").write_text(random_latent(rng, 2, 3).to_json())
    done = run(tmp_path / "chain.json", *COSTS, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Halt when the risk of a violation" in done.output
    assert "Never halting costs" in done.output
    again = run(tmp_path / "chain.json", *COSTS, "--out", tmp_path / "out")
    assert isinstance(again.exception, FileExistsError)
    alone = run(
        tmp_path / "chain.json", *COSTS, "--out", tmp_path / "b", "--recording", tmp_path / "x"
    )
    assert alone.exit_code == 2
    assert "need a bundle" in alone.output


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["false_halt", "leak", "delay"])
def test_costs_that_are_none_are_refused_by_name(name, cost):
    given = {"false_halt": 1.0, "leak": 1.0, "delay": 1.0, name: cost}
    with pytest.raises(StoppingError, match=f"{name}: expected a finite cost of 0 or more"):
        Costs(**given)


def test_costs_that_are_all_nothing_are_refused():
    with pytest.raises(StoppingError, match="all costs are 0"):
        Costs(0.0, 0.0, 0.0)


def test_states_that_are_never_left_are_named():
    chain = make_chain(
        [[0.5, 0.3, 0.2], [0, 1, 0], [0, 0, 1]], [0.1, 0, 0.1], [[0.5, 0.5]] * 3, [1, 0, 0]
    )
    with pytest.raises(SingularChainError, match=r"states \[0?,? ?1\] are never absorbed"):
        solve(chain, Costs(1, 1, 1))


def test_more_latent_states_than_a_grid_can_hold_are_refused_with_what_to_do(rng):
    with pytest.raises(StoppingError, match=r"can come from 13 states.*fewer latent states"):
        solve(random_latent(rng, 12, 3), Costs(1, 1, 1))
    with pytest.raises(StoppingError, match="too few for a grid"):
        BeliefGrid(random_latent(rng, 3, 3), points=20)
