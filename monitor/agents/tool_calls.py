"""Tool calls out of a text that is still written: each is known at the character that ends it.

The scanner never parses again from the start: it jumps from one structural character to the next
and decodes a call's JSON once, when its last bracket closes. Time is linear in the characters, and
the text of one call is bounded. What sets out to be a call and is none is reported as a
`MalformedCall`, which a gate blocks. Run a call only on a decision that allows it: what the scanner
did not see, for want of its format, has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls.

    Attributes
    ----------
    name : str
    opens : str
        Literal text in front of the JSON; empty for JSON that begins the message.
    tool_keys, argument_keys : tuple of str
        Keys of the call's object, of which one must be there. Without ``tool_keys`` the name
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
        self._json: JsonReader | None = None
        self._tool: str | None = None
        self._head = ""  # of a ReAct call: what stands before its arguments
        self._search_from_start()

    def _search_from_start(self, after: CallFormat | None = None) -> None:
        """Begin anew; right after a call, more JSON is another one of the same format."""
        self._tail = "\n"
        self._here = after if after is not None and after.tool_keys else self._bare

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
        if self._here is not None:
            begin = at
            while at < len(piece) and piece[at] in BLANK + ";":
                at += 1
            self._remember(piece[begin:at])
            if at == len(piece):
                return at
            form, self._here = self._here, None
            if piece[at] == "{":
                self._form, self._json = form, JsonReader()
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
            room = LONGEST_NAME + 1 - len(self._head)
            stop = min(len(piece) if end < 0 else end, at + room)
            self._head += piece[at:stop]
            if len(self._head) > LONGEST_NAME:
                fault = f"a tool's name of more than {LONGEST_NAME} characters"
                self._report(found, self._fed + stop, MalformedCall(fault, self._shown()))
            elif stop == end:
                self._tool, self._head = self._head.strip(), ""
                return stop + 1
            return stop
        while at < len(piece):
            character = piece[at]
            at += 1
            if len(self._head) < len(form.then) and not (character in BLANK and not self._head):
                self._head += character
                if form.then.startswith(self._head):
                    continue
                fault = f"expected {form.then!r} after the tool's name"
                self._report(found, self._fed + at, MalformedCall(fault, self._shown()))
                return at
            if character in BLANK:
                continue
            if character == "{" and len(self._head) == len(form.then):
                self._json = JsonReader()
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
                return make_call(self._tool, content)
            tool = _first(content, form.tool_keys)
            return make_call(tool, _first(content, form.argument_keys))
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
        form = self._form if isinstance(call, ToolCall) else None
        self._form = self._json = self._tool = None
        self._head = ""
        self._search_from_start(form)
        self._tail = "" if isinstance(call, MalformedCall) else "}"

    def _shown(self) -> str:
        return (self._json.text if self._json else self._tool or self._head)[:SHOWN]


def _first(content: Mapping[str, Any], keys: Sequence[str]) -> Any:
    given = [key for key in keys if key in content]
    if len(given) > 1:  # whoever runs the call may read the other one
        raise CallError(f"it has both {' and '.join(map(repr, given))}")
    if given:
        return content[given[0]]
    raise CallError(f"it has no {' or '.join(map(repr, keys))}")
