"""Recorded streams judged again: the live verdicts bit for bit, and sweeps against it."""

from __future__ import annotations

import dataclasses
import itertools
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import toy
from kernel_cases import fresh_seed
from recordings import HAZARD, random_bundle, random_chain, random_recording

from midstream import testbed
from midstream.bundle import Bundle, BundleError
from midstream.holdback import HoldBack
from midstream.kernels.tables import Verdict
from midstream.measure import rejudge as rejudge_module
from midstream.measure.compare import compare
from midstream.measure.halting import NEVER
from midstream.measure.outcomes import Outcomes
from midstream.measure.recording import TIER, Recording, RecordingError
from midstream.measure.rejudge import rejudge
from midstream.measure.sweep import sweep
from midstream.monitor import Monitor
from midstream.policy import Policy, PolicyError, Segment, Thresholds
from midstream.streams import StreamReport

TIERS = {
    "strict": Thresholds(horizon=9, halt_at=0.75, hold_at=0.4, release_at=0.3),
    "moderate": Thresholds(horizon=3, halt_at=0.8, hold_at=0.5, release_at=0.35),
    "loose": Thresholds(horizon=0, halt_at=0.9),
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def with_tiers(bundle: Bundle, rng: np.random.Generator, **policy: Any) -> Bundle:
    """The bundle with levels that its risks reach and leave."""
    free = Policy(tiers={"loose": Thresholds(horizon=3, halt_at=1.0)}, default_tier="loose")
    risk = rejudge(random_recording(rng, bundle, 60), bundle, policy=free).risk

    def levels(horizon: int, *shares: float) -> Thresholds:
        halt, hold, release = np.nanquantile(risk, shares).tolist()
        return Thresholds(horizon=horizon, halt_at=halt, hold_at=hold, release_at=release)

    tiers = {
        "strict": levels(9, 0.97, 0.5, 0.4),
        "moderate": levels(3, 0.98, 0.6, 0.5),
        "loose": levels(0, 0.99, 0.7, 0.6),
    }
    return bundle.with_policy(
        Policy(tiers=tiers, default_tier="moderate", loosest_tier="loose", **policy)
    )


def live(bundle: Bundle, rng: np.random.Generator, streams: int) -> list[StreamReport]:
    """Reports of random streams, decoded token by token, with gaps and unscored tokens."""
    monitor = Monitor(bundle, slots=1, rows=8, trace=64)
    taps, width = bundle.bank.taps, bundle.bank.hidden_size
    tiers = list(bundle.policy.tiers)
    reports = []
    for n in range(streams):
        prompt = int(rng.integers(0, 9))
        slot = monitor.admit(f"s{n}", prompt, str(rng.choice(tiers)))
        fed = np.flatnonzero(rng.random(rng.integers(1, 60)) < 0.92)
        if prompt and len(fed) and fed[-1] >= prompt:
            fed = np.union1d(fed, [prompt - 1])  # engines always feed the last of a prompt
        first = int(np.searchsorted(fed, prompt))
        for rows in [fed[:first], *fed[first:, None]]:  # the prompt at once, then one by one
            hidden = torch.from_numpy(2 * rng.standard_normal((len(taps), len(rows), width)))
            hidden[:, torch.from_numpy(rng.random(len(rows)) < 0.05)] = torch.nan
            for tap, of_tap in zip(taps, hidden.float(), strict=True):
                monitor.observe(tap, of_tap)
            where = torch.full((len(rows),), slot, dtype=torch.int32)
            monitor.advance(where, torch.from_numpy(rows.astype(np.int32)))
        reports.append(monitor.retire(slot))
    return reports


def assert_as_recorded(recording: Recording, bundle: Bundle, reports: list[StreamReport]) -> None:
    judged = rejudge(recording, bundle)
    for e, report in enumerate(reports):
        rows = slice(recording.starts[e], recording.starts[e + 1])
        risk = [None if np.isnan(r) else r for r in judged.risk[rows].tolist()]
        assert risk == report.trace.risk  # every bit: fp32 as Python numbers
        assert [Verdict(v).name for v in judged.verdict[rows]] == report.trace.verdict
        assert judged.halted_at[e] == (-1 if report.halted_at is None else report.halted_at)
        cause = {-1: None, -2: "unscored"} | dict(enumerate(bundle.bank.names))
        assert cause[int(judged.cause[e])] == report.cause


# ---- as it was -----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_unscored", ["pass", "hold", "halt"])
@pytest.mark.parametrize("reads_prompt", [True, False])
def test_nothing_changed_gives_the_verdicts_of_the_live_run(
    rng, tmp_path, on_unscored, reads_prompt
):
    # The case is worth its name: streams are held, let go and halted, which few bundles do alone.
    wanted = {("CONTINUE", "HOLD"), ("HOLD", "CONTINUE"), ("HALT", "HALT")}
    seen: set[tuple[str, str]] = set()
    for n in range(60):
        if n >= 6 and wanted <= seen:
            break
        free = random_bundle(rng, reads_prompt=reads_prompt)
        bundle = with_tiers(free, rng, on_unscored=on_unscored)
        reports = live(bundle, rng, 20)
        Recording.from_reports(reports, bundle).save(tmp_path / str(n))
        recording = Recording.load(tmp_path / str(n))
        assert_as_recorded(recording, bundle, reports)
        unscored = [report.unscored for report in reports]
        assert rejudge(recording, bundle).unscored.tolist() == unscored
        assert any(unscored)
        seen |= {pair for report in reports for pair in pairwise(["", *report.trace.verdict])}
    assert wanted <= seen


@pytest.mark.parametrize(("slots", "rows", "window"), [(1, 1, 7), (3, 50, 16), (256, 1 << 16, 64)])
def test_batches_and_windows_change_nothing(rng, monkeypatch, slots, rows, window):
    bundle = with_tiers(random_bundle(rng), rng)
    reports = live(bundle, rng, 12)
    for name, value in (("_SLOTS", slots), ("_ROWS", rows), ("_WINDOW", window)):
        monkeypatch.setattr(rejudge_module, name, value)
    assert_as_recorded(Recording.from_reports(reports, bundle), bundle, reports)


@pytest.mark.parametrize("enforce", [True, False])
def test_a_generation_of_the_testbed_replays_exactly(tmp_path, enforce):
    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    monitor = Monitor(bundle, slots=24, trace=192)
    seed = fresh_seed()
    drawn = (testbed.sample_prompt(seed, n) for n in itertools.count())
    attacks = itertools.islice((prompt for prompt in drawn if prompt.attack), 24)
    prompts = [list(prompt.messages) for prompt in attacks]  # two of three are halted
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_dict=True,
    )
    torch.manual_seed(seed)
    with monitor.attach(model, tokenizer, tier="strict", enforce=enforce) as attached:
        model.generate(
            **inputs,
            logits_processor=[attached.halting()],
            do_sample=True,
            top_k=0,
            max_new_tokens=100,
        )
    Recording.from_reports(attached.reports, bundle).save(tmp_path / "trace")
    recording = Recording.load(tmp_path / "trace")
    assert_as_recorded(recording, bundle, attached.reports)
    assert any(report.halted_at is not None for report in attached.reports)
    assert recording.columns[TIER] == ("strict",) * 24


