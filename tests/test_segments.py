"""Segments: told from token ids as a plain reader would, and each judged as if it stood alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import BAD, EOS
from transformers import LogitsProcessor

from midstream.bank import Probe
from midstream.chain import Chain
from midstream.engines.hf import score, stream
from midstream.evidence import Cusum, Ema, Mean
from midstream.monitor import Monitor
from midstream.policy import Segment, Thresholds
from midstream.segments import SegmentError, SegmentReader
from midstream.streams import StreamReport

NEVER = {"moderate": Thresholds(horizon=0, halt_at=1.0)}
THINK, ANSWERS, CALL, CALLED = 5, 6, [7, 8], 9
SEGMENTS = {
    "reasoning": Segment(opens=["w5"], closes=["w6"], tiers=NEVER),
    "tool_call": Segment(opens=[CALL], closes=[[CALLED]]),
}


def plain_reader(segments: dict[str, Segment], text: list[int]) -> list[str]:
    """What the automaton should say, by looking back at every token."""
    meaning = {
        tuple(marker): (name, opens)
        for name, segment in segments.items()
        for opens, markers in ((True, segment.opens), (False, segment.closes))
        for marker in markers
    }
    inside, out = [], []
    for end in range(1, len(text) + 1):
        found = max(
            (m for m in meaning if tuple(text[:end][-len(m) :]) == m), key=len, default=None
        )
        current = inside[-1] if inside else "answer"
        if found:
            name, opens = meaning[found]
            if opens and name not in inside:
                inside.append(name)
                current = name
            elif not opens and name in inside:
                del inside[inside.index(name) :]
                current = name
        out.append(current)
    return out


marker = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)


@settings(max_examples=150)
@given(st.lists(marker, min_size=6, max_size=6, unique=True), st.lists(st.integers(0, 5)))
def test_the_automaton_reads_like_someone_who_looks_back(
    markers: list[tuple[int, ...]], text: list[int]
) -> None:
    ids = [list(m) for m in markers]
    segments = {
        "a": Segment(opens=[ids[0], ids[1]], closes=[ids[2]]),
        "b": Segment(opens=[ids[3]], closes=[ids[4], ids[5]]),
    }
    reader = SegmentReader.of(toy.policy(segments=segments))
    read = reader.read(reader.start([]), text)
    assert [reader.names[segment] for segment in read] == plain_reader(segments, text)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ([10, THINK], "reasoning"),
        ([10, *CALL], "tool_call"),
        ([10, THINK, 11], "answer"),  # a user can write this
        ([THINK], "reasoning"),
        ([], "answer"),
        ([8], "answer"),
    ],
)
def test_a_prompt_opens_a_segment_by_its_end_alone(prompt: list[int], inside: str) -> None:
    reader = SegmentReader.of(toy.policy(segments=SEGMENTS), toy.tokenizer())
    read = reader.read(reader.start(prompt), [10])
    assert reader.names[read[0]] == inside


def test_white_space_after_the_opening_marker_does_not_hide_it() -> None:
    class Spaced:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [THINK]}

        def __len__(self) -> int:
            return 24

        def convert_ids_to_tokens(self, token: int) -> str:
            return "w5"

        def decode(self, ids: list[int]) -> str:
            return "\n" if ids == [20] else "x"

    segments = {"reasoning": Segment(opens=["w5"], closes=[[6]])}
    reader = SegmentReader.of(toy.policy(segments=segments), Spaced())
    for prompt, inside in (([THINK, 20, 20], 1), ([THINK, 21], 0), ([20], 0)):
        assert reader.read(reader.start(prompt), [10]).tolist() == [inside]


@pytest.mark.parametrize(
    ("segments", "tokenizer", "fault"),
    [
        ({"a": Segment(opens=["w5"], closes=[[1]])}, None, "segments.a: 'w5' is a text; give the"),
        (
            {"a": Segment(opens=["w5 w6"], closes=[[1]])},
            toy.tokenizer(),
            r"'w5 w6' is no token of this tokenizer, it makes \[5, 6\] of it",
        ),
        (
            {"a": Segment(opens=["nowhere"], closes=[[1]])},
            toy.tokenizer(),
            r"'nowhere' is no token",
        ),
        (
            {"a": Segment(opens=[[1]], closes=[[2]]), "b": Segment(opens=[[3]], closes=[[1]])},
            None,
            r"segments.b: the marker \[1\] has another meaning",
        ),
    ],
)
def test_what_cannot_be_recognised_is_refused(segments: Any, tokenizer: Any, fault: str) -> None:
    with pytest.raises(SegmentError, match=fault):
        SegmentReader.of(toy.policy(segments=segments), tokenizer)


def test_an_engine_that_does_not_recognise_is_told() -> None:
    monitor = toy.monitor(segments=SEGMENTS)
    assert monitor.segments is not None
    with pytest.raises(SegmentError, match="recognise_segments"):
        monitor.segments.read([], [1])
    with pytest.raises(SegmentError, match="'w5' is a text"):
        monitor.attach(toy.model())  # without its tokenizer


# -- in generate, in a stream, in given texts ------------------------------------------------------


class Writer(LogitsProcessor):
    """Writes the given rows, after that the end."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.calls = rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for at, row in enumerate(self.rows):
            forced[at, row[self.calls] if self.calls < len(row) else EOS] = 0.0
        self.calls += 1
        return forced


