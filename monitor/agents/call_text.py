"""What a gate reads in a call's arguments: all keys and values, within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sized
from typing import Any, NamedTuple

from midstream.agents.text import fold

_MOST_BITS = 4096  # of a whole number
_WRAPPED = {("{", "}"), ("[", "]"), ('"', '"')}
_OPENERS = frozenset('{[" \t\r\n')


class FormError(ValueError):
    """Arguments that are no JSON object, or too large; the message says what and where."""


class CallText(NamedTuple):
    """Arguments as the gate reads them.

    Attributes
    ----------
    leaves : list of str
        Keys and values as they are written; of a string that holds JSON, those in it.
    text : str
        The same, folded, one line each.
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
    text = "\n".join(reader.leaves)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormError("arguments: a lone surrogate, which is no character") from error
    return CallText(reader.leaves, fold(text))


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON in a string, with keys that are given twice."""


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_INSIDE = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refuse, strict=False)


class _Reader:
    """Keys and values of JSON in their order. It recurses no deeper than its limit."""

    def __init__(self, characters: int, depth: int, values: int) -> None:
        self._characters, self._depth, self._values = characters, depth, values
        self._size = self._count = 0
        self.leaves: list[str] = []

    def read_items(self, items: Collection[tuple[Any, Any]], level: int) -> None:
        self._count_values(items, level)
        leaves, size = self.leaves, 0
        for key, item in items:
            if type(key) is not str:
                raise FormError(f"arguments: a key is {type(key).__name__}, expected a string")
            leaves.append(key)
            size += len(key)
            if type(item) is str and item[:1] not in _OPENERS:  # as in _read, without a call
                leaves.append(item)
                size += len(item)
            else:
                self._read(item, level)
        self._grow(size)

    def _read(self, value: object, level: int) -> None:
        kind = type(value)  # exact types first: they are what JSON gives, and fast to tell
        if kind is str or isinstance(value, str):
            text = str(value)
            self._grow(len(text))
            if text[:1] in _OPENERS and self._read_inside(text, level + 1):
                return
            self.leaves.append(text)
        elif value is None or kind is bool:
            self.leaves.append("null" if value is None else "true" if value else "false")
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

    def _read_inside(self, text: str, level: int) -> bool:
        """Read JSON in a string, which tools parse again, as what it says; False for other text."""
        bare = text.strip()
        if len(bare) < 2 or (bare[0], bare[-1]) not in _WRAPPED:
            return False
        try:
            inner = _INSIDE.decode(bare)
        except ValueError:
            return False
        except RecursionError as error:
            raise FormError(f"arguments: nested more than {self._depth} deep") from error
        self._count_values((), level)
        size = self._size  # what it says counts once, though it is there twice
        self._size -= len(text)
        self._read(inner, level)
        self._size = max(self._size, size)
        return True

    def _add(self, line: str) -> None:
        self._grow(len(line))
        self.leaves.append(line)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._characters:
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
