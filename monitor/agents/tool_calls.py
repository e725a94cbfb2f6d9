"""Tool calls out of a text that is still written: each is known at the character that ends it.

The scanner never parses again from the start: it jumps from one structural character to the next
and decodes a call's JSON once, when its last bracket closes. Time is linear in the characters, and
the text of one call is bounded. What sets out to be a call and is none is reported as a
`MalformedCall`, which a gate blocks. Run a call only on a decision that allows it: what the scanner
did not see, for want of its format, has none.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from midstream.agents.action_gate import Decision, GateSession, GateVerdict, MalformedCall
from midstream.agents.steps import ToolCall

MOST_CHARACTERS = 131_072
"""Of the JSON of one call; above it the call is malformed."""

MOST_DEPTH = 64
MOST_CALLS = 128
"""Calls that one message of chunks may make at once."""

_LONGEST_NAME = 256
_SHOWN = 200  # characters of a malformed call that are kept
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls.

    Attributes
    ----------
    name : str
    opens : str
        Literal text in front of the JSON; empty for JSON that begins the message.
    tool_keys, argument_keys : tuple of str
        Keys of the call's object; the first that is there counts. Without ``tool_keys`` the name
        stands on the rest of the line that ``opens`` begins, and the JSON is the arguments.
    then : str
        Literal text between such a name and its arguments.
    """

    name: str
    opens: str
    tool_keys: tuple[str, ...] = ("name",)
    argument_keys: tuple[str, ...] = ("arguments",)
    then: str = ""


FORMATS: dict[str, CallFormat] = {
    known.name: known
    for known in (
        CallFormat("hermes", "<tool_call>"),  # Hermes, Qwen
        CallFormat("llama", "<|python_tag|>", argument_keys=("parameters", "arguments")),
        CallFormat("bare", "", argument_keys=("parameters", "arguments")),  # Llama 3.1 without tag
        CallFormat("react", "\nAction:", (), (), "Action Input:"),
    )
}
"""Name to format. A line break stands for the beginning of the message, too."""


class Found(NamedTuple):
    """A call and the number of characters fed up to and with the one that ended it."""

    call: ToolCall | MalformedCall
    end: int


class CallError(ValueError):
    """JSON that is no call; the message says why."""


class _Json:
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


def _call(tool: object, arguments: object) -> ToolCall:
    if isinstance(arguments, str):  # some models write the arguments as JSON within a string
        arguments = parse_object(arguments)
    if not isinstance(tool, str) or not tool.strip() or len(tool) > _LONGEST_NAME:
        raise CallError(f"expected a tool's name of 1 to {_LONGEST_NAME} characters")
    if not isinstance(arguments, dict):
        raise CallError(f"arguments: expected an object, got {type(arguments).__name__}")
    return ToolCall(tool=tool, arguments=arguments)


class Scanner(Protocol):
    """Whatever finds calls in pieces of a message."""

    def feed(self, piece: Any) -> list[Found]:
        """Read a piece; return the calls that it ended."""
        ...

    def finish(self) -> list[Found]:
        """End the message; return what was begun and not ended, as malformed."""
        ...


