"""What an upstream may send: read by the letter, and never believed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.serve.event_stream import EventStreamError, EventStreamReader, ServerSentEvent
from midstream.serve.upstream import MAX_TEXT, Upstream, UpstreamConfigError
from midstream.serve.upstream_answer import FINISH_REASONS, Answer, Delta, UpstreamError

# --------------------------------------------------------------------------- event streams


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes, cut at some places."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(parts: list[bytes], **options: Any) -> list[ServerSentEvent]:
    reader = EventStreamReader(**options)
    return [event for part in parts for event in reader.feed(part)] + reader.finish()


def by_the_letter(text: str) -> list[ServerSentEvent]:
    """The standard's algorithm over a whole text, as simply as it can be put."""
    lines = re.split("\r\n|\n|\r", text.removeprefix("\ufeff"))
    events: list[ServerSentEvent] = []
    kind, data = "", list[str]()
    for line in [*lines, ""]:  # an event that is cut off is given out
        if not line:
            events += [ServerSentEvent(kind, "\n".join(data))] if data else []
            kind, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "data":
            data.append(value)
        elif field == "event":
            kind = value
    return events


LINES = st.lists(
    st.sampled_from(
        ["data: a", "data:b", "data:  c", "data", "data:", ": note", "event: x", "id: 1",
         "datum: d", "", "", "event:", "retry: 5", "data: \u00e9\U0001f389", "\ufeffdata: e",
         " data: f"]
    )
)  # fmt: skip
ENDS = st.sampled_from(["\n", "\r", "\r\n"])


@given(st.lists(st.tuples(LINES, ENDS)), st.lists(st.integers(0, 999)), st.booleans())
@settings(max_examples=500)
def test_events_are_those_of_the_standard_cut_anywhere(
    groups: list[tuple[list[str], str]], places: list[int], marked: bool
) -> None:
    text = "\ufeff" * marked + "".join(line + end for lines, end in groups for line in lines)
    want = by_the_letter(text)
    data = text.encode()
    assert read(cuts(data, places)) == want
    assert read([data[i : i + 1] for i in range(len(data))]) == want
    assert read([data]) == want


@given(st.binary(max_size=200), st.lists(st.integers(0, 999)))
def test_no_bytes_do_more_than_be_refused(data: bytes, places: list[int]) -> None:
    try:
        found = read(cuts(data, places))
    except EventStreamError:
        with pytest.raises(EventStreamError):
            read([data])
    else:
        assert found == read([data])


def test_what_is_complete_before_a_fault_is_given_out() -> None:
    events = EventStreamReader().feed(b"data: a\n\ndata: \xff\n\n")
    assert next(events).data == "a"
    with pytest.raises(EventStreamError):
        next(events)


def test_sizes_are_bound_whether_in_one_line_or_in_many() -> None:
    assert read([b"data: " + b"x" * 90 + b"\n\n"] * 5, max_event=100)
    for data in (b"data: " + b"x" * 95, b"data: xx\n" * 13, b":" * 101, b": x\n" * 40):
        for parts in ([data], [data[i : i + 1] for i in range(len(data))]):
            with pytest.raises(EventStreamError, match="more than 100 bytes"):
                read(parts, max_event=100)


def test_a_byte_at_a_time_costs_no_more_than_its_length() -> None:
    reader, begun = EventStreamReader(max_event=1 << 18), time.thread_time()
    for _ in range(200_000):  # half a second; minutes where each byte means a look at all before
        assert not [*reader.feed(b"x")]
    assert time.thread_time() - begun < 60


# --------------------------------------------------------------------------------- answers


def answer(
    parts: list[bytes], kind: str = "text/event-stream", *, chat: bool = True, **headers: str
) -> list[Delta]:
    """What is read from an upstream that sends these bytes."""
    headers = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def read_all() -> list[Delta]:
        found = Answer(headers, body(), chat=chat, between=600.0, max_text=MAX_TEXT)
        return [delta async for delta in found.deltas()]

    return asyncio.run(read_all())


def stream_of(*contents: Any) -> bytes:
    return b"".join(f"data: {json.dumps(content)}\n\n".encode() for content in contents)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NAMES = ("content", "refusal", "text", "role", "tool_calls", "function_call", "audio", "name")