def generated(
    monitor: Monitor, rows: list[list[int]], prompt: str = "w10 w11", **options: Any
) -> list[StreamReport]:
    inputs = toy.tokenizer()([prompt] * len(rows), return_tensors="pt")
    with monitor.attach(toy.model(), toy.tokenizer(), **options) as m:
        toy.model().generate(
            **{k: v for k, v in inputs.items() if k != "token_type_ids"},
            logits_processor=[Writer(rows), m.halting()],
            max_new_tokens=max(map(len, rows)) + 1,
            do_sample=False,
        )
        return m.reports


def summary(report: StreamReport) -> dict[str, tuple[int, bool]]:
    return {name: (part.scored, part.flagged) for name, part in report.segments.items()}


def test_each_segment_is_judged_by_its_own_thresholds() -> None:
    rows = [
        [THINK, BAD, 12, ANSWERS, 13, 14],  # thinks what it may think
        [THINK, 12, ANSWERS, 13, BAD, 14],
        [12, *CALL, BAD, CALLED, 13],
        [12, BAD, 13],
    ]
    reports = generated(toy.monitor(segments=SEGMENTS), rows)
    prompt = reports[0].prompt_tokens
    assert [r.halted_at for r in reports] == [None, prompt + 4, prompt + 3, prompt + 1]
    assert [r.verdict for r in reports] == ["CONTINUE", "HALT", "HALT", "HALT"]
    # The end token is fed to rows that others outlast.
    assert summary(reports[0])["reasoning"] == (4, False)
    assert summary(reports[1])["answer"] == (2, True)
    assert summary(reports[2])["tool_call"] == (2, True)  # its marker's end and the bad word
    assert summary(reports[2])["answer"] == (2, False)
    assert reports[0].peak == max(part.peak for part in reports[0].segments.values())
    assert reports[0].peak > 0.9 > reports[0].segments["answer"].peak


def test_a_leak_and_an_escape_are_visible() -> None:
    both = {"reasoning": Segment(opens=["w5"], closes=["w6"])}
    rows = [
        [THINK, BAD, ANSWERS, 13, 14],
        [THINK, 12, ANSWERS, BAD, 14],
        [THINK, BAD, ANSWERS, BAD, 14],
        [THINK, 12, ANSWERS, 13, 14],
        [BAD, 12, 13, 14, 15],
    ]
    reports = generated(toy.monitor(segments=both), rows, enforce=False)
    assert [r.mismatch for r in reports] == ["leak", "escape", None, None, None]
    assert [r.segments["answer"].flagged for r in reports] == [False, True, True, False, True]


def slow_probe(rule: Any) -> Probe:
    """Reads a layer that attends, and remembers."""
    width = toy.model().config.hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(3)) / width**0.5
    return Probe("slow", "h", toy.Tap(1, "resid_post"), weight, evidence=rule)


FINE = Chain(
    transition=[[0.8, 0.19, 0.01], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]],
    ending=[0.05, 0.02, 0.1],
    emission=[[0.6, 0.2, 0.1, 0.1], [0.2, 0.3, 0.3, 0.2], [0.1, 0.1, 0.3, 0.5]],
    edges=[0.3, 0.6, 1.0],
    prior=[0.5, 0.4, 0.1],
    prompt_emission=[[0.9, 0.1], [0.3, 0.7], [0.1, 0.9]],
    prompt_edges=[5.0],
)
"""A chain in which every token's evidence counts, and the prompt's."""


