"""``advance`` on every backend: rules, gaps, verdicts, and what must never change anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_cases import (
    Oracle,
    Tables,
    Target,
    check_against,
    fresh_seed,
    make_tables,
    random_stream,
    rows_of,
    run,
    targets,
)

from midstream.kernels import ops
from midstream.kernels.tables import (
    NO_CAUSE,
    UNSCORED_CAUSE,
    OnUnscored,
    Rule,
    SlotTable,
    Verdict,
)

# The C++ code has one path for all instruction sets.
TARGETS = [target for target in targets() if target.isa in (None, "generic")]


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.active() as active:
        yield active


def tokens_for(target: Target, usual: int) -> int:
    """The interpreter takes some 20 ms per row."""
    return min(usual, 15) if target.backend == "triton" else usual


def same(a: SlotTable, b: SlotTable) -> None:
    """Bit-identical, NaN equal to NaN."""
    for name, x, y in zip(vars(a), a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


def scalar_tables(
    rule: Rule = Rule.LAST,
    *,
    parameter: float = 0.5,
    window: int = 3,
    start: int = 0,
    on_unscored: OnUnscored = OnUnscored.PASS,
) -> Tables:
    """One probe, one policy row, K = 1; the last token's evidence bin alone gives the risk."""
    tables = make_tables(
        1,
        slots=2,
        rules=(rule,),
        prompt_probes=0,
        states=1,
        bins=3,
        prompt_bins=1,
        window=window,
        trace=4,
        start=start,
        on_unscored=(on_unscored,),
    )
    tables.evidence.parameter.fill_(parameter)
    tables.evidence.center.fill_(0.0)
    # Steps that keep no memory, so that a token's bin alone gives its risk: 0.1, 0.5 and 0.9.
    tables.chain.step_powers.fill_(1.0)
    tables.chain.emission.copy_(torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]]))
    tables.chain.edges.copy_(torch.tensor([1.0, 3.0]))  # softplus(0.54), softplus(2.95)
    tables.policy.ahead.copy_(torch.tensor([[0.0, 1.0]]))
    tables.policy.halt_at.fill_(2.0)
    tables.policy.hold_at.fill_(2.0)
    tables.policy.release_at.fill_(2.0)
    return tables


LOW, MIDDLE, HIGH = -1.0, 2.0, 5.0  # logits in the three bins


def feed(target: Target, tables: Tables, slot: int, position: int, *logits: float) -> SlotTable:
    rows = [(slot, position + i, np.array([z])) for i, z in enumerate(logits)]
    run(target, tables, rows)
    return tables.slots


RULES = {
    Rule.LAST: [1.0, -2.0, 3.0, 0.5],
    Rule.EMA: [1.0, 0.5 * -2 + 0.5 * 1, 1.25, 0.875],
    Rule.MEAN: [1.0, -0.5, 2.0 / 3.0, 0.5],
    Rule.CUSUM: [0.5, 0.0, 2.5, 2.5],
    Rule.COUNT: [1.0, 1.0, 2.0, 3.0],
    Rule.RUN: [1.0, 0.0, 1.0, 2.0],
    Rule.MAX: [1.0, 1.0, 3.0, 3.0],
}


@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name.lower())
def test_rules_by_hand(target: Target, rule: Rule) -> None:
    tables = scalar_tables(rule).clone(target.device)
    for t, (z, expected) in enumerate(zip([1.0, -2.0, 3.0, 0.5], RULES[rule], strict=True)):
        slots = feed(target, tables, 0, t, z)
        assert float(slots.evidence[0, 0]) == pytest.approx(expected, abs=1e-6)
        assert int(slots.folds[0, 0]) == t + 1
    assert float(tables.slots.evidence[1, 0]) == 0.0


def test_max_of_negative_logits_is_negative(target: Target) -> None:
    """A new stream's evidence is 0; that is not a token's logit."""
    tables = scalar_tables(Rule.MAX).clone(target.device)
    assert float(feed(target, tables, 0, 0, -3.0).evidence[0, 0]) == -3.0


