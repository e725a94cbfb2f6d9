"""From an engine's stream to a client: pieces of text, and one end, whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from midstream.serve.engine import Released, Stream
from midstream.serve.errors import ApiError
from midstream.serve.settings import Settings
from midstream.serve.stops import StopStrings
from midstream.streams import Event, StreamReport

_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Text that leaves.

    Attributes
    ----------
    text : str
    start : int
        Characters that left before it.
    checked : int
        Characters of the response up to which everything was judged.
    """

    text: str
    start: int
    checked: int


@dataclass(frozen=True, slots=True)
class End:
    """How a response ended.

    Attributes
    ----------
    finish_reason : str, optional
        None where it broke off; ``error`` then says why.
    error : ApiError, optional
        What to tell the client.
    report : StreamReport, optional
        What the monitor saw.
    completion_tokens : int
    checked, length : int
        Characters judged, and characters that left.
    halt_message : str, optional
        What the policy has clients told, where the response was halted.
    """

    finish_reason: str | None
    error: ApiError | None
    report: StreamReport | None
    completion_tokens: int
    checked: int
    length: int
    halt_message: str | None = None


class ClientGoneError(Exception):
    """Nothing more can be delivered to the client."""


class Relay:
    """Carries one stream to its client.

    Parameters
    ----------
    stream : Stream
    stops : tuple of str
    settings : Settings
    """

    def __init__(self, stream: Stream, stops: tuple[str, ...], settings: Settings) -> None:
        self.stream = stream
        self._stops = StopStrings(stops)
        self._settings = settings
        self._clock: asyncio.Timeout | None = None
        self._cut: ApiError | None = None
        self._gone = False
        self._begun = False
        self._ended = False
        self._length = 0
        self._released = 0
        self._checked = 0
        self._report: StreamReport | None = None
        self._halted = False

    def cut(self, error: ApiError) -> None:
        """Break the response off soon, with this as its end."""
        self._cut = self._cut or error
        self._expire()

    def leave(self) -> None:
        """The client has gone: break off soon, without an end."""
        self._gone = True
        self._expire()

    def _expire(self) -> None:
        if self._clock is not None and not self._clock.expired():
            self._clock.reschedule(0.0)

    async def run(self, deliver: Callable[[Piece], None]) -> End:
        """Hand every piece to ``deliver``; return how it ended. The stream is never left running.

        Raises
        ------
        ClientGoneError
            After `leave`.
        """
        try:
            reason, error = await self._timed(deliver)
        finally:
            if not self._ended:
                self.stream.cancel()
        tokens = self.stream.completion_tokens
        checked = min(self._checked, self._length)
        told = self.stream.halt_message if self._halted and not self._stops.hit else None
        return End(reason, error, self._report, tokens, checked, self._length, told)

    async def _timed(self, deliver: Callable[[Piece], None]) -> tuple[str | None, ApiError | None]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._deliver = deliver
        self._over: asyncio.Future[tuple[str | None, ApiError | None]] = loop.create_future()
        self._latest = now + self._settings.request_seconds
        start = now + self._settings.start_seconds
        try:
            async with asyncio.timeout_at(min(start, self._latest)) as self._clock:
                if self._cut is not None or self._gone:
                    self._expire()
                self.stream.follow(self._take)
                return await self._over
        except TimeoutError:
            if self._gone:
                raise ClientGoneError from None
            return None, self._cut or ApiError(504, "the response took too long", code="timeout")
        except Exception:
            _log.exception("stream %s: its engine failed", self.stream.ask.stream)
            return None, engine_error()
        finally:
            self._clock = None

    def _take(self, event: Released | Event) -> None:
        """Follow the stream, until its end or the response's."""
        if self._over.done():
            return
        try:
            if not self._begun:
                self._begin()
            if isinstance(event, Released):
                self._release(event.text, event.risk is not None)
            elif event.type == "halted":
                self._halted = True
            elif event.type == "finished":
                self._report = event.report
                self._end(event.message, self._cut or cancelled())
            elif event.type == "error":
                _log.error("stream %s broke off: %s", event.stream, event.message)
                self._end(None, engine_error(event.cause))
        except Exception:
            _log.exception("stream %s could not be passed on", self.stream.ask.stream)
            self._over.set_result((None, engine_error()))

    def _begin(self) -> None:
        """The engine has begun, so that only the latest end still counts."""
        self._begun = True
        breaking_off = self._cut is not None or self._gone
        if self._clock is not None and not self._clock.expired() and not breaking_off:
            self._clock.reschedule(self._latest)

    def _release(self, text: str, scored: bool) -> None:
        self._released += len(text)
        if scored:
            # What a scored token attended to is judged with it.
            self._checked = self._released
        self._pass(self._stops.take(text))
        if self._stops.hit:
            self.stream.cancel()

    def _end(self, reason: str | None, error: ApiError) -> None:
        """The stream has ended, and so does the response; with ``error`` where it broke off."""
        self._ended = True
        if self._stops.hit:
            self._over.set_result(("stop", None))
            return
        self._pass(self._stops.finish())
        broke_off = reason is None or reason == "cancelled"
        self._over.set_result((None, error) if broke_off else (reason, None))

    def _pass(self, text: str) -> None:
        if text:
            start, self._length = self._length, self._length + len(text)
            self._deliver(Piece(text, start, min(self._checked, self._length)))


_UPSTREAM = {
    "upstream_timeout": (504, "the upstream stopped sending before the response was whole"),
    "upstream_error": (502, "the upstream's response broke off or cannot be passed on"),
}


def engine_error(cause: str | None = None) -> ApiError:
    """What a client is told of a failure: nothing of the insides, which the log has."""
    if cause in _UPSTREAM:
        status, told = _UPSTREAM[cause]
        return ApiError(status, f"{told}; try again", code=cause)
    return ApiError(500, "the engine failed while it wrote; try again", code="engine_error")


def cancelled() -> ApiError:
    """The server ended a stream of itself."""
    return ApiError(503, "the server cancelled the response; try again", code="cancelled")


def shutting_down() -> ApiError:
    """The server goes away."""
    message = "the server is shutting down; try again"
    return ApiError(503, message, code="server_shutting_down", retry_after=5.0)
