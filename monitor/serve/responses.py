"""Responses as OpenAI's API has them, whole and in chunks, with the monitor's facts beside."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from midstream.policy import TierName
from midstream.serve.errors import ApiError
from midstream.serve.relay import End, Piece
from midstream.streams import StreamReport, VerdictName


class Json(Response):
    """A JSON body in ASCII, so that no text can fail to be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return json.dumps(content).encode()


def refusal(error: ApiError) -> Json:
    """The standard error object, with its status and headers."""
    headers = {"WWW-Authenticate": 'Bearer realm="midstream"'} if error.status == 401 else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Json(error.body, error.status, headers)


class Facts(BaseModel):
    """What the monitor saw of a response.

    Attributes
    ----------
    tier, bundle : str
        What it was judged by.
    verdict : str
    halted_at : int, optional
        Position of the token that halted it, counted from the start of the prompt.
    cause : str, optional
        Probe with the largest hazard, or ``unscored``.
    peak_risk : float
    scored, unscored : int
        Tokens with and without a score.
    """

    tier: TierName
    bundle: str
    verdict: VerdictName
    halted_at: int | None
    cause: str | None
    peak_risk: float
    scored: int
    unscored: int

    @classmethod
    def of(cls, report: StreamReport | None) -> dict[str, Any] | None:
        """Facts of a report; None where the stream ended before it had one."""
        if report is None:
            return None
        return cls(
            tier=report.tier,
            bundle=report.bundle,
            verdict=report.verdict,
            halted_at=report.halted_at,
            cause=report.cause,
            peak_risk=report.peak,
            scored=report.scored,
            unscored=report.unscored,
        ).model_dump()


class Writer:
    """Writes one response.

    Parameters
    ----------
    stream : str
        Its id.
    model : str
        The name that was asked for.
    chat : bool
        Which of the two endpoints.
    annotates : bool
        Whether with Azure's annotations.
    usage : bool
        Whether a stream ends with the counts.
    """

    def __init__(
        self, stream: str, model: str, *, chat: bool, annotates: bool, usage: bool
    ) -> None:
        self._chat = chat
        self._annotates = annotates
        self._usage = usage
        self._model = model
        self._head = {
            "id": stream,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tail: dict[str, Any] = {"usage": None} if usage else {}
        # Only text differs between the chunks of a stream, so the rest is encoded once.
        encoded = json.dumps(self._chunk({"content": 0} if chat else 0)).encode()
        before, _, after = encoded.partition(b'"content": 0' if chat else b'"text": 0')
        name = b'"content": ' if chat else b'"text": '
        self._before, self._after = b"data: " + before + name, after + b"\n\n"

    def opening(self) -> bytes:
        """The chunk that names the role; text completions have none."""
        return _sse(self._chunk({"role": "assistant", "content": ""})) if self._chat else b""

    def piece(self, piece: Piece) -> bytes:
        """A chunk with text."""
        if not self._annotates:
            return self._before + json.dumps(piece.text).encode() + self._after
        end = piece.start + len(piece.text)
        annotation = _annotation(None, piece.checked, piece.start, end)
        return _sse(self._chunk({"content": piece.text} if self._chat else piece.text, annotation))

    def ending(self, end: End, prompt_tokens: int) -> bytes:
        """The last chunks, and the mark after them."""
        if end.error is not None:
            return failed(end.error)
        annotation = self._annotation(end)
        last = self._chunk({} if self._chat else "", annotation, end.finish_reason)
        parts = [_sse({**last, "midstream": Facts.of(end.report)})]
        if self._usage:
            usage = _usage(prompt_tokens, end.completion_tokens)
            parts.append(_sse({**self._head, "choices": [], "usage": usage}))
        return b"".join([*parts, b"data: [DONE]\n\n"])

    def whole(self, text: str, end: End, prompt_tokens: int) -> dict[str, Any]:
        """The response in one piece."""
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._chat
            else {"text": text}
        )
        annotation = self._annotation(end)
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end.finish_reason}
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [{**choice, **annotation}],
            "usage": _usage(prompt_tokens, end.completion_tokens),
            "midstream": Facts.of(end.report),
        }

    def _annotation(self, end: End) -> dict[str, Any]:
        """What a choice has beside the usual, at the end."""
        # Where vLLM has it, too: a message among the text would count as the model's words.
        told = {} if end.halt_message is None else {"stop_reason": end.halt_message}
        return {**told, **(_final(end) if self._annotates else {})}

    def _chunk(
        self, said: Any, annotation: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta" if self._chat else "text": said,
            "logprobs": None,
            "finish_reason": finish_reason,
            **(annotation or {}),
        }
        return {**self._head, "choices": [choice], **self._tail}


def failed(error: ApiError) -> bytes:
    """The end of a stream that broke off."""
    return _sse(error.body) + b"data: [DONE]\n\n"


def _final(end: End) -> dict[str, Any]:
    return _annotation(end.report, end.checked, 0, end.length)


def _annotation(report: StreamReport | None, checked: int, start: int, end: int) -> dict[str, Any]:
    """Azure's fields of a choice.

    What left was judged before it left, so only the last ones name hazards: what halted the stream.
    """
    halted = None if report is None or report.halted_at is None else report.cause
    names = [] if report is None else [*report.trace.scores]
    if halted is not None and halted not in names:
        names.append(halted)
    return {
        "content_filter_results": {
            name: {"filtered": name == halted, "detected": name == halted} for name in names
        },
        "content_filter_offsets": {
            "check_offset": checked,
            "start_offset": start,
            "end_offset": end,
        },
    }


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _sse(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
