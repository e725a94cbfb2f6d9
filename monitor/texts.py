"""Texts in and scores out, for the command line: JSONL and CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from midstream.engines.hf.scoring import TextScore

STDIO = Path("-")


class TextInputError(ValueError):
    """A line of input without a text; the message names file, line and key."""


def read(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """Read records from JSONL, or from CSV when the name ends so; ``-`` is standard input.

    Raises
    ------
    TextInputError
        For a line that is no JSON object, no CSV, or one without a text under ``field``, and for a
        file that is not UTF-8.
    """
    for number, row in records(path, "csv" if path.suffix == ".csv" else "jsonl"):
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise TextInputError(
                f"{path}, line {number}: no text under {field!r}; give --field, or fix the line"
            )
        yield row


def records(path: Path, format: Literal["jsonl", "csv"]) -> Iterator[tuple[int, Any]]:
    """Read JSON values or rows of a CSV, each with the number of its line; ``-`` is standard input.

    Raises
    ------
    TextInputError
        For a line that is no JSON, no CSV, or not UTF-8.
    """
    with _open(path) as stream:
        if format == "csv":
            yield from _table(stream, path)
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse(line, path, number)


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a plain text file.

    Raises
    ------
    TextInputError
        When there is none.
    """
    with _open(path) as stream:
        lines = [line.rstrip("\r\n") for line in stream if line.strip()]
    if not lines:
        raise TextInputError(f"{path}: no text in it")
    return lines


@contextmanager
def writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a JSONL file for writing; yields a function that writes one record."""
    with open(path, "w", encoding="utf-8") if path != STDIO else _borrowed(sys.stdout) as stream:

        def write(record: dict[str, Any]) -> None:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")

        yield write


def scored_record(record: dict[str, Any], scored: TextScore) -> dict[str, Any]:
    """Extend an input record by its scores.

    ``tokens`` has one object per scored token: character span, risk, verdict, and logit by probe.
    """
    report, trace = scored.report, scored.report.trace
    tokens = [
        {
            "start": start,
            "end": end,
            "risk": trace.risk[i],
            "verdict": trace.verdict[i],
            "scores": {name: values[i] for name, values in trace.scores.items()},
        }
        for i, (start, end) in enumerate(scored.offsets)
    ]
    return {
        **record,
        "verdict": report.verdict,
        "halted_at": report.halted_at,
        "cause": report.cause,
        "peak": report.peak,
        "scored": report.scored,
        "unscored": report.unscored,
        "tokens": tokens,
    }


def pieces(text: str, scored: TextScore) -> Iterator[tuple[str, float | None]]:
    """Cut a text into its tokens, each with its risk; what lies between them has none."""
    done = 0
    for (start, end), risk in zip(scored.offsets, scored.report.trace.risk, strict=True):
        if start > done:
            yield text[done:start], None
        yield text[max(start, done) : end], risk
        done = max(done, end)
    yield text[done:], None


def _table(stream: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV, each with the number of its last line: a quoted text may span several."""
    reader = csv.DictReader(stream)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise TextInputError(f"{path}, after line {reader.line_num}: not CSV: {error}") from error


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise TextInputError(f"{path}, line {number}: not JSON: {error}") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    # utf-8-sig: spreadsheets begin what they export with a byte order mark
    with (
        open(path, encoding="utf-8-sig", newline="") if path != STDIO else _borrowed(sys.stdin)
    ) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise TextInputError(f"{path}: not UTF-8: {error}") from error


@contextmanager
def _borrowed(stream: IO[str]) -> Iterator[IO[str]]:
    yield stream
