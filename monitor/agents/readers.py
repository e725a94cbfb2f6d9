"""Traces of agents from files: rows of `AgentTrace` as JSON lines, and R-Judge's layout.

Agents write their calls in many shapes. What cannot be parsed stays, as what the agent said, and is
counted: nothing is dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from midstream.agents.steps import AgentTrace, Step, ToolCall
from midstream.chain import faults_by_key

Shape = Literal["call", "text", "malformed"]
TraceFormat = Literal["jsonl", "r_judge"]
TRACE_FORMATS: tuple[str, ...] = get_args(TraceFormat)

_NAME = r"([A-Za-z_][\w.\-]{0,127})"
_NAMED = re.compile(rf"{_NAME}\s{{0,8}}(?:[:(]\s{{0,8}})?(\{{)")  # Name{...}  Name: {...}  Name({...
_INPUT = re.compile(rf"(?:Action:\s{{0,8}})?{_NAME}\s{{1,8}}Action Input:\s{{0,8}}")
_CALL = re.compile(rf"{_NAME}\(")  # Name(key=value, ...)
_BLOCK = re.compile(r"```(?:bash|sh|shell|console|python)\b")
_VERB = re.compile(r"(open|click|tap|press|type|scroll|select|choose|search|swipe)\b", re.I)
_LONGEST = 1_000_000  # characters of an action that are parsed; a literal of more is only kept


class TraceError(ValueError):
    """A file of traces that cannot be read; the message names file, row and key."""


@dataclass(frozen=True)
class ReadTraces:
    """Traces of a file, with how their actions could be read.

    Attributes
    ----------
    traces : tuple of AgentTrace
    calls, texts, malformed : int
        Steps with a parsed call; in which the agent only spoke; and whose call could not be parsed,
        so that its text stands under ``said``.
    """

    traces: tuple[AgentTrace, ...]
    calls: int
    texts: int
    malformed: int


def read_traces(path: Path, data_format: str | None = None) -> ReadTraces:
    """Read a file of traces; R-Judge's layout for a ``.json`` when no format is given.

    Raises
    ------
    TraceError
        For a file in neither layout.
    OSError
        If it cannot be read.
    """
    if data_format is None:
        data_format = "r_judge" if path.suffix == ".json" else "jsonl"
    if data_format not in TRACE_FORMATS:
        raise TraceError(f"data format {data_format!r}: there are {', '.join(TRACE_FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8: {error}") from error
    read = _r_judge if data_format == "r_judge" else _json_lines
    pairs = list(read(text, str(path)))
    if not pairs:
        raise TraceError(f"{path}: holds no trace")
    traces = tuple(trace for trace, _ in pairs)
    ids = [trace.id for trace in traces]
    if len(set(ids)) < len(ids):
        twice = next(id_ for id_ in ids if ids.count(id_) > 1)
        raise TraceError(f"{path}: more than one trace has the id {twice!r}")
    count = sum(len(trace.steps) for trace in traces)
    calls = sum(step.call is not None for trace in traces for step in trace.steps)
    malformed = sum(number for _, number in pairs)
    return ReadTraces(traces, calls, count - calls - malformed, malformed)


def _json_lines(text: str, source: str) -> Iterator[tuple[AgentTrace, int]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield AgentTrace.model_validate_json(line), 0
        except ValidationError as error:
            raise TraceError(f"{source}, line {number}: {faults_by_key(error)}") from error


def _r_judge(text: str, source: str) -> Iterator[tuple[AgentTrace, int]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{source}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise TraceError(f"{source}: expected a list of traces, found a {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        try:
            yield _r_judge_trace(row)
        except ValidationError as error:
            raise TraceError(f"{source}, trace {number}: {faults_by_key(error)}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TraceError(
                f"{source}, trace {number}: expected id, scenario, label 0 or 1 and contents, a "
                f"list of sessions of steps with a role; failed at {error!r}"
            ) from error


def _r_judge_trace(row: Mapping[str, Any]) -> tuple[AgentTrace, int]:
    """Build one trace; what the user says, at whatever point, is the task."""
    if row["label"] not in (0, 1):
        raise ValueError(f"label {row['label']!r}")
    asked: list[str] = []
    steps: list[dict[str, Any]] = []
    malformed = 0
    for turn in (turn for session in row["contents"] for turn in session):
        if turn["role"] == "agent":
            thought, action = (str(turn.get(key) or "") for key in ("thought", "action"))
            call, shape = parse_action(action)
            malformed += shape == "malformed"
            said = [thought] if call is not None else [thought, action]
            steps.append({"call": call, "said": "\n".join(filter(None, said)), "observed": []})
        elif turn["role"] == "environment" and steps:
            steps[-1]["observed"].append(str(turn["content"] or ""))
        elif turn["role"] in ("user", "environment"):
            asked.append(str(turn["content"] or ""))
        else:
            raise ValueError(f"role {turn['role']!r}")
    trace = AgentTrace(
        id=f"r_judge/{row['id']}",
        category=str(row["scenario"] or "assistant"),  # 414 of 564 name none: a general assistant
        task="\n".join(filter(None, asked)),
        steps=tuple(
            Step(call=step["call"], said=step["said"], observed="\n".join(step["observed"]))
            for step in steps
        ),
        violates=bool(row["label"]),
    )
    return trace, malformed


def parse_action(text: str) -> tuple[ToolCall | None, Shape]:
    """Find the call in what an agent wrote.

    Understood are ``Name{...}``, ``Name: {...}``, ``Name`` / ``Action Input: {...}``,
    ``Name(key=value)``, an object with ``name`` and ``args`` (``arguments``, ``parameters``,
    ``action_input``) even with brackets missing or left over around it, a fenced block of shell or
    Python, and what an agent does on a screen (``click <Sign Up>``). Arguments may be JSON or a
    Python literal. Linear in the length for all but the nesting.

    Returns
    -------
    call : ToolCall or None
    shape : {"call", "text", "malformed"}
        Malformed is what announces a call whose arguments cannot be read.
    """
    text = text.strip()
    if not text or text.startswith("Final Answer"):
        return None, "text"
    if len(text) > _LONGEST:
        return None, "malformed"
    if found := _INPUT.match(text):
        return _named(found.group(1), text[found.end() :])
    if _BLOCK.match(text):
        body = text[_BLOCK.match(text).end() :].split("```")[0]  # type: ignore[union-attr]
        return ToolCall(tool="shell", arguments={"command": body.strip()}), "call"
    if call := _object_with_name(text):
        return call, "call"
    if (found := _NAMED.match(text)) and found.group(1).lower() != "the":
        return _named(found.group(1), text[found.start(2) :])
    if found := _CALL.match(text):
        return _python_call(text)
    if found := _VERB.match(text):
        return ToolCall(
            tool=found.group(1).lower(), arguments={"target": text[found.end() :].strip()}
        ), "call"
    announces = text[0] in '{["' or "Action Input" in text
    return None, "malformed" if announces and "{" in text else "text"


def _named(name: str, rest: str) -> tuple[ToolCall | None, Shape]:
    """Read the arguments of a named call; a plain word after ``Action Input:`` is one argument."""
    rest = rest.strip()
    if not rest.startswith("{"):
        return ToolCall(tool=name, arguments={"input": rest} if rest else {}), "call"
    arguments = _mapping(rest)
    if arguments is None:
        return None, "malformed"
    return ToolCall(tool=name, arguments=arguments), "call"


def _object_with_name(text: str) -> ToolCall | None:
    """``{"name": ..., "args": {...}}``, alone, under a key, or somewhere in a sentence."""
    start = text.find("{")
    if start < 0:
        return None
    content = _mapping(text[start:])
    while content is not None:
        name = next((content[k] for k in ("name", "tool", "action", "action_type") if k in content), None)
        if isinstance(name, str) and name:
            keys = ("args", "arguments", "parameters", "action_input", "input")
            inner = next((content[key] for key in keys if key in content), None)
            if isinstance(inner, dict):
                return ToolCall(tool=name, arguments=_keyed(inner))
            left = {k: v for k, v in content.items() if v != name}
            return ToolCall(tool=name, arguments=_keyed(left))
        inner_objects = [value for value in content.values() if isinstance(value, dict)]
        content = inner_objects[0] if len(content) == 1 and inner_objects else None
    return None
