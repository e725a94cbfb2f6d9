"""An upstream's answer, believed nothing: text, an end with its reason, or an `UpstreamError`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp

from midstream.serve.event_stream import EventStreamError, EventStreamReader

MAX_WHOLE = 8 << 20
"""Bytes of an answer that is no stream, at most."""
BROKEN = (aiohttp.ClientError, RuntimeError)
"""What reading from aiohttp raises where the connection broke; the latter, where it just did."""
_DRAIN_SECONDS, _DRAIN_BYTES = 1.0, 1 << 16

FINISH_REASONS = frozenset({"stop", "length", "content_filter"})

# In a delta or a message, what would be an answer that has no text to judge.
_NO_TEXT = ("tool_calls", "function_call", "audio")
_NOTHING: tuple[Any, ...] = (None, "", [], {})

_DONE = "[DONE]"


class UpstreamError(Exception):
    """The upstream broke off, or sent what cannot be passed on; the message holds none of it."""

    code = "upstream_error"


class UpstreamStalledError(UpstreamError):
    """The upstream sent nothing for too long."""

    code = "upstream_timeout"


class Delta(NamedTuple):
    """A part of the response: text, and at its end the reason."""

    text: str
    finish_reason: str | None = None


class Answer:
    """An answer that has begun. `Upstream.ask` gives it."""

    def __init__(
        self,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes],
        *,
        chat: bool,
        between: float,
        max_text: int,
    ) -> None:
        self._headers = headers
        self._bytes = body
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
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        if self._headers.get("content-encoding", "identity").lower() != "identity":
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
        with suppress(TimeoutError, *BROKEN):
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
                raise UpstreamStalledError(
                    f"the upstream sent nothing for {self._between:g} seconds"
                ) from None
            except BROKEN as error:
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
        content = json_object(data)
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
            content = json_object(data.decode())
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


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    UpstreamError
    """
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