class ToolCallScanner:
    """Finds calls in text, however it is split.

    Parameters
    ----------
    formats : iterable of CallFormat
        Those that the model may write. Several are told apart by their opening text.

    Notes
    -----
    O(1) amortised per character, whatever the pieces; it keeps the text of one call at most.
    """

    def __init__(self, formats: Iterable[CallFormat] = FORMATS.values()) -> None:
        known = tuple(formats)
        self._by_opening = {form.opens: form for form in known if form.opens}
        openings = list(self._by_opening)
        if not known or len(self._by_opening) + sum(not form.opens for form in known) < len(known):
            raise ValueError("formats: expected one or more, with different opening texts")
        for text in openings:
            inside = [other for other in openings if other != text and other in text]
            if inside:
                raise ValueError(f"formats: {inside[0]!r} is part of {text!r}: they cannot be told")
        self._opening = re.compile("|".join(map(re.escape, openings)) or r"(?!)")
        self._longest = max(map(len, openings), default=1)
        self._bare = next((form for form in known if not form.opens), None)
        self._fed = 0
        self._form: CallFormat | None = None
        self._json: _Json | None = None
        self._tool: str | None = None
        self._head = ""  # of a ReAct call: what stands before its arguments
        self._search_from_start()

    def _search_from_start(self) -> None:
        self._tail = "\n"
        self._at_start = self._bare is not None

    def feed(self, piece: str) -> list[Found]:
        """Read a piece of text; return the calls whose last character it holds."""
        found: list[Found] = []
        at = 0
        while at < len(piece):
            if self._json is not None:
                at = self._in_json(piece, at, found)
            elif self._form is not None:
                at = self._before_json(piece, at, found)
            else:
                at = self._search(piece, at)
        self._fed += len(piece)
        return found

    def finish(self) -> list[Found]:
        """End the message; a call that was begun is malformed. The scanner can be fed anew."""
        found: list[Found] = []
        if self._form is not None and self._form.opens:
            what = "its JSON does not end" if self._json else "it has no arguments"
            self._report(found, self._fed, MalformedCall(what, self._shown()))
        elif self._json is not None and self._looks_like_call():
            self._report(found, self._fed, MalformedCall("its JSON does not end", self._shown()))
        self._form = self._json = self._tool = None
        self._head = ""
        self._fed = 0
        self._search_from_start()
        return found

    def _search(self, piece: str, at: int) -> int:
        """Look for the beginning of a call; return from where to go on."""
        if self._at_start:
            begin = at
            while at < len(piece) and piece[at] in _BLANK + ";":
                at += 1
            self._remember(piece[begin:at])
            if at == len(piece):
                return at
            self._at_start = False
            if piece[at] == "{":
                self._form, self._json = self._bare, _Json()
                return at
        # First where an opening may have been split, then in what is new.
        seam = self._tail + piece[at : at + self._longest]
        match = self._opening.search(seam)
        end = None if match is None else at + match.end() - len(self._tail)
        if match is None:
            match = self._opening.search(piece, at)
            if match is None:
                self._remember(piece[max(at, len(piece) - self._longest) :])
                return len(piece)
            end = match.end()
        self._form, self._head, self._tool, self._tail = self._by_opening[match[0]], "", None, ""
        assert end is not None
        return end

    def _remember(self, text: str) -> None:
        """Keep as much as may be the beginning of an opening."""
        text = self._tail + text
        self._tail = text[max(0, len(text) - self._longest + 1) :]

    def _before_json(self, piece: str, at: int, found: list[Found]) -> int:
        """Between the opening text and the JSON."""
        form = self._form
        assert form is not None
        if not form.tool_keys and self._tool is None:
            end = piece.find("\n", at)
            room = _LONGEST_NAME + 1 - len(self._head)
            stop = min(len(piece) if end < 0 else end, at + room)
            self._head += piece[at:stop]
            if len(self._head) > _LONGEST_NAME:
                fault = f"a tool's name of more than {_LONGEST_NAME} characters"
                self._report(found, self._fed + stop, MalformedCall(fault, self._shown()))
            elif stop == end:
                self._tool, self._head = self._head.strip(), ""
                return stop + 1
            return stop
        while at < len(piece):
            character = piece[at]
            at += 1
            if len(self._head) < len(form.then) and not (character in _BLANK and not self._head):
                self._head += character
                if form.then.startswith(self._head):
                    continue
                fault = f"expected {form.then!r} after the tool's name"
                self._report(found, self._fed + at, MalformedCall(fault, self._shown()))
                return at
            if character in _BLANK:
                continue
            if character == "{" and len(self._head) == len(form.then):
                self._json = _Json()
                return at - 1
            fault = "expected a JSON object"
            self._report(found, self._fed + at, MalformedCall(fault, character))
            return at
        return at

    def _in_json(self, piece: str, at: int, found: list[Found]) -> int:
        assert self._json is not None
        end = self._json.feed(piece, at)
        if end is None:
            return len(piece)
        call = self._complete()
        if call is None:
            self._form = self._json = None
            self._tail = "}"
        else:
            self._report(found, self._fed + end, call)
        return end

    def _complete(self) -> ToolCall | MalformedCall | None:
        """Make the call of the JSON that just ended; None for bare JSON that is no call."""
        form, value = self._form, self._json
        assert form is not None
        assert value is not None
        if not form.opens and not self._looks_like_call():
            return None
        try:
            if value.fault is not None:
                raise CallError(value.fault)
            content = parse_object(value.text)
            if not form.tool_keys:
                return _call(self._tool, content)
            tool = _first(content, form.tool_keys)
            return _call(tool, _first(content, form.argument_keys))
        except CallError as error:
            return MalformedCall(str(error), self._shown())

    def _looks_like_call(self) -> bool:
        """Whether bare JSON has the keys of a call, as text: it need not be JSON after all."""
        assert self._bare is not None
        assert self._json is not None
        text = self._json.text
        return all(
            any(f'"{key}"' in text for key in keys)
            for keys in (self._bare.tool_keys, self._bare.argument_keys)
        )

    def _report(self, found: list[Found], end: int, call: ToolCall | MalformedCall) -> None:
        found.append(Found(call, end))
        self._form = self._json = self._tool = None
        self._head = ""
        self._search_from_start()
        self._tail = "" if isinstance(call, MalformedCall) else "}"

    def _shown(self) -> str:
        return (self._json.text if self._json else self._tool or self._head)[:_SHOWN]