# ---- with something changed ----------------------------------------------------------------------


def relive(bundle: Bundle, recording: Recording, tier: str | None = None) -> list[StreamReport]:
    """Recorded logits through a `Monitor` of one slot, row by row: its probes are set aside."""
    monitor = Monitor(bundle, slots=1, rows=1, trace=64)
    reports = []
    for e, name in enumerate(recording.streams):
        slot = monitor.admit(name, int(recording.prompt_tokens[e]), tier)
        where = torch.tensor([slot], dtype=torch.int32)
        for row in range(recording.starts[e], recording.starts[e + 1]):
            monitor._set_rows(1)
            monitor._used[:] = torch.from_numpy(recording.logits[row])
            monitor.advance(where, torch.tensor([recording.position[row]], dtype=torch.int32))
        reports.append(monitor.retire(slot))
    return reports


def test_another_policy_chain_and_tier_judge_as_a_monitor_with_them(rng):
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle, 40)
    chain = random_chain(rng, states=6)
    policy = Policy(tiers=TIERS, default_tier="moderate", loosest_tier="loose", on_unscored="halt")
    other = dataclasses.replace(bundle, policy=policy, chain=chain)
    for tier in (None, "strict", "loose"):
        judged = rejudge(recording, bundle, policy=policy, chain=chain, tier=tier)
        for e, report in enumerate(relive(other, recording, tier)):
            rows = slice(recording.starts[e], recording.starts[e + 1])
            assert [Verdict(v).name for v in judged.verdict[rows]] == report.trace.verdict
            assert judged.halted_at[e] == (-1 if report.halted_at is None else report.halted_at)
            assert judged.unscored[e] == report.unscored