def fine_monitor(rule: Any, **fields: Any) -> Monitor:
    lm = toy.model()
    asks = Probe(**{**vars(toy.detector(lm)), "reads": "prompt", "name": "asks"})
    bundle = toy.bundle(probes=[slow_probe(rule), asks], **fields)
    return Monitor(dataclasses.replace(bundle, chain=FINE), slots=8, rows=64, trace=64)


@pytest.mark.parametrize("rule", [Ema(alpha=0.2), Mean(window=3), Cusum(kappa=-0.1, alarm=1.0)])
@pytest.mark.parametrize("prompt", ["w10 w11", "w10 bad"])
def test_evidence_and_belief_start_afresh(rule: Any, prompt: str) -> None:
    """The risk in a segment is that of a stream which begins there, after the same prompt."""
    tiers = {"moderate": Thresholds(horizon=3, halt_at=1.0)}
    quiet = {"reasoning": Segment(opens=["w5"], closes=["w6"])}
    row = [12, 13, THINK, 14, 15, 16, ANSWERS, 17, 18, 19]
    [whole] = generated(fine_monitor(rule, segments=quiet, tiers=tiers), [row], prompt)
    start, trace = whole.prompt_tokens, whole.trace
    plain = fine_monitor(rule, tiers=tiers)
    logits = np.array([trace.scores[name] for name in plain.bank.names], np.float32).T
    peaks = []
    for first, last in ((0, 2), (2, 7), (7, 10)):
        # The same logits at the same tokens, as if the others had not been there.
        slot = plain.admit("alone", start)
        kept = [*range(start), *range(start + first, start + last)]
        plain._set_rows(len(kept))
        plain._used.copy_(torch.from_numpy(logits[kept]))
        plain._observed = True
        plain.advance(
            torch.full((len(kept),), slot, dtype=torch.int32),
            torch.arange(len(kept), dtype=torch.int32),
        )
        alone = plain.retire(slot).trace.risk
        assert trace.risk[start + first : start + last] == pytest.approx(alone[start:], rel=1e-5)
        peaks.append(max(alone[start:]))
    assert np.ptp(trace.risk[start:]) > 0.05, "the evidence must matter"
    assert whole.segments["reasoning"].peak == pytest.approx(peaks[1], rel=1e-5)
    assert whole.segments["answer"].peak == pytest.approx(max(peaks[0], peaks[2]), rel=1e-5)
    assert summary(whole) == {"reasoning": (5, False), "answer": (5, False)}
    assert whole.scored == start + 10, "the prompt's tokens count, but in no segment"


@pytest.mark.parametrize("row", [[12, THINK, 13], [THINK, 12, ANSWERS, 13]])
def test_the_prompt_may_be_the_riskiest_place(row: list[int]) -> None:
    """Its risk is none of the answer's, also where the response begins with a segment."""
    bundle = toy.bundle(segments=SEGMENTS, tiers=NEVER)
    suspicious = bundle.chain.model_copy(update={"prior": [0.4, 0.6]})
    monitor = Monitor(dataclasses.replace(bundle, chain=suspicious), rows=64)
    [report] = generated(monitor, [[*row, 14]])
    assert report.peak == pytest.approx(0.6, abs=1e-3)
    assert all(part.peak < 0.01 for part in report.segments.values())


@pytest.mark.parametrize("prompt", ["w10 w11", "w10 w5"])
def test_given_texts_are_judged_as_they_would_be_while_written(prompt: str) -> None:
    """One forward pass over the text says what the decoding loop said."""
    tiers = {"moderate": Thresholds(horizon=2, halt_at=1.0)}
    rows = [
        [12, THINK, BAD, 14, ANSWERS, 13, *CALL, 15, BAD, CALLED, 16, EOS],
        [12, 13, ANSWERS, 14, 15, 16, 17, 18, 19, 20, 21, EOS],
        [THINK, THINK, *CALL, ANSWERS, BAD, CALLED, 7, 7, 8, 12, 13, EOS],
    ]
    lm = toy.model()
    probes = [toy.detector(lm), slow_probe(Ema(alpha=0.3))]
    written = generated(
        toy.monitor(probes=probes, segments=SEGMENTS, tiers=tiers), rows, prompt, enforce=False
    )
    from midstream.engines.hf.scoring import GivenTokens, feed

    start = toy.tokenizer()(prompt)["input_ids"]
    given = [
        GivenTokens(str(i), [*start, *row], [True] * (len(start) + len(row)), len(start))
        for i, row in enumerate(rows)
    ]
    monitor = toy.monitor(probes=probes, segments=SEGMENTS, tiers=tiers)
    monitor.recognise_segments(toy.tokenizer())
    for fed, loop in zip(feed(lm, given, monitor), written, strict=True):
        # generate never feeds the end of the rows that end last.
        read = len(loop.trace.risk)
        assert read >= len(start) + 11
        np.testing.assert_allclose(
            np.array(fed.trace.risk[:read], float), np.array(loop.trace.risk, float), rtol=1e-3
        )
        for name, part in loop.segments.items():
            assert fed.segments[name].peak == pytest.approx(part.peak, rel=1e-3)
    assert [set(r.segments) for r in written] == [
        {"answer", "reasoning", "tool_call"},
        {"answer"} if prompt == "w10 w11" else {"answer", "reasoning"},
        {"answer", "reasoning", "tool_call"},
    ]


