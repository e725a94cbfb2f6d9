"""A response that is sent while it is written, as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from midstream.serve.relay import ClientGoneError, Piece, Relay
from midstream.serve.responses import Writer, refusal
from midstream.serve.settings import Settings

_log = logging.getLogger(__name__)

ABORT = "midstream.abort"
"""Key of the ASGI scope under which our HTTP protocol offers to drop the connection."""

WRITE = "midstream.write"
"""Key under which it offers to write a chunk without the way through all of ASGI's layers."""

_PART = 1 << 16  # bytes that are sent at a time: so much is to be read within a client's time

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends what a relay carries; where it breaks off before its first token, the status says so.

    Parameters
    ----------
    relay : Relay
    writer : Writer
    settings : Settings
    held : ExitStack
        Closed when the response is over.
    """

    media_type = "text/event-stream"

    def __init__(self, relay: Relay, writer: Writer, settings: Settings, held: ExitStack) -> None:
        super().__init__()
        self._relay = relay
        self._writer = writer
        self._patience = settings.slow_reader_seconds
        self._held = held
        self._write: Callable[[bytes], bool] | None = None
        self._waiting = bytearray()
        self._wake = asyncio.Event()
        self._begun = False
        self._sending = False
        self._complete = False
        self._stuck = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        stream = self._relay.stream
        self._write = scope.get(WRITE)
        with self._held:
            watch = asyncio.ensure_future(leave_with_client(self._relay, receive))
            sending = asyncio.ensure_future(self._send(send))
            try:
                end = await self._relay.run(self._deliver)
                if end.error is not None and not self._begun and not self._waiting:
                    await refusal(end.error)(scope, receive, send)
                    return
                self._wait(self._writer.ending(end, stream.prompt_tokens))
                self._complete = True
                await sending
            except ClientGoneError:
                if sending.done():
                    await sending
            finally:
                watch.cancel()
                sending.cancel()
                if self._stuck:
                    _log.warning("stream %s: its client did not read; cut", stream.ask.stream)
                    if abort := scope.get(ABORT):
                        abort()

    def _deliver(self, piece: Piece) -> None:
        """Write at once; what cannot be written so waits, and what comes after it behind it."""
        chunk = self._writer.piece(piece)
        direct = self._begun and not self._sending and not self._waiting
        # Half of what a token costs here would be a task's turn, and the layers' wrappers.
        if not (direct and self._write is not None and self._write(chunk)):
            self._wait(chunk)

    def _wait(self, chunk: bytes) -> None:
        self._waiting += chunk
        self._wake.set()

    async def _send(self, send: Send) -> None:
        """Send what waits, until all was sent or the client takes too long to read."""
        try:
            while not self._complete or self._waiting:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    async with asyncio.timeout(self._patience):
                        await self._send_waiting(send)
        except TimeoutError:
            self._stuck = True
        except OSError:
            pass
        finally:
            self._relay.leave()

    async def _send_waiting(self, send: Send) -> None:
        self._sending = True
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            self._waiting[:0] = self._writer.opening()
        chunk = bytes(self._waiting[:_PART])
        del self._waiting[:_PART]
        more = bool(self._waiting) or not self._complete
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._sending = False


async def leave_with_client(relay: Relay, receive: Receive) -> None:
    """Break a response off when its client goes."""
    await until_gone(receive)
    relay.leave()


async def until_gone(receive: Receive) -> None:
    """Wait until the client goes; its request was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
