"""What a gate reads in a call's arguments: all keys and values, within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sized
from typing import Any, NamedTuple

from midstream.agents.text import fold

_MOST_BITS = 4096  # of a whole number
_WRAPPED = {("{", "}"), ("[", "]"), ('"', '"')}


class FormError(ValueError):
    """Arguments that are no JSON object, or too large; the message says what and where."""


class CallText(NamedTuple):
    """Arguments as the gate reads them.

    Attributes
    ----------
    leaves : list of str
        Keys and string values as they are; of a string that holds JSON, those in it.
    text : str
        Keys and values, folded, one line each.
    """

    leaves: list[str]
    text: str


def read_arguments(arguments: object, characters: int, depth: int, values: int) -> CallText:
    """Read arguments within limits.

    Raises
    ------
    FormError
        For what is not JSON (a key that is no string, NaN, another type, a lone surrogate), and for
        what exceeds a limit.
    """
    if not isinstance(arguments, Mapping):
        raise FormError(f"arguments: expected an object, got {type(arguments).__name__}")
    reader = _Reader(characters, depth, values)
    reader.read_items(arguments.items(), 1)
    text = "\n".join(reader.lines)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormError("arguments: a lone surrogate, which is no character") from error
    return CallText(reader.leaves, fold(text))


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON in a string, with keys that are given twice."""


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_INSIDE = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refuse)


class _Reader:
    """Keys and values of JSON in their order. It recurses no deeper than its limit."""

    def __init__(self, characters: int, depth: int, values: int) -> None:
        self._characters, self._depth, self._values = characters, depth, values
        self._size = self._count = 0
        self.leaves: list[str] = []
        self.lines: list[str] = []

    def read_items(self, items: Collection[tuple[Any, Any]], level: int) -> None:
        self._count_values(items, level)
        for key, item in items:
            if type(key) is not str:
                raise FormError(f"arguments: a key is {type(key).__name__}, expected a string")
            self.leaves.append(key)
            self._add(key)
            self._read(item, level)

    def _read(self, value: object, level: int) -> None:
        kind = type(value)  # exact types first: they are what JSON gives, and fast to tell
        if kind is str or isinstance(value, str):
            self._read_string(str(value), level)
        elif value is None or kind is bool:
            self.lines.append("null" if value is None else "true" if value else "false")
        elif isinstance(value, int):
            if value.bit_length() > _MOST_BITS:
                raise FormError(f"arguments: a number of more than {_MOST_BITS} bits")
            self._add(str(value))
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise FormError(f"arguments: {value} is not JSON")
            self._add(repr(value))
        elif kind is dict or isinstance(value, Mapping):
            self.read_items(value.items(), level + 1)  # type: ignore[attr-defined]
        elif kind is _Pairs:
            self.read_items(value, level + 1)  # type: ignore[arg-type]
        elif isinstance(value, list | tuple):
            self._count_values(value, level + 1)
            for item in value:
                self._read(item, level + 1)
        else:
            raise FormError(f"arguments: {kind.__name__} is not JSON")

    def _read_string(self, text: str, level: int) -> None:
        """Read a string; JSON in it (which tools parse again) is read as what it says."""
        self._check_room(len(text))
        bare = text.strip()
        if len(bare) > 1 and (bare[0], bare[-1]) in _WRAPPED:
            try:
                inner = _INSIDE.decode(bare)
            except ValueError:
                pass
            except RecursionError as error:
                raise FormError(f"arguments: nested more than {self._depth} deep") from error
            else:
                self._count_values((), level + 1)
                size = self._size + len(text)
                self._read(inner, level + 1)
                self._size = max(self._size, size)
                return
        self.leaves.append(text)
        self._add(text)

    def _add(self, line: str) -> None:
        self._check_room(len(line))
        self._size += len(line)
        self.lines.append(line)

    def _check_room(self, size: int) -> None:
        if self._size + size > self._characters:
            raise FormError(f"arguments: more than {self._characters} characters")

    def _count_values(self, value: Sized, level: int) -> None:
        if level > self._depth:
            raise FormError(f"arguments: nested more than {self._depth} deep")
        self._count += len(value)
        if self._count > self._values:
            raise FormError(f"arguments: more than {self._values} values")


def json_type(value: Any) -> str:
    """Name of a value's JSON type."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, Mapping):
        return "object"
    if isinstance(value, list | tuple):
        return "array"
    names = {str: "string", int: "integer", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
