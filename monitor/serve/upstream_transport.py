"""HTTP/1.1 to an upstream, under httpx: httptools parses what uvloop reads, and no more is between.

httpx's own way takes most of what a token costs the proxy, and its pool time that grows with the
square of the open connections for each request, in which no token goes on (bench/proxy_overhead.py
has the figures).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import httptools
import httpx

MAX_HEAD = 1 << 16
"""Bytes of an answer before its body, or behind a part of it, that are no more of it, at most."""
IDLE = 5.0
"""Seconds that a connection waits to be used again; upstreams close theirs at their own time."""
_WAITING = 1 << 16  # bytes that nobody has read yet, from which on the socket is left alone


class UpstreamTransport(httpx.AsyncBaseTransport):
    """Connections to one upstream, each for one request after the other.

    Nobody is asked twice: what fails is for the caller to tell. It waits without end for an answer;
    the time for that is the caller's, too.

    Parameters
    ----------
    connections : int
        Open at a time; further requests wait.
    secure : bool
        Whether the upstream is spoken to by TLS.
    """

    def __init__(self, connections: int, *, secure: bool) -> None:
        self._room = asyncio.Semaphore(connections)
        self._tls = httpx.create_ssl_context(trust_env=False) if secure else None
        self._idle: list[_Connection] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Of httpx: send a request, and return the answer when its headers have come."""
        await self._room.acquire()
        try:
            connection = self._reused() or await self._connected(request)
            try:
                status, headers = await connection.ask(request)
            except BaseException:
                connection.abort()
                raise
        except BaseException:
            self._room.release()
            raise
        return httpx.Response(status, headers=headers, stream=_Body(connection, self._done))

    async def aclose(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().abort()

    def _reused(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.take():
                return connection
        return None

    async def _connected(self, request: httpx.Request) -> _Connection:
        url = request.url
        secure = self._tls is not None
        patience = request.extensions["timeout"]["connect"]
        try:
            async with asyncio.timeout(patience):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection,
                    url.raw_host.decode("ascii"),
                    url.port or (443 if secure else 80),
                    ssl=self._tls,
                )
        except TimeoutError:
            raise httpx.ConnectTimeout("no connection in time", request=request) from None
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        return connection

    def _done(self, connection: _Connection) -> None:
        self._room.release()
        if connection.rest():
            self._idle.append(connection)
        else:
            connection.abort()


class _Body(httpx.AsyncByteStream):
    """What comes behind the headers; closing it ends the use of the connection."""

    def __init__(self, connection: _Connection, done: Any) -> None:
        self._connection: _Connection | None = connection
        self._done = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._connection is not None and (data := await self._connection.read()):
            yield data

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._done(connection)


class _Connection(asyncio.Protocol):
    """One connection, and the answer that is read from it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._lost: httpx.TransportError | None = None  # why nothing comes any more
        self._expiry: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._asked = False
        self._begin()

    def _begin(self) -> None:
        """Be ready for another answer."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._head = 0  # bytes since the last one of a body
        self._status = 0  # once the headers are complete
        self._until_closed = False  # the body, for want of a length
        self._lasts = False  # the connection, beyond this answer
        self._parts: list[bytes] = []
        self._waiting = 0  # bytes of them
        self._complete = False

    async def ask(self, request: httpx.Request) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Send a request; return status and headers of the answer."""
        assert self._transport is not None
        self._asked = True
        lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
        lines += [b"%s: %s" % header for header in request.headers.raw]
        self._transport.write(b"\r\n".join([*lines, b"", request.content]))
        while not self._status:
            await self._more()
        return self._status, self._headers

    async def read(self) -> bytes:
        """More of the body; empty at its end."""
        while not self._parts and not self._complete:
            await self._more()
        data = b"".join(self._parts)
        self._parts.clear()
        if self._waiting >= _WAITING and self._transport is not None:
            self._transport.resume_reading()
        self._waiting = 0
        return data

    def rest(self) -> bool:
        """Wait to be used again; False where it cannot be."""
        if not (self._complete and self._lasts) or self._parts or self._lost is not None:
            return False
        self._asked = False
        self._begin()
        self._expiry = asyncio.get_running_loop().call_later(IDLE, self.abort)
        return True

    def take(self) -> bool:
        """Wait no more; False where it was closed meanwhile."""
        if self._expiry is not None:
            self._expiry.cancel()
        return self._lost is None

    def abort(self) -> None:
        """Close it at once."""
        self._lost = self._lost or httpx.ReadError("the connection was closed")
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        """Wait until something came."""
        if self._lost is not None:
            raise self._lost
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        if not self._asked or self._lost is not None:
            self.abort()
            return
        self._head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"no HTTP: {type(error).__name__}")
        if self._head > MAX_HEAD:
            self._fail(f"more than {MAX_HEAD} bytes of headers")
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio."""
        if self._until_closed and error is None:
            self._complete = True
        self._lost = self._lost or httpx.ReadError("the connection broke")
        self._wake()

    def _fail(self, why: str) -> None:
        self._lost = httpx.RemoteProtocolError(why)
        self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of httptools."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Of httptools."""
        status = self._parser.get_status_code()
        if status < 200:  # more is to come
            self._headers = []
            return
        names = {name.lower() for name, _ in self._headers}
        self._until_closed = not names & {b"content-length", b"transfer-encoding"}
        self._lasts = self._parser.should_keep_alive()
        self._status = status

    def on_body(self, body: bytes) -> None:
        """Of httptools."""
        if self._complete:  # nobody asked for another answer
            return
        self._head = 0
        self._parts.append(body)
        before, self._waiting = self._waiting, self._waiting + len(body)
        if before < _WAITING <= self._waiting and self._transport is not None:
            self._transport.pause_reading()

    def on_message_begin(self) -> None:
        """Of httptools."""
        if self._complete:
            self._fail("another answer than was asked for")

    def on_message_complete(self) -> None:
        """Of httptools."""
        self._complete = bool(self._status)
