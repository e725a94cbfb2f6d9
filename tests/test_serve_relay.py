"""How a response ends, whatever the moment: the stream's end, a cut, a client that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from http_service import PATIENCE
from scripted_engine import BUNDLE
from serving import run, turns

from midstream.serve.engine import Ask, Events, Released
from midstream.serve.relay import ClientGoneError, End, Piece, Relay, shutting_down
from midstream.serve.settings import Settings
from midstream.streams import Event


class Scripted(Events):
    """A stream to which happens what it is told; it can end as soon as it is cancelled."""

    ask = Ask("s", "testbed", None, "x", 9)
    prompt_tokens, completion_tokens, halt_message = 4, 1, None

    def __init__(self, *, prompt: bool = False) -> None:
        super().__init__()
        self.cancels = 0
        self._prompt = prompt

    def cancel(self) -> None:
        self.cancels += 1
        if self._prompt and self.cancels == 1:
            self.end("cancelled")

    def say(self, *texts: str) -> None:
        for text in texts:
            self.put(Released(4, 0.1, text))

    def end(self, message: str = "stop", type: Any = "finished") -> None:
        self.put(Event(type=type, stream="s", bundle=BUNDLE, message=message))


class Carried:
    """A stream, its relay and what came out of it."""

    def __init__(self, *stops: str, prompt: bool = False, **settings: Any) -> None:
        self.stream = Scripted(prompt=prompt)
        self.relay = Relay(self.stream, stops, Settings(**settings))
        self.pieces: list[str] = []
        self.reports: list[dict[str, Any]] = []

    def begin(self) -> asyncio.Future[End]:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.reports.append(context)
        )
        return asyncio.ensure_future(self.relay.run(self._deliver))

    def _deliver(self, piece: Piece) -> None:
        assert piece.start == len(self.text)
        self.pieces.append(piece.text)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def before(carried: Carried) -> None:
    carried.stream.say("The urn. St", "op")
    carried.stream.say("pale")


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_stop_string_ends_the_response_when_the_engine_has(prompt: bool, followed: bool) -> None:
    """An engine may tell the end while it is told to cancel, in the middle of its own telling."""

    async def check() -> None:
        carried = Carried("Stop", prompt=prompt)
        if not followed:
            before(carried)
        running = carried.begin()
        await turns()
        if followed:
            before(carried)
        if not prompt:
            await turns()
            assert not running.done()
            carried.stream.end("cancelled")
        end = await running
        assert (carried.text, end.finish_reason, end.error) == ("The urn. ", "stop", None)
        assert carried.stream.cancels
        assert not carried.reports

    run(check())


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (lambda stream: stream.end(), None),
        (lambda stream: stream.end("cancelled"), "cancelled"),
        (lambda stream: stream.end("lost", "error"), "engine_error"),
    ],
)
def test_what_waited_for_a_stop_string_leaves_before_any_end(
    ends: Callable[[Scripted], None], code: str | None
) -> None:
    async def check() -> None:
        carried = Carried("Stop")
        running = carried.begin()
        await turns()
        carried.stream.say("The Sto")
        assert carried.text == "The "
        ends(carried.stream)
        assert carried.text == "The Sto"
        end = await running
        assert (end.error.code if end.error else None) == code
        assert end.finish_reason == (None if code else "stop")
        assert not carried.stream.cancels  # it has ended

    run(check())


@pytest.mark.parametrize("moment", ["before", "begun", "text"])
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_broken_off_ends_at_any_moment_and_takes_no_more(cut: bool, moment: str) -> None:
    async def check() -> None:
        carried = Carried(start_seconds=10 * PATIENCE)
        stream, relay = carried.stream, carried.relay

        def break_off() -> None:
            relay.cut(shutting_down()) if cut else relay.leave()

        if moment == "before":
            break_off()
        running = carried.begin()
        await turns(1)
        if moment == "text":
            stream.say("a")
        if moment != "before":
            break_off()
        stream.put(Event(type="admitted", stream="s", bundle=BUNDLE))  # puts nothing off
        while moment != "before" and not running.done():  # again is as good as once
            await turns(1)
            break_off()
        if cut:
            end = await running
            assert end.error is not None
            assert (end.error.code, end.finish_reason) == ("server_shutting_down", None)
        else:
            with pytest.raises(ClientGoneError):
                await running
        assert stream.cancels == 1
        stream.say("b")
        stream.end("cancelled")
        break_off()
        await turns()
        assert carried.text == ("a" if moment == "text" else "")
        assert not carried.reports

    run(check())


def test_who_has_the_end_already_is_not_cut() -> None:
    async def check() -> None:
        carried = Carried()
        running = carried.begin()
        await turns()
        carried.stream.say("a")
        carried.stream.end()
        carried.relay.cut(shutting_down())
        carried.stream.say("b")
        carried.stream.end("lost", "error")
        end = await running
        assert (carried.text, end.finish_reason, end.error) == ("a", "stop", None)
        assert not carried.stream.cancels
        assert not carried.reports
        carried.relay.cut(shutting_down())
        carried.relay.leave()

    run(check())


def test_what_the_engine_has_cancelled_for_the_same_reason_is_told_the_reason() -> None:
    async def check() -> None:
        carried = Carried()
        carried.stream.end("cancelled")
        carried.relay.cut(shutting_down())
        end = await carried.begin()
        assert end.error is not None
        assert end.error.code == "server_shutting_down"

    run(check())


def test_from_the_first_event_only_the_time_for_the_whole_counts() -> None:
    async def check() -> None:
        carried = Carried(start_seconds=100.0, request_seconds=10_000.0)
        running, loop = carried.begin(), asyncio.get_running_loop()
        await turns()
        clock = carried.relay._clock
        assert clock is not None
        assert (clock.when() or 0.0) - loop.time() <= 100.0
        carried.stream.put(Event(type="admitted", stream="s", bundle=BUNDLE))
        assert (clock.when() or 0.0) - loop.time() > 5_000.0
        carried.stream.end()
        await running

    run(check())


def test_what_came_before_is_handed_over_first_also_where_more_comes_meanwhile() -> None:
    told: list[str] = []
    events = Events()

    def follower(event: Any) -> None:
        told.append(event.text)
        if event.text == "a":
            events.put(Released(4, 0.1, "c"))

    for text in "ab":
        events.put(Released(4, 0.1, text))
    events.follow(follower)
    events.put(Released(4, 0.1, "d"))
    assert told == ["a", "b", "c", "d"]
