"""The proxy: real sockets, a real worker process, an upstream that behaves in every bad way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import pytest
import reading_toys
from fake_upstream import Connection, FakeUpstream, chunk, event
from scripted_engine import events
from serving import PATIENCE, Seen, events_of, text_of
from typer.testing import CliRunner

from midstream.cli import app as cli
from midstream.serve.app import create_app
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.metrics import Metrics
from midstream.serve.proxy import ProxyEngine
from midstream.serve.proxy_pump import AHEAD
from midstream.serve.proxy_request import SENT_ON, upstream_body
from midstream.serve.settings import ANSWERED_HERE, Settings
from midstream.serve.upstream import Patience, Upstream
from midstream.streams import Event

T = TypeVar("T")
KEY = "sk-not-to-be-seen-anywhere"
SLOTS = 4
LATER = 4 * PATIENCE  # seconds; what the upstream has for everything, and the clock is put on by


class Proxy:
    """An upstream, the engine in front of it, and the loop that both live in."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.seen = Seen()
        self.upstream = FakeUpstream()
        self.run(self.upstream.start())
        patience = Patience(connect=LATER, first=LATER, between=LATER)
        self.connections = Upstream(self.upstream.url, key=KEY, patience=patience)
        self.engine = ProxyEngine(
            Feed([self.seen]), self.connections, name="watched", upstream_model="theirs",
            slots=SLOTS, main=reading_toys.main,
        )  # fmt: skip
        self._count = 0

    def run(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            task, end = asyncio.ensure_future(work), time.monotonic() + PATIENCE
            while not task.done():
                await asyncio.wait([task], timeout=1.0)
                if time.monotonic() > end:  # the loop's own clock may be put on
                    task.cancel()
            return await task

        return self.runner.run(bounded())

    def pass_time(self, seconds: float) -> None:
        """Put the loop's clock on, by which all waiting ends."""
        loop, now = self.runner.get_loop(), self.runner.get_loop().time
        loop.time = lambda: now() + seconds  # type: ignore[method-assign]

    def text(self) -> str:
        """What has left of the last stream that was asked for with `ask`."""
        return text_of(self.seen.streams.get(f"s{self._count}", []))

    def ask(self, content: str = "w5 w6", **fields: Any) -> Ask:
        self._count += 1
        messages = ({"role": "user", "content": content},)
        body = {"model": "watched", "messages": list(messages), **fields.pop("body", {})}
        return Ask(f"s{self._count}", "watched", messages, None, 64, body=body, **fields)

    async def answer(self, play: Any, **fields: Any) -> list[Event]:
        """Ask an upstream that plays this; read to the end."""
        self.upstream.play = play
        return await events_of(await self.engine.submit(self.ask(**fields)))

    def close(self) -> None:
        self.run(self.engine.close(1.0))
        self.run(self.upstream.close())
        self.runner.close()


@contextmanager
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    try:
        made.run(made.engine.start())
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def front() -> Iterator[Proxy]:
    with proxy() as made:
        yield made
        made.run(no_slot_is_lost(made))


async def no_slot_is_lost(made: Proxy) -> None:
    """As many streams as there are slots, at the same time."""
    made.upstream.play = lambda c: c.say("w7 ", "w8")
    streams = [await made.engine.submit(made.ask()) for _ in range(SLOTS)]
    for stream in streams:
        assert text_of(await events_of(stream)) == "w7 w8"


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def say(*texts: str, **options: Any) -> Callable[[Connection], Awaitable[None]]:
    return lambda connection: connection.say(*texts, **options)


@pytest.mark.parametrize(
    "texts",
    [
        ["w7", " w8", " w9"],
        ["w7 w8 w9 w10 w11"],
        ["  w7\n\n", "\tw8", "  ", "  w9 \n"],
        list("w7 w8 w9"),
        ["naïve ", "👩‍👩‍👧 ", "漢字かな交じり文", "\u0000", "\ufeff"],
        [],
        [""],
        [" "],
    ],
)
def test_the_clients_text_is_the_upstreams(front: Proxy, texts: list[str]) -> None:
    events = front.run(front.answer(say(*texts)))
    assert text_of(events) == "".join(texts)
    assert [e.type for e in events if e.type != "released"] == ["admitted", "finished"]
    assert events[-1].message == "stop"
    report = events[-1].report
    assert report is not None
    assert report.unscored == 0
    assert front.seen.streams[report.stream] == events


def test_what_the_upstream_is_asked(front: Proxy) -> None:
    body = {
        "temperature": 0.5, "seed": 7, "stop": ["x"], "midstream": {"tier": "moderate"}, "n": 1,
        "stream": False, "stream_options": {"include_usage": True}, "user": "somebody",
    }  # fmt: skip
    front.run(front.answer(say("w7"), body=body, client="a client"))
    asked = front.upstream.seen[-1]
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "theirs", "messages": [{"role": "user", "content": "w5 w6"}], "stream": True,
        "max_tokens": 64, "temperature": 0.5, "seed": 7, "stop": ["x"], "user": "somebody",
    }  # fmt: skip
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["accept-encoding"] == "identity"
    for name in ("max_tokens", "max_completion_tokens"):
        assert upstream_body(front.ask(body={name: 9}), "m")[name] == 64
    assert not SENT_ON & ANSWERED_HERE