@pytest.mark.parametrize("shape", ["all rules", "many states", "no trace, no ring", "one bin"])
def test_streams_agree_with_the_oracle(target: Target, shape: str) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    tables = {
        "all rules": lambda: make_tables(seed),
        "many states": lambda: make_tables(seed, states=11, bins=7, window=9, prompt_probes=3),
        "no trace, no ring": lambda: make_tables(
            seed, rules=(Rule.EMA, Rule.CUSUM, Rule.LAST), window=0, trace=0, prompt_probes=0
        ),
        "one bin": lambda: make_tables(seed, rules=(Rule.MAX,), bins=1, prompt_bins=1, states=1),
    }[shape]()
    drawn = [
        random_stream(rng, tables, slot, tokens_for(target, 40))
        for slot in (range(6) if target.backend != "triton" else (0, 1))
    ]
    tables = tables.clone(target.device)
    run(target, tables, [row for stream, _ in drawn for row in rows_of(stream)])
    for _, oracle in drawn:
        check_against(oracle, tables.slots)


def test_interleaving_and_chunking_change_no_bit(target: Target) -> None:
    """One call with all rows, a call per row, and any split give the same bits."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    tables = make_tables(seed)
    drawn = [random_stream(rng, tables, slot, tokens_for(target, 24))[0] for slot in (4, 1, 3)]
    whole = tables.clone(target.device)
    run(target, whole, [row for stream in drawn for row in rows_of(stream)])

    steps = tables.clone(target.device)
    for i in range(len(drawn[0].positions)):
        decode = [rows_of(stream)[i] for stream in drawn]
        rng.shuffle(decode)
        run(target, steps, decode)
    same(whole.slots, steps.slots)

    chunks = tables.clone(target.device)
    left = [rows_of(stream) for stream in drawn]
    padding = (-1, 0, np.full(9, 3.0, np.float32))
    while any(left):
        batch = [padding]
        for i in rng.permutation(len(left)):
            cut = int(rng.integers(0, len(left[i]) + 1))
            batch += [*left[i][:cut], padding]
            left[i] = left[i][cut:]
        run(target, chunks, batch)
    same(whole.slots, chunks.slots)


def test_feeding_rows_again_changes_nothing(target: Target) -> None:
    seed = fresh_seed()
    tables = make_tables(seed)
    stream, _ = random_stream(np.random.default_rng(seed), tables, 2, tokens_for(target, 20))
    tables = tables.clone(target.device)
    run(target, tables, rows_of(stream))
    once = tables.clone(target.device)
    run(target, tables, rows_of(stream))
    same(once.slots, tables.slots)


def test_padding_and_empty_batches_change_nothing(target: Target) -> None:
    tables = make_tables(3).clone(target.device)
    before = tables.clone(target.device)
    left = run(target, tables, [(-1, t, np.full(9, 7.0, np.float32)) for t in (0, 5, 2**31 - 1)])
    assert bool(left.isnan().all())
    run(target, tables, [])
    same(before.slots, tables.slots)


def test_logits_are_consumed_and_their_neighbours_kept(target: Target) -> None:
    """A tap that writes nothing in the next step must not be scored with what stood there."""
    tables = make_tables(5).clone(target.device)
    wide = torch.full((4, 13), 0.25, device=target.device)
    slot = torch.tensor([0, 0, -1, 3], dtype=torch.int32, device=target.device)
    position = torch.tensor([0, 0, 0, 9], dtype=torch.int32, device=target.device)
    ops.advance(wide[:, 2:11], slot, position, *tables, backend=target.backend)
    assert bool(wide[:, 2:11].isnan().all())
    assert bool((wide[:, :2] == 0.25).all())
    assert bool((wide[:, 11:] == 0.25).all())
    ops.advance(wide[:1, 2:11], slot[:1], position[:1] + 1, *tables, backend=target.backend)
    assert int(tables.slots.unscored[0]) == 1


@pytest.mark.parametrize(
    ("position", "unscored"),
    [(2, 2), (4, 4), (6, 6), (9, 9), (1_000_000, 1_000_000)],
    ids=["prompt", "whole-prompt", "straddling", "response", "million"],
)
def test_gaps(target: Target, position: int, unscored: int) -> None:
    """A prefix-cache hit: skipped tokens are counted, and the belief moves through the response."""
    tables = make_tables(11)  # prompts of 4 tokens
    oracle = Oracle(tables, 0)
    z = np.full(9, 0.1, np.float32)
    tables = tables.clone(target.device)
    oracle.feed(position, z)
    run(target, tables, [(0, position, z)])
    assert int(tables.slots.unscored[0]) == unscored
    assert int(tables.slots.scored[0]) == 1
    assert oracle.margin > 1e-3
    check_against(oracle, tables.slots)


def test_prompt_gap_counts_only_where_a_probe_reads_prompts(target: Target) -> None:
    tables = make_tables(11, prompt_probes=0).clone(target.device)
    run(target, tables, [(0, 2, np.zeros(7, np.float32)), (0, 5, np.zeros(7, np.float32))])
    assert int(tables.slots.unscored[0]) == 1  # token 4; 0, 1 and 3 are prompt
    assert int(tables.slots.scored[0]) == 1  # token 5; 2 is prompt


def test_row_is_scored_by_the_probes_of_its_phase_alone(target: Target) -> None:
    """A response probe's NaN on a prompt token is no loss, and the other way round."""
    tables = make_tables(12).clone(target.device)
    prompt, response = np.zeros(9, np.float32), np.zeros(9, np.float32)
    prompt[0], response[8] = np.nan, np.inf
    run(target, tables, [(0, t, prompt if t < 4 else response) for t in range(6)])
    assert int(tables.slots.scored[0]) == 6
    assert int(tables.slots.unscored[0]) == 0
    assert bool(tables.slots.evidence[0].isfinite().all())


