"""What the tests of the service share: a loop that stays, one who looks on, and how to ask."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from scripted_engine import events

from midstream import testbed
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed, Observer
from midstream.serve.local import LocalEngine
from midstream.streams import Event

T = TypeVar("T")
PATIENCE = 300.0  # seconds, against hanging

_ids = itertools.count()


class Seen(Observer):
    """Keeps all it is told."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Event]] = {}
        self.openings: dict[str, Any] = {}
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.told_stats: list[Any] = []

    def opened(self, stream: Any) -> None:
        assert stream.ask.stream not in self.streams
        self.openings[stream.ask.stream] = stream
        self.streams[stream.ask.stream] = []

    def event(self, stream: Any, event: Event) -> None:
        told = self.streams[stream.ask.stream]
        assert not told or told[-1].type not in ("finished", "error")
        told.append(event)

    def notice(self, kind: str, facts: Any) -> None:
        self.notices.append((kind, dict(facts)))

    def stats(self, stats: Any) -> None:
        self.told_stats.append(stats)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.notices]


def run(work: Awaitable[T]) -> T:
    """In a loop of its own."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(bounded())


async def turns(count: int = 5) -> None:
    """Let what is ready in the loop come to its turn."""
    for _ in range(count):
        await asyncio.sleep(0)


class House:
    """An engine, its observer, and the loop that both live in."""

    def __init__(self, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.seen = Seen()
        self.engine = LocalEngine(Feed([self.seen]), **{"slots": 4, **options})

    def run(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, PATIENCE)

        return self.runner.run(bounded())

    def settled(self) -> Any:
        """Wait until no slot is taken; return what was told then."""

        async def wait() -> Any:
            before = len(self.seen.told_stats)
            while True:
                told = self.seen.told_stats[before:]
                if told and not told[-1].slots_used:
                    return told[-1]
                await asyncio.sleep(0.05)

        return self.run(wait())

    def close(self, drain: float = 10.0) -> None:
        self.run(self.engine.close(drain))
        self.runner.close()


@contextmanager
def house(**options: Any) -> Iterator[House]:
    """A started engine."""
    made = House(**options)
    try:
        made.run(made.engine.start())
        yield made
    finally:
        made.close()


def ask(index: int | None = 0, *, prompt: Any = None, max_tokens: int = 64, **fields: Any) -> Ask:
    """A request: prompt number ``index`` of the testbed, or ``prompt``."""
    messages = None
    if prompt is None:
        messages = tuple(testbed.sample_prompt(0, index).messages)
    name = fields.pop("stream", f"s{next(_ids)}")
    return Ask(name, fields.pop("model", "testbed"), messages, prompt, max_tokens, **fields)


async def events_of(stream: Any) -> list[Event]:
    return [event async for event in events(stream)]


async def answer(engine: Any, asked: Ask) -> tuple[Any, list[Event]]:
    """Ask, and read to the end."""
    stream = await engine.submit(asked)
    return stream, await events_of(stream)


def text_of(events: list[Event]) -> str:
    return "".join(event.text or "" for event in events if event.type == "released")


def ended(events: list[Event]) -> bool:
    return bool(events) and events[-1].type in ("finished", "error")
