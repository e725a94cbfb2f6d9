"""The first stage of the gate: whether a tool and its arguments are what the role may use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from midstream.agents.call_text import json_type
from midstream.agents.places import (
    host_of,
    is_inside,
    is_listed_host,
    is_listed_recipient,
    paths_in,
)
from midstream.agents.roles import ArgumentLimit, Role, ToolScope
from midstream.agents.text import fold


class Finding(NamedTuple):
    """Why a call is out of scope: the rule, what broke it, what would pass."""

    rule: str
    matched: str
    remedy: str


def entry_of(role: Role, tool: str) -> str | None:
    """Return the key of the first entry that fits a tool's name; None where none does."""
    if tool in role.tools:
        return tool
    return next((name for name in role.tools if fnmatchcase(tool, name)), None)


def outside_arguments(scope: ToolScope, arguments: Mapping[str, Any]) -> Finding | None:
    """Check arguments against their limits."""
    for name, limit in scope.arguments.items():
        if name in arguments:
            fault = _fault(limit, arguments[name])
            if fault:
                return Finding(f"arguments.{name}", *fault)
        elif limit.required:
            return Finding(f"arguments.{name}", "it is missing", f"give the argument {name}")
    if not scope.other_arguments:
        for name in arguments:
            if name not in scope.arguments:
                allowed = ", ".join(scope.arguments) or "none"
                return Finding(
                    "arguments", f"unknown argument {name[:80]!r}", f"allowed: {allowed}"
                )
    return None


def _fault(limit: ArgumentLimit, value: Any) -> tuple[str, str] | None:
    kind = json_type(value)
    shown = repr(value)[:80] if not isinstance(value, Mapping | list | tuple) else kind
    if limit.type not in (None, kind, "number" if kind == "integer" else kind):
        return f"{shown} is of type {kind}", f"give a value of type {limit.type}"
    if limit.one_of is not None and not any(
        value == allowed and json_type(allowed) == kind for allowed in limit.one_of
    ):
        return f"{shown} is not on its list", f"one of {', '.join(map(repr, limit.one_of))}"
    if kind in ("integer", "number"):
        if limit.minimum is not None and value < limit.minimum:
            return f"{shown} is below the minimum", f"at least {limit.minimum:g}"
        if limit.maximum is not None and value > limit.maximum:
            return f"{shown} is above the maximum", f"at most {limit.maximum:g}"
    elif limit.minimum is not None or limit.maximum is not None:
        return f"{shown} is of type {kind}", "give a number"
    sized = kind in ("string", "array", "object")
    if sized and limit.max_length is not None and len(value) > limit.max_length:
        return f"it has {len(value)} characters or items", f"at most {limit.max_length}"
    if limit.like is not None and not (
        isinstance(value, str) and any(fnmatchcase(value, pattern) for pattern in limit.like)
    ):
        return f"{shown} has another form", f"like {' or '.join(limit.like)}"
    return None


def outside_places(
    role: Role,
    scope: ToolScope,
    arguments: Mapping[str, Any],
    leaves: Sequence[str],
    hosts: Sequence[str],
    recipients: Sequence[str],
) -> Finding | None:
    """Check every host, recipient and path in the arguments against the role's lists.

    ``hosts`` and ``recipients`` are those that were recognised; arguments whose limit says what
    they hold are checked whole.
    """
    held: dict[str, list[str]] = {"host": [], "recipient": [], "path": []}
    for name, limit in scope.arguments.items():
        if limit.holds is not None and name in arguments:
            held[limit.holds].extend(_strings(arguments[name]))
    if role.hosts is not None:
        for host in (*hosts, *(host_of(fold(value)) for value in held["host"])):
            if not is_listed_host(host, role.hosts):
                return Finding("hosts", host[:80], f"a host like {' or '.join(role.hosts)}")
    if role.recipients is not None:
        for recipient in (*recipients, *(fold(value) for value in held["recipient"])):
            if not is_listed_recipient(recipient, role.recipients):
                allowed = " or ".join(role.recipients)
                return Finding("recipients", recipient[:80], f"a recipient like {allowed}")
    if role.paths is not None:
        for path in (*paths_in(leaves), *held["path"]):
            if not is_inside(path, role.paths):
                return Finding("paths", path[:80], f"a path in {' or '.join(role.paths)}")
    return None


def _strings(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list | tuple) else (value,):
        yield item if isinstance(item, str) else repr(item)
