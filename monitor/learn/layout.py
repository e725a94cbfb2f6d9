"""One row of labelled data, in any of the forms that docs/data.md lists, as examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from midstream.learn.examples import Contrast, Example, Message, Span

_TRUTHS = {"0": False, "1": True, "false": False, "true": True}
_LABELS = ("label", "labels", "spans")
_JOINTS = {"sentences": "\n", "tokens": " "}

Row = Mapping[str, Any]
Pieces = list[tuple[int, int]]


class RowError(ValueError):
    """A key of a row that cannot be read: which one, and what was expected there."""

    def __init__(self, key: str, expected: str) -> None:
        super().__init__(f"{key!r}: {expected}")


def examples_of(
    row: Row, *, id: str, hazard: str | None = None, columns: Sequence[str] = ()
) -> list[Example]:
    """Read one row: an example, or one per labelled turn of a conversation.

    Parameters
    ----------
    row : mapping
        Keys with None are as good as absent; keys outside the layout are left aside.
    id : str
        Of the example, where the row has none.
    hazard : str, optional
        What labels and spans without a name speak of.
    columns : sequence of str
        Keys outside the layout to be kept as columns of the example.

    Raises
    ------
    RowError
    """
    row = {key: value for key, value in row.items() if value is not None}
    id = str(row.get("id", id))
    common: dict[str, Any] = {"columns": _columns(row, columns)}
    if "group" in row:
        common["group"] = str(row["group"])
    if "contrast" in row:
        common["contrast"] = _valid(Contrast, "contrast", _parsed(row, "contrast"))
    turns = [_turn(turn, n) for n, turn in enumerate(_list(row, "messages"))]
    if any(key in turn for turn in turns for key in _LABELS):
        return list(_labelled_turns(row, id, turns, hazard, common))

    prompt_labels = _labels(row, "prompt_label", "prompt_labels", hazard)
    messages, response = _texts(row, turns)
    spans: list[Span] | None
    labels: dict[str, bool] = {}
    if pieces := [key for key in _JOINTS if key in row]:
        response, spans = _pieces(row, pieces, response, hazard)
    else:
        response = response or ""
        spans = _spans(row, hazard)
        labels = _labels(row, "label", "labels", hazard)
    return [
        _valid(
            Example,
            "row",
            {
                "id": id,
                "messages": messages,
                "response": response,
                "spans": spans,
                "labels": labels,
                "prompt_labels": prompt_labels,
                **common,
            },
        )
    ]


def _texts(row: Row, turns: list[dict[str, Any]]) -> tuple[list[Message], str | None]:
    """Conversation and response; None where the row leaves the response to its pieces."""
    for one, other in (("text", "response"), ("text", "prompt"), ("text", "messages")):
        if one in row and other in row:
            raise RowError(one, f"there is {other!r} as well; the labelled text is 'response' then")
    if "prompt" in row and "messages" in row:
        raise RowError("prompt", "there are 'messages' as well; leave one of them out")
    for key in ("text", "response", "prompt"):
        if not isinstance(row.get(key, ""), str):
            raise RowError(key, f"expected a string, found {_shown(row[key])}")
    messages = [_message(turn, n) for n, turn in enumerate(turns)]
    if "prompt" in row:
        messages = [Message(role="user", content=row["prompt"])]
    response = row.get("response", row.get("text"))
    if response is None and messages and messages[-1].role == "assistant":
        response = messages.pop().content
    return messages, response


def _labelled_turns(
    row: Row,
    id: str,
    turns: list[dict[str, Any]],
    hazard: str | None,
    common: dict[str, Any],
) -> Iterator[Example]:
    """One example per labelled turn, with the turns before it as its conversation."""
    alone = (*_LABELS, "prompt_label", "prompt_labels", "response", "text", "prompt", *_JOINTS)
    if clash := [key for key in alone if key in row]:
        raise RowError(clash[0], "turns have labels of their own; leave it out, or theirs")
    messages = [_message(turn, n) for n, turn in enumerate(turns)]
    common = {"group": id, **common}
    for n, turn in enumerate(turns):
        if not any(key in turn for key in _LABELS):
            continue
        where = f"messages[{n}]"
        if messages[n].role != "assistant":
            raise RowError(where, f"a {messages[n].role!r} turn has a label; only 'assistant' may")
        yield _valid(
            Example,
            where,
            {
                "id": f"{id}/{n}",
                "messages": messages[:n],
                "response": messages[n].content,
                "spans": _spans(turn, hazard),
                "labels": _labels(turn, "label", "labels", hazard),
                **common,
            },
        )


def _turn(turn: Any, n: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(f"messages[{n}]", f"expected role and content, found {_shown(turn)}")
    return {key: value for key, value in turn.items() if value is not None}


def _message(turn: dict[str, Any], n: int) -> Message:
    plain = {key: value for key, value in turn.items() if key not in _LABELS}
    message: Message = _valid(Message, f"messages[{n}]", plain)
    return message


def _pieces(
    row: Row, keys: list[str], response: str | None, hazard: str | None
) -> tuple[str, list[Span]]:
    """Response and spans of words or sentences with a label each."""
    key, *more = keys
    if more or "spans" in row or "label" in row:
        other = more[0] if more else "spans" if "spans" in row else "label"
        raise RowError(other, f"{key!r} have labels of their own; leave one of them out")
    words, marks = _list(row, key), _list(row, "labels")
    if bad := [word for word in words if not isinstance(word, str) or not word.strip()]:
        raise RowError(key, f"expected strings that are not blank, found {_shown(bad[0])}")
    if len(words) != len(marks):
        raise RowError(
            "labels", f"expected one for each of the {len(words)} {key}, found {len(marks)}"
        )
    places = _located(words, response, key) if response is not None else _joined(words, key)
    if response is None:
        response = _JOINTS[key].join(words)
    spans: list[Span] = []
    before: dict[str, int] = {}  # hazard to its last span, while the words it covers go on
    for (start, end), mark in zip(places, marks, strict=True):
        running = {}
        for name in _hazards(mark, hazard):
            if key == "tokens" and name in before:
                spans[before[name]] = spans[before[name]].model_copy(update={"end": end})
                running[name] = before[name]
            else:
                running[name] = len(spans)
                spans.append(_valid(Span, "labels", {"start": start, "end": end, "hazard": name}))
        before = running
    return response, spans


def _joined(words: Sequence[str], key: str) -> Pieces:
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + len(_JOINTS[key])
    return places


def _located(words: Sequence[str], text: str, key: str) -> Pieces:
    """Find each piece after the one before it."""
    places, done = [], 0
    for n, word in enumerate(words):
        start = text.find(word, done)
        if start < 0:
            raise RowError(f"{key}[{n}]", f"{_shown(word)} is not in the text after {done}")
        done = start + len(word)
        places.append((start, done))
    return places


def _hazards(mark: Any, hazard: str | None) -> list[str]:
    """Hazards of a word or sentence: a list of names, or 0 or 1 of the one hazard."""
    if isinstance(mark, list | tuple):
        return list(dict.fromkeys(str(name) for name in mark))
    return [_named(hazard, "labels")] if _truth(mark, "labels") else []


def _spans(row: Row, hazard: str | None) -> list[Span] | None:
    """Spans as objects, as ``[start, end]`` or ``[start, end, hazard]``, or as offsets."""
    if "spans" not in row:
        return None
    items = _list(row, "spans")
    if all(isinstance(item, int) for item in items):
        items = list(_runs(items))
    spans = []
    for item in items:
        if isinstance(item, list | tuple) and len(item) in (2, 3):
            item = dict(zip(("start", "end", "hazard"), item, strict=False))
        if not isinstance(item, Mapping):
            raise RowError(
                "spans",
                "expected {start, end, hazard}, [start, end], [start, end, hazard] or offsets of "
                f"characters, found {_shown(item)}",
            )
        named = item if item.get("hazard") is not None else {**item, "hazard": hazard}
        _named(named["hazard"], "spans")
        spans.append(_valid(Span, "spans", named))
    return spans


def _runs(offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Join offsets that follow on one another."""
    start = end = None
    for offset in sorted(set(offsets)):
        if start is None or offset != end:
            if start is not None and end is not None:
                yield start, end
            start = offset
        end = offset + 1
    if start is not None and end is not None:
        yield start, end


