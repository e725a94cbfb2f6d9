"""The other end of the proxy: an OpenAI-compatible API, asked for a stream and believed nothing.

Whatever comes is either text, an end with its reason, or an `UpstreamError` whose message is ours
and holds nothing of what came.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from midstream.serve.errors import ApiError
from midstream.serve.event_stream import EventStreamError, EventStreamReader

_log = logging.getLogger(__name__)

MAX_WHOLE = 8 << 20
"""Bytes of an answer that is no stream, at most."""
MAX_TEXT = 1 << 20
"""Characters of a response, at most: what is held back waits in memory."""
_DRAIN_SECONDS, _DRAIN_BYTES = 1.0, 1 << 16
_MAX_REFUSAL = 1 << 16
_LONGEST_RETRY = 3600.0

FINISH_REASONS = frozenset({"stop", "length", "content_filter"})

# In a delta or a message, what would be an answer that has no text to judge.
_NO_TEXT = ("tool_calls", "function_call", "audio")
_NOTHING: tuple[Any, ...] = (None, "", [], {})

_DONE = "[DONE]"
_CODE = re.compile(r"[a-z0-9_]{1,64}")


class UpstreamError(Exception):
    """The upstream broke off, or sent what cannot be passed on."""


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


@dataclass(frozen=True)
class Delta:
    """A part of the response: text, and at its end the reason."""

    text: str
    finish_reason: str | None = None


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
        self._client = httpx.AsyncClient(
            base_url=_base(url),
            headers=headers,
            timeout=httpx.Timeout(None, connect=self._patience.connect, pool=self._patience.first),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
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


class Answer:
    """An answer that has begun. `Upstream.ask` gives it."""

    def __init__(self, response: httpx.Response, chat: bool, between: float, max_text: int) -> None:
        self._response = response
        self._bytes = response.aiter_raw()
        self._chat = chat
        self._between = between
        self._left = max_text
        self._surrogate = ""

    async def deltas(self) -> AsyncIterator[Delta]:
        """Give its parts; the last has the finish reason.

        Raises
        ------
        UpstreamError
            Where it breaks off, stalls, or is no answer.
        """
        kind = self._response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self._response.headers.get("content-encoding", "identity").lower() != "identity":
            raise UpstreamError("the upstream compressed its answer, which it was not asked to")
        if kind == "application/json":
            yield self._whole(await self._all())
        elif kind == "text/event-stream":
            async for delta in self._streamed():
                yield delta
                if delta.finish_reason is not None:
                    return
            raise UpstreamError("the upstream's stream ended before the response did")
        else:
            raise UpstreamError("the upstream's answer is neither an event stream nor JSON")

    async def drain(self) -> None:
        """Read what is behind the last part, so that the connection can be used again."""
        with suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                left = _DRAIN_BYTES
                while left > 0 and (data := await anext(self._bytes, None)) is not None:
                    left -= len(data)

    async def _streamed(self) -> AsyncIterator[Delta]:
        reader = EventStreamReader()
        try:
            async for data in self._chunks():
                for event in reader.feed(data):
                    yield self._read(event.type, event.data)
            for event in reader.finish():
                yield self._read(event.type, event.data)
        except EventStreamError as error:
            raise UpstreamError(f"the upstream's event stream is malformed: {error}") from None

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Bytes as they come, each within its time."""
        while True:
            try:
                async with asyncio.timeout(self._between):
                    data = await anext(self._bytes, None)
            except TimeoutError:
                raise UpstreamError(
                    f"the upstream sent nothing for {self._between:g} seconds"
                ) from None
            except httpx.HTTPError as error:
                raise UpstreamError(
                    f"the connection to the upstream broke: {type(error).__name__}"
                ) from None
            if data is None:
                return
            yield data

    async def _all(self) -> bytes:
        found = bytearray()
        async for data in self._chunks():
            found += data
            if len(found) > MAX_WHOLE:
                raise UpstreamError(f"the upstream's answer has more than {MAX_WHOLE} bytes")
        return bytes(found)

    def _read(self, kind: str, data: str) -> Delta:
        if data.strip() == _DONE:
            return Delta(self._whole_characters("", last=True), "stop")
        content = _object(data)
        if kind == "error" or content.get("error") is not None or content.get("object") == "error":
            raise UpstreamError("the upstream failed while it wrote")
        choice = _choice(content)
        if choice is None:
            return Delta("")
        part = choice.get("delta") if self._chat else choice
        return self._delta(choice, {} if part is None else part)

    def _whole(self, data: bytes) -> Delta:
        """The answer of an upstream that does not stream."""
        try:
            content = _object(data.decode())
        except UnicodeDecodeError:
            raise UpstreamError("the upstream's answer is not UTF-8") from None
        if content.get("error") is not None:
            raise UpstreamError("the upstream failed")
        choice = _choice(content)
        if choice is None:
            raise UpstreamError("the upstream's answer has no choice")
        delta = self._delta(choice, choice.get("message") if self._chat else choice)
        return Delta(
            delta.text + self._whole_characters("", last=True), delta.finish_reason or "stop"
        )

    def _delta(self, choice: Mapping[str, Any], part: Any) -> Delta:
        if not isinstance(part, dict):
            raise UpstreamError("the upstream's answer is malformed: a choice without a message")
        for name in _NO_TEXT:
            if part.get(name) not in _NOTHING:
                raise UpstreamError(f"the upstream answered with {name}, which cannot be judged")
        text = ""
        for name in ("content", "refusal") if self._chat else ("text",):
            found = part.get(name)
            if found is not None and not isinstance(found, str):
                raise UpstreamError(f"the upstream's answer is malformed: {name} is no string")
            text += found or ""
        reason = choice.get("finish_reason") or None
        if reason is not None and reason not in FINISH_REASONS:
            raise UpstreamError("the upstream ended for a reason that cannot be passed on")
        return Delta(self._whole_characters(text, last=reason is not None), reason)

    def _whole_characters(self, text: str, *, last: bool) -> str:
        """Join surrogates that came apart; JSON can name each half of a character."""
        text, self._surrogate = self._surrogate + text, ""
        if not last and "\ud800" <= text[-1:] <= "\udbff":
            text, self._surrogate = text[:-1], text[-1]
        if not text.isascii():
            try:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise UpstreamError("the upstream's text is not Unicode") from None
        self._left -= len(text)
        if self._left < 0:
            raise UpstreamError("the upstream's response is longer than this proxy takes")
        return text


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


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UpstreamError("the upstream's answer is malformed: it is not JSON") from None
    if not isinstance(content, dict):
        raise UpstreamError("the upstream's answer is malformed: it is no JSON object")
    return content


def _choice(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one choice, or None where there is none, as beside the counts of a stream."""
    choices = content.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamError("the upstream's answer is malformed: it has no list of choices")
    if not choices:
        return None
    if len(choices) > 1 or choices[0].get("index", 0) != 0:
        raise UpstreamError("the upstream sent more choices than it was asked for")
    return choices[0]  # type: ignore[no-any-return]


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
        content = _object(found.decode())
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
