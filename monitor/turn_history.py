"""A chat history as turns, in the form that names them in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.ledger.ledger import ROOT, turn_key

ASSISTANT = "assistant"


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
        Messages since the last response: what is to be answered. None where the model writes on.
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
            For a message without a role.
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
            if role != ASSISTANT:
                asked.append((role, content_of(message)))
                continue
            keys.append(turn_key(keys[-1] if keys else ROOT, asked, content_of(message)))
            asked = []
        return cls(tuple(keys), tuple(asked))


def content_of(message: Mapping[str, Any]) -> str:
    """What a message says, as one string that every client writes alike.

    Text parts are joined; parts of other kinds and tool calls (name and arguments, without their
    ids) stand in it as JSON.
    """
    content = message.get("content")
    said = [content] if isinstance(content, str) else [_part(part) for part in content or ()]
    for call in message.get("tool_calls") or ():
        called = call.get("function", call)
        said.append(_json([called.get("name"), called.get("arguments")]))
    return "\n".join(said)


def _part(part: Any) -> str:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    return str(part.get("text", "")) if is_text else _json(part)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)
