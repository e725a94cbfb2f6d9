"""HTTP to the upstream, over real sockets: what it sends is the answer, or an error of ours."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from serving import PATIENCE, run

from midstream.serve import upstream
from midstream.serve.errors import ApiError
from midstream.serve.upstream import Patience, Upstream
from midstream.serve.upstream_answer import UpstreamError

Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
KEY = "sk-not-to-be-seen-anywhere"


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that wait on a slow machine wait on."""
    monkeypatch.setattr(upstream, "_IDLE", 4 * PATIENCE)


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
    play: Play, connections: int = 4, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Upstream, Server]]:
    server = Server(play)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    host, port = listening.sockets[0].getsockname()
    scheme = "http" if tls is None else "https"
    patience = Patience(4 * PATIENCE, 4 * PATIENCE, 4 * PATIENCE)
    made = Upstream(
        f"{scheme}://{host}:{port}/v1", key=KEY, patience=patience, connections=connections
    )
    try:
        yield made, server
    finally:
        await made.close()
        listening.close()


async def say(made: Upstream) -> str:
    """Ask; the whole answer's text."""
    async with made.ask("chat/completions", {}) as answer:
        text = "".join([delta.text async for delta in answer.deltas()])
        await answer.drain()
    return text


JSON = b'{"choices": [{"message": {"content": "hello"}}]}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n\r\n" % len(JSON)
WHOLE = OK + LENGTH + JSON
CHUNKING = b"transfer-encoding: chunked\r\n"
CHUNKED = OK + CHUNKING + b"\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(JSON), JSON)


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def work() -> None:
        cookie = OK + b"set-cookie: a=b; path=/\r\n" + LENGTH + JSON
        async with client(sends(cookie)) as (made, server):
            made._base = made._base.with_host("localhost")  # addresses have no cookies anyway
            assert [await say(made), await say(made)] == ["hello"] * 2
        assert server.asked[0] == server.asked[1]  # and no cookie
        first, *lines = server.asked[0].decode().split("\r\n")
        assert first == "POST /v1/chat/completions HTTP/1.1"
        assert lines[-2:] == ["", "{}"]
        headers = {name.lower(): value for name, value in (line.split(": ") for line in lines[:-2])}
        assert headers.pop("host").startswith("localhost:")
        assert headers == {
            "accept": "text/event-stream, application/json",
            "accept-encoding": "identity",
            "authorization": f"Bearer {KEY}",
            "content-length": "2",
            "content-type": "application/json",
            "user-agent": "midstream",
        }

    run(work())