def test_scored_texts_have_segments_too() -> None:
    monitor = toy.monitor(segments=SEGMENTS)
    texts = ["w5 bad w6 w12", "w12 w13", "w12 w7 w8 bad w9"]
    found = [r.report for r in score(toy.model(), toy.tokenizer(), texts, monitor)]
    assert [r.halted_at for r in found] == [None, None, 3]
    assert summary(found[0]) == {"reasoning": (3, False), "answer": (1, False)}
    assert summary(found[1]) == {"answer": (2, False)}


def test_a_stream_knows_its_segments_and_slots_forget_them() -> None:
    monitor = toy.monitor(segments=SEGMENTS, slots=1)
    thinks = [THINK, BAD, ANSWERS, 12, THINK, 13]
    for row, verdict in ((thinks, "CONTINUE"), ([12, BAD, 13], "HALT")):
        events = list(
            stream(
                toy.model(),
                toy.tokenizer(),
                "w10",
                monitor,
                logits_processor=[Writer([row])],
                max_new_tokens=len(row),
            )
        )
        report = events[-1].report
        assert report is not None
        assert report.verdict == verdict
        names = {"answer", "reasoning"} if verdict == "CONTINUE" else {"answer"}
        assert set(report.segments) == names
    assert StreamReport.model_validate_json(report.model_dump_json()) == report


def test_without_response_there_is_no_segment() -> None:
    monitor = toy.monitor(segments=SEGMENTS)
    assert monitor.retire(monitor.admit("s", 3)).segments == {}


# -- against plain arithmetic ----------------------------------------------------------------------

REMEMBERS = FINE.model_copy(update={"prompt_emission": [[1.0]] * 3, "prompt_edges": []})
HELD = {
    "answer": Thresholds(horizon=0, halt_at=0.97, hold_at=0.3, release_at=0.2),
    "reasoning": Thresholds(horizon=0, halt_at=0.99, hold_at=0.5, release_at=0.4),
}
HOLDING = {
    "tiers": {"moderate": HELD["answer"]},
    "segments": {
        "reasoning": Segment(
            opens=[[THINK]], closes=[[ANSWERS]], tiers={"moderate": HELD["reasoning"]}
        ),
        "tool_call": Segment(opens=[CALL], closes=[[CALLED]]),
    },
}


def holding_monitor() -> Monitor:
    return Monitor(
        dataclasses.replace(toy.bundle(**HOLDING), chain=REMEMBERS), slots=8, rows=64, trace=64
    )


def plain_verdicts(inside: str, row: list[int]) -> tuple[list[float], list[str], dict[str, float]]:
    """Risk and verdict after each token, and the peak of each segment."""
    step = (1 - np.array(REMEMBERS.ending))[:, None] * np.array(REMEMBERS.transition)
    begin = np.array(REMEMBERS.prior)
    opened = {"answer": [], "reasoning": [THINK], "tool_call": CALL}[inside]
    names = plain_reader(HOLDING["segments"], [*opened, *row])[len(opened) :]
    belief, verdict, before = begin, "CONTINUE", "answer"
    risks, verdicts, peaks = [], [], dict.fromkeys(names, 0.0)
    for name, token in zip(names, row, strict=True):
        if name != before and verdict != "HOLD":
            belief = begin
        before, at = name, HELD.get(name, HELD["answer"])
        belief = belief @ step * np.array(REMEMBERS.emission)[:, 3 if token == BAD else 0]
        belief = belief / belief.sum()
        risks.append(belief[-1])
        peaks[name] = max(peaks[name], risks[-1])
        level = at.release_at if verdict == "HOLD" else at.hold_at
        if verdict != "HALT":
            verdict = "HOLD" if risks[-1] >= level else "CONTINUE"
            verdict = "HALT" if risks[-1] >= at.halt_at else verdict
        verdicts.append(verdict)
    return risks, verdicts, peaks


