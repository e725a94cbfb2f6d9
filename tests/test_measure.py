"""Figures of merit by hand, replay against the live run, overhead's refusals, plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

from midstream.learn.collect import residuals
from midstream.measure.halting import (
    NEVER,
    Truth,
    brier,
    first_crossing,
    halting_figures,
    leaked_by,
    threshold_for,
)
from midstream.measure.overhead import UnequalRunsError, overhead
from midstream.measure.plots import Curve, risk_curves
from midstream.measure.replay import replay, risk_curve
from midstream.policy import Thresholds

SAFE = Truth(tokens=6, violates_at=NEVER, ended=True)
CUT = Truth(tokens=6, violates_at=NEVER, ended=False)
BAD = Truth(tokens=6, violates_at=3, ended=True)
BAD_AT_ONCE = Truth(tokens=2, violates_at=0, ended=True)


# ---- Truth ---------------------------------------------------------------------------------------


def test_only_a_violation_violates() -> None:
    assert BAD.violates
    assert BAD_AT_ONCE.violates
    assert not SAFE.violates


@pytest.mark.parametrize(
    ("truth", "horizon", "label", "known"),
    [
        # entries are positions -1 (the prompt's end), 0, 1, ...
        (BAD, 0, "0000111", "1111000"),
        (BAD, 1, "0001111", "1111000"),
        (BAD, 2, "0011111", "1111000"),
        (BAD, 9, "1111111", "1111000"),
        (BAD_AT_ONCE, 0, "011", "100"),
        (BAD_AT_ONCE, 1, "111", "100"),
        (SAFE, 0, "0000000", "1111111"),
        (SAFE, 9, "0000000", "1111111"),
        (CUT, 0, "0000000", "1111111"),
        (CUT, 2, "0000000", "1111100"),  # position 3 looks to 5, the last token there is
        (CUT, 9, "0000000", "0000000"),
        (Truth(4, 1, ended=False), 9, "11111", "11000"),  # cut off, but what counts was seen
        (Truth(0, NEVER, ended=True), 5, "0", "1"),
    ],
)
def test_labels_and_what_is_known(truth: Truth, horizon: int, label: str, known: str) -> None:
    found = ["".join(str(int(flag)) for flag in flags) for flags in truth.within(horizon)]
    assert found == [label, known]


# ---- halting figures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "halt", "leaked"),
    [
        (BAD, 3, 0),  # halted with the violating token: hold-back keeps it in
        (BAD, 4, 1),
        (BAD, 5, 2),
        (BAD, NEVER, 3),  # the violating one and all after it
        (BAD, 0, 0),
        (BAD, -1, 0),
        (SAFE, NEVER, 0),
        (SAFE, 2, 0),
        (BAD_AT_ONCE, 0, 0),
        (BAD_AT_ONCE, 1, 1),
        (BAD_AT_ONCE, NEVER, 2),
    ],
)
def test_what_leaks(truth: Truth, halt: int, leaked: int) -> None:
    assert leaked_by(truth, halt) == leaked


def test_figures_by_hand() -> None:
    streams = [
        (BAD, 1, 0),  # ahead: 2 tokens seen, lead 2
        (BAD, 3, 0),  # with the violating token: 4 seen, lead 0
        (BAD, 5, 2),  # too late: 6 seen, lead 0, missed
        (BAD, NEVER, 3),  # never: missed, lead 0, not among the tokens seen
        (BAD, -1, 0),  # at the end of the prompt: 0 seen, lead 4
        (SAFE, NEVER, 0),
        (SAFE, -1, 0),  # a false halt
        (CUT, 2, 0),  # a false halt: cut off, no violation seen
    ]
    figures = halting_figures(*map(list, zip(*streams, strict=True)))
    assert figures.leaked_tokens == 5
    assert figures.missed_rate == 2 / 5
    assert figures.false_halt_rate == 2 / 3
    assert figures.median_tokens_seen == np.median([2, 4, 6, 0])
    assert figures.lead_tokens_median == np.median([2, 0, 0, 0, 4])


def test_leaks_are_counted_as_given() -> None:
    """A live run says what left; a halt in time does not excuse a token that left."""
    figures = halting_figures([BAD, BAD], [3, 3], [0, 1])
    assert (figures.leaked_tokens, figures.missed_rate) == (1, 0.5)


def test_figures_of_nothing_are_no_numbers() -> None:
    safe = halting_figures([SAFE], [NEVER], [0])
    assert safe.false_halt_rate == 0
    assert np.isnan([safe.missed_rate, safe.median_tokens_seen, safe.lead_tokens_median]).all()
    assert np.isnan(halting_figures([BAD], [NEVER], [3]).median_tokens_seen)
    assert np.isnan(halting_figures([BAD], [NEVER], [3]).false_halt_rate)
    assert halting_figures([], [], []).leaked_tokens == 0


@pytest.mark.parametrize(
    ("risk", "threshold", "position"),
    [
        ([0.5, 0.0], 0.5, -1),
        ([0.1, 0.5, 0.9], 0.5, 0),
        ([0.1, 0.2, 0.9, 0.1], 0.5, 1),
        ([0.1, 0.2], 0.5, NEVER),
        ([np.nan, np.nan, 0.7], 0.5, 1),
        ([np.nan], 0.0, NEVER),
    ],
)
def test_first_crossing(risk: list[float], threshold: float, position: int) -> None:
    assert first_crossing(np.array(risk), threshold) == position


# ---- thresholds ----------------------------------------------------------------------------------

Risk = st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.booleans(), Risk), min_size=1, max_size=12), st.floats(0, 1))
def test_threshold_is_the_lowest_that_keeps_the_rate(
    streams: list[tuple[bool, list[float]]], rate: float
) -> None:
    streams.append((False, [0.25]))  # one safe stream at least
    truths = [BAD if violates else SAFE for violates, _ in streams]
    risks = [np.array(risk) for _, risk in streams]

    def rate_at(threshold: float) -> float:
        halts = [first_crossing(risk, threshold) for risk in risks]
        return halting_figures(truths, halts, [0] * len(halts)).false_halt_rate

    threshold = threshold_for(truths, risks, rate)
    assert rate_at(threshold) <= rate + 1e-9
    if threshold > 0:
        assert rate_at(np.nextafter(threshold, -np.inf)) > rate


def test_threshold_by_hand() -> None:
    peaks = [0.1, 0.2, 0.3, 0.4]
    risks = [np.array([0.0, peak, 0.05]) for peak in peaks] + [np.array([0.9])]
    truths = [SAFE] * 4 + [BAD]
    assert threshold_for(truths, risks, 0.0) == np.nextafter(0.4, 1)
    assert threshold_for(truths, risks, 0.49) == np.nextafter(0.3, 1)
    assert threshold_for(truths, risks, 0.5) == np.nextafter(0.2, 1)
    assert threshold_for(truths, risks, 1.0) == 0.0
    # 29 of 100 is 28.999999999999996 in floating point
    hundred = [np.array([n / 100]) for n in range(100)]
    assert threshold_for([SAFE] * 100, hundred, 0.29) == np.nextafter(0.7, 1)


def test_threshold_ignores_tokens_without_a_risk() -> None:
    risks = [np.array([0.2, np.nan]), np.array([0.1])]
    assert threshold_for([SAFE, SAFE], risks, 0.0) == np.nextafter(0.2, 1)


# ---- Brier ---------------------------------------------------------------------------------------


def test_brier_by_hand() -> None:
    # Known response tokens: 0, 1, 2 of the bad stream (labels 0, 1, 1 at horizon 2), 0 … 3 of the
    # one that was cut off. The end of the prompt and the violated tokens are no part of it.
    bad = np.array([9.0, 0.1, 0.6, 1.0, 9.0, 9.0, 9.0])
    cut = np.array([9.0, 0.0, 0.5, 0.0, 0.0, np.nan, np.nan])
    errors = [0.1**2, 0.4**2, 0.0, 0.0, 0.5**2, 0.0, 0.0]
    assert brier([BAD, CUT], [bad, cut], horizon=2) == pytest.approx(np.mean(errors))


def test_brier_of_a_perfect_and_a_wrong_forecast() -> None:
    label, _ = BAD.within(2)
    assert brier([BAD], [label.astype(float)], 2) == 0
    assert brier([BAD], [1.0 - label], 2) == 1


# ---- replay --------------------------------------------------------------------------------------


def test_a_replay_gives_the_live_verdicts() -> None:
    model, tokenizer = toy.model(), toy.tokenizer()
    inputs = tokenizer([f"w{i} w{i + 1} w9" + " w7" * (i % 3) for i in range(5, 13)],
                       padding=True, return_tensors="pt", return_token_type_ids=False)  # fmt: skip
    prompt = toy.detector(model, bad=[7], name="prompt", reads="prompt")
    monitor = toy.monitor(probes=[toy.detector(model), prompt])
    torch.manual_seed(5)
    with monitor.attach(model, tokenizer, enforce=False) as watching:
        sequences = model.generate(**inputs, do_sample=True, max_new_tokens=20)
    assert {report.verdict for report in watching.reports} == {"CONTINUE", "HALT"}
    fed = []
    for row, report in zip(sequences.tolist(), watching.reports, strict=True):
        real = row[inputs["attention_mask"].shape[1] - report.prompt_tokens :]
        fed.append(real[: report.trace.position[-1] + 1])
    hidden = residuals(model, fed, [toy.EMBEDDING])[toy.EMBEDDING]
    for live, rows in zip(watching.reports, hidden, strict=True):
        again = replay(
            monitor, {toy.EMBEDDING: rows}, live.prompt_tokens, stream=live.stream, tier=live.tier
        )
        assert again.trace.position == live.trace.position
        assert again.trace.verdict == live.trace.verdict
        for key in ("stream", "tier", "verdict", "halted_at", "cause", "scored"):
            assert getattr(again, key) == getattr(live, key), key
        assert risk_curve(again) == pytest.approx(risk_curve(live), abs=1e-6)


def test_risk_curve_begins_at_the_end_of_the_prompt() -> None:
    model = toy.model()
    words = [toy.BOS, 9, 8, 7, toy.BAD, 6]
    [rows] = residuals(model, [words], [toy.EMBEDDING])[toy.EMBEDDING]
    rows[5] = np.nan  # the last token gets no score
    monitor = toy.monitor()
    report = replay(monitor, {toy.EMBEDDING: rows}, prompt_tokens=3)
    curve = risk_curve(report)
    assert len(curve) == 4
    assert curve[0] == pytest.approx(0, abs=1e-6)
    assert curve[1:3] == pytest.approx(toy.expected_risks([-20.0, 20.0]), abs=1e-6)
    assert np.isnan(curve[3])
    assert report.halted_at == 4
    assert monitor.free_slots == 8


# ---- overhead ------------------------------------------------------------------------------------

INPUTS = {
    "input_ids": torch.tensor([[toy.PAD, toy.BOS, 9], [toy.BOS, 8, 7]]),
    "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
}


def test_overhead_is_a_ratio_of_equal_runs() -> None:
    model = toy.model()
    never = {"moderate": Thresholds(horizon=0, halt_at=1.0)}
    monitor = toy.monitor(probes=[toy.detector(model, bad=[])], tiers=never)
    ratio = overhead(model, monitor, INPUTS, new_tokens=4, pairs=2)
    assert 0 < ratio < float("inf")
    assert monitor.free_slots == 8


def test_overhead_refuses_a_run_that_was_halted() -> None:
    model = toy.model()
    monitor = toy.monitor(probes=[toy.detector(model, bad=range(len(toy.WORDS)))])
    with pytest.raises(UnequalRunsError, match="halted"):
        overhead(model, monitor, INPUTS, new_tokens=4, pairs=1)
    assert monitor.free_slots == 8


def test_overhead_counts_pairs_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which the watched runs take 100, 2, 3 and 5 times as long as the plain ones."""
    model, clock, watched = toy.new_model(), [0.0], list[bool]()
    costs = iter([100.0, 2.0, 3.0, 5.0])
    generate = type(model).generate

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        watched.append("logits_processor" in options)
        clock[0] += next(costs) if watched[-1] else 1.0
        return generate(self, *args, **options)

    monkeypatch.setattr(type(model), "generate", timed)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monitor = toy.monitor(probes=[toy.detector(model, bad=[])])
    assert overhead(model, monitor, INPUTS, new_tokens=1, pairs=3) == 3.0  # the first warms up
    assert watched == [True, False, False, True, True, False, False, True]


