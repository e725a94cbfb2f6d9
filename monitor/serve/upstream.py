"""The other end of the proxy: an OpenAI-compatible API, asked for a stream and believed nothing.

What it answers is read in `upstream_answer`; a refusal becomes an error of ours.

aiohttp takes half of what httpx takes of a core for each token, and a twentieth for each of 250
requests at once, where httpx's pool looks through all connections for every one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.connector import Connection
from yarl import URL

from midstream.serve.errors import ApiError
from midstream.serve.upstream_answer import BROKEN, Answer, UpstreamError, json_object

_log = logging.getLogger(__name__)

MAX_TEXT = 1 << 20
"""Characters of a response, at most: what is held back waits in memory."""
_MAX_REFUSAL = 1 << 16
_LONGEST_RETRY = 3600.0
_IDLE = 5.0  # seconds that a connection waits to be used again; upstreams close theirs at their own
_BUFFER = 1 << 15  # bytes; with twice as many that nobody has read, the socket is left alone

_CODE = re.compile(r"[a-z0-9_]{1,64}")


class UpstreamConfigError(ValueError):
    """An address or a key that cannot be used."""


@dataclass(frozen=True)
class Patience:
    """Seconds that the upstream has.

    Attributes
    ----------
    connect : float
        To take a connection.
    first : float
        To begin its answer.
    between : float
        From one part of its answer to the next.
    """

    connect: float = 5.0
    first: float = 60.0
    between: float = 30.0


class Upstream:
    """Connections to one upstream; close it in the loop that it was used in.

    Nothing of a client's headers is sent on, redirects are not followed, and neither proxies nor
    keys are taken from the environment.

    Parameters
    ----------
    url : str
        Up to and with ``/v1``.
    key : str, optional
        Sent as a bearer token; never logged.
    patience : Patience
    connections : int
        Open at a time.
    max_text : int
        Characters of a response, at most.

    Raises
    ------
    UpstreamConfigError
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience: Patience | None = None,
        connections: int = 256,
        max_text: int = MAX_TEXT,
    ) -> None:
        self._patience = patience or Patience()
        self._max_text = max_text
        self._connections = connections
        # No compression: a few bytes of it can stand for gigabytes.
        self._headers = {
            "accept": "text/event-stream, application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "midstream",
        }
        if key is not None:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UpstreamConfigError("the upstream's key: expected printable ASCII, no blanks")
            self._headers["authorization"] = f"Bearer {key}"
        self._base = _base(url)
        self._session: aiohttp.ClientSession | None = None
        self._read: dict[asyncio.Future[None], aiohttp.StreamReader] = {}  # by their connections

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def ask(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """Send a request; give the answer once it has begun. Leaving closes it, read or not.

        Parameters
        ----------
        path : str
            ``chat/completions`` or ``completions``.
        body : mapping

        Raises
        ------
        ApiError
            Where the upstream cannot be had, or refuses.
        """
        response = await self._begun(path, json.dumps(body, allow_nan=False).encode())
        self._tell_when_lost(response)
        try:
            if response.status != 200:
                raise await _refusal(response, self._patience.between)
            yield Answer(
                response.headers,
                response.content.iter_any(),
                chat=path.startswith("chat"),
                between=self._patience.between,
                max_text=self._max_text,
            )
        finally:
            response.close()

    async def _begun(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        patience = self._patience
        if self._session is None:  # made here because it belongs to the loop that runs
            self._session = self._opened()
        try:
            async with asyncio.timeout(patience.connect + patience.first):
                return await self._session.post(self._base / path, data=body, allow_redirects=False)
        except TimeoutError:
            raise ApiError(504, "the upstream did not answer", code="upstream_timeout") from None
        except aiohttp.ClientError as error:
            _log.error("the upstream cannot be reached: %s", type(error).__name__)
            told = "the upstream cannot be reached; try again later"
            raise ApiError(502, told, code="upstream_unreachable", retry_after=1.0) from None

    def _tell_when_lost(self, response: aiohttp.ClientResponse) -> None:
        """Wake who reads when the connection is lost: aiohttp does not after malformed chunks."""
        connection = response.connection
        protocol = None if connection is None else connection.protocol
        closed = None if protocol is None else protocol.closed
        if closed is not None:
            if closed not in self._read:
                closed.add_done_callback(self._lost)
            self._read[closed] = response.content

    def _lost(self, closed: asyncio.Future[None]) -> None:
        body = self._read.pop(closed)
        if not closed.cancelled():
            closed.exception()  # is looked at, so that asyncio does not log it
        if not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection broke"))

    def _opened(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_IDLE),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            request_class=_Request,
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_BUFFER,
        )


class _Request(aiohttp.ClientRequest):
    """A request that is not sent where an answer that nobody asked for has come already."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Of aiohttp, which would take such an answer for this request's."""
        if conn.protocol is None or conn.protocol.should_close:
            raise aiohttp.ServerDisconnectedError("an answer that nobody asked for")
        return await super().send(conn)


def _base(url: str) -> URL:
    try:
        parsed = URL(url)
    except ValueError as error:
        raise UpstreamConfigError(f"the upstream's address {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UpstreamConfigError(
            f"the upstream's address {url!r}: expected http(s)://host/v1, up to and with /v1"
        )
    if parsed.user or parsed.password or parsed.query_string or parsed.fragment:
        raise UpstreamConfigError("the upstream's address: leave user, query and fragment out")
    return parsed


async def _refusal(response: aiohttp.ClientResponse, patience: float) -> ApiError:
    """What the client is told of an answer that is none."""
    status = response.status
    _log.error("the upstream answered with status %d", status)
    if status == 429:
        told = "the upstream takes no more requests now; try again later"
        wait = _retry_after(response.headers.get("retry-after", ""))
        return ApiError(429, told, code="upstream_rate_limit", retry_after=wait)
    if status in (400, 413, 422):
        told, code = await _explanation(response, patience)
        return ApiError(400, f"the upstream refused the request: {told}", code=code)
    if status in (408, 504):
        return ApiError(504, "the upstream timed out", code="upstream_timeout")
    if status in (401, 403):
        told = "the upstream does not take this server's key"
        return ApiError(502, told, code="upstream_key_refused")
    if 300 <= status < 400:
        told = "the upstream redirects, which is not followed; its address must be corrected"
        return ApiError(502, told, code="upstream_redirects")
    told = f"the upstream failed with status {status}"
    return ApiError(502, told, code="upstream_failed", retry_after=1.0 if status == 503 else None)


async def _explanation(response: aiohttp.ClientResponse, patience: float) -> tuple[str, str]:
    """Message and code of an error object, as far as they are fit to be passed on."""
    found = bytearray()
    try:
        async with asyncio.timeout(patience):
            async for data in response.content.iter_any():
                found += data
                if len(found) > _MAX_REFUSAL:
                    break
        content = json_object(found.decode())
    except (TimeoutError, *BROKEN, UnicodeDecodeError, UpstreamError):
        content = {}
    error = content.get("error", content)
    error = error if isinstance(error, dict) else {}
    message, code = error.get("message"), error.get("code")
    text = "".join(c for c in message if c.isprintable()) if isinstance(message, str) else ""
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        code = "upstream_refused"
    return text[:500] or "it does not say why", code


def _retry_after(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:  # or a date
        return 1.0
    return min(seconds, _LONGEST_RETRY) if math.isfinite(seconds) and seconds >= 0 else 1.0