def test_a_stream_keeps_its_tier_unless_another_is_given(rng):
    bundle = random_bundle(rng, tiers=TIERS)
    plain = random_recording(rng, bundle, 40)
    tiers = tuple(rng.choice(list(TIERS), 40).tolist())
    recording = dataclasses.replace(plain, columns={TIER: tiers})
    judged = rejudge(recording, bundle)
    alone = {tier: rejudge(plain, bundle, tier=tier) for tier in TIERS}
    for e, tier in enumerate(tiers):
        rows = slice(recording.starts[e], recording.starts[e + 1])
        assert (judged.verdict[rows] == alone[tier].verdict[rows]).all()
        assert judged.halted_at[e] == alone[tier].halted_at[e]
    assert (rejudge(plain, bundle).verdict == alone["moderate"].verdict).all()
    with pytest.raises(PolicyError, match=r"no tier '(strict|loose)'"):
        rejudge(recording, bundle, policy=toy.policy())


def test_what_cannot_be_judged_is_refused(rng):
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle)
    other = random_bundle(rng)
    with pytest.raises(RecordingError, match=rf"bundle {bundle.hash}; bundle {other.hash} has"):
        rejudge(recording, other)
    with pytest.raises(RecordingError, match="record the streams anew"):
        rejudge(dataclasses.replace(recording, probes_hash=None), bundle)
    segments = Policy(
        tiers={"moderate": TIERS["moderate"]},
        default_tier="moderate",
        segments={"tool": Segment(opens=[[1]], closes=[[2]])},
    )
    with pytest.raises(RecordingError, match=r"segments \(tool\)"):
        rejudge(recording, bundle, policy=segments)
    with pytest.raises(PolicyError, match="no tier 'stern'"):
        rejudge(recording, bundle, tier="stern")
    bare = random_bundle(rng, reads_prompt=False)
    with pytest.raises(BundleError, match="prompt_edges"):
        rejudge(random_recording(rng, bare), bare, chain=random_chain(rng))


# ---- sweeps --------------------------------------------------------------------------------------


def left(recording: Recording, judged: Any, e: int, depth: Any) -> list[int]:
    """Rows of the stream's response that leave, by the queue that serving uses."""
    queue: HoldBack[int] = HoldBack(depth)
    out: list[int] = []
    start = int(recording.prompt_tokens[e])
    for row in range(recording.starts[e], recording.starts[e + 1]):
        position = int(recording.position[row])
        if position >= start:
            queue.push(position, row)
        if position >= start - 1:
            out += queue.judge(position, Verdict(judged.verdict[row]))
    return out + queue.finish()


@pytest.mark.parametrize("on_unscored", ["pass", "hold", "halt"])
def test_a_sweep_is_one_judgement_per_threshold(rng, on_unscored):
    bundle = random_bundle(rng, on_unscored=on_unscored)
    recording = random_recording(rng, bundle, 90)
    free = rejudge(recording, bundle, policy=toy.policy(tiers={"moderate": TIERS["moderate"]}))
    hit = rng.choice(free.risk[~np.isnan(free.risk)], 3).astype(np.float64)  # reached exactly
    thresholds = [
        0.0,
        1.0,
        *rng.random(5),
        *hit,
        *np.nextafter(hit.astype(np.float32), np.float32(1)),
    ]
    depths = [1, 3, "turn"]
    found = sweep(recording, bundle, thresholds, horizons=[3, 0], hold_backs=depths)
    truth = Outcomes.of(recording, free, [HAZARD])
    violates_at = truth.violates_at + recording.prompt_tokens
    assert found.safe == truth.safe.sum() > 0
    assert found.violating == truth.violating.sum() > 0
    assert found.located == truth.located.sum() > 0
    for g, horizon in enumerate([3, 0]):
        for t, threshold in enumerate(thresholds):
            policy = Policy(
                tiers={"moderate": Thresholds(horizon=horizon, halt_at=threshold)},
                default_tier="moderate",
                on_unscored=on_unscored,
            )
            judged = rejudge(recording, bundle, policy=policy)
            assert (found.halted_at[g, t] == judged.halted_at).all()
            halted = judged.halted_at >= 0
            assert found.false_halts[g, t] == (halted & truth.safe).sum()
            assert found.caught[g, t] == (halted & truth.violating).sum()
            halt = np.where(halted, judged.halted_at, NEVER)
            early = np.maximum(violates_at - halt, 0)[truth.located]
            assert found.lead[g, t] == np.median(early)
            for b, depth in enumerate(depths):
                leaked = np.array(
                    [
                        sum(
                            recording.labels[row, 0] == 1
                            for row in left(recording, judged, e, depth)
                        )
                        for e in range(90)
                    ]
                )
                if on_unscored != "pass":  # which lets go at the end what was never judged
                    assert found.leaked_tokens[g, t, b] == leaked.sum()
                    assert found.missed[g, t, b] == (leaked[truth.located] > 0).sum()