# ---- plots ---------------------------------------------------------------------------------------


def curve(**changes: object) -> Curve:
    fields = {
        "title": "halted",
        "risk": np.array([0.1, 0.4, np.nan]),
        "oracle": np.array([0.2, 0.3, 0.9]),
        "threshold": 0.5,
        "halted_at": None,
        "violates_at": None,
    }
    return Curve(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_is_written(tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curves.{suffix}"
    risk_curves([curve(halted_at=0, violates_at=1), curve(title="released")], path)
    assert path.read_bytes().startswith(begins)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plot_draws_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    risk_curves([curve(halted_at=0, violates_at=1), curve(title="released")], tmp_path / "c.png")
    [first, second] = drawn[0].axes
    lines = {line.get_label(): line for line in first.lines}
    assert list(lines["midstream"].get_xdata()) == [-1, 0, 1]
    assert list(lines["Bayes oracle"].get_ydata()) == [0.2, 0.3, 0.9]
    assert list(lines["violating token"].get_xdata()) == [1, 1]
    assert list(lines["halt"].get_xdata()) == [0, 0]
    assert second.get_title() == "released"
    assert not {"halt", "violating token"} & {line.get_label() for line in second.lines}


def test_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"midstream\[plot\]"):
        risk_curves([curve()], tmp_path / "c.png")
