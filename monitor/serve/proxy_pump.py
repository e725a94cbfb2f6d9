"""Carries an upstream's text to the worker that reads along, as fast as that reads."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from midstream.serve.errors import ApiError
from midstream.serve.forced_messages import Ended, Read, Written
from midstream.serve.messages import Cancel
from midstream.serve.serving import LocalStream, Serving
from midstream.serve.upstream import Upstream
from midstream.serve.upstream_answer import UpstreamError

_log = logging.getLogger(__name__)

AHEAD = 4096
"""Characters that the upstream may be ahead of the model; then it is not read for a while."""
_PART = 1024  # characters sent to the worker at a time: what one stream may cost the others


class Pump:
    """Carries the upstream's text to the worker, as fast as the worker takes it."""

    def __init__(self, local: LocalStream, upstream: Upstream, body: dict[str, Any]) -> None:
        self.stream = local.ask.stream
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        """Done when the upstream has taken the request, refused it, or is not needed any more."""
        self._local = local
        self._upstream = upstream
        self._path = "completions" if local.ask.messages is None else "chat/completions"
        self._body = body
        self._sent = self._read = 0
        self._room = asyncio.Event()
        self._complete = False
        self.task = loop.create_task(self._run())

    def stop(self) -> None:
        """Close the connection, unless the response has come to its end."""
        if not self._complete:
            self.task.cancel()
        if not self.begun.done():
            self.begun.set_result(None)

    def read(self, characters: int) -> None:
        """The worker has read so far."""
        self._read = characters
        self._room.set()

    async def _run(self) -> None:
        try:
            async with self._upstream.ask(self._path, self._body) as answer:
                if not self.begun.done():
                    self.begun.set_result(None)
                async for delta in answer.deltas():
                    await self._send(delta.text)
                    if delta.finish_reason is not None:
                        self._complete = True
                        self._local.send(Ended(self.stream, delta.finish_reason, None))
                await answer.drain()
        except ApiError as error:
            self._break_off(error.code, "the upstream did not take the request")
            if not self.begun.done():
                self.begun.set_exception(error)
        except UpstreamError as error:
            _log.error("stream %s: %s", self.stream, error)
            self._break_off(error.code, str(error))
        except Exception as error:
            _log.exception("stream %s: the proxy failed", self.stream)
            self._break_off("engine_error", "the proxy failed")
            if not self.begun.done():
                self.begun.set_exception(error)

    async def _send(self, text: str) -> None:
        for begin in range(0, len(text), _PART):
            part = text[begin : begin + _PART]
            self._local.send(Written(self.stream, part))
            self._sent += len(part)
            while self._sent - self._read > AHEAD:
                self._room.clear()
                await self._room.wait()

    def _break_off(self, code: str, message: str) -> None:
        self._local.send(Ended(self.stream, code, message))


class ReaderServing(Serving):
    """A worker that reads along, and who carries it what it reads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pumps: dict[str, Pump] = {}

    def follow(self, pump: Pump) -> None:
        """Tell the pump how far its stream was read, and stop it when the stream ends."""
        if pump.stream in self.streams:
            self._pumps[pump.stream] = pump
        else:  # it has ended already: the prompt was enough
            pump.stop()

    def send(self, message: Any) -> None:
        """Send a message about a stream; one that is cancelled loses its upstream at once."""
        if isinstance(message, Cancel):
            self._stop(message.stream)
        super().send(message)

    def _stop(self, stream: str) -> None:
        if pump := self._pumps.pop(stream, None):
            pump.stop()

    def _received(self, message: Any) -> None:
        if not isinstance(message, Read):
            super()._received(message)
        elif pump := self._pumps.get(message.stream):
            pump.read(message.characters)

    def _forget(self, name: str) -> LocalStream:
        self._stop(name)
        return super()._forget(name)