BODIES: dict[str, tuple[Play, bool]] = {
    "in chunks": (
        sends(
            CHUNKED,
            b"2\r\n" + JSON[:2] + b"\r\n%x;x=y\r\n" % (len(JSON) - 2),
            JSON[2:] + b"\r\n",
            b"0\r\n\r\n",
        ),
        True,
    ),
    "a byte at a time": (sends(*(bytes([b]) for b in CHUNKED + CHUNK + b"0\r\n\r\n")), True),
    "to the end of the connection": (sends(OK + b"\r\n", JSON[:9], JSON[9:], close=True), False),
    "after a note in advance": (sends(b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + WHOLE), True),
    "to be closed": (sends(OK + b"connection: close\r\n" + LENGTH + JSON), False),
    "of HTTP/1.0": (sends(WHOLE.replace(b"1.1", b"1.0")), False),
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_every_kind_and_which_connections_are_used_again(kind: str) -> None:
    play, again = BODIES[kind]

    async def work() -> None:
        async with client(play) as (made, server):
            assert [await say(made) for _ in range(3)] == ["hello"] * 3
            assert server.accepted == (1 if again else 3)

    run(work())


MANY = [b"x: " + b"y" * 4096 + b"\r\n"] * 512
FAULTS: dict[str, Play] = {
    "nonsense": sends(b"nonsense\r\n\r\n"),
    "a request": sends(b"GET / HTTP/1.1\r\n\r\n"),
    "nothing": sends(close=True),
    "half a head": sends(OK + b"x: ", close=True),
    "a head without end": sends(OK, *MANY),
    "a header without end": sends(OK + b"x: ", *[b"y" * 4096] * 512),
    "a status without end": sends(b"HTTP/1.1 200 ", *[b"y" * 4096] * 512),
    "trailers without end": sends(CHUNKED, CHUNK + b"0\r\n", *MANY),
    "a trailer without end": sends(CHUNKED, CHUNK + b"0\r\nx: ", *[b"y" * 4096] * 512),
    "two lengths": sends(OK + b"content-length: 5\r\n" + LENGTH + JSON),
    "length and chunks": sends(OK + CHUNKING + LENGTH + CHUNK),
    "a negative length": sends(OK + b"content-length: -5\r\n\r\n"),
    "a body cut off": sends(OK + LENGTH + JSON[:-1], close=True),
    "chunks cut off": sends(CHUNKED + CHUNK, close=True),
    "a chunk of no size": sends(CHUNKED + b"zz\r\n" + JSON + b"\r\n"),
    "then a chunk of no size": sends(CHUNKED, CHUNK, b"zz\r\n" + JSON + b"\r\n"),
    "another protocol": sends(
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_answer_is_an_error_and_the_connection_is_closed(fault: str) -> None:
    async def work() -> None:
        async with client(FAULTS[fault]) as (made, server):
            with pytest.raises((ApiError, UpstreamError)) as caught:
                await say(made)
            assert caught.value.code in (
                "upstream_error",
                "upstream_unreachable",
                "upstream_failed",
            )
            if fault not in ("nothing", "half a head", "a body cut off", "chunks cut off"):
                await server.gone.wait()
            server.play = sends(WHOLE)
            assert await say(made) == "hello"
            assert server.accepted == 2

    run(work())


def test_an_answer_that_nobody_asked_for_is_not_the_next_ones() -> None:
    """Behind the end of one, in the same bytes or alone; and later, while the connection waits."""
    false = WHOLE.replace(b"hello", b"false")

    async def work() -> None:
        for parts in ((WHOLE + false,), (OK + LENGTH + JSON[:-1], JSON[-1:] + false)):
            async with client(sends(*parts)) as (made, server):
                assert await say(made) == "hello"
                server.play = sends(WHOLE)
                for _ in range(2):
                    with suppress(ApiError):
                        assert await say(made) == "hello"
                assert await say(made) == "hello"

        async with client(sends(WHOLE)) as (made, server):

            async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(WHOLE)
                await unasked.wait()
                writer.write(false)
                await writer.drain()
                sent.set()

            unasked, sent = asyncio.Event(), asyncio.Event()
            server.play = late
            assert await say(made) == "hello"
            unasked.set()
            await sent.wait()
            assert made._session is not None
            (((waiting, _),),) = made._session.connector._conns.values()  # type: ignore[union-attr]
            while not waiting.should_close:  # it has read that
                await asyncio.sleep(0.005)
            server.play = sends(WHOLE)
            with pytest.raises(ApiError, match="cannot be reached"):
                await say(made)
            assert await say(made) == "hello"

    run(work())


def test_a_connection_that_waits_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_IDLE", 1e-3)

    async def work() -> None:
        async with client(sends(WHOLE)) as (made, server):
            assert await say(made) == "hello"
            await server.gone.wait()
            assert await say(made) == "hello"
            assert server.accepted == 2

    run(work())


def test_no_request_is_sent_twice() -> None:
    """Not even where the upstream closes a connection that has served before."""

    async def work() -> None:
        async with client(sends(WHOLE)) as (made, server):
            assert await say(made) == "hello"
            server.play = sends(close=True)
            with pytest.raises(ApiError, match="cannot be reached"):
                await say(made)
            assert (len(server.asked), server.accepted) == (2, 1)

    run(work())


def test_no_more_connections_than_allowed() -> None:
    async def work() -> None:
        release = asyncio.Event()

        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.write(WHOLE)

        async with client(play, connections=2) as (made, server):
            asking = [asyncio.create_task(say(made)) for _ in range(5)]
            while len(server.asked) < 2:
                await asyncio.sleep(0.01)
            asking[0].cancel()  # its connection makes room for another
            while len(server.asked) < 3:
                await asyncio.sleep(0.01)
            release.set()
            assert await asyncio.gather(*asking[1:]) == ["hello"] * 4
            assert server.accepted == 3

    run(work())


EVENT = b'data: {"choices": [{"delta": {"content": "w"}}], "x": "%s"}\n\n' % (b"x" * (1 << 16))
EVENTS = 1024  # 64 MiB: more than the sockets between hold
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
LAST = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "header",
    [b"content-length: %d\r\n" % (EVENTS * len(EVENT) + len(LAST)), CHUNKING, b""],
    ids=["length", "chunks", "end of the connection"],
)
def test_what_nobody_reads_stays_with_the_upstream_and_comes_whole(header: bytes) -> None:
    chunked = header == CHUNKING

    async def work() -> None:
        sent = 0

        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(STREAM + header + b"\r\n")
            for data in [EVENT] * EVENTS + [LAST]:
                writer.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
                await writer.drain()
                sent += 1
            writer.write(b"0\r\n\r\n" * chunked)
            writer.close()

        async with client(play) as (made, _), made.ask("chat/completions", {}) as answer:
            before = -1
            while sent != before:  # it stands still
                before = sent
                await asyncio.sleep(0.2)
            assert sent < EVENTS // 2
            deltas = [delta async for delta in answer.deltas()]
            assert "".join(delta.text for delta in deltas) == "w" * EVENTS
            assert deltas[-1].finish_reason == "stop"

    run(work())


# Of 127.0.0.1, signed by itself, for a hundred years; made for this test by `openssl req -x509`.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEPk7QxChKV0TkhrJ
gALeMv2AjYn1gEmV1uJeKtbmygahRANCAAR/TaODk7O2Tf5lbanFv5Xadq5mNkOD
5lFb/51s+5ewE5w1TKuHtBbcTglBXJPnX4X3QnzKdIEYFsP+t68Q7U7/
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBjzCCATagAwIBAgIUFSI6fYOLXdyWOiVg5XnwiEP+5TUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjE2MjM0M1oYDzIxMjYxMDI5
MTYyMzQzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR/TaODk7O2Tf5lbanFv5Xadq5mNkOD5lFb/51s+5ewE5w1TKuHtBbc
TglBXJPnX4X3QnzKdIEYFsP+t68Q7U7/o2QwYjAdBgNVHQ4EFgQUnTsX2y4vsrQI
cOkKocLn+M3+hz4wHwYDVR0jBBgwFoAUnTsX2y4vsrQIcOkKocLn+M3+hz4wDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0cAMEQC
ID7QhPHcFXF2iwhXvm05f/mie5LhUjLzK3Oj6Iz1//eRAiAqTOhEU7szYgP3wAdn
tpvcBWJ+Ft0uf3E/NJ2/eAUlug==
-----END CERTIFICATE-----
"""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """What a server of TLS needs."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_text(CERTIFICATE)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    return context


def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the certificate for one of an authority of the system's."""
    trusting = ssl.create_default_context(cadata=CERTIFICATE)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)


def test_tls_is_verified(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused() -> None:
        async with client(sends(WHOLE), tls=tls) as (made, server):
            with pytest.raises(ApiError, match="cannot be reached"):
                await say(made)
            assert not server.asked

    async def taken() -> None:
        async with client(sends(WHOLE), tls=tls) as (made, _):
            assert await say(made) == "hello"

    run(refused())
    trust(monkeypatch)
    run(taken())


@pytest.mark.parametrize("secure", [False, True])
def test_what_is_left_unread_closes_the_connection_at_once(
    secure: bool, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(monkeypatch)

    async def work() -> None:
        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM + b"\r\n")
            while True:
                writer.write(EVENT)
                await writer.drain()

        async with client(play, tls=tls if secure else None) as (made, server):
            async with made.ask("chat/completions", {}) as answer:
                async for delta in answer.deltas():
                    assert delta.text == "w"
                    break
            await server.gone.wait()

    run(work())