TEXTS = JSON | st.text() | st.just("w7 ")
PARTS = JSON | st.dictionaries(st.sampled_from(NAMES), TEXTS)
REASONS = st.sampled_from([None, "", "stop", "length", "tool_calls", "eos", 1, [], True])
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 0, 0, 1, None, "0", False]),
        "delta": PARTS,
        "message": PARTS,
        "text": TEXTS,
        "finish_reason": REASONS,
    },
)
CONTENTS = JSON | st.fixed_dictionaries(
    {}, optional={"choices": JSON | st.lists(CHOICES, max_size=2), "error": JSON, "object": JSON}
)


@given(st.lists(CONTENTS, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_whatever_comes_is_text_or_an_error_of_ours(
    contents: list[Any], chat: bool, whole: bool
) -> None:
    if whole:
        data, kind = json.dumps(contents[0] if contents else None).encode(), "application/json"
    else:
        data, kind = stream_of(*contents), "text/event-stream"
    try:
        deltas = answer([data], kind, chat=chat)
    except UpstreamError as error:
        deltas, told = [Delta("", "stop")], str(error)
    else:
        told = "the upstream is well"
    assert re.fullmatch(r"the upstream[ -~]*", told)
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason in FINISH_REASONS
    for delta in deltas:
        delta.text.encode()  # no half of a character


@given(st.binary(max_size=300), st.sampled_from(["text/event-stream", "application/json", "x"]))
def test_so_do_bytes_of_any_kind(data: bytes, kind: str) -> None:
    try:
        deltas = answer([data[:100], data[100:]], kind)
    except UpstreamError:
        return
    assert deltas[-1] == Delta("", "stop")  # hypothesis has written data:[DONE] before


def test_the_text_is_as_it_came_in_any_cut() -> None:
    texts = ["The ", "naïve 🎉", "", "\u0000\ufeff", "  \n", '"quoted"']
    contents = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    data = stream_of(*contents, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    for size in (1, 2, 3, 1000):
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        deltas = answer(parts)
        assert "".join(delta.text for delta in deltas) == "".join(texts)


@pytest.mark.parametrize(
    "content",
    [
        {"choices": [{"delta": {"role": "assistant", "content": None}}]},
        {"choices": [{"index": 0, "delta": {"content": "", "tool_calls": None, "audio": {}}}]},
        {"choices": [{"index": 0, "delta": {"reasoning_content": "never given out"}}]},
        {"choices": [], "usage": {"total_tokens": 3}},
        {"choices": [{"index": 0, "delta": None, "logprobs": {"content": []}}]},
    ],
)
def test_parts_without_text(content: Any) -> None:
    deltas = answer([stream_of(content), b"data: [DONE]\n\n"])
    assert deltas == [Delta(""), Delta("", "stop")]


def test_a_refusal_is_judged_and_given_out_as_text() -> None:
    content = {"choices": [{"index": 0, "delta": {"refusal": "no"}, "finish_reason": "stop"}]}
    assert answer([stream_of(content)]) == [Delta("no", "stop")]


def test_nothing_is_read_behind_the_end() -> None:
    end = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}
    more = {"choices": [{"index": 0, "delta": {"content": "b"}}]}
    assert answer([stream_of(end, more)]) == [Delta("a", "stop")]


def test_half_a_character_at_the_end_is_refused() -> None:
    content = {"choices": [{"index": 0, "delta": {"content": "a\ud83d"}}]}
    for end in (b"data: [DONE]\n\n", stream_of({"choices": [{"finish_reason": "stop"}]})):
        with pytest.raises(UpstreamError, match="not Unicode"):
            answer([stream_of(content), end])


def test_compression_nobody_asked_for_is_refused() -> None:
    with pytest.raises(UpstreamError, match="compressed"):
        answer([b""], content_encoding="gzip")


# -------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "make",
    [
        lambda: Upstream("ftp://host/v1"),
        lambda: Upstream("host/v1"),
        lambda: Upstream("http://"),
        lambda: Upstream("http://user:secret@host/v1"),
        lambda: Upstream("http://host/v1?x=1"),
        lambda: Upstream("http://host:port/v1"),
        lambda: Upstream("http://host/v1", key=""),
        lambda: Upstream("http://host/v1", key="a\r\nx-evil: 1"),
        lambda: Upstream("http://host/v1", key="clé"),
    ],
)
def test_addresses_and_keys_that_cannot_be_used(make: Callable[[], Upstream]) -> None:
    with pytest.raises(UpstreamConfigError) as caught:
        make()
    assert "secret" not in str(caught.value)
    assert "evil" not in str(caught.value)
