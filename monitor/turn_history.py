"""A chat history as turns, in the form that names them in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.ledger.ledger import ROOT, turn_key

ASSISTANT = "assistant"
INSTRUCTIONS = frozenset({"system", "developer"})
"""Roles that are no part of a turn: servers write the date, or what was looked up, into them, and a
turn must be found again under the next request's."""


class HistoryError(ValueError):
    """Messages that are no chat history."""


@dataclass(frozen=True)
class History:
    """A history split behind every response of the model.

    A tool call is a response of its own: it was judged on its own when it was written.

    Attributes
    ----------
    keys : tuple of str
        `midstream.ledger.ledger.turn_key` of each turn so far.
    asked : tuple of (role, content)
        Messages since the last response, `INSTRUCTIONS` left out: what is to be answered. None
        where the model writes on.
    """

    keys: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]

    @property
    def parent(self) -> str:
        """Key of the last turn."""
        return self.keys[-1] if self.keys else ROOT

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> History:
        """Split messages in the form of OpenAI's chat API; linear in their length.

        Raises
        ------
        HistoryError
            For a message without a role, or with a content of another form.
        """
        keys: list[str] = []
        asked: list[tuple[str, str]] = []
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise HistoryError(
                    f"messages[{number}]: expected a mapping with a role, such as "
                    "{'role': 'user', 'content': '...'}"
                )
            try:
                content = content_of(message)
            except HistoryError as error:
                raise HistoryError(f"messages[{number}].{error}") from error
            if role == ASSISTANT:
                keys.append(turn_key(keys[-1] if keys else ROOT, asked, content))
                asked = []
            elif role not in INSTRUCTIONS:
                asked.append((role, content))
        return cls(tuple(keys), tuple(asked))


def content_of(message: Mapping[str, Any]) -> str:
    """What a message says, as one string that every client writes alike.

    Text parts are joined; parts of other kinds and tool calls (name and arguments, without their
    ids) stand in it as JSON.

    Raises
    ------
    HistoryError
        For a content, or for tool calls, of another form than the chat API's.
    """
    content = message.get("content")
    said = [content] if isinstance(content, str) else [_part(p) for p in _list(content, "content")]
    if message.get("refusal"):
        said.append(str(message["refusal"]))
    calls = _list(message.get("tool_calls"), "tool_calls")
    if message.get("function_call"):  # the older form of one call
        calls = [*calls, message["function_call"]]
    return "\n".join([*said, *map(_call, calls)])


def _list(value: Any, key: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise HistoryError(f"{key}: expected a list, got {type(value).__name__}")
    return value


def _call(call: Any) -> str:
    called = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(called, Mapping):
        raise HistoryError("tool_calls: expected mappings with a function, which has a name")
    if "name" in called:
        return _json([called["name"], called.get("arguments")])
    return _json({key: value for key, value in called.items() if key != "id"})


def _part(part: Any) -> str:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    return str(part.get("text", "")) if is_text else _json(part)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)
