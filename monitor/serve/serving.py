"""One worker as the engine has it: its streams, and what it said of itself."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from midstream.serve.channel import Channel
from midstream.serve.engine import Ask, Events, Released
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed, Opened
from midstream.serve.garbage import collect
from midstream.serve.messages import (
    Accepted,
    Cancel,
    Failed,
    PlainLeft,
    Plan,
    Ready,
    Refused,
    Step,
    Submit,
)
from midstream.serve.workers import Worker, WorkerError
from midstream.streams import Event

Main = Callable[[Channel, Any], None]
_BREATH = 0.01  # seconds after a step, when what came with it has been dealt with


class LocalStream(Events):
    """One response; see `midstream.serve.engine.Stream`."""

    def __init__(self, ask: Ask, serving: Serving) -> None:
        super().__init__()
        self.ask = ask
        self.serving = serving
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.unscored = 0
        """Of these, those without a score."""
        self.opened: Opened | None = None
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def halt_message(self) -> str | None:
        """What the policy has clients told of a halt."""
        assert self.serving.ready is not None
        return self.serving.ready.policy.on_halt.message

    def cancel(self) -> None:
        """Free its slot before the next step."""
        self.send(Cancel(self.ask.stream))

    def send(self, message: Any) -> None:
        """Send a message about it to its worker."""
        self.serving.send(message)

    def event(self, type: Literal["released", "error"], **facts: Any) -> Event:
        """Build an event of this stream."""
        assert self.opened is not None, "nothing is told of it before it was accepted"
        return Event(type=type, stream=self.ask.stream, bundle=self.opened.bundle, **facts)


class Judged:
    """What was judged, by whatever worker, since it was last asked for."""

    def __init__(self) -> None:
        self._rows = 0
        self._seconds: list[float] = []

    def add(self, rows: int, seconds: float) -> None:
        """Count a step."""
        self._rows += rows
        self._seconds.append(seconds)

    def take(self) -> tuple[int, list[float]]:
        """Rows, and the seconds that each step took; count anew."""
        rows, seconds = self._rows, self._seconds
        self._rows, self._seconds = 0, []
        return rows, seconds


class Serving:
    """A worker as the engine has it: its streams, and what it said of itself.

    Parameters
    ----------
    plan : Plan
    main : callable
        What runs in the process.
    feed : Feed
    judged : Judged
    lost : callable
        Called with this when the process is gone and its streams were told.
    """

    def __init__(
        self,
        plan: Plan,
        main: Main,
        feed: Feed,
        judged: Judged,
        lost: Callable[[Serving], None],
    ) -> None:
        self.streams: dict[str, LocalStream] = {}
        self.ready: Ready | None = None
        self.failure: str | None = None
        """What it said before it ended; for the log."""
        self.ending = ""
        """How it ended; for everybody."""
        self.since = 0.0
        self.free_slots = 0
        self.heard = 0
        """Goes up with all that comes from where the model runs."""
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle = asyncio.Event()
        """Set while there are no streams."""
        self.idle.set()
        self.worker = Worker(main, plan, self._hear, self._ended)
        self._feed, self._judged, self._lost = feed, judged, lost
        self._untold: deque[tuple[LocalStream, Released | Event]] = deque()

    async def start(self) -> None:
        """Start it and wait until it serves.

        Raises
        ------
        WorkerError
        """
        try:
            await self.worker.start()
        except BaseException:
            self.ending = "was not started"
            raise
        try:
            await asyncio.shield(self.started)
        except BaseException:
            # Not by hanging up: it would not notice before the model is loaded, and who is told
            # twice to end does not wait until it is killed for that.
            self.worker.kill("was not needed any more")
            await self.worker.stop()
            raise
        self.since = time.monotonic()

    def send(self, message: Any) -> None:
        """Send a message about a stream; without effect once the worker is gone."""
        self.worker.send(message)

    async def submit(self, ask: Ask) -> LocalStream:
        """Send a request, and wait until it was accepted."""
        stream = self.streams[ask.stream] = LocalStream(ask, self)
        self.idle.clear()
        self.worker.send(
            Submit(
                ask.stream,
                ask.messages,
                ask.prompt,
                ask.max_tokens,
                ask.tier,
                ask.sampling,
                ask.prior,
            )
        )
        try:
            await asyncio.shield(stream.accepted)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    def _hear(self, message: Any) -> None:
        # Another thread takes requests in and refuses them, also while the model's hangs.
        if not isinstance(message, Accepted | Refused):
            self.heard += 1
        self._received(message)

    def _received(self, message: Any) -> None:
        match message:
            case Step():
                self.free_slots = message.free_slots
                if message.judge_seconds is not None:
                    self._judged.add(message.rows, message.judge_seconds)
                for told in message.told:
                    self._tell(told)
                loop = asyncio.get_running_loop()
                # Two turns of the loop on, when all was written: no token is to wait for those who
                # look on.
                loop.call_soon(loop.call_soon, self._tell_feed)
                loop.call_later(_BREATH, collect)
            case Accepted(name, prompt_tokens):
                assert self.ready is not None
                stream = self.streams[name]
                stream.prompt_tokens = prompt_tokens
                tier = stream.ask.tier or self.ready.tier
                stream.opened = Opened(stream.ask, tier, self.ready.bundle)
                self._feed.opened(stream.opened)
                stream.accepted.set_result(None)
            case Refused(name, status, text, code, param):
                stream = self._forget(name)
                stream.accepted.set_exception(ApiError(status, text, code=code, param=param))
                stream.accepted.exception()  # also where nobody waits any more
            case Ready():
                self.ready, self.free_slots = message, message.slots
                self.started.set_result(None)
            case Failed(reason):
                self.failure = reason

    def _tell(self, told: PlainLeft | Event) -> None:
        event: Released | Event
        if isinstance(told, Event):
            event, stream = told, self.streams[told.stream]
        else:
            name, tokens, position, risk, text, unscored = told
            stream = self.streams[name]
            stream.completion_tokens += tokens
            stream.unscored = unscored
            if not text:  # a character that is not whole yet
                return
            event = Released(position, risk, text)
        stream.put(event)
        self._untold.append((stream, event))
        if isinstance(event, Event) and event.type in ("finished", "error"):
            self._forget(event.stream)

    def _tell_feed(self) -> None:
        while self._untold:
            stream, event = self._untold.popleft()
            assert stream.opened is not None
            if isinstance(event, Released):
                event = stream.event("released", **event._asdict())
            self._feed.event(stream.opened, event)

    def _forget(self, name: str) -> LocalStream:
        stream = self.streams.pop(name)
        if not self.streams:
            self.idle.set()
        return stream

    def _ended(self, how: str) -> None:
        self.ending = how if self.failure is None else "failed"
        if not self.started.done():
            self.started.set_exception(WorkerError(self.failure or f"the model's process {how}"))
            self.started.exception()
        for name, stream in list(self.streams.items()):
            if stream.opened is None:
                self._forget(name)
                stream.accepted.set_exception(unavailable(1.0))
                stream.accepted.exception()
                continue
            told = "the model's process ended while it wrote this response; try again"
            delivered = {
                "delivered": stream.completion_tokens,
                "delivered_unscored": stream.unscored,
            }
            self._tell(stream.event("error", message=told, **delivered))
        self._tell_feed()
        self._lost(self)


def unavailable(retry_after: float | None) -> ApiError:
    """What requests are answered while no worker takes them."""
    return ApiError(
        503, "the model is not ready; try again later", code="unavailable", retry_after=retry_after
    )
