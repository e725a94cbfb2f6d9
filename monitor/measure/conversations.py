"""Labelled conversations from files: what a turn gate is fitted on, replayed over and measured by.

A line of JSON is one conversation, in one of two layouts::

    {"id": "a", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}],
     "target_turn": 3, "harmful": true, "violated": [false, false, true]}
    {"conversation": [{"turn_id": 1, "role": "user", "content": "..."}, ...], "target_turn": 3}

The second is MTID's (arXiv 2605.05630). ``target_turn`` is the first response, counted from 1, that
completes the harm, null where none does. ``violated``, whether the harm is complete after each
response, says the same. ``harmful`` alone leaves the turn unknown. Other keys are left aside.

R-Judge's traces are read as conversations whose responses are the agent's steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.texts import records
from midstream.turn_history import ASSISTANT, HistoryError, content_of

FORMATS = ("jsonl", "r_judge")

Message = Mapping[str, Any]


class ConversationError(ValueError):
    """A row that is no conversation; the message names file, line and key."""


@dataclass(frozen=True)
class Conversation:
    """A conversation with what is known of it.

    Attributes
    ----------
    id : str
    messages : tuple of mappings
        With role and content; at least one is the assistant's.
    harmful : bool, optional
        None where it is not known.
    target : int, optional
        First response that completes the harm, 1 for the first.
    """

    id: str
    messages: tuple[Message, ...]
    harmful: bool | None
    target: int | None

    @property
    def responses(self) -> list[int]:
        """Index of every response of the model in ``messages``."""
        return [n for n, message in enumerate(self.messages) if message["role"] == ASSISTANT]


def read_conversations(path: Path, data_format: str | None = None) -> list[Conversation]:
    """Read a file; R-Judge's layout for a ``.json`` when no format is given.

    Raises
    ------
    ConversationError
        At the first row that is none, and for a file without any.
    TextInputError
        For a file that is not JSON lines, or not UTF-8.
    OSError
        If it cannot be read.
    """
    data_format = data_format or ("r_judge" if path.suffix == ".json" else "jsonl")
    if data_format not in FORMATS:
        raise ConversationError(f"data format {data_format!r}: there are {', '.join(FORMATS)}")
    read = _r_judge if data_format == "r_judge" else _json_lines
    found: dict[str, Conversation] = {}
    for where, row in read(path):
        try:
            conversation = _conversation(row, where)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConversationError(
                f"{path}, {where}: expected messages, a list of mappings with a role and a "
                f"content; failed at {error!r}"
            ) from error
        except (ConversationError, HistoryError) as error:
            raise ConversationError(f"{path}, {where}: {error}") from error
        if conversation.id in found:
            raise ConversationError(f"{path}, {where}: the id {conversation.id!r} was there before")
        found[conversation.id] = conversation
    if not found:
        raise ConversationError(f"{path}: holds no conversation")
    return list(found.values())


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in records(path, "jsonl"):
        if not isinstance(row, Mapping):
            raise ConversationError(f"{path}, line {number}: expected an object")
        yield f"line {number}", row


def _r_judge(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        traces = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of UTF-8
        raise ConversationError(f"{path}: not JSON: {error}") from error
    if not isinstance(traces, list):
        raise ConversationError(f"{path}: expected a list of traces")
    for number, trace in enumerate(traces, start=1):
        where = f"trace {number}"
        try:
            steps = [step for session in trace["contents"] for step in session]
            messages = [{"role": "system", "content": trace["profile"]}, *map(_step, steps)]
            row = {"id": f"r_judge/{trace['id']}", "harmful": {0: False, 1: True}[trace["label"]]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ConversationError(
                f"{path}, {where}: expected id, profile, label 0 or 1 and contents, a list of "
                f"sessions of steps with a role; failed at {error!r}"
            ) from error
        yield where, {**row, "messages": messages}


def _step(step: Mapping[str, Any]) -> Message:
    """What the agent thinks and does is a response; what it sees comes back from a tool."""
    role = {"agent": ASSISTANT, "environment": "tool"}.get(step["role"], step["role"])
    said = [str(step[key]) for key in ("thought", "action", "content") if step.get(key)]
    return {"role": role, "content": "\n".join(said)}


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    messages = tuple(row["messages"] if "messages" in row else row["conversation"])
    for message in messages:
        if not isinstance(message["role"], str):
            raise TypeError("role")
        content_of(message)
    conversation = Conversation(str(row.get("id", where)), messages, None, None)
    turns = len(conversation.responses)
    if not turns:
        raise ConversationError("messages: none is the assistant's, so there is nothing to judge")
    harmful, target = _labels(row, turns)
    return Conversation(conversation.id, messages, harmful, target)


def _labels(row: Mapping[str, Any], turns: int) -> tuple[bool | None, int | None]:
    said = {key: row[key] for key in ("target_turn", "violated", "harmful") if key in row}
    target = said.get("target_turn")
    if target is not None and (type(target) is not int or not 1 <= target <= turns):
        raise ConversationError(
            f"target_turn: expected 1 to {turns}, the number of responses, got {target!r}"
        )
    if "violated" in said:
        flags = said["violated"]
        if not isinstance(flags, Sequence) or len(flags) != turns:
            raise ConversationError(f"violated: expected {turns} labels, one per response")
        first = next((n for n, flag in enumerate(flags, start=1) if flag), None)
        if "target_turn" in said and first != target:
            raise ConversationError(f"violated: begins at {first}, target_turn says {target}")
        target = first
    harmful = said.get("harmful")
    located = "target_turn" in said or "violated" in said
    if harmful is None:
        return (target is not None if located else None), target
    if not isinstance(harmful, bool):
        raise ConversationError(f"harmful: expected true or false, got {harmful!r}")
    if target is not None and not harmful:
        raise ConversationError(f"harmful: false, but target_turn is {target}")
    return harmful, target
