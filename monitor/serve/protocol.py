"""HTTP on the socket: uvicorn's protocol with the limits that it lacks."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from midstream.serve.errors import ApiError
from midstream.serve.settings import Settings
from midstream.serve.sse import ABORT, WRITE

MAX_HEAD_BYTES = 1 << 16


class GuardedProtocol(HttpToolsProtocol):
    """Bounds connections, the head of a request, the time for it, and what is never read.

    uvicorn has no time for headers to come in, so that a client which sends a byte now and then
    keeps its socket forever, and no bound on their size.
    """

    settings: ClassVar[Settings]

    _is_early = False
    """Whether a request came before the one before it was answered."""
    _in_head = True
    _head_bytes = 0
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it at once where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and sock.family != socket.AF_UNIX:
            # The end of a response whose client stopped reading is the kernel's to give up, later
            # than a stream is cut, so that the log can say why.
            milliseconds = int(3000 * self.settings.slow_reader_seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Parse; outside a request that is being answered only for so long, and so much."""
        if self._is_early:
            return
        if self.cycle is None or self.cycle.response_complete:
            self._arm()
        super().data_received(data)
        if self._in_head and not self._is_early and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                message = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
                self._refuse(ApiError(431, message, code="head_too_large"))

    def on_message_begin(self) -> None:
        """Begin a request, or leave it unread and the connection to end with the one before.

        uvicorn would read no more of the socket, and so not see that its client has gone.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_early, self.cycle.keep_alive = True, False
            return
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """Take a part of it."""
        if not self._is_early:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a part of it."""
        if not self._is_early:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take a part of it."""
        if not self._is_early:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of it."""
        if not self._is_early:
            super().on_message_complete()

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        if self._is_early:
            return
        self._in_head = False
        self._disarm()
        super().on_headers_complete()
        self.scope[WRITE] = partial(_write, self.cycle)  # type: ignore[literal-required]

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, with the standard error object."""
        self._refuse(ApiError(400, "this is not valid HTTP/1.1", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: any client can ask to speak WebSocket, and is answered in HTTP."""

    def _arm(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(self.settings.header_seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _too_slow(self) -> None:
        self._head_due = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, "the request did not come in time", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        head = (
            b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()


def _write(cycle: RequestResponseCycle | None, chunk: bytes) -> bool:
    """Write a chunk of a body at once; False where that has to wait, or to go another way."""
    if (
        cycle is None
        or cycle.flow.write_paused
        or cycle.disconnected
        or not cycle.response_started
        or cycle.response_complete
        or not cycle.chunked_encoding
    ):
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    return True


def guarded(settings: Settings) -> type[GuardedProtocol]:
    """Protocol with these limits."""
    return type("GuardedProtocol", (GuardedProtocol,), {"settings": settings})