@pytest.mark.parametrize("loss", ["nan", "inf", "gap"])
@pytest.mark.parametrize("rule", list(OnUnscored), ids=lambda rule: rule.name.lower())
def test_on_unscored(target: Target, rule: OnUnscored, loss: str) -> None:
    tables = scalar_tables(on_unscored=rule).clone(target.device)
    tables.policy.halt_at.fill_(0.95)
    feed(target, tables, 0, 0, LOW)
    if loss == "gap":
        slots = feed(target, tables, 0, 3, LOW)
    else:
        slots = feed(target, tables, 0, 1, math.nan if loss == "nan" else math.inf)
    expected = {
        OnUnscored.PASS: Verdict.CONTINUE,
        # The row after a gap is scored and its low risk releases what the gap held.
        OnUnscored.HOLD: Verdict.CONTINUE if loss == "gap" else Verdict.HOLD,
        OnUnscored.HALT: Verdict.HALT,
    }[rule]
    assert int(slots.verdict[0]) == expected
    halted = expected == Verdict.HALT
    assert int(slots.cause[0]) == (UNSCORED_CAUSE if halted else NO_CAUSE)
    assert int(slots.halted_at[0]) == ((3 if loss == "gap" else 1) if halted else -1)
    assert int(slots.unscored[0]) == (2 if loss == "gap" else 1)
    assert float(slots.evidence[0, 0]) == LOW


def test_hysteresis(target: Target) -> None:
    """Held at 0.9, still held at 0.5, released at 0.1; and 0.5 alone does not hold."""
    tables = scalar_tables().clone(target.device)
    tables.policy.hold_at.fill_(0.8)
    tables.policy.release_at.fill_(0.4)
    seen = [
        int(feed(target, tables, 0, t, z).verdict[0])
        for t, z in enumerate([MIDDLE, HIGH, MIDDLE, LOW, MIDDLE])
    ]
    hold, go = Verdict.HOLD, Verdict.CONTINUE
    assert seen == [go, hold, hold, go, go]
    assert float(tables.slots.peak[0]) == pytest.approx(0.9)
    assert float(tables.slots.risk[0]) == pytest.approx(0.5)


