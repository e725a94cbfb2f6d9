"""Messages between the server and a process that it started: pickles, each behind its length."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

_LENGTH = struct.Struct("!Q")
_READ = 1 << 18


def _framed(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class _Frames:
    """Cuts what was read into messages."""

    def __init__(self) -> None:
        self._read = bytearray()

    def add(self, data: bytes) -> Iterator[Any]:
        self._read += data
        while len(self._read) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._read)[0]
            if len(self._read) < end:
                return
            with memoryview(self._read) as view:
                message = pickle.loads(view[_LENGTH.size : end])
            del self._read[:end]
            yield message


class Channel:
    """The end of the process that was started; blocking, for several threads that send.

    Iterate it, in one thread, for what comes in; it ends when the other end is gone. Or `take`.

    Parameters
    ----------
    sock : socket.socket
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = _Frames()
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send; when nobody is there to read any more, do nothing."""
        data = _framed(message)
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError:
            return  # iterating ends, too, and with it the process

    def close(self) -> None:
        """Hang up; iterating ends."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def take(self, *, wait: bool) -> list[Any] | None:
        """Messages that have come, which may be none; None when the other end is gone.

        With ``wait`` it comes back once there is something to read.
        """
        try:
            data = self._receive(0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        return list(self._frames.add(data)) if data else None

    def __iter__(self) -> Iterator[Any]:
        while data := self._receive():
            yield from self._frames.add(data)

    def _receive(self, flags: int = 0) -> bytes:
        try:
            return self._sock.recv(_READ, flags)
        except BlockingIOError:
            raise
        except OSError:
            return b""


class ChannelProtocol(asyncio.Protocol):
    """The server's end, in its event loop: never waits.

    Parameters
    ----------
    received : callable
        Given each message.
    lost : callable
        Called once, when the other end is gone and all it sent was handed over.
    """

    def __init__(self, received: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._received, self._lost = received, lost
        self._frames = _Frames()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        for message in self._frames.add(data):
            self._received(message)

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio."""
        self._lost()

    def send(self, message: Any) -> None:
        """Send; what cannot be sent at once waits."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(_framed(message))

    def close(self) -> None:
        """Hang up, also where the other end does not read what waits to be sent."""
        if self._transport is not None:
            self._transport.abort()
