"""Characters that the tokenizer drops: the model has not read them, so the policy decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import toy
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from midstream.engines.hf.forced import CHUNK, ForcedStreams
from midstream.engines.hf.growing_text import GrowingText, literal
from midstream.monitor import Monitor
from midstream.streams import Event

HIDDEN = "\u200b"  # a blank of no width


def dropping() -> PreTrainedTokenizerFast:
    """The toy's tokenizer, with a normalizer that deletes what is hidden."""
    backend = Tokenizer.from_str(toy.tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(HIDDEN, "")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def read(parts: Sequence[str], **policy: Any) -> tuple[list[Event], str]:
    """Feed and step part by part; return the events and the text that left."""
    monitor = Monitor(toy.bundle(**policy), slots=2, trace=CHUNK)
    events: list[Event] = []
    with ForcedStreams(monitor, toy.model(), dropping()) as forced:
        stream = forced.open("a", "w5 w6")
        for part in parts:
            stream.feed(part)
            while forced.busy:
                events += [event for _, told in forced.step() for event in told]
        stream.finish("stop")
        while forced.busy:
            events += [event for _, told in forced.step() for event in told]
        assert forced.monitor.free_slots == 2
    return events, "".join(event.text or "" for event in events)


def test_a_token_says_what_comes_with_it_unread() -> None:
    text = GrowingText(literal(dropping()))
    pieces = [
        piece for part in ("w7 ", HIDDEN, "w8 w9 ", "w1", HIDDEN) for piece in text.push(part)
    ]
    pieces += text.finish()
    assert [(piece.text, piece.unread) for piece in pieces] == [
        ("w7", False),
        (f" {HIDDEN}w8", True),
        (" w9", False),
        (" w1", False),
    ]
    assert text.rest == HIDDEN


def test_what_is_hidden_within_a_word_is_covered_by_its_token() -> None:
    text = GrowingText(literal(dropping()))
    (piece,) = [*text.push(f"w{HIDDEN}7"), *text.finish()]
    assert (piece.text, piece.unread) == (f"w{HIDDEN}7", False)


@pytest.mark.parametrize("parts", [["w7 ", f"{HIDDEN}w8 ", "w9"], [f"w7 {HIDDEN}w8 w9"]])
def test_it_leaves_counted_where_the_policy_passes_what_is_unscored(parts: list[str]) -> None:
    events, left = read(parts, on_unscored="pass")
    assert left == "".join(parts)
    assert (events[-1].delivered, events[-1].delivered_unscored) == (3, 1)


@pytest.mark.parametrize("parts", [["w7 ", f"{HIDDEN}w8 ", "w9"], [f"w7 {HIDDEN}w8 w9"]])
def test_it_halts_the_stream_where_the_policy_halts(parts: list[str]) -> None:
    events, left = read(parts, on_unscored="halt")
    assert left == "w7"
    halted, finished = events[-2:]
    assert (halted.type, halted.cause, halted.position) == ("halted", "unscored", 4)
    assert (finished.message, finished.verdict) == ("content_filter", "HALT")
    report = finished.report
    assert report is not None
    assert (report.cause, report.halted_at, report.finish_reason) == (
        "unscored",
        4,
        "content_filter",
    )
    assert finished.delivered_unscored == 0


def test_it_is_held_until_what_follows_is_judged_where_the_policy_holds() -> None:
    events, left = read(["w7 ", f"{HIDDEN}w8"], on_unscored="hold")
    assert left == "w7"
    assert events[-1].delivered_unscored == 0
    events, left = read(["w7 ", f"{HIDDEN}w8 ", "w9"], on_unscored="hold")
    assert left == f"w7 {HIDDEN}w8 w9"
    assert (events[-1].delivered, events[-1].delivered_unscored) == (3, 1)
    held = [event for event in events if event.type == "verdict"]
    assert [(event.verdict, event.cause) for event in held] == [
        ("HOLD", "unscored"),
        ("CONTINUE", None),
    ]


@pytest.mark.parametrize("on_unscored", ["hold", "halt"])
def test_at_the_texts_end_it_does_not_leave(on_unscored: str) -> None:
    events, left = read(["w7 ", f"w8{HIDDEN}"], on_unscored=on_unscored)
    assert left == "w7 w8"
    assert (events[-1].message, events[-1].cause) == ("content_filter", "unscored")
    assert "drops the text's last characters" in str(events[-2].message)


@pytest.mark.parametrize("hold_back", [1, 3, "turn"])
def test_or_leaves_counted(hold_back: Any) -> None:
    parts = ["w7 ", f"w8{HIDDEN}"]
    events, left = read(parts, on_unscored="pass", hold_back=hold_back)
    assert left == "".join(parts)
    assert (events[-1].delivered, events[-1].delivered_unscored) == (3, 1)
    assert events[-1].report is not None
    assert events[-1].report.unscored == 1


def test_a_text_of_nothing_else_is_no_exception() -> None:
    assert read([HIDDEN * 3], on_unscored="halt")[1] == ""
    assert read([HIDDEN * 300], on_unscored="pass")[1] == HIDDEN * 300
