"""HTTP to the upstream, over real sockets: what it sends is the answer, or an error of httpx."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
import pytest
from serving import PATIENCE

from midstream.serve import upstream_transport
from midstream.serve.upstream_transport import MAX_HEAD, UpstreamTransport

T = TypeVar("T")
Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"content-length: 5\r\n\r\nhello"


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(bounded())


class Server:
    """Reads requests, and answers each as it is told."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.accepted = 0
        self.gone = asyncio.Event()
        """Set when a connection was closed by the other side."""
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked.append(head + await reader.readexactly(2))
                await self.play(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            writer.close()


def sends(*parts: bytes, close: bool = False) -> Play:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return play


@asynccontextmanager
async def client(
    play: Play, connections: int = 4
) -> AsyncIterator[tuple[httpx.AsyncClient, Server]]:
    server = Server(play)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    transport = UpstreamTransport(connections, secure=False)
    url = f"http://127.0.0.1:{port}/v1"
    async with httpx.AsyncClient(transport=transport, base_url=url, timeout=None) as made:
        yield made, server
    listening.close()


def ask(play: Play, times: int = 1) -> tuple[list[httpx.Response], Server]:
    async def work() -> tuple[list[httpx.Response], Server]:
        async with client(play) as (made, server):
            return [await made.post("/x", content=b"{}") for _ in range(times)], server

    return run(work())


def test_what_is_asked_and_answered() -> None:
    (found,), server = ask(
        sends(OK + b"x-one: 1\r\nX-One: 2\r\ncontent-length: 5\r\n\r\n", b"hello")
    )
    assert (found.status_code, found.content) == (200, b"hello")
    assert found.headers.get_list("x-one") == ["1", "2"]
    first, *lines = server.asked[0].decode().split("\r\n")
    assert first == "POST /v1/x HTTP/1.1"
    assert lines[-2:] == ["", "{}"]
    assert "content-length: 2" in [line.lower() for line in lines]


CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BODIES: dict[str, tuple[Play, bool]] = {
    "in chunks": (sends(CHUNKED, b"2\r\nhe\r\n3;x=y\r\nllo\r\n", b"0\r\n\r\n"), True),
    "a byte at a time": (sends(*(bytes([b]) for b in CHUNKED + b"5\r\nhello\r\n0\r\n\r\n")), True),
    "to the end of the connection": (sends(OK + b"\r\n", b"hel", b"lo", close=True), False),
    "after a note in advance": (sends(b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + WHOLE), True),
    "to be closed": (sends(OK + b"connection: close\r\ncontent-length: 5\r\n\r\nhello"), False),
    "of HTTP/1.0": (sends(b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello"), False),
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_every_kind_and_which_connections_are_used_again(kind: str) -> None:
    play, again = BODIES[kind]
    found, server = ask(play, times=3)
    assert [answer.content for answer in found] == [b"hello"] * 3
    assert "link" not in found[0].headers
    assert server.accepted == (1 if again else 3)


FAULTS: dict[str, Play] = {
    "nonsense": sends(b"nonsense\r\n\r\n"),
    "a request": sends(b"GET / HTTP/1.1\r\n\r\n"),
    "nothing": sends(close=True),
    "half a head": sends(OK + b"x: ", close=True),
    "a head without end": sends(OK, *[b"x: " + b"y" * 4096 + b"\r\n"] * (MAX_HEAD // 4096 + 1)),
    "trailers without end": sends(
        CHUNKED, b"5\r\nhello\r\n0\r\n", *[b"x: " + b"y" * 4096 + b"\r\n"] * (MAX_HEAD // 4096 + 1)
    ),
    "a trailer without end": sends(
        CHUNKED, b"5\r\nhello\r\n0\r\nx: ", *[b"y" * 4096] * (MAX_HEAD // 4096 + 1)
    ),
    "two lengths": sends(OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!"),
    "length and chunks": sends(OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"),
    "a negative length": sends(OK + b"content-length: -5\r\n\r\n"),
    "a body cut off": sends(OK + b"content-length: 9\r\n\r\nhello", close=True),
    "chunks cut off": sends(CHUNKED + b"5\r\nhello\r\n", close=True),
    "a chunk of no size": sends(CHUNKED + b"zz\r\nhello\r\n"),
    "another protocol": sends(
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_answer_is_an_error_and_the_connection_is_closed(fault: str) -> None:
    async def work() -> None:
        async with client(FAULTS[fault]) as (made, server):
            with pytest.raises(httpx.TransportError):
                await made.post("/x", content=b"{}")
            if fault not in ("nothing", "half a head", "a body cut off", "chunks cut off"):
                await server.gone.wait()
            server.play = sends(WHOLE)
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            assert server.accepted == 2

    run(work())


def test_an_answer_that_nobody_asked_for_is_not_the_next_ones() -> None:
    async def work() -> None:
        async with client(sends(WHOLE + WHOLE.replace(b"hello", b"false"))) as (made, server):
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            server.play = sends(WHOLE)
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            assert server.accepted == 2

            async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(WHOLE)
                await unasked.wait()
                writer.write(WHOLE.replace(b"hello", b"false"))

            unasked = asyncio.Event()
            server.play = late
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            server.gone.clear()
            unasked.set()
            await server.gone.wait()
            server.play = sends(WHOLE)
            assert (await made.post("/x", content=b"{}")).content == b"hello"

    run(work())


def test_a_connection_that_waits_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_transport, "IDLE", 0.0)

    async def work() -> None:
        async with client(sends(WHOLE)) as (made, server):
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            await server.gone.wait()
            assert (await made.post("/x", content=b"{}")).content == b"hello"
            assert server.accepted == 2

    run(work())


def test_no_more_connections_than_allowed() -> None:
    async def work() -> None:
        release = asyncio.Event()

        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.write(WHOLE)

        async with client(play, connections=2) as (made, server):
            asking = [asyncio.create_task(made.post("/x", content=b"{}")) for _ in range(5)]
            while len(server.asked) < 2:
                await asyncio.sleep(0.01)
            asking[0].cancel()  # its connection makes room for another
            while len(server.asked) < 3:
                await asyncio.sleep(0.01)
            release.set()
            found = await asyncio.gather(*asking[1:])
            assert [answer.content for answer in found] == [b"hello"] * 4
            assert server.accepted == 3

    run(work())


def test_what_nobody_reads_stays_with_the_upstream() -> None:
    total = 64 << 20

    async def work() -> None:
        sent = 0

        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(OK + b"content-length: %d\r\n\r\n" % total)
            while sent < total:
                writer.write(b"x" * (1 << 16))
                await writer.drain()
                sent += 1 << 16

        async with client(play) as (made, _), made.stream("POST", "/x", content=b"{}") as answer:
            before = -1
            while sent != before:  # it stands still
                before = sent
                await asyncio.sleep(0.2)
            assert sent < total // 2
            found = 0
            async for data in answer.aiter_raw():
                found += len(data)
            assert found == total

    run(work())


def test_tls_is_tls() -> None:
    async def work() -> None:
        async with client(sends(WHOLE)) as (made, _):
            url = made.base_url.copy_with(scheme="https")
        listening = await asyncio.start_server(Server(sends(WHOLE)).serve, "127.0.0.1", url.port)
        transport = UpstreamTransport(1, secure=True)
        async with httpx.AsyncClient(transport=transport, base_url=url, timeout=None) as secure:
            with pytest.raises(httpx.ConnectError):
                await secure.post("/x", content=b"{}")
        listening.close()

    run(work())
