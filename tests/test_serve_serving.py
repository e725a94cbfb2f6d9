"""What the server makes of a worker's messages, and of its end, whenever that comes."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from serving import Seen, run

from midstream import testbed
from midstream.serve import serving
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.messages import Accepted, Cancel, Left, Ready, Refused, Step, Submit
from midstream.streams import Event

BUNDLE = "b" * 64


class Silent:
    """Stands for a worker's process: keeps what it is sent."""

    def __init__(self, *parts: Any) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


class House:
    """A worker as the engine has it, which says what it is told to."""

    def __init__(self) -> None:
        self.seen, self.told = Seen(), dict[str, list[Any]]()
        self.feed = Feed([self.seen])
        self.lost: list[dict[str, list[str]]] = []
        self.reports: list[dict[str, Any]] = []
        self.part = serving.Serving(None, None, self.feed, serving.Judged(), self._lost)  # type: ignore[arg-type]
        self.say(Ready(BUNDLE, testbed.load_bundle().policy, "moderate", 8))
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.reports.append(context)
        )

    def _lost(self, part: serving.Serving) -> None:
        self.lost.append({name: self.saw(name) for name in self.seen.streams})

    def say(self, message: Any) -> None:
        self.part._received(message)

    def step(self, *told: Any) -> None:
        self.say(Step(1.0, 1, None, 8, told))

    def ask(self, name: str) -> asyncio.Future[serving.LocalStream]:
        ask = Ask(name, "testbed", None, "The urn", 9)
        return asyncio.ensure_future(self.part.submit(ask))

    async def taken(self, name: str) -> serving.LocalStream:
        asking = self.ask(name)
        await asyncio.sleep(0)
        self.say(Accepted(name, 3))
        return await asking

    async def gone(self, name: str) -> None:
        asking = self.ask(name)
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait((asking,))
        assert asking.cancelled()

    def saw(self, name: str) -> list[str]:
        return [event.type for event in self.seen.streams[name]]


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Worker", Silent)


def types(told: list[Any]) -> list[str]:
    return [getattr(event, "type", "released") for event in told]


def end(name: str, message: str = "cancelled") -> Event:
    return Event(type="finished", stream=name, bundle=BUNDLE, message=message)


def test_a_worker_that_dies_in_the_middle_of_a_step_ends_each_stream_once() -> None:
    async def check() -> None:
        house = House()
        told: dict[str, list[Any]] = {}
        for name in ("done", "read", "unread"):
            stream = await house.taken(name)
            if name != "unread":
                stream.follow(told.setdefault(name, []).append)
        waiting = house.ask("waiting")
        await asyncio.sleep(0)
        left = [Left(name, 2, 4, 0.1, "urn", 1) for name in ("done", "read", "unread")]
        house.step(*left, end("done", "stop"))
        house.part._ended("was killed by SIGKILL")  # nobody who looks on was told of the step yet
        ends = [event for event in told["read"] if isinstance(event, Event)]
        assert [(e.type, e.delivered, e.delivered_unscored) for e in ends] == [("error", 2, 1)]
        assert types(told["done"]) == ["released", "finished"]
        broken = ["released", "error"]
        assert house.lost == [{"done": ["released", "finished"], "read": broken, "unread": broken}]
        stream.follow(told.setdefault("unread", []).append)
        assert types(told["unread"]) == types(told["read"]) == broken
        with pytest.raises(ApiError) as refused:
            await waiting
        assert refused.value.status == 503
        assert house.part.idle.is_set()
        for _ in range(4):
            await asyncio.sleep(0)
        assert house.saw("read") == broken
        assert (house.feed.failures, house.reports) == (0, [])

    run(check())


def test_a_request_that_nobody_waits_for_any_more_ends_all_the_same() -> None:
    async def check() -> None:
        house = House()
        for name in ("taken", "refused", "dies"):
            await house.gone(name)
        sent = [type(message) for message in house.part.worker.sent]  # type: ignore[attr-defined]
        assert sent == [Submit, Cancel] * 3
        house.say(Accepted("taken", 3))
        house.step(end("taken"))
        house.say(Refused("refused", 429, "too many", "too_many_requests", None))
        house.part._ended("was killed by SIGKILL")
        assert {name: house.saw(name) for name in house.seen.streams} == {"taken": ["finished"]}
        assert house.part.idle.is_set()
        gc.collect()  # what was never retrieved is reported by then
        assert house.reports == []

    run(check())


def test_the_garbage_of_a_step_is_left_until_its_tokens_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    collected = asyncio.Event()

    def collect() -> None:
        order.append("collected")
        collected.set()

    monkeypatch.setattr(serving, "collect", collect)

    async def check() -> None:
        house = House()
        stream = await house.taken("a")
        stream.follow(lambda _: order.append("left"))
        house.step(Left("a", 1, 4, 0.1, "urn", 0), end("a"))
        assert order == ["left", "left"]  # which has only now been handed to the sockets
        await collected.wait()

    run(check())