def test_edges_and_thresholds_belong_to_what_is_above(target: Target) -> None:
    """Equality, on numbers that every backend computes exactly: softplus(32) = 32, risk = 1/2."""
    for z, verdict in ((32.0, Verdict.HALT), (31.0, Verdict.CONTINUE)):
        tables = scalar_tables().clone(target.device)
        tables.chain.edges.copy_(torch.tensor([1.0, 32.0]))
        tables.chain.emission.copy_(torch.tensor([[1.0, 1.0, 0.5], [0.0, 0.0, 0.5]]))
        tables.policy.halt_at.fill_(0.5)
        assert int(feed(target, tables, 0, 0, z).verdict[0]) == verdict


def test_halt_is_absorbing_and_names_its_first_cause(target: Target) -> None:
    tables = make_tables(
        21, rules=(Rule.LAST, Rule.LAST, Rule.LAST), prompt_probes=0, start=0, trace=8
    ).clone(target.device)
    tables.evidence.center.copy_(torch.tensor([0.0, 5.0, 0.0]))
    tables.policy.ahead.fill_(1.0)
    tables.policy.halt_at.fill_(0.99)
    rows = [
        (0, 0, np.array([1.0, 6.5, 1.2])),
        (0, 1, np.array([-9.0, -9.0, -9.0])),
        (0, 2, np.full(3, np.nan)),
    ]
    run(target, tables, rows[:1])
    tables.policy.ahead.fill_(0.0)
    run(target, tables, rows[1:])
    slots = tables.slots
    assert int(slots.verdict[0]) == Verdict.HALT
    assert int(slots.cause[0]) == 1  # the largest hazard: 6.5 - 5 > 1.2
    assert int(slots.halted_at[0]) == 0
    assert slots.trace_verdict[0, :3].tolist() == [Verdict.HALT] * 3
    assert int(slots.scored[0]) == 2  # what comes after a halt is still counted
    assert int(slots.unscored[0]) == 1


def test_prompt_can_halt_at_its_last_token_only(target: Target) -> None:
    tables = make_tables(31).clone(target.device)
    tables.policy.ahead.fill_(1.0)
    tables.policy.halt_at.fill_(0.5)
    z = np.zeros(9, np.float32)
    z[8] = 9.0
    run(target, tables, [(0, t, z) for t in range(3)])
    assert int(tables.slots.verdict[0]) == Verdict.CONTINUE
    assert tables.slots.trace_risk[0, :3].isnan().all()
    run(target, tables, [(0, 3, z)])
    assert int(tables.slots.verdict[0]) == Verdict.HALT
    assert int(tables.slots.halted_at[0]) == 3
    assert int(tables.slots.cause[0]) == 8


def test_trace_ring_wraps_around(target: Target) -> None:
    tables = scalar_tables().clone(target.device)  # 4 cells
    feed(target, tables, 0, 0, *([LOW, HIGH, MIDDLE] * 2))
    slots = tables.slots
    assert slots.trace_position[0].tolist() == [4, 5, 2, 3]
    assert slots.trace_logits[0, :, 0].tolist() == [HIGH, MIDDLE, MIDDLE, LOW]
    np.testing.assert_allclose(slots.trace_risk[0].cpu(), [0.9, 0.5, 0.5, 0.1], rtol=1e-6)
    assert slots.trace_position[1].tolist() == [-1] * 4


def test_window_of_mean_wraps_around(target: Target) -> None:
    tables = scalar_tables(Rule.MEAN, window=3).clone(target.device)
    zs = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    slots = feed(target, tables, 0, 0, *zs)
    assert float(slots.evidence[0, 0]) == pytest.approx(112.0 / 3.0)


