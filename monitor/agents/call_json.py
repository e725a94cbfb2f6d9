"""The JSON of a tool call: found while it arrives, then parsed once, strictly."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple

from midstream.agents.decisions import MalformedCall
from midstream.agents.steps import ToolCall

MOST_CHARACTERS = 131_072
"""Of the JSON of one call; above it the call is malformed."""

MOST_DEPTH = 64
LONGEST_NAME = 256
"""Characters of a tool's name."""

SHOWN = 200
"""Characters of a malformed call that are kept."""

BLANK = " \t\r\n"

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class Found(NamedTuple):
    """A call and the number of characters fed up to and with the one that ended it."""

    call: ToolCall | MalformedCall
    end: int


class CallError(ValueError):
    """JSON that is no call; the message says why."""


class JsonReader:
    """One JSON object that arrives in pieces. Ends where its brackets close, or at a fault."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._room = MOST_CHARACTERS
        self._closers: list[str] = []
        self._in_string = self._escaped = False
        self.fault: str | None = None

    @property
    def text(self) -> str:
        """What was read."""
        return "".join(self._pieces)

    @property
    def began(self) -> bool:
        """Whether anything was read."""
        return bool(self._pieces)

    def feed(self, text: str, at: int) -> int | None:
        """Read ``text`` from ``at``; return where the value ends, None while it does not."""
        begin, limit = at, min(len(text), at + self._room)
        end = None
        while end is None and at < limit:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, at, limit)
            if match is None:
                break
            at = match.end()
            if self._ends(match[0]):
                end = at
        if end is None and limit < len(text):
            end = limit + 1
            self.fault = f"more than {MOST_CHARACTERS} characters"
        self._pieces.append(text[begin:end])
        self._room -= len(self._pieces[-1])
        return end

    def _ends(self, character: str) -> bool:
        """Take in a structural character."""
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\":
            self._escaped = True
        elif character in "{[":
            self._closers.append("}" if character == "{" else "]")
            if len(self._closers) > MOST_DEPTH:
                self.fault = f"nested more than {MOST_DEPTH} deep"
        elif self._closers.pop() != character:
            self.fault = f"{character!r} closes what it did not open"
        return self.fault is not None or not (self._closers or self._in_string)


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises
    ------
    CallError
        For what is no JSON object, NaN or infinite numbers, a key given twice, a lone surrogate.
    """

    def no_constant(name: str) -> Any:
        raise CallError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise CallError(f"the number {digits[:20]} is too large")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CallError(f"the key {twice[:80]!r} is given twice")
        return found

    try:
        value = json.loads(
            text, parse_constant=no_constant, parse_float=finite, object_pairs_hook=unique
        )
    except CallError:
        raise
    except (ValueError, RecursionError) as error:
        raise CallError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CallError(f"expected a JSON object, got {type(value).__name__}")
    try:
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise CallError("a lone surrogate, which is no character") from error
    return value


def make_call(tool: object, arguments: object) -> ToolCall:
    """Make a call of what JSON gave; a CallError says what is wrong with it."""
    if isinstance(arguments, str):  # some models write the arguments as JSON within a string
        arguments = parse_object(arguments)
    if not isinstance(tool, str) or not tool.strip() or len(tool) > LONGEST_NAME:
        raise CallError(f"expected a tool's name of 1 to {LONGEST_NAME} characters")
    if not isinstance(arguments, dict):
        raise CallError(f"arguments: expected an object, got {type(arguments).__name__}")
    return ToolCall(tool=tool, arguments=arguments)