def test_text_completions(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        await connection.begin()
        for text, reason in (("w7", None), (" w8", "length")):
            choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
            await connection.send(event({"choices": [choice]}))
        await connection.end()

    async def complete() -> list[Event]:
        front.upstream.play = play
        asked = Ask("text", "watched", None, "w5 w6", 8, body={"prompt": "w5 w6"})
        return await events_of(await front.engine.submit(asked))

    events = front.run(complete())
    assert (text_of(events), events[-1].message) == ("w7 w8", "length")
    assert front.upstream.seen[-1].path == "/v1/completions"
    assert front.upstream.seen[-1].body["prompt"] == "w5 w6"


async def alive(connection: Connection) -> None:
    """Go on, and say nothing, until the connection is closed."""
    with contextlib.suppress(ConnectionError):
        while not connection.gone.is_set():
            await connection.send(b": still there\n\n")
            await asyncio.sleep(0.05)


def test_a_halt_closes_the_connection_at_once(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        await connection.begin()
        for text in ("w7 ", "w8 ", "bad ", "w9 "):
            await connection.send(chunk(text))
        await alive(connection)

    events = front.run(front.answer(play))
    assert text_of(events) == "w7 w8"
    assert [e.type for e in events[-2:]] == ["halted", "finished"]
    assert (events[-1].message, events[-1].cause) == ("content_filter", "bad")
    front.run(front.upstream.seen[-1].gone.wait())


def test_so_does_a_client_that_leaves(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        await connection.begin()
        await connection.send(chunk("w7 w8 "))
        await alive(connection)

    async def leave() -> list[Event]:
        front.upstream.play = play
        stream = await front.engine.submit(front.ask())
        told = []
        async for found in events(stream):
            told.append(found)
            if found.type == "released":
                stream.cancel()
        await front.upstream.seen[-1].gone.wait()
        return told

    told = front.run(leave())
    assert text_of(told) == "w7"[: len(text_of(told))] or text_of(told) == "w7 w8"
    assert told[-1].message == "cancelled"


def test_and_one_that_leaves_before_the_upstream_answers(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        await connection.gone.wait()

    async def leave() -> None:
        front.upstream.play = play
        asked = len(front.upstream.seen)
        submitting = asyncio.create_task(front.engine.submit(front.ask()))
        await until(lambda: len(front.upstream.seen) > asked)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await front.upstream.seen[-1].gone.wait()
        told = front.seen.streams[f"s{front._count}"]
        await until(lambda: [e.type for e in told[-1:]] == ["finished"])

    front.run(leave())


GOOD = chunk("w7 ") + chunk("w8 ")


def abort(front: Proxy) -> Callable[[Connection], Awaitable[None]]:
    async def play(connection: Connection) -> None:
        await connection.begin()
        await connection.send(GOOD)
        await until(lambda: front.text() == "w7 w8")  # an abort takes back what was not read
        connection.abort()

    return play


async def stall(connection: Connection) -> None:
    await connection.begin()
    await connection.send(GOOD)
    await connection.gone.wait()


def stall_for_long(front: Proxy) -> Callable[[Connection], Awaitable[None]]:
    async def play(connection: Connection) -> None:
        stalling = asyncio.create_task(stall(connection))
        await until(lambda: front.text() == "w7 w8")
        front.pass_time(LATER)
        await stalling

    return play


async def no_end(connection: Connection) -> None:
    await connection.say("w7 ", "w8 ", reason=None, done=False)


def then(*data: bytes) -> Callable[[Connection], Awaitable[None]]:
    async def play(connection: Connection) -> None:
        await connection.begin()
        for part in (GOOD, *data, chunk("bad "), chunk("w9"), b"data: [DONE]\n\n"):
            await connection.send(part)
        await connection.end()

    return play


def whole(content: Any, kind: str = "application/json") -> Callable[[Connection], Awaitable[None]]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda connection: connection.answer("200 OK", data, [f"content-type: {kind}"])


def message(content: Any, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"content": content, **fields}, "finish_reason": "stop"}
    return {"choices": [choice]}


TWICE = event({"choices": [{"index": i, "delta": {"content": "bad"}} for i in (0, 1)]})
SECOND = event({"choices": [{"index": 1, "delta": {"content": "bad"}}]})
CALLS = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]

# What the upstream does, what is told of it, and whether text came before.
FAULTS: dict[str, tuple[Any, str, bool]] = {
    "breaks off": (abort, "connection to the upstream broke", True),
    "stalls": (stall_for_long, f"sent nothing for {LATER:g} seconds", True),
    "ends without an end": (no_end, "ended before the response did", True),
    "nonsense": (then(b"data: {nonsense\n\n"), "not JSON", True),
    "no object": (then(b"data: [1, 2]\n\n"), "no JSON object", True),
    "deep": (then(b"data: " + b"[" * 200_000 + b"\n\n"), "not JSON", True),
    "no UTF-8": (then(b'data: {"choices": "\xff"}\n\n'), "not UTF-8", True),
    "giant line": (then(b"data: " + b"x" * (1 << 21) + b"\n\n"), "more than 1048576 bytes", True),
    "giant event": (then(b"data: x\n" * (1 << 18) + b"\n"), "more than 1048576 bytes", True),
    "error object": (then(event({"error": {"message": "secret"}})), "failed while it wrote", True),
    "error event": (then(b"event: error\ndata: {}\n\n"), "failed while it wrote", True),
    "error of vLLM": (then(event({"object": "error", "message": "x"})), "failed while", True),
    "no choices": (then(event({"usage": 1})), "no list of choices", True),
    "two choices": (then(TWICE), "more choices", True),
    "second choice": (then(SECOND), "more choices", True),
    "content is a list": (then(chunk(None, content=["bad"])), "content is no string", True),
    "tool calls": (then(chunk(None, tool_calls=CALLS)), "tool_calls, which cannot", True),
    "function call": (then(chunk(None, function_call={"name": "f"})), "function_call", True),
    "ends with tool calls": (then(chunk(None, "tool_calls")), "cannot be passed on", True),
    "half a character": (then(chunk("\ud83d"), chunk("bad")), "not Unicode", True),
    "delta is no object": (then(event({"choices": [{"delta": "bad"}]})), "without a message", True),
    "choice is no object": (then(event({"choices": ["bad"]})), "no list of choices", True),
    "page of HTML": (whole(b"<html>bad</html>", "text/html"), "neither an event stream", False),
    "whole nonsense": (whole(b"{"), "not JSON", False),
    "whole error": (whole({"error": {"message": "bad"}}), "the upstream failed", False),
    "whole without choice": (whole({"choices": []}), "no choice", False),
    "whole tool calls": (whole(message("bad", tool_calls=CALLS)), "tool_calls", False),
    "whole no UTF-8": (whole(b'"\xff"'), "not UTF-8", False),
    "whole too long": (whole(b'"' + b"x" * (9 << 20)), "more than 8388608 bytes", False),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_the_stream_with_an_error_and_nothing_unjudged(
    front: Proxy, fault: str, caplog: Any
) -> None:
    play, told, some = FAULTS[fault]
    play = play(front) if play in (abort, stall_for_long) else play
    events = front.run(front.answer(play))
    assert text_of(events) == ("w7 w8 " if some else "")
    assert [e.type for e in events if e.type in ("error", "finished", "halted")] == ["error"]
    assert told in str(events[-1].message)
    assert events[-1].cause == ("upstream_timeout" if fault == "stalls" else "upstream_error")
    assert "secret" not in str(events[-1].message)
    assert KEY not in caplog.text
    assert "w7" not in caplog.text
    front.run(closed(front))
    assert text_of(front.run(front.answer(say("w9")))) == "w9"


async def closed(front: Proxy) -> None:
    """The last connection is closed, or the upstream had said all."""
    connection = front.upstream.seen[-1]
    await until(lambda: connection.gone.is_set() or connection.done)


@pytest.mark.parametrize(
    "event_stream",
    [
        b"\xef\xbb\xbf: hello\r\ndata: ",
        b": comment\ndata:",
        b"id: 7\nretry: 10\nevent: message\ndata: ",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_odd_streams_that_are_well_formed(front: Proxy, event_stream: bytes, size: int) -> None:
    content = json.dumps({"choices": [{"index": 0, "delta": {"content": "w7 naïve"}}]})
    first, last = content.encode("utf-8"), b"data: [DONE]"
    ends = b"\r\n\r\n" if b"\r\n" in event_stream else b"\n\n"
    data = event_stream + first + ends + b'data: {"choices":\ndata: []}\n\n' + last

    async def play(connection: Connection) -> None:
        await connection.begin("text/event-stream; charset=utf-8")
        for begin in range(0, len(data), size):
            await connection.send(data[begin : begin + size])
        await connection.end()

    events = front.run(front.answer(play))
    assert (text_of(events), events[-1].message) == ("w7 naïve", "stop")


def test_halves_of_a_character_are_joined(front: Proxy) -> None:
    events = front.run(front.answer(say("w7 \ud83c", "\udf89 w8")))
    assert (text_of(events), events[-1].message) == ("w7 🎉 w8", "stop")


def test_a_reason_without_done_is_an_end(front: Proxy) -> None:
    events = front.run(front.answer(say("w7 w8", reason="length", done=False)))
    assert (text_of(events), events[-1].message) == ("w7 w8", "length")


def test_an_upstream_that_ignores_stream(front: Proxy) -> None:
    assert text_of(front.run(front.answer(whole(message("w7  w8 "))))) == "w7  w8 "
    events = front.run(front.answer(whole(message("w7 w8 bad w9"))))
    assert (text_of(events), events[-1].message) == ("w7 w8", "content_filter")
    long = "w7 " * 3000
    events = front.run(front.answer(whole(message(long))))
    assert text_of(events) == long


def test_a_text_that_is_longer_than_the_window_halts_there(front: Proxy) -> None:
    events = front.run(front.answer(say(*["w7 "] * 5000)))
    left = text_of(events)
    assert left == ("w7 " * 5000)[: len(left)]
    assert (events[-1].message, events[-1].cause) == ("content_filter", "unscored")


# Status and headers of the upstream; status, code and message for the client.
REFUSALS = {
    "400 Bad Request": (400, "context_length_exceeded", "too long"),
    "422 Unprocessable": (400, "context_length_exceeded", "too long"),
    "401 Unauthorized": (502, "upstream_key_refused", "does not take this server's key"),
    "403 Forbidden": (502, "upstream_key_refused", "does not take this server's key"),
    "404 Not Found": (502, "upstream_failed", "status 404"),
    "429 Too Many": (429, "upstream_rate_limit", "try again"),
    "500 Oh": (502, "upstream_failed", "status 500"),
    "504 Oh": (504, "upstream_timeout", "timed out"),
    "302 Found": (502, "upstream_redirects", "not followed"),
    "204 No Content": (502, "upstream_failed", "status 204"),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_refusals_of_the_upstream_become_standard_errors(
    front: Proxy, status: str, caplog: Any
) -> None:
    error = {"message": "too\x00 long", "code": "context_length_exceeded", "type": "t"}
    body = b"" if status.startswith("204") else json.dumps({"error": error}).encode()
    headers = ["retry-after: 7", f"location: {front.upstream.url}/elsewhere"]
    asked = len(front.upstream.seen)
    with pytest.raises(ApiError) as caught:
        front.run(front.answer(lambda c: c.answer(status, body, headers)))
    want, code, told = REFUSALS[status]
    refused = caught.value
    assert (refused.status, refused.code) == (want, code)
    assert told in refused.message
    assert "\x00" not in refused.message
    assert len(front.upstream.seen) == asked + 1
    if want == 429:
        assert refused.retry_after == 7.0
    assert KEY not in caplog.text

    # The front tells of it. What the worker still says of it comes before this stream ends.
    refused_stream = f"s{front._count}"
    assert text_of(front.run(front.answer(say("w9")))) == "w9"
    assert refused_stream not in front.seen.streams
    assert not front.engine._feed._refused


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[]", b'{"error": "x"}', b"\xff", b"x" * 99999]
)
def test_a_refusal_that_makes_no_sense(front: Proxy, body: bytes) -> None:
    with pytest.raises(ApiError, match="does not say why") as caught:
        front.run(front.answer(lambda c: c.answer("400 Bad", body)))
    assert caught.value.code == "upstream_refused"


def test_an_upstream_that_does_not_begin(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        front.pass_time(2 * LATER)
        await connection.gone.wait()

    with pytest.raises(ApiError) as caught:
        front.run(front.answer(play))
    assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")


def test_an_upstream_that_is_not_there(front: Proxy, monkeypatch: Any) -> None:
    with socket.socket() as silent:  # holds the port, but does not listen
        silent.bind(("127.0.0.1", 0))
        nowhere = Upstream(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        monkeypatch.setattr(front.engine, "_upstream", nowhere)
        with pytest.raises(ApiError) as caught:
            front.run(front.engine.submit(front.ask()))
    assert (caught.value.status, caught.value.code) == (502, "upstream_unreachable")
    front.run(nowhere.close())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("best_of", 3), ("tools", [{}]), ("functions", [{}]), ("logprobs", True),
        ("top_logprobs", 2), ("audio", {}), ("modalities", ["audio"]), ("echo", True),
        ("suffix", "x"), ("n", True), ("logprobs", 0),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(front: Proxy, name: str, value: Any) -> None:
    asked = len(front.upstream.seen)
    with pytest.raises(ApiError) as caught:
        front.run(front.engine.submit(front.ask(body={name: value})))
    assert (caught.value.status, caught.value.param) == (400, name)
    assert caught.value.code == "unsupported_parameter"
    assert len(front.upstream.seen) == asked


def test_what_the_local_model_cannot_be_given_is_refused(front: Proxy) -> None:
    def code(asked: Ask) -> tuple[int, str, str | None]:
        with pytest.raises(ApiError) as caught:
            front.run(front.engine.submit(asked))
        return caught.value.status, caught.value.code, caught.value.param

    asked = len(front.upstream.seen)
    long = "w7 " * reading_toys.WINDOW
    assert code(front.ask(long)) == (400, "context_length_exceeded", "messages")
    assert code(front.ask(tier="loose")) == (400, "invalid_tier", "midstream.tier")
    assert code(Ask("x", "other", (), "w5", 8)) == (404, "model_not_found", "model")
    assert code(Ask("x", "watched", None, (5, 6), 8)) == (400, "unsupported_parameter", "prompt")
    assert len(front.upstream.seen) == asked


def test_more_streams_than_slots_are_refused(front: Proxy) -> None:
    async def fill() -> ApiError:
        front.upstream.play = stall
        streams = [await front.engine.submit(front.ask()) for _ in range(SLOTS)]
        with pytest.raises(ApiError) as caught:
            await front.engine.submit(front.ask())
        for stream in streams:
            stream.cancel()
            await events_of(stream)
        return caught.value

    refused = front.run(fill())
    assert (refused.status, refused.retry_after) == (429, 1.0)


def test_connections_are_used_again(front: Proxy) -> None:
    def next_answer() -> str:
        text = text_of(front.run(front.answer(say("w7 w8"))))
        front.run(until(lambda: not front.engine._tasks))  # the connection is free
        return text

    next_answer()
    before = front.upstream.accepted
    for _ in range(5):
        assert next_answer() == "w7 w8"
    assert front.upstream.accepted == before


def test_many_at_once(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        words = connection.body["messages"][0]["content"].split()
        await connection.say(*(f"{word} " for word in words))

    slots = asyncio.Semaphore(SLOTS)

    async def one(index: int) -> None:
        words = [f"w{5 + (index * k) % 13}" for k in range(1, 30)]
        if index % 3 == 0:
            words[10 + index % 5] = "bad"
        async with slots:
            stream = await front.engine.submit(front.ask(" ".join(words)))
            left = text_of(await events_of(stream))
        text = " ".join(words) + " "
        assert left == (text[: text.index(" bad")] if "bad" in words else text)

    async def everyone() -> None:
        front.upstream.play = play
        await asyncio.gather(*(one(index) for index in range(20)))

    front.run(everyone())


def test_a_slow_model_stops_the_upstream(front: Proxy) -> None:
    async def flood(connection: Connection) -> None:
        await connection.begin()
        for _ in range(100_000):
            await connection.send(chunk("w19 " * 20) * 50)

    async def watch() -> None:
        front.upstream.play = flood
        stream = await front.engine.submit(front.ask())
        serving: Any = front.engine._readers._serving
        (pump,) = serving._pumps.values()
        connection = front.upstream.seen[-1]
        for _ in range(5):  # again and again: the model reads on
            await until(lambda: connection.is_stuck and pump._sent - pump._read > AHEAD)
            assert pump._sent - pump._read <= AHEAD + 1024
            before = pump._read
            await until(lambda before=before: pump._read > before)
        assert not [e for e in front.seen.streams[stream.ask.stream] if e.type == "error"]
        stream.cancel()
        events = await events_of(stream)
        assert events[-1].message == "cancelled"
        assert set(text_of(events)) <= set("w19 ")

    front.run(watch())


def test_a_response_that_never_ends_is_cut(front: Proxy, monkeypatch: Any) -> None:
    monkeypatch.setattr(front.connections, "_max_text", 3000)
    events = front.run(front.answer(say(*["w7 "] * 5000)))
    assert "longer than this proxy takes" in str(events[-1].message)
    assert text_of(events) == "w7 " * 1000


def test_a_model_that_fails_ends_the_stream_and_the_connection(front: Proxy) -> None:
    async def play(connection: Connection) -> None:
        await connection.begin()
        await connection.send(chunk("w7 w8 "))
        await until(lambda: front.text() == "w7 w8")
        await connection.send(chunk("w18 w9 "))
        await connection.gone.wait()

    events = front.run(front.answer(play))
    assert text_of(events) == "w7 w8"
    assert events[-1].type == "error"
    assert "insides" not in str(events[-1].message)
    front.run(no_slot_is_lost(front))


def test_behind_the_http_front(front: Proxy) -> None:
    app = create_app(front.engine, Feed(), Settings(sent_on=SENT_ON))

    async def post(play: Any, **fields: Any) -> httpx.Response:
        front.upstream.play = play
        body = {"model": "watched", "messages": [{"role": "user", "content": "w5"}], **fields}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            headers = {"authorization": "Bearer of the client", "x-own": "1", "cookie": "a=b"}
            return await client.post("/v1/chat/completions", json=body, headers=headers)

    found = front.run(post(say("w7 ", "w8"), seed=5, stop="w12")).json()
    assert found["choices"][0]["message"]["content"] == "w7 w8"
    assert found["choices"][0]["finish_reason"] == "stop"
    asked = front.upstream.seen[-1]
    assert (asked.body["seed"], asked.body["stop"]) == (5, "w12")
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert not {"x-own", "cookie"} & set(asked.headers)

    streamed = front.run(post(say("w7 ", "bad ", "w8"), stream=True)).text
    *chunks, last, done = [line[6:] for line in streamed.splitlines() if line]
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "content_filter"
    contents = [json.loads(c)["choices"][0]["delta"].get("content") or "" for c in chunks]
    assert "".join(contents) == "w7"

    broken = front.run(post(then(b"data: {\n\n"), stream=True)).text
    assert broken.endswith("data: [DONE]\n\n")
    assert '"error"' in broken
    assert "bad" not in broken
    refused = front.run(post(lambda c: c.answer("429 No", b"", ["retry-after: 3"])))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    assert refused.json()["error"]["code"] == "upstream_rate_limit"
    tools = front.run(post(say("w7"), tools=[{"type": "function"}]))
    assert (tools.status_code, tools.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("stalls", 504, "upstream_timeout"), ("nonsense", 502, "upstream_error")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_clients_are_told_that_it_was_the_upstream(
    front: Proxy, fault: str, status: int, code: str, stream: bool
) -> None:
    app = create_app(front.engine, Feed(), Settings(request_seconds=10 * LATER))
    before = len(front.seen.streams)

    async def play(connection: Connection) -> None:
        if fault == "nonsense":
            await then(b"data: {nonsense\n\n")(connection)
            return
        stalling = asyncio.create_task(stall(connection))
        await until(lambda: len(front.seen.streams) > before)
        told = [*front.seen.streams.values()][-1]
        await until(lambda: text_of(told) == "w7 w8")
        front.pass_time(LATER)
        await stalling

    front.upstream.play = play

    async def post() -> httpx.Response:
        body = {"model": "watched", "messages": [{"role": "user", "content": "w5"}]}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post("/v1/chat/completions", json={**body, "stream": stream})

    answer = front.run(post())
    if stream:
        *_, last, done = [line[6:] for line in answer.text.splitlines() if line]
        assert done == "[DONE]"
        error = json.loads(last)["error"]
    else:
        assert answer.status_code == status
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == (code, "server_error")
    assert "JSON" not in error["message"]


def test_a_request_that_the_upstream_refuses_is_counted_once(front: Proxy) -> None:
    metrics, engine_feed = Metrics("watched"), front.engine._feed
    engine_feed.add(metrics)
    app = create_app(front.engine, Feed([metrics]), Settings())
    front.upstream.play = lambda c: c.answer("500 Oh", b"")

    async def post() -> httpx.Response:
        body = {"model": "watched", "messages": [{"role": "user", "content": "w5"}]}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post("/v1/chat/completions", json=body)

    assert front.run(post()).status_code == 502
    front.run(front.answer(say("w9")))
    engine_feed._observers.remove(metrics)

    def count(name: str, **labels: str) -> float | None:
        labels["model_name"] = "watched"
        return metrics.registry.get_sample_value(f"midstream:{name}_total", labels)

    assert count("requests_refused", status="502", code="upstream_failed") == 1
    assert count("requests_finished", finished_reason="error") == 0
    assert count("requests_finished", finished_reason="stop") == 1


async def killed(made: Proxy) -> None:
    made.upstream.play = stall
    streams = [await made.engine.submit(made.ask()) for _ in range(3)]
    serving = made.engine._readers._serving
    assert serving is not None
    os.kill(serving.worker.pid, signal.SIGKILL)
    for stream in streams:
        events = await events_of(stream)
        assert events[-1].type == "error"
        assert "w7 w8".startswith(text_of(events))
    for connection in made.upstream.seen:
        await connection.gone.wait()
    assert made.engine.unready is not None
    while made.engine.unready is not None:
        await asyncio.sleep(0.05)
    await no_slot_is_lost(made)


async def shut_down(made: Proxy) -> None:
    del made.upstream.seen[:]

    async def play(connection: Connection) -> None:
        await connection.begin()
        await connection.send(GOOD)
        await until(lambda: made.engine.unready is not None)
        if connection is not made.upstream.seen[0]:
            await connection.gone.wait()
        await connection.send(chunk("w9", "stop"))
        await connection.end()

    made.upstream.play = play
    ends = await made.engine.submit(made.ask())
    stays = await made.engine.submit(made.ask())
    closing = asyncio.create_task(made.engine.close(PATIENCE))
    assert text_of(await events_of(ends)) == "w7 w8 w9"
    assert not closing.done()
    made.pass_time(PATIENCE)
    await closing
    assert (await events_of(stays))[-1].message == "cancelled"
    with pytest.raises(ApiError) as caught:
        await made.engine.submit(made.ask())
    assert caught.value.status == 503


def test_a_killed_worker_and_a_shut_down_leave_nothing_open(monkeypatch: Any) -> None:
    monkeypatch.setattr("midstream.serve.rotation.CUT", PATIENCE)
    with proxy() as made:
        made.run(killed(made))
        made.run(shut_down(made))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--upstream", "ftp://host/v1"], "expected http(s)://host/v1"),
        (["--upstream", "http://host/v1", "--upstream-key", "open"], "only its owner can read"),
        (["--upstream", "http://host/v1", "--upstream-key", "two words"], "printable ASCII"),
        (["--upstream", "http://host/v1", "--model", "m"], "give --bundle"),
    ],
)
def test_the_command_refuses_what_cannot_work(
    options: list[str], told: str, tmp_path: Any, monkeypatch: Any
) -> None:
    for name, mode in (("open", 0o644), ("two words", 0o600)):
        (tmp_path / name).write_text("two words")
        (tmp_path / name).chmod(mode)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["proxy", "--upstream-model", "theirs", *options])
    assert result.exit_code != 0
    assert told in " ".join(f"{result.output} {result.exception}".split())
    assert "two words" not in str(result.exception)