def test_changed_tables_are_seen_by_the_next_call(target: Target) -> None:
    """Thresholds live in device tensors: a captured graph must see them change."""
    tables = scalar_tables().clone(target.device)
    bound = ops.Backend(target.device, target.backend).bind_advance(*tables)
    slot = torch.zeros(1, dtype=torch.int32, device=target.device)
    for t, (halt_at, expected) in enumerate([(2.0, Verdict.CONTINUE), (0.8, Verdict.HALT)]):
        tables.policy.halt_at.fill_(halt_at)
        bound(torch.full((1, 1), HIGH, device=target.device), slot, slot + t)
        assert int(tables.slots.verdict[0]) == expected


def test_tiers_are_per_slot(target: Target) -> None:
    tables = make_tables(41, start=0, on_unscored=(OnUnscored.PASS,) * 2).clone(target.device)
    tables.policy.ahead.fill_(0.7)
    tables.policy.halt_at.copy_(torch.tensor([0.6, 0.8]))
    tables.policy.hold_at.fill_(2.0)
    z = np.zeros(9, np.float32)
    run(target, tables, [(0, 0, z), (1, 0, z), (2, 0, z)])
    assert tables.slots.verdict[:3].tolist() == [Verdict.HALT, Verdict.CONTINUE, Verdict.HALT]


def test_recycled_slot_is_as_good_as_new(target: Target) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    tables = make_tables(seed)
    first, _ = random_stream(rng, tables, 2, tokens_for(target, 20))
    second, oracle = random_stream(rng, tables, 2, tokens_for(target, 20))
    tables = tables.clone(target.device)
    run(target, tables, rows_of(first))
    tables.slots.admit(2, start=4, policy=2, prior=tables.chain.prior)
    run(target, tables, rows_of(second))
    check_against(oracle, tables.slots)


def test_slot_outside_the_table(target: Target) -> None:
    tables = make_tables(2).clone(target.device)
    before = tables.clone(target.device)
    z = np.zeros(9, np.float32)
    rows = [(0, 0, z), (6, 0, z)]
    if not target.looks_at_rows:
        run(target, tables, rows[1:])
    else:
        with pytest.raises(IndexError, match="row 1 names slot 6, the table has 6"):
            run(target, tables, rows)
        tables.slots.policy[0] = before.slots.policy[0] = 3
        with pytest.raises(IndexError, match="row 0, slot 0, names policy row 3, the table has 3"):
            run(target, tables, rows[:1])
    same(before.slots, tables.slots)


def test_position_beyond_the_limit(target: Target) -> None:
    """A gap up to there would overflow int32."""
    tables = make_tables(2).clone(target.device)
    before = tables.clone(target.device)
    rows = [(0, 2**31 - 1, np.zeros(9, np.float32))]
    if not target.looks_at_rows:
        run(target, tables, rows)
    else:
        with pytest.raises(IndexError, match="row 0 has position 2147483647, the limit is"):
            run(target, tables, rows)
    same(before.slots, tables.slots)


def test_underflowing_belief_keeps_what_it_was(target: Target) -> None:
    """Where no state can emit the evidence the filter must not divide by zero."""
    tables = scalar_tables().clone(target.device)
    tables.chain.emission.fill_(0.0)
    slots = feed(target, tables, 0, 0, LOW)
    assert slots.belief[0].tolist() == [0.5, 0.5]
    tables.chain.step_powers.fill_(0.0)
    slots = feed(target, tables, 0, 1, LOW)
    assert slots.belief[0].tolist() == [0.5, 0.5]


def test_long_stream_does_not_drift(target: Target) -> None:
    """Rounding does not add up: three hundred tokens stay as close to the oracle as forty."""
    tables = make_tables(7)
    stream, oracle = random_stream(
        np.random.default_rng(7), tables, 0, tokens_for(target, 300), gaps=False
    )
    tables = tables.clone(target.device)
    run(target, tables, rows_of(stream))
    check_against(oracle, tables.slots)