written_row = st.lists(
    st.one_of(st.sampled_from([BAD, BAD, THINK, ANSWERS, *CALL, CALLED]), st.integers(10, 13)),
    min_size=1,
    max_size=16,
)


@settings(max_examples=20, deadline=None)
@given(st.lists(written_row, min_size=1, max_size=3), st.sampled_from(["answer", "reasoning"]))
def test_generate_and_given_texts_agree_with_plain_arithmetic(
    rows: list[list[int]], inside: str
) -> None:
    """Nested, unclosed and split markers, rows of different lengths, holds across segments."""
    from midstream.engines.hf.scoring import GivenTokens, feed

    prompt = "w10 w11" if inside == "answer" else "w10 w5"
    monitor = holding_monitor()
    loops = generated(monitor, [[*row, 14] for row in rows], prompt, enforce=False)
    start = toy.tokenizer()(prompt)["input_ids"]
    given_rows = [
        GivenTokens("", [*start, *row], [True] * (len(start) + len(row)), len(start))
        for row in rows
    ]
    fed = feed(toy.model(), given_rows, monitor)
    for row, loop, whole in zip(rows, loops, fed, strict=True):
        risks, verdicts, peaks = plain_verdicts(inside, row)
        for report in (loop, whole):
            trace = report.trace
            here = slice(len(start), len(start) + len(row))
            np.testing.assert_allclose(trace.risk[here], risks, rtol=1e-4)
            assert trace.verdict[here] == verdicts
        assert {n: part.peak for n, part in whole.segments.items()} == pytest.approx(
            peaks, rel=1e-4
        )
        counted = {n: (part.scored, part.unscored) for n, part in whole.segments.items()}
        assert counted == {n: (c, 0) for n, c in counts_of(inside, row).items()}


def counts_of(inside: str, row: list[int]) -> Counter[str]:
    opened = [THINK] if inside == "reasoning" else []
    return Counter(plain_reader(HOLDING["segments"], [*opened, *row])[len(opened) :])


def test_a_marker_does_not_let_go_what_is_held() -> None:
    """Suspicion that has not fallen goes into the next segment along with what it holds."""
    suspicious = [THINK, BAD, BAD, BAD, BAD, ANSWERS, 12]
    [report] = generated(holding_monitor(), [[*suspicious, 13]])
    first = report.prompt_tokens
    assert report.trace.verdict[first + 2 : first + 7] == ["HOLD"] * 5
    [calmed] = generated(holding_monitor(), [[*suspicious, *[12] * 12]])
    assert calmed.verdict == "CONTINUE"


class Spoken:
    """A tokenizer whose ids of 20 and above are white space; counts what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, ids: list[int]) -> str:
        self.decoded += ids
        return "\n" if ids[0] >= 20 else "x"


def test_only_the_end_of_a_prompt_is_decoded() -> None:
    """Not the vocabulary, in every attachment."""
    segments = {"reasoning": Segment(opens=[[THINK]], closes=[[6]])}
    tokenizer = Spoken()
    reader = SegmentReader.of(toy.policy(segments=segments), tokenizer)
    assert not tokenizer.decoded
    for _ in range(2):
        assert reader.read(reader.start([9, THINK, 20, 21, 20]), [10]).tolist() == [1]
    assert sorted(tokenizer.decoded) == [THINK, 20, 21]


def test_tables_stay_where_a_captured_graph_reads_them() -> None:
    monitor = toy.monitor(segments=SEGMENTS)
    table = monitor.segments
    assert table is not None
    monitor.recognise_segments(toy.tokenizer())
    places = [t.data_ptr() for t in (table._step, table._segment_of, table._token_class)]
    monitor.recognise_segments(toy.tokenizer())
    assert [t.data_ptr() for t in (table._step, table._segment_of, table._token_class)] == places
    reader = SegmentReader.of(toy.policy(segments={"a": SEGMENTS["tool_call"]}))
    table.recognise(reader)
    assert table._step.shape == reader.step.shape