def _first(content: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if key in content:
            return content[key]
    raise CallError(f"it has no {' or '.join(map(repr, keys))}")


@dataclass
class _Open:
    """A call of a message of chunks, so far."""

    tool: str
    json: _Json
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
        call = self._open.setdefault(index, _Open("", _Json()))
        at = 0
        if not call.ended:
            call.tool = (call.tool + name)[: _LONGEST_NAME + 1]
            name = ""
            at = self._arguments(call, text, found)
        rest = (name + text[at:]).strip(_BLANK)
        self._fed += len(text)
        if call.ended and rest:
            more = MalformedCall("more after the arguments had ended", rest[:_SHOWN])
            found.append(Found(more, self._fed))

    def _arguments(self, call: _Open, text: str, found: list[Found]) -> int:
        """Read a piece of arguments; return where they end, or its length."""
        at = 0 if call.json.began else len(text) - len(text.lstrip(_BLANK))
        if at == len(text):
            return at
        if not call.json.began and text[at] != "{":
            call.ended = True
            wrong = MalformedCall("arguments: expected a JSON object", text[at : at + _SHOWN])
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
                open_ = MalformedCall("its JSON does not end", call.json.text[:_SHOWN])
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
        return _call(call.tool, parse_object(text))
    except CallError as error:
        return MalformedCall(str(error), text[:_SHOWN])


class GatedToolCalls:
    """A scanner with a gate behind it: pieces in, decisions out, before anything runs.

    Parameters
    ----------
    session : GateSession
        Told of every call that it allows, so that limits on calls hold within one message, too. A
        call that a person allows later is for the caller to report (`GateSession.ran`).
    scanner : Scanner, optional
        A `ToolCallScanner` of all formats when not given.
    """

    def __init__(self, session: GateSession, scanner: Scanner | None = None) -> None:
        self._session = session
        self._scanner: Scanner = ToolCallScanner() if scanner is None else scanner

    def feed(self, piece: Any) -> list[Decision]:
        """Read a piece (text, or a chunk); judge the calls that it ended."""
        return [self._judged(found.call) for found in self._scanner.feed(piece)]

    def finish(self) -> list[Decision]:
        """End the message; judge what was left open."""
        return [self._judged(found.call) for found in self._scanner.finish()]

    def _judged(self, call: ToolCall | MalformedCall) -> Decision:
        decision = self._session.decide(call)
        if decision.verdict is GateVerdict.ALLOW and isinstance(call, ToolCall):
            self._session.ran(call)
        return decision
