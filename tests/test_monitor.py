"""The monitor as an engine sees it: slots, rows, reports."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.evidence import Ema, Mean
from midstream.kernels.tables import MAX_POSITION, SlotTable, Verdict
from midstream.monitor import Monitor, MonitorInUseError, NoFreeSlotError, RowError
from midstream.policy import PolicyError, Segment, Thresholds
from midstream.streams import StreamReport
from midstream.taps import Tap

D = 4
FIRST, SECOND = Tap(0, "resid_pre"), Tap(1, "resid_post")
FINGERPRINT = Fingerprint(
    architecture="None",
    model_type="none",
    hidden_size=D,
    layers=2,
    vocab_size=10,
    tokenizer_sha256=None,
    weights_sha256="0" * 64,
)


def axis(name: str, tap: Tap, column: int, **fields: Any) -> Probe:
    """A probe whose logit is one entry of the hidden state."""
    return Probe(name, "hazard", tap, torch.eye(D)[column], **fields)


def watch(*probes: Probe, slots: int = 4, trace: int = 16, **policy: Any) -> Monitor:
    bundle = Bundle(
        bank=ProbeBank(probes or [axis("one", FIRST, 0)]),
        chain=toy.trusting_chain(),
        policy=toy.policy(**policy),
        fingerprint=FINGERPRINT,
    )
    return Monitor(bundle, slots=slots, rows=4, trace=trace)


def hidden(*logits: float | tuple[float, ...]) -> torch.Tensor:
    rows = [z if isinstance(z, tuple) else (z,) for z in logits]
    return torch.tensor([[*row, *[0.0] * (D - len(row))] for row in rows])


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def step(monitor: Monitor, rows: list[tuple[int, int, float]]) -> None:
    """One forward pass: (slot, position, logit) per row, the same at every tap."""
    slots, positions, logits = zip(*rows, strict=True)
    for tap in monitor.bank.taps:
        monitor.observe(tap, hidden(*logits))
    monitor.advance(ints(*slots), ints(*positions))


def run(monitor: Monitor, logits: list[float], prompt: int = 0) -> StreamReport:
    """A stream by itself, token by token."""
    slot = monitor.admit("alone", prompt)
    for position, z in enumerate(logits):
        step(monitor, [(slot, position, z)])
    return monitor.retire(slot)


def test_a_stream_halts_at_its_first_bad_token_and_stays_halted() -> None:
    monitor = watch()
    slot = monitor.admit("s", prompt_tokens=2)
    verdicts = []
    for position, z in enumerate([20.0, -20.0, -20.0, 20.0, -20.0]):
        step(monitor, [(slot, position, z)])
        verdicts.append(Verdict(int(monitor.slots.verdict[slot])))
    # the prompt's logits are none of a response probe's business
    assert verdicts == [Verdict.CONTINUE] * 3 + [Verdict.HALT] * 2
    report = monitor.retire(slot, "length")
    assert (report.stream, report.prompt_tokens, report.tier) == ("s", 2, "moderate")
    assert (report.verdict, report.halted_at, report.cause) == ("HALT", 3, "one")
    assert (report.scored, report.unscored) == (3, 0)
    assert report.finish_reason == "content_filter"
    assert report.bundle == monitor.bundle.hash


def test_the_report_says_what_was_computed() -> None:
    monitor = watch()
    logits = [-20.0, -3.0, 7.5, 0.25, -1.0]
    report = run(monitor, logits)
    risks = toy.expected_risks(logits)
    assert report.trace.position == list(range(5))
    assert report.trace.scores == {"one": logits}
    assert report.trace.risk == pytest.approx(risks, rel=1e-4)
    assert report.risk == pytest.approx(risks[-1], rel=1e-4)
    assert report.peak == pytest.approx(max(risks), rel=1e-4)
    assert report.trace.verdict == ["CONTINUE"] * 2 + ["HALT"] * 3
    assert StreamReport.model_validate_json(report.model_dump_json()) == report


def test_the_trace_keeps_the_newest_tokens_in_order() -> None:
    monitor = watch(trace=4)
    report = run(monitor, [float(-z) for z in range(6)])
    assert report.trace.position == [2, 3, 4, 5]
    assert report.trace.scores["one"] == [-2.0, -3.0, -4.0, -5.0]
    assert run(watch(trace=0), [-1.0, -2.0]).trace.position == []


def test_more_streams_than_slots_are_refused_until_one_retires() -> None:
    monitor = watch(slots=2)
    first = monitor.admit("a", 1)
    monitor.admit("b", 1)
    assert monitor.free_slots == 0
    with pytest.raises(NoFreeSlotError, match=r"'c'.*all 2 slots.*more slots"):
        monitor.admit("c", 1)
    monitor.retire(first)
    assert monitor.admit("c", 1) == first


def test_nothing_survives_in_a_recycled_slot() -> None:
    probes = [
        axis("m", FIRST, 0, evidence=Mean(window=3)),
        axis("e", SECOND, 1, evidence=Ema(alpha=0.5)),
    ]
    logits = [-20.0, -4.0, -20.0, -1.0]
    fresh, used = watch(*probes, slots=1), watch(*probes, slots=1)
    run(used, [20.0, float("nan"), 20.0, 20.0, 20.0, 3.0, 20.0])
    slot = used.admit("next", 0)
    untouched = fresh.admit("next", 0)
    for dirty, clean in zip(used.slots.tensors(), fresh.slots.tensors(), strict=True):
        assert torch.equal(dirty[slot], clean[untouched])
    used.retire(slot)
    fresh.retire(untouched)
    assert run(used, logits) == run(fresh, logits)


@pytest.mark.parametrize("slot", [0, -1, 99])
def test_a_slot_without_a_stream_is_refused(slot: int) -> None:
    monitor = watch()
    monitor.retire(monitor.admit("gone", 0)) if slot == 0 else None
    for call in (monitor.retire, monitor.trace, monitor.session, monitor.enter_segment):
        with pytest.raises(KeyError, match="holds no stream"):
            call(slot)


@pytest.mark.parametrize(("slots", "message"), [(0, "slots: expected at least 1"), (-1, "slots")])
def test_a_monitor_needs_slots(slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watch(slots=slots)


def test_a_negative_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_tokens"):
        watch().admit("s", -1)


def test_a_tap_that_was_not_observed_leaves_its_rows_unscored() -> None:
    monitor = watch(axis("a", FIRST, 0), axis("b", SECOND, 0), on_unscored="halt")
    slot = monitor.admit("s", 0)
    step(monitor, [(slot, 0, -20.0)])
    monitor.observe(FIRST, hidden(-20.0))
    monitor.advance(ints(slot), ints(1))
    report = monitor.retire(slot)
    assert (report.scored, report.unscored, report.cause) == (1, 1, "unscored")
    assert report.trace.scores == {"a": [-20.0, -20.0], "b": [-20.0, None]}
    assert report.trace.risk[1] is None


@pytest.mark.parametrize("rows", [1, 3])
def test_no_tap_at_all_leaves_the_rows_unscored_too(rows: int) -> None:
    monitor = watch()
    slots = [monitor.admit(f"{i}", 0) for i in range(3)]
    step(monitor, [(slot, 0, -20.0) for slot in slots])
    monitor.advance(ints(*slots[:rows]), ints(*[1] * rows))
    assert [monitor.retire(slot).unscored for slot in slots] == [1] * rows + [0] * (3 - rows)


def test_rows_of_an_advance_that_failed_are_not_folded_by_the_next() -> None:
    monitor = watch()
    slot = monitor.admit("s", 0)
    monitor.observe(FIRST, hidden(20.0))
    with pytest.raises(IndexError, match="names slot 99"):
        monitor.advance(ints(99), ints(0))
    monitor.advance(ints(slot), ints(0))
    assert (report := monitor.retire(slot)).unscored == 1
    assert report.verdict != "HALT"


def test_rows_that_do_not_fit_are_refused_and_can_be_discarded() -> None:
    monitor = watch(axis("a", FIRST, 0), axis("b", SECOND, 0))
    slot = monitor.admit("s", 0)
    with pytest.raises(RowError, match=r"no probe reads resid_mid.0; .*resid_pre.0, resid_post.1"):
        monitor.observe(Tap(0, "resid_mid"), hidden(1.0))
    monitor.observe(FIRST, hidden(20.0, 20.0))
    with pytest.raises(RowError, match=r"3 rows at resid_post.1, 2 at the taps before"):
        monitor.observe(SECOND, hidden(1.0, 1.0, 1.0))
    with pytest.raises(RowError, match="1 slots for the 2 rows"):
        monitor.advance(ints(slot), ints(0))
    monitor.discard()
    monitor.observe(SECOND, hidden(-20.0))
    monitor.advance(ints(slot), ints(0))
    # the bad logit of the pass that failed is gone
    assert monitor.retire(slot).trace.scores == {"a": [None], "b": [-20.0]}


def test_a_wrong_width_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match=rf"\[1, {D + 1}\], expected \[N, {D}\]"):
        watch().observe(FIRST, torch.zeros(1, D + 1))


def test_hidden_states_may_have_any_layout_and_number_of_rows() -> None:
    monitor = watch()
    slot = monitor.admit("s", 0)
    batch = hidden(*[float(-i) for i in range(12)])
    strided = batch.view(3, 4, D).transpose(0, 1)  # [4, 3, D], not contiguous
    monitor.observe(FIRST, strided)
    monitor.advance(ints(*[slot] * 12), ints(*range(12)))  # more rows than were reserved
    assert monitor.retire(slot).trace.scores["one"] == strided.reshape(12, D)[:, 0].tolist()


@pytest.mark.parametrize(
    ("on_unscored", "verdicts"),
    [
        ("pass", ["CONTINUE", "CONTINUE", "CONTINUE"]),
        ("hold", ["CONTINUE", "HOLD", "CONTINUE"]),
        ("halt", ["CONTINUE", "HALT", "HALT"]),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_unscored_and_touch_no_other_row(
    on_unscored: str, verdicts: list[str], value: float
) -> None:
    monitor = watch(on_unscored=on_unscored)
    sick, well = monitor.admit("sick", 0), monitor.admit("well", 0)
    for position, z in enumerate([-20.0, value, -20.0]):
        step(monitor, [(sick, position, z), (well, position, -20.0)])
    report = monitor.retire(sick)
    assert report.trace.verdict == verdicts
    assert report.trace.scores["one"] == [-20.0, None, -20.0]
    assert (report.scored, report.unscored) == (2, 1)
    assert monitor.retire(well).trace == run(watch(), [-20.0] * 3).trace


def test_rows_of_the_past_change_nothing_and_gaps_are_counted() -> None:
    monitor = watch()
    slot = monitor.admit("s", 0)
    step(monitor, [(slot, 0, -20.0), (slot, 1, -20.0)])
    step(monitor, [(slot, 0, 20.0), (slot, 1, 20.0), (slot, 2, -20.0), (-1, 3, 20.0)])
    step(monitor, [(slot, 5, -20.0)])
    report = monitor.retire(slot, never_fed=2)
    assert (report.scored, report.unscored) == (4, 2 + 2)
    assert report.verdict == "CONTINUE"
    assert report.trace.position == [0, 1, 2, 5]


TIERS = {
    "strict": Thresholds(horizon=0, halt_at=0.005),
    "moderate": Thresholds(horizon=0, halt_at=0.5),
    "loose": Thresholds(horizon=0, halt_at=0.95),
}


def test_each_stream_has_its_own_tier() -> None:
    monitor = watch(tiers=TIERS, loosest_tier="loose")
    slots = {tier: monitor.admit(tier, 0, tier) for tier in ("strict", "moderate", "loose")}
    # one bad token: risk 0.91
    step(monitor, [(slot, 0, 20.0) for slot in slots.values()])
    reports = {tier: monitor.retire(slot) for tier, slot in slots.items()}
    assert {tier: r.verdict for tier, r in reports.items()} == {
        "strict": "HALT",
        "moderate": "HALT",
        "loose": "CONTINUE",
    }
    assert [r.tier for r in reports.values()] == list(reports)


def test_a_looser_tier_than_allowed_takes_no_slot() -> None:
    monitor = watch(tiers=TIERS)
    with pytest.raises(PolicyError, match="'loose' is looser than this server allows"):
        monitor.admit("s", 0, "loose")
    with pytest.raises(PolicyError, match="mild"):
        monitor.admit("s", 0, "mild")
    assert monitor.free_slots == 4


def test_a_segment_has_thresholds_of_its_own() -> None:
    relaxed = {"moderate": Thresholds(horizon=0, halt_at=0.95)}
    segment = Segment(opens=["<think>"], closes=["</think>"], tiers=relaxed)
    monitor = watch(segments={"reasoning": segment})
    slot, other = monitor.admit("s", 0), monitor.admit("o", 0)
    monitor.enter_segment(slot, "reasoning")
    step(monitor, [(slot, 0, 20.0), (other, 0, 20.0)])
    assert monitor.slots.verdict.tolist()[slot] == Verdict.CONTINUE
    assert monitor.slots.verdict.tolist()[other] == Verdict.HALT
    monitor.enter_segment(slot)
    step(monitor, [(slot, 1, 20.0)])
    assert monitor.retire(slot).halted_at == 1
    with pytest.raises(PolicyError, match="no segment 'tool'"):
        monitor.enter_segment(other, "tool")


@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("trace", [0, 1, 100])
@pytest.mark.parametrize("windows", [(), (3,), (3, 7)])
def test_memory_is_what_the_formula_says(slots: int, trace: int, windows: tuple[int, ...]) -> None:
    probes = [axis(f"m{w}", FIRST, 0, evidence=Mean(window=w)) for w in windows]
    monitor = watch(axis("l", SECOND, 1), *probes, slots=slots, trace=trace)
    per_slot = SlotTable.bytes_per_slot(1 + len(windows), 1, max(windows, default=0), trace)
    assert monitor.slots.nbytes() == slots * per_slot
    p, m, k = 1 + len(windows), max(windows, default=0), 1
    assert per_slot == 35 + 8 * p + 4 * p * m + 4 * (k + 1) + trace * (9 + 4 * p)


LOGITS = st.sampled_from([-20.0, -3.0, -0.5, 0.5, 3.0, 6.0, float("nan")])
STREAMS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(LOGITS, min_size=1, max_size=8)), min_size=1, max_size=4
)
PROBES = (
    axis("l", FIRST, 0),
    axis("e", SECOND, 0, evidence=Ema(alpha=0.5)),
    axis("m", SECOND, 0, evidence=Mean(window=3)),
    axis("p", FIRST, 0, reads="prompt"),
)


@given(streams=STREAMS, data=st.data())
@settings(max_examples=25)
def test_a_stream_gets_the_same_verdicts_in_any_batch(
    streams: list[tuple[int, list[float]]], data: st.DataObject
) -> None:
    alone = [run(watch(*PROBES), logits, prompt) for prompt, logits in streams]
    monitor = watch(*PROBES)
    slots = [monitor.admit("alone", prompt) for prompt, _ in streams]
    fed = [0] * len(streams)
    while any(n < len(logits) for n, (_, logits) in zip(fed, streams, strict=True)):
        rows: list[tuple[int, int, float]] = []
        going = [i for i, (_, logits) in enumerate(streams) if fed[i] < len(logits)]
        for i in data.draw(st.permutations(going)):
            logits = streams[i][1]
            for _ in range(data.draw(st.integers(0 if rows else 1, len(logits) - fed[i]))):
                rows.append((slots[i], fed[i], logits[fed[i]]))
                fed[i] += 1
            rows += [(-1, 0, 20.0)] * data.draw(st.integers(0, 1))
        step(monitor, rows)
    assert [monitor.retire(slot) for slot in slots] == alone


@given(logits=st.lists(LOGITS, min_size=1, max_size=12))
@settings(max_examples=30)
def test_a_recorded_stream_replays_to_the_recorded_verdicts(logits: list[float]) -> None:
    probes = [p for p in PROBES if p.reads == "response"]
    recorded = run(watch(*probes), logits)
    scores = recorded.trace.scores["l"]
    again = run(watch(*probes), [float("nan") if z is None else z for z in scores])
    assert again == recorded


@given(logits=st.lists(st.tuples(LOGITS, LOGITS, LOGITS), min_size=1, max_size=12))
@settings(max_examples=30)
def test_parts_add_their_logits_to_the_head_and_to_nothing_else(
    logits: list[tuple[float, float, float]],
) -> None:
    parted = watch(
        axis("head", SECOND, 0, bias=1.0),
        axis("part", FIRST, 1, adds_to="head", bias=-0.5),
        axis("other part", SECOND, 1, adds_to="head"),
        axis("free", FIRST, 2),
    )
    whole = watch(
        Probe("head", "hazard", SECOND, torch.tensor([1.0, 2.0, 0.0, 0.0]), 0.5),
        axis("free", FIRST, 2),
    )
    found, expected = (run(monitor, logits) for monitor in (parted, whole))
    for name in ("head", "free"):
        ours, theirs = (
            np.array(report.trace.scores[name], dtype=float) for report in (found, expected)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (found.scored, found.unscored) == (expected.scored, expected.unscored)


def test_a_part_whose_tap_was_not_observed_leaves_the_token_unscored() -> None:
    monitor = watch(axis("head", FIRST, 0), axis("part", SECOND, 0, adds_to="head"))
    slot = monitor.admit("s", 0)
    for position, taps in enumerate([(FIRST, SECOND), (FIRST,), (SECOND,), (FIRST, SECOND)]):
        for tap in taps:
            monitor.observe(tap, hidden(-9.0))
        monitor.advance(ints(slot), ints(position))
    report = monitor.retire(slot)
    assert report.trace.scores["head"] == [-18.0, None, None, -18.0]
    assert (report.scored, report.unscored) == (2, 2)


def test_one_engine_at_a_time() -> None:
    monitor = watch()
    refused: list[Exception] = []

    def second() -> None:
        try:
            with monitor.exclusive():
                pass
        except MonitorInUseError as error:
            refused.append(error)

    with monitor.exclusive():
        other = threading.Thread(target=second)
        other.start()
        other.join()
    assert len(refused) == 1
    second()
    assert len(refused) == 1


def test_a_saved_bundle_makes_the_same_monitor(tmp_path: Any) -> None:
    monitor = watch(*PROBES)
    monitor.bundle.save(tmp_path / "bundle")
    loaded = Monitor.from_bundle(tmp_path / "bundle", slots=4, trace=16)
    logits = [-20.0, 0.5, 3.0, -0.5]
    assert run(loaded, logits, 1) == run(monitor, logits, 1)


def test_a_prompt_that_no_position_can_count_is_refused_and_takes_no_slot() -> None:
    monitor = toy.monitor(slots=1)
    for tokens in (-1, MAX_POSITION, 2**40):
        with pytest.raises(ValueError, match=f"got {tokens}"):
            monitor.admit("s", tokens)
    assert monitor.free_slots == 1


def test_a_copy_of_a_slot_table_has_a_host_of_its_own() -> None:
    slots = toy.monitor(slots=1).slots
    slots.admit(0, start=3, policy=0, prior=torch.ones(2))
    copied = copy.deepcopy(slots)
    copied.admit(0, start=5, policy=0, prior=torch.ones(2))
    assert (int(slots.start[0]), int(copied.start[0])) == (3, 5)
