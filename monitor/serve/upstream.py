"""The other end of the proxy: an OpenAI-compatible API, asked for a stream and believed nothing.

What it answers is read in `upstream_answer`; a refusal becomes an error of ours.
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

import httpx

from midstream.serve.errors import ApiError
from midstream.serve.upstream_answer import Answer, UpstreamError, json_object
from midstream.serve.upstream_transport import UpstreamTransport

_log = logging.getLogger(__name__)

MAX_TEXT = 1 << 20
"""Characters of a response, at most: what is held back waits in memory."""
_MAX_REFUSAL = 1 << 16
_LONGEST_RETRY = 3600.0

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
        # No compression: a few bytes of it can stand for gigabytes.
        headers = {"accept-encoding": "identity", "user-agent": "midstream"}
        if key is not None:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UpstreamConfigError("the upstream's key: expected printable ASCII, no blanks")
            headers["authorization"] = f"Bearer {key}"
        base = _base(url)
        self._client = httpx.AsyncClient(
            transport=UpstreamTransport(connections, secure=base.scheme == "https"),
            base_url=base,
            headers=headers,
            timeout=httpx.Timeout(None, connect=self._patience.connect),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

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
        request = self._client.build_request(
            "POST",
            path,
            content=json.dumps(body, allow_nan=False).encode(),
            headers={
                "content-type": "application/json",
                "accept": "text/event-stream, application/json",
            },
        )
        response = await self._begun(request)
        try:
            if response.status_code != 200:
                raise await _refusal(response, self._patience.between)
            yield Answer(response, path.startswith("chat"), self._patience.between, self._max_text)
        finally:
            await response.aclose()

    async def _begun(self, request: httpx.Request) -> httpx.Response:
        patience = self._patience
        try:
            async with asyncio.timeout(patience.connect + patience.first):
                return await self._client.send(request, stream=True)
        except (TimeoutError, httpx.TimeoutException):
            raise ApiError(504, "the upstream did not answer", code="upstream_timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            _log.error("the upstream cannot be reached: %s", type(error).__name__)
            told = "the upstream cannot be reached; try again later"
            raise ApiError(502, told, code="upstream_unreachable", retry_after=1.0) from None


def _base(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UpstreamConfigError(f"the upstream's address {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UpstreamConfigError(
            f"the upstream's address {url!r}: expected http(s)://host/v1, up to and with /v1"
        )
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UpstreamConfigError("the upstream's address: leave user, query and fragment out")
    return parsed


async def _refusal(response: httpx.Response, patience: float) -> ApiError:
    """What the client is told of an answer that is none."""
    status = response.status_code
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


async def _explanation(response: httpx.Response, patience: float) -> tuple[str, str]:
    """Message and code of an error object, as far as they are fit to be passed on."""
    found = bytearray()
    try:
        async with asyncio.timeout(patience):
            async for data in response.aiter_raw():
                found += data
                if len(found) > _MAX_REFUSAL:
                    break
        content = json_object(found.decode())
    except (TimeoutError, httpx.HTTPError, UnicodeDecodeError, UpstreamError):
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
