"""An engine with quiet workers, in a loop whose clock the test moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import quiet_workers
from serving import PATIENCE, Seen

from midstream.serve.feed import Feed
from midstream.serve.local import LocalEngine
from midstream.serve.metrics import Metrics
from midstream.serve.watchdog import _LOOKS, Silence

HANG, LOAD = 120.0, 1800.0
LOOK = HANG / _LOOKS


class Loop(asyncio.SelectorEventLoop):
    """Its clock jumps where it is told to, as if the process had stood still."""

    ahead = 0.0
    frozen: float | None = None

    def time(self) -> float:
        return (super().time() if self.frozen is None else self.frozen) + self.ahead

    @contextmanager
    def stands(self) -> Iterator[None]:
        """The time within does not count, however long it is on a machine under load."""
        self.frozen = super().time()
        try:
            yield
        finally:
            self.ahead -= super().time() - self.frozen
            self.frozen = None


class House:
    """An engine whose workers do as they are told, in a loop whose clock the test moves."""

    def __init__(self, main: Any) -> None:
        self.seen, self.metrics = Seen(), Metrics("testbed")
        feed = Feed([self.seen, self.metrics])
        silence = Silence(LOAD, HANG)
        self.engine = LocalEngine(feed, slots=4, main=main, silence=silence)
        self.loop = Loop()

    @property
    def worker(self) -> Any:
        assert self.engine._serving is not None
        return self.engine._serving.worker

    async def pass_by(self, seconds: float) -> None:
        """Let time go by as the watch-dog sees it, which looks every now and then."""
        for _ in range(round(seconds / LOOK)):
            await self.stand_still(LOOK)

    async def stand_still(self, seconds: float) -> None:
        """All that time at once."""
        self.loop.ahead += seconds
        for _ in range(10):  # what has come is read, what is due is run
            await asyncio.sleep(0)

    async def hears(self, say: Callable[[], None]) -> None:
        """Have the worker say something, and read it."""
        serving = self.engine._serving
        assert serving is not None
        before, latest = serving.heard, time.monotonic() + PATIENCE
        with self.loop.stands():
            say()
            while serving.heard == before:
                assert time.monotonic() < latest, "it said nothing"
                time.sleep(0.005)
                await asyncio.sleep(0)

    def counted(self, name: str, **labels: str) -> float | None:
        labels["model_name"] = "testbed"
        return self.metrics.registry.get_sample_value(f"midstream:{name}_total", labels)


async def until(condition: Callable[[], Any]) -> None:
    latest = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < latest, "it did not come to pass"
        await asyncio.sleep(0.01)


@contextmanager
def house(main: Any = quiet_workers.obeying, start: bool = True) -> Iterator[House]:
    made = House(main)
    with asyncio.Runner(loop_factory=lambda: made.loop) as runner:
        try:
            if start:
                runner.run(made.engine.start())
            made.run = runner.run  # type: ignore[attr-defined]
            yield made
        finally:
            runner.run(made.engine.close(0.0))
