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
        self._begun = False
        self._sending = False
        self._sends = 0
        self._stuck = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        stream = self._relay.stream
        write: Callable[[bytes], bool] | None = scope.get(WRITE)

        async def deliver(piece: Piece) -> None:
            chunk = self._writer.piece(piece)
            if not self._begun:
                chunk = await self._begin(send) + chunk
            # Half of what a token costs here would be the timeout and the layers' wrappers.
            if write is None or not write(chunk):
                await self._send(send, chunk)

        with self._held:
            watch = asyncio.ensure_future(leave_with_client(self._relay, receive))
            patience = asyncio.ensure_future(self._watch_reading())
            try:
                end = await self._relay.run(deliver)
                if end.error is not None and not self._begun:
                    await refusal(end.error)(scope, receive, send)
                    return
                opening = b"" if self._begun else await self._begin(send)
                ending = opening + self._writer.ending(end, stream.prompt_tokens)
                async with asyncio.timeout(self._patience):
                    await self._send(send, ending, more=False)
            except (ClientGoneError, TimeoutError) as error:
                if self._stuck or isinstance(error, TimeoutError):
                    _log.warning("stream %s: its client did not read; cut", stream.ask.stream)
                    if abort := scope.get(ABORT):
                        abort()
            finally:
                watch.cancel()
                patience.cancel()

    async def _begin(self, send: Send) -> bytes:
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        return self._writer.opening()

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        self._sends += 1
        self._sending = True
        try:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except OSError as error:
            raise ClientGoneError from error
        self._sending = False

    async def _watch_reading(self) -> None:
        """Break off where one send takes as long as a client may; a timer for each costs 3 µs."""
        seen = -1
        while not self._stuck:
            await asyncio.sleep(self._patience)
            self._stuck = self._sending and self._sends == seen
            seen = self._sends
        self._relay.leave()


async def leave_with_client(relay: Relay, receive: Receive) -> None:
    """Break a response off when its client goes."""
    await until_gone(receive)
    relay.leave()


async def until_gone(receive: Receive) -> None:
    """Wait until the client goes; its request was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
