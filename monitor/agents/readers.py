"""Traces of agents from files: rows of `AgentTrace` as JSON lines, and R-Judge's layout.

Agents write their calls in many shapes. What cannot be parsed stays as text, where the rules read
it, and is counted: nothing is dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from midstream.agents.steps import AgentTrace, Step, ToolCall
from midstream.validation import faults_by_key, named_faults

Shape = Literal["call", "text", "malformed"]
TraceFormat = Literal["jsonl", "r_judge"]
TRACE_FORMATS: tuple[str, ...] = get_args(TraceFormat)

_NAME = r"([A-Za-z_][\w.\-]{0,127})"
_NAMED = re.compile(
    rf"{_NAME}\s{{0,8}}(?:[:(]\s{{0,8}})?(\{{)"
)  # Name{...}  Name: {...}  Name({...
_INPUT = re.compile(rf"(?:Action:\s{{0,8}})?{_NAME}\s{{1,8}}Action Input:\s{{0,8}}")
_CALL = re.compile(rf"{_NAME}\(")  # Name(key=value, ...)
_BLOCK = re.compile(r"```(?:bash|sh|shell|console|python)\b")
_VERB = re.compile(
    r"(open|click|tap|press|type|scroll|select|choose|search|swipe)\b([^\n]{0,200})", re.I
)
_TOOL_KEYS = ("name", "tool", "tool_name", "action", "action_type")
_ARGUMENT_KEYS = ("args", "arguments", "parameters", "action_input", "input")
_JSON = json.JSONDecoder(strict=False)  # line breaks within strings are common
_STRAY_BRACKETS = 4  # closing ones left over at the end that are tried without
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
        Steps with a parsed call; in which the agent only spoke; and whose call could not be parsed:
        its text is the argument ``input`` where the tool's name was readable, and else ``said``.
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
    shapes = sum((counted for _, counted in pairs), Counter())
    return ReadTraces(traces, shapes["call"], shapes["text"], shapes["malformed"])


def _json_lines(text: str, source: str) -> Iterator[tuple[AgentTrace, Counter[Shape]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        with named_faults(f"{source}, line {number}", TraceError):
            trace = AgentTrace.model_validate_json(line)
        yield trace, Counter("text" if step.call is None else "call" for step in trace.steps)


def _r_judge(text: str, source: str) -> Iterator[tuple[AgentTrace, Counter[Shape]]]:
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


def _r_judge_trace(row: Mapping[str, Any]) -> tuple[AgentTrace, Counter[Shape]]:
    """Build one trace; what the user says, at whatever point, is the task."""
    if row["label"] not in (0, 1):
        raise ValueError(f"label {row['label']!r}")
    asked: list[str] = []
    steps: list[dict[str, Any]] = []
    shapes: Counter[Shape] = Counter()
    for turn in (turn for session in row["contents"] for turn in session):
        if turn["role"] == "agent":
            thought, action = (str(turn.get(key) or "") for key in ("thought", "action"))
            call, shape = parse_action(action)
            shapes[shape] += 1
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
    return trace, shapes


def parse_action(text: str) -> tuple[ToolCall | None, Shape]:
    """Find the call in what an agent wrote.

    Understood are ``Name{...}``, ``Name: {...}``, ``Name`` / ``Action Input: {...}``,
    ``Name(key=value)``, an object with ``name`` and ``args`` (``arguments``, ``parameters``,
    ``action_input``) even with brackets missing or left over around it, a fenced block of shell or
    Python, and what an agent does on a screen (``click <Sign Up>``). Arguments may be JSON or a
    Python literal. Linear in the length.

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
    if found := _NAMED.match(text):
        return _named(found.group(1), text[found.end() - 1 :])
    if found := _BLOCK.match(text):
        command = text[found.end() :].split("```")[0].strip()
        return ToolCall(tool="shell", arguments={"command": command}), "call"
    if found := _CALL.match(text):
        return _python_call(found.group(1), text)
    if found := _VERB.fullmatch(text):
        target = found.group(2).strip()
        return ToolCall(tool=found.group(1).lower(), arguments={"target": target}), "call"
    if call := _object_with_name(text):
        return call, "call"
    return None, "malformed" if "{" in text or "Action Input" in text else "text"


def _named(name: str, rest: str) -> tuple[ToolCall | None, Shape]:
    """Read the arguments of a named call; text that is no object is one argument."""
    rest = rest.strip()
    if not rest.startswith("{"):
        return ToolCall(tool=name, arguments={"input": rest} if rest else {}), "call"
    arguments = _mapping(rest)
    if arguments is None:
        return ToolCall(tool=name, arguments={"input": rest}), "malformed"
    return ToolCall(tool=name, arguments=arguments), "call"


def _python_call(name: str, text: str) -> tuple[ToolCall | None, Shape]:
    """``Name(1, key='value')``; arguments without a name are numbered."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            return None, "text"
        given = {str(at): ast.literal_eval(value) for at, value in enumerate(call.args)}
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ToolCall(tool=name, arguments={"input": text[len(name) :]}), "malformed"
    return ToolCall(tool=name, arguments={**given, **named}), "call"


def _object_with_name(text: str) -> ToolCall | None:
    """An object that names a tool, alone, under a key, or after a few words."""
    start = text.find("{")
    content = _mapping(text[start:]) if start >= 0 else None
    while content is not None:
        key = next((key for key in _TOOL_KEYS if isinstance(content.get(key), str)), None)
        if key is not None and content[key]:
            given = [content[k] for k in _ARGUMENT_KEYS if isinstance(content.get(k), dict)]
            rest = {other: value for other, value in content.items() if other != key}
            return ToolCall(tool=content[key], arguments=given[0] if given else rest)
        if len(content) != 1 or not isinstance(inner := next(iter(content.values())), dict):
            return None
        tool = next(iter(content))
        if not any(name in inner for name in _TOOL_KEYS):
            return ToolCall(tool=tool, arguments=inner) if tool else None
        content = inner
    return None


def _mapping(text: str) -> dict[str, Any] | None:
    """Read the object that a text begins with, as JSON or as a Python literal."""
    value: Any = None
    try:
        value, _ = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        end = text.rfind("}") + 1
        for _ in range(_STRAY_BRACKETS):
            try:
                value = ast.literal_eval(text[:end])
                break
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                end = text.rfind("}", 0, end - 1) + 1
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else None
