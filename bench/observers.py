"""What those who look on cost the server's one core: CPU time per ``released`` event.

    python bench/observers.py [--events 100000] [--streams 200] [--rate 1000]

The streams write by turns, one token each, as a batch does. Ten times per second of that rate the
page is told, which is why what viewers cost falls per event as the rate grows. What one event
object costs, and writing to viewers' sockets, is not in it. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from midstream.serve.audit import AuditLog
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed, Observer, Opened
from midstream.serve.live import TICK, Live
from midstream.serve.live_viewers import Viewer
from midstream.serve.metrics import Metrics
from midstream.streams import Event

BUNDLE = "b" * 64
ROUNDS = 5
"""Each is measured so often; the least disturbed counts."""


class Looked:
    """A page with viewers that read everything, told as often as the rate asks for."""

    def __init__(self, viewers: int, every: int, *, closely: bool = False) -> None:
        self.live = Live()
        self._viewers, self._every, self._closely = viewers, every, closely
        self._events = 0
        self._reading: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        looking = [self.live.look() for _ in range(self._viewers)]
        if self._closely:
            looking += [self.live.look_at(n + 1) for n in range(self._viewers)]
        self._reading = [asyncio.create_task(read(viewer)) for viewer in looking]

    async def told(self) -> None:
        self._events += 1
        if self._viewers and self._events % self._every == 0:
            self.live.tell()
            await asyncio.sleep(0)  # they read


async def read(viewer: Viewer) -> None:
    async for _ in viewer:
        pass


def streams(number: int, new: int = 0) -> list[Opened]:
    return [
        Opened(Ask(f"s-{new}-{n}", "testbed", None, "x", 10_000), "moderate", BUNDLE)
        for n in range(number)
    ]


def events(opened: list[Opened], number: int) -> Iterator[tuple[Opened, Event]]:
    for n in range(number):
        stream = opened[n % len(opened)]
        position = 8 + n // len(opened)
        risk = 0.1 + 0.0007 * (n % 997)
        yield stream, Event(
            type="released", stream=stream.ask.stream, bundle=BUNDLE, position=position,
            risk=risk, text=" word",
        )  # fmt: skip


async def measured(
    size: tuple[int, int], observer: Observer | None = None, page: Looked | None = None
) -> float:
    """Microseconds of CPU time per event, the feed's part included."""
    number, many = size
    feed = Feed([] if observer is None else [observer])
    opened = streams(many)
    for stream in opened:
        feed.opened(stream)
        feed.event(stream, Event(type="admitted", stream=stream.ask.stream, bundle=BUNDLE))
    if page is not None:
        page.begin()
    happening = list(events(opened, number))
    begin = time.process_time()
    for stream, event in happening:
        feed.event(stream, event)
        if page is not None:
            await page.told()
    took = time.process_time() - begin
    for stream in opened:
        done = Event(type="finished", stream=stream.ask.stream, bundle=BUNDLE, message="stop")
        feed.event(stream, done)
    assert feed.failures == 0
    return 1e6 * took / number


@contextmanager
def audit() -> Iterator[AuditLog]:
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(folder)
        yield log
        log.close()


async def main(number: int, many: int, rate: int) -> dict[str, float]:
    size = number, many
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        bare = await measured(size)
        took = {"feed_alone": bare}
        took["metrics"] = await measured(size, Metrics("testbed")) - bare
        with audit() as log:
            took["audit"] = await measured(size, log) - bare
        for name, viewers, closely in (
            ("page_0_viewers", 0, False),
            ("page_3_viewers", 3, False),
            ("page_3_viewers_each_at_a_stream", 3, True),
        ):
            looked = Looked(viewers, int(rate * TICK), closely=closely)
            took[name] = await measured(size, looked.live, looked) - bare
            looked.live.close()
        for name, value in took.items():
            found.setdefault(name, []).append(value)
    return {f"{name}_us": round(min(values), 2) for name, values in found.items()}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--events", type=int, default=100_000)
    options.add_argument("--streams", type=int, default=200)
    options.add_argument("--rate", type=int, default=1000, help="tokens per second")
    chosen = options.parse_args()
    result = asyncio.run(main(chosen.events, chosen.streams, chosen.rate))
    told = {"events": chosen.events, "streams": chosen.streams, "rate": chosen.rate}
    print(json.dumps({**told, **result, "load": round(os.getloadavg()[0], 1)}, indent=2))
