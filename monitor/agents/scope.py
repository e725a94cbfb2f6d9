"""The first stage of the gate: whether a tool and its arguments are what the role may use."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import unquote

from midstream.agents.call_text import fold, host_of, json_type
from midstream.agents.gate_rules import ArgumentLimit, Role, ToolScope

_PATH = re.compile(r"(?:~|/|\.\.?[/\\])|[A-Za-z]:[/\\]")
_UP = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")


class Finding(NamedTuple):
    """Why a call is out of scope: the rule, what broke it, what would pass."""

    rule: str
    matched: str
    remedy: str


def scope_of(role: Role, tool: str) -> ToolScope | None:
    """Return the scope of the first entry that fits a tool's name; None where none does."""
    exact = role.tools.get(tool)
    if exact is not None:
        return exact
    return next((scope for name, scope in role.tools.items() if fnmatchcase(tool, name)), None)


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
            if not any(fnmatchcase(host, pattern) for pattern in role.hosts):
                return Finding("hosts", host[:80], f"a host like {' or '.join(role.hosts)}")
    if role.recipients is not None:
        for recipient in (*recipients, *(fold(value) for value in held["recipient"])):
            if not any(fnmatchcase(recipient, pattern) for pattern in role.recipients):
                allowed = " or ".join(role.recipients)
                return Finding("recipients", recipient[:80], f"a recipient like {allowed}")
    if role.paths is not None:
        for path in (*_paths(leaves), *held["path"]):
            if not _inside(path, role.paths):
                return Finding("paths", path[:80], f"a path in {' or '.join(role.paths)}")
    return None


def _strings(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list | tuple) else (value,):
        yield item if isinstance(item, str) else repr(item)


def _paths(leaves: Sequence[str]) -> Iterator[str]:
    for leaf in leaves:
        if _PATH.match(leaf):  # as a whole: it may hold spaces
            yield leaf
        for word in leaf.split():
            bare = word.strip("\"'`,;()[]{}<>|&=")
            if _PATH.match(bare) or _UP.search(bare):
                yield bare


def _inside(path: str, folders: Sequence[str]) -> bool:
    """Whether a path stays in a folder, however it is written.

    A relative one is taken from where the agent works, and only must not climb. Links on the disk
    are not followed: that is for whoever opens the file.
    """
    if "\0" in path:
        return False
    plain = unquote(path).replace("\\", "/")
    if plain.startswith(("/", "~")):
        norm = posixpath.normpath("/" + plain.lstrip("/") if plain[0] == "/" else plain)
        return any(norm == f or norm.startswith(f.rstrip("/") + "/") for f in folders)
    if re.match(r"[A-Za-z]:", plain):
        return False
    return not posixpath.normpath(plain).startswith("..")