def test_holds_move_no_halt(rng):
    bundle = with_tiers(random_bundle(rng), rng)
    recording = random_recording(rng, bundle, 60)
    levels = bundle.policy.tiers["moderate"]
    found = sweep(recording, bundle, [levels.halt_at], horizons=[levels.horizon])
    judged = rejudge(recording, bundle)
    assert (judged.verdict == Verdict.HOLD).any()
    assert (found.halted_at[0, 0] == judged.halted_at).all()


def test_a_sweep_of_nothing_known_or_nothing_recorded(rng):
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle)
    unlabelled = dataclasses.replace(recording, hazards=("x", "y"))  # which nothing looks for
    found = sweep(unlabelled, bundle, [0.5])
    assert (found.safe, found.violating, found.located) == (0, 0, 0)
    assert np.isnan(found.lead).all()
    nothing = sweep(recording.part(slice(0, 0)), bundle, [0.5])
    assert nothing.halted_at.shape == (1, 1, 0)


@pytest.mark.parametrize(
    ("thresholds", "options", "message"),
    [
        ([], {}, "thresholds"),
        ([0.5, 1.1], {}, "thresholds: expected numbers from 0 to 1"),
        ([np.nan], {}, "thresholds"),
        ([0.5], {"horizons": []}, "horizons"),
        ([0.5], {"horizons": [-1]}, "horizons: expected 0 or more"),
        ([0.5], {"hold_backs": [0]}, "hold_backs: expected 1 or more"),
    ],
)
def test_a_grid_that_is_none_is_refused(rng, thresholds, options, message):
    bundle = random_bundle(rng)
    with pytest.raises(RecordingError, match=message):
        sweep(random_recording(rng, bundle), bundle, thresholds, **options)


# ---- comparisons ---------------------------------------------------------------------------------


def test_a_comparison_names_every_changed_stream(rng, monkeypatch):
    monkeypatch.setattr(rejudge_module, "_SLOTS", 16)  # several parts
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle, 100)
    policy = Policy(tiers={"moderate": TIERS["moderate"]}, default_tier="moderate", hold_back=2)
    found = compare(recording, bundle, policy=policy)
    before, after = rejudge(recording, bundle), rejudge(recording, bundle, policy=policy)
    changed = {change.stream: change for change in found.changed}
    for e, name in enumerate(recording.streams):
        rows = slice(recording.starts[e], recording.starts[e + 1])
        was, now = int(before.halted_at[e]), int(after.halted_at[e])
        if (before.verdict[rows] == after.verdict[rows]).all():
            assert name not in changed
            continue
        change = changed[name]
        assert (change.before, change.after) == (
            was if was >= 0 else None,
            now if now >= 0 else None,
        )
        if was == now:
            assert change.kind == "held differently"
        elif was < 0 or now < 0:
            assert change.kind == ("newly halted" if was < 0 else "no longer halted")
            assert change.tokens is None
        else:
            assert change.kind == ("halted earlier" if now < was else "halted later")
            assert change.tokens == now - was
        last = recording.position[recording.starts[e + 1] - 1]
        assert change.cut_short == (now < 0 and was == last and not recording.ended[e])
    for totals, judged, depth in ((found.before, before, 1), (found.after, after, 2)):
        truth = Outcomes.of(recording, judged, [HAZARD])
        halted = judged.halted_at >= 0
        assert totals.halted == halted.sum()
        assert totals.false_halts == (halted & truth.safe).sum()
        assert totals.caught == (halted & truth.violating).sum()
        assert totals.leaked_tokens == truth.leaked(depth).sum()
        assert totals.missed == (truth.located & (truth.leaked(depth) > 0)).sum()
    same = compare(recording, bundle, policy=bundle.policy, chain=bundle.chain)
    assert same.changed == []
    assert same.before == same.after
