"""An upstream that does as it is told, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection:
    """One request, and the means to answer it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path = ""
        self.headers: dict[str, str] = {}
        self.body: dict[str, Any] = {}
        self.gone = asyncio.Event()
        """Set when the other side has closed."""
        self.done = False
        """Whether all of the answer was sent."""
        self.is_stuck = False
        """Whether the other side reads nothing, and the sockets between are full."""
        self._reader, self._writer = reader, writer

    async def begin(self, kind: str = "text/event-stream") -> None:
        await self.raw(HEAD % kind.encode())

    async def send(self, data: bytes) -> None:
        """Send a chunk of the body."""
        if data:
            await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")
        self.done = True

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        self.is_stuck = self._writer.transport.get_write_buffer_size() > 0
        await self._writer.drain()
        self.is_stuck = False

    async def answer(self, status: str, body: bytes, headers: Iterable[str] = ()) -> None:
        """Send a whole answer."""
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
        await self.raw("\r\n".join([*lines, "", ""]).encode() + body)
        self.done = True

    def abort(self) -> None:
        self._writer.transport.abort()

    async def say(self, *texts: str, reason: str | None = "stop", done: bool = True) -> None:
        """A well-formed stream."""
        await self.begin()
        for text in texts:
            await self.send(chunk(text))
            await asyncio.sleep(0)
        if reason is not None:
            await self.send(chunk(None, reason))
        if done:
            await self.send(b"data: [DONE]\n\n")
        await self.end()

    async def _read_request(self) -> bool:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        first, *lines = head.decode().split("\r\n")
        self.path = first.split(" ")[1]
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        body = await self._reader.readexactly(int(self.headers["content-length"]))
        self.body = json.loads(body)
        return True

    async def _watch(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._reader.read(1)  # nothing more is asked before the answer
        self.gone.set()


Play = Callable[[Connection], Awaitable[None]]


class FakeUpstream:
    """Listens on a port of its own; ``play`` answers each request."""

    def __init__(self) -> None:
        self.play: Play = lambda connection: connection.say("w7 ", "w8")
        self.seen: list[Connection] = []
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[Any] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    @property
    def url(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}/v1"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while True:
                connection = Connection(reader, writer)
                if not await connection._read_request():
                    return
                self.seen.append(connection)
                watching = asyncio.create_task(connection._watch())
                try:
                    await self.play(connection)
                finally:
                    if not writer.transport.is_closing() and not connection.gone.is_set():
                        watching.cancel()
                        await asyncio.gather(watching, return_exceptions=True)
                    else:
                        await connection.gone.wait()
        except ConnectionError:
            return
        finally:
            self._tasks.discard(task)
            writer.close()


def chunk(text: str | None, reason: str | None = None, **delta: Any) -> bytes:
    """One event of a chat's stream."""
    if text is not None:
        delta["content"] = text
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return event({"id": "x", "object": "chat.completion.chunk", "choices": [choice]})


def event(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
