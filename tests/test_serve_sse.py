"""What a streamed response sends, in which order, and when it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from scripted_engine import BUNDLE
from serving import run, turns

from midstream.serve.engine import Ask, Events, Released
from midstream.serve.relay import Piece, Relay
from midstream.serve.responses import Writer
from midstream.serve.settings import Settings
from midstream.serve.sse import ABORT, WRITE, EventStream
from midstream.streams import Event

DONE = b"data: [DONE]\n\n"


class Scripted(Events):
    """A stream to which happens what it is told."""

    ask = Ask("s", "testbed", None, "x", 9)
    prompt_tokens, completion_tokens, halt_message = 4, 1, None
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def say(self, text: str) -> None:
        self.put(Released(4, 0.1, text))

    def tell(self, type: Any, message: str) -> None:
        self.put(Event(type=type, stream="s", bundle=BUNDLE, message=message))


class Wire:
    """A connection that takes bytes while it is free, as uvicorn has it: waits, then writes."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.started: list[int] = []
        self.parts: list[tuple[str, bytes]] = []
        self.complete = self.aborted = False
        self.fault: Exception | None = None

    async def send(self, message: Any) -> None:
        await self.free.wait()
        if self.fault is not None:
            raise self.fault
        assert not self.complete
        if message["type"] == "http.response.start":
            assert not self.parts
            self.started.append(message["status"])
            return
        assert self.started
        self.parts.append(("sent", message["body"]))
        self.complete = not message.get("more_body", False)

    def write(self, chunk: bytes) -> bool:
        assert self.started
        assert not self.complete
        if self.free.is_set():
            self.parts.append(("written", chunk))
        return self.free.is_set()

    def abort(self) -> None:
        self.aborted = True

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)


class Response:
    """One response on its way: the stream behind it, and the connection in front."""

    def __init__(self, *, direct: bool = True, chat: bool = True, **settings: Any) -> None:
        self.stream, self.wire = Scripted(), Wire()
        self.writer = Writer("s", "testbed", chat=chat, annotates=False, usage=False)
        self.relay = Relay(self.stream, (), Settings(**settings))
        self._scope = {"type": "http", "method": "POST", ABORT: self.wire.abort}
        if direct:
            self._scope[WRITE] = self.wire.write
        self._response = EventStream(self.relay, self.writer, Settings(**settings), ExitStack())
        self._leaves = asyncio.Event()

    def begin(self) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._response(self._scope, self._receive, self.wire.send))

    async def _receive(self) -> Any:
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    def expected(self, texts: Sequence[str]) -> bytes:
        chunks = [self.writer.piece(Piece(text, 0, 0)) for text in texts]
        return b"".join([self.writer.opening(), *chunks])


ACTIONS = ("say", "turn", "fill", "free")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_whatever_way_a_chunk_goes_the_order_is_that_of_the_tokens(
    chat: bool, direct: bool
) -> None:
    async def respond(actions: Sequence[str]) -> None:
        response, said = Response(direct=direct, chat=chat), ["0"]
        wire = response.wire
        answering = response.begin()
        await turns()
        response.stream.say("0")
        for number, action in enumerate(actions, 1):
            match action:
                case "say":
                    said.append(str(number))
                    response.stream.say(said[-1])
                case "turn":
                    await asyncio.sleep(0)
                case "fill":
                    wire.free.clear()
                case "free":
                    wire.free.set()
        response.stream.tell("finished", "stop")
        await asyncio.sleep(0)
        wire.free.set()
        await answering
        before, _, last = wire.body.removesuffix(DONE).rpartition(b"data: ")
        assert before == response.expected(said), actions
        assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
        assert (wire.started, wire.complete) == ([200], True)

    async def every() -> None:
        for actions in itertools.product(ACTIONS, repeat=5):
            await respond(("turn", *actions))
            await respond(actions)

    run(every())


def test_once_it_has_begun_a_token_is_written_at_once() -> None:
    async def check() -> None:
        response, before = Response(), asyncio.all_tasks()
        answering = response.begin()
        await turns()
        response.stream.say("a")
        assert response.wire.parts == []
        await turns()
        response.stream.say("b")
        response.stream.say("c")
        assert [way for way, _ in response.wire.parts] == ["sent", "written", "written"]
        response.stream.tell("finished", "stop")
        await answering
        await turns()
        assert asyncio.all_tasks() == before  # nobody waits for the client to leave any more

    run(check())


def test_what_has_waited_is_sent_in_parts_each_of_which_has_its_time() -> None:
    """A client that reads slowly, but reads, is not to be cut for what a long stop left."""

    async def check() -> None:
        response, said = Response(), ["x" * 30_000] * 5
        response.wire.free.clear()
        answering = response.begin()
        await turns()
        for text in said:
            response.stream.say(text)
        await turns()
        response.stream.tell("finished", "stop")
        await turns()
        response.wire.free.set()
        await answering
        assert response.wire.body.startswith(response.expected(said))
        assert response.wire.body.endswith(DONE)
        assert max(len(part) for _, part in response.wire.parts) == 1 << 16

    run(check())


def test_an_error_right_behind_the_first_token_comes_behind_it() -> None:
    async def check() -> None:
        response = Response()
        response.stream.say("a")  # before anybody follows
        response.stream.tell("error", "lost")
        await response.begin()
        assert response.wire.started == [200]
        assert response.wire.body.startswith(response.expected("a"))
        assert b'"engine_error"' in response.wire.body
        assert response.wire.body.endswith(DONE)
        response = Response()
        response.stream.tell("error", "lost")
        await response.begin()
        assert response.wire.started == [500]
        assert DONE not in response.wire.body

    run(check())


@pytest.mark.parametrize("fault", [OSError("gone"), RuntimeError("a bug")])
@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_whose_chunks_cannot_be_sent_is_cancelled(fault: Exception, begun: bool) -> None:
    async def check() -> None:
        response = Response(direct=False)
        answering = response.begin()
        await turns()
        if begun:
            response.stream.say("a")
            await turns()
        response.wire.fault = fault
        response.stream.say("b")
        if isinstance(fault, OSError):  # as the client's going is
            await answering
        else:
            with pytest.raises(RuntimeError, match="a bug"):
                await answering
        assert response.stream.cancelled
        assert response.wire.started == [200] * begun

    run(check())


@pytest.mark.parametrize("ended", [True, False])
def test_a_client_that_does_not_read_is_cut_also_at_the_end(
    ended: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        response = Response(slow_reader_seconds=0.01)
        answering = response.begin()
        await turns()
        response.wire.free.clear()
        response.stream.say("a")
        if ended:
            response.stream.tell("finished", "stop")
        await answering
        assert response.wire.aborted
        assert response.stream.cancelled is not ended

    run(check())
    assert "its client did not read; cut" in caplog.text


@pytest.mark.parametrize("full", [True, False])
def test_a_client_that_leaves_ends_its_stream_and_gets_no_more(full: bool) -> None:
    async def check() -> None:
        response = Response()
        answering = response.begin()
        await turns()
        response.stream.say("a")
        await turns()
        before = response.wire.body
        if full:
            response.wire.free.clear()
            response.stream.say("b")
        response._leaves.set()
        await answering
        response.wire.free.set()
        response.stream.say("c")
        response.stream.tell("finished", "cancelled")
        await turns()
        assert response.stream.cancelled
        assert not response.wire.aborted
        assert (response.wire.body, response.wire.complete) == (before, False)

    run(check())