def _labels(row: Row, one: str, many: str, hazard: str | None) -> dict[str, bool]:
    if one in row and many in row:
        raise RowError(one, f"there is {many!r} as well; leave one of them out")
    if one in row:
        value = _truth(row[one], one)
        return {_named(hazard, one): value}
    found = _parsed(row, many) if many in row else {}
    try:
        pairs = dict(found).items()  # Parquet gives a map as a list of pairs
    except (TypeError, ValueError):
        raise RowError(many, f"expected hazards with truth values, found {_shown(found)}") from None
    return {str(name): _truth(v, f"{many}.{name}") for name, v in pairs if v is not None}


def _columns(row: Row, wanted: Sequence[str]) -> dict[str, str]:
    own = _parsed(row, "columns") if "columns" in row else {}
    if not isinstance(own, Mapping):
        raise RowError("columns", f"expected names with values, found {_shown(own)}")
    if missing := [name for name in wanted if name not in row]:
        raise RowError(missing[0], f"no such column; there are {', '.join(row)}")
    kept = {**own, **{name: row[name] for name in wanted}}
    return {str(name): str(value) for name, value in kept.items() if value is not None}


def _list(row: Row, key: str) -> list[Any]:
    if key not in row:
        return []
    value = _parsed(row, key)
    if not isinstance(value, list | tuple):
        raise RowError(key, f"expected a list, found {_shown(value)}")
    return list(value)


def _parsed(row: Row, key: str) -> Any:
    """Value of a key; a string, as a CSV has it, is JSON."""
    value = row[key]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(key, f"not JSON: {error}; found {_shown(value)}") from error


def _truth(value: Any, key: str) -> bool:
    if isinstance(value, str):
        value = _TRUTHS.get(value.strip().lower(), value)
    if isinstance(value, str) or value not in (0, 1):
        raise RowError(key, f"expected true, false, 0 or 1, found {_shown(value)}")
    return bool(value)


def _named(hazard: Any, key: str) -> str:
    if not isinstance(hazard, str) or not hazard:
        raise RowError(key, "it names no hazard; say which it speaks of with hazard=")
    return hazard


def _valid(kind: Any, key: str, fields: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([key, *(str(part) for part in first["loc"])])
        raise RowError(place.removeprefix("row."), first["msg"]) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
