"""Tool calls out of the chunks of a chat API, each known at the character that ends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midstream.agents.call_json import (
    BLANK,
    LONGEST_NAME,
    SHOWN,
    CallError,
    Found,
    JsonReader,
    make_call,
    parse_object,
)
from midstream.agents.decisions import MalformedCall
from midstream.agents.steps import ToolCall

MOST_CALLS = 128
"""Calls that one message may make at once."""


@dataclass
class _Open:
    """A call of a message of chunks, so far."""

    tool: str
    json: JsonReader
    ended: bool = False


class DeltaScanner:
    """Finds calls in chunks as OpenAI's chat API streams them.

    Notes
    -----
    A chunk is ``choices[0].delta``: ``{"tool_calls": [{"index": 0, "function": {"name": ...,
    "arguments": ...}}]}``. ``end`` of a call counts characters of all arguments.
    """

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}
        self._fed = 0

    def feed(self, piece: Mapping[str, Any]) -> list[Found]:
        """Read a chunk; return the calls that it ended."""
        found: list[Found] = []
        chunks = piece.get("tool_calls") if isinstance(piece, Mapping) else None
        if chunks is None:
            return found
        for chunk in chunks if isinstance(chunks, list) else [chunks]:
            self._read(chunk, found)
        return found

    def _read(self, chunk: object, found: list[Found]) -> None:
        function = chunk.get("function") if isinstance(chunk, Mapping) else None
        index = chunk.get("index", 0) if isinstance(chunk, Mapping) else None
        if type(index) is not int or not isinstance(function, Mapping):
            found.append(Found(MalformedCall("a chunk without index or function"), self._fed))
            return
        name, text = function.get("name") or "", function.get("arguments") or ""
        if not isinstance(name, str) or not isinstance(text, str):
            found.append(Found(MalformedCall("name and arguments must be text"), self._fed))
            return
        if index not in self._open and len(self._open) >= MOST_CALLS:
            fault = f"more than {MOST_CALLS} calls at once"
            found.append(Found(MalformedCall(fault), self._fed))
            return
        call = self._open.setdefault(index, _Open("", JsonReader()))
        at = 0
        if not call.ended:
            call.tool = (call.tool + name)[: LONGEST_NAME + 1]
            name = ""
            at = self._arguments(call, text, found)
        rest = (name + text[at:]).strip(BLANK)
        self._fed += len(text)
        if call.ended and rest:
            more = MalformedCall("more after the arguments had ended", rest[:SHOWN])
            found.append(Found(more, self._fed))

    def _arguments(self, call: _Open, text: str, found: list[Found]) -> int:
        """Read a piece of arguments; return where they end, or its length."""
        at = 0 if call.json.began else len(text) - len(text.lstrip(BLANK))
        if at == len(text):
            return at
        if not call.json.began and text[at] != "{":
            call.ended = True
            wrong = MalformedCall("arguments: expected a JSON object", text[at : at + SHOWN])
            found.append(Found(wrong, self._fed + at + 1))
            return len(text)
        end = call.json.feed(text, at)
        if end is None:
            return len(text)
        call.ended = True
        found.append(Found(_closed(call), self._fed + end))
        return end

    def finish(self) -> list[Found]:
        """End the message. A call that named a tool and got no arguments takes none."""
        found = []
        for call in self._open.values():
            if call.ended:
                continue
            if call.json.began:
                open_ = MalformedCall("its JSON does not end", call.json.text[:SHOWN])
                found.append(Found(open_, self._fed))
            else:
                found.append(Found(_closed(call, "{}"), self._fed))
        self._open.clear()
        self._fed = 0
        return found


def _closed(call: _Open, text: str | None = None) -> ToolCall | MalformedCall:
    text = call.json.text if text is None else text
    try:
        if call.json.fault is not None:
            raise CallError(call.json.fault)
        return make_call(call.tool, parse_object(text))
    except CallError as error:
        return MalformedCall(str(error), text[:SHOWN])
