"""Labelled data from JSONL, CSV, Parquet and anything that yields mappings; see docs/data.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from midstream.learn.examples import Example
from midstream.learn.layout import Row, RowError, examples_of
from midstream.texts import records

Format = Literal["jsonl", "csv", "parquet"]


class ExampleError(ValueError):
    """A row that is no example; the message names file, line or row, key and what was expected."""


def read_examples(
    source: str | Path | Iterable[Row],
    *,
    format: Format | None = None,
    hazard: str | None = None,
    columns: Sequence[str] = (),
    labelled: bool = True,
) -> Iterator[Example]:
    """Read labelled data, one row at a time.

    Parameters
    ----------
    source : path or iterable of mappings
        A file, ``-`` for JSONL on standard input, or rows, such as a ``datasets.Dataset``.
    format : {"jsonl", "csv", "parquet"}, optional
        The end of the file's name when not given.
    hazard : str, optional
        What labels and spans without a name speak of.
    columns : sequence of str
        Keys outside the layout to be kept, for breaking figures down. All others are left aside.
    labelled : bool
        Refuse a row that has no label of any kind. A misspelt key shows in this way.

    Yields
    ------
    Example
        With unique ids. Rows without an id are named after file and line.

    Raises
    ------
    ExampleError
        At the first bad row.
    TextInputError
        For a file that is not JSONL, not CSV, or not UTF-8.
    ImportError
        When Parquet is to be read and the extra ``learn`` is not installed.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        rows, name = _rows(path, format), f"{path}, "
        stem = path.stem if path != Path("-") else "stdin"
    else:
        rows, name, stem = (("row", n, row) for n, row in enumerate(source, 1)), "", "row"
    seen: dict[str, int] = {}
    for unit, number, row in rows:
        where = f"{name}{unit} {number}"
        if not isinstance(row, Mapping):
            hint = "; of a DatasetDict, give one split" if isinstance(row, str) else ""
            raise ExampleError(f"{where}: expected a mapping, found a {type(row).__name__}{hint}")
        try:
            found = examples_of(row, id=f"{stem}:{number}", hazard=hazard, columns=columns)
        except RowError as error:
            raise ExampleError(f"{where}: {error}") from error
        for example in found:
            if labelled and not _is_labelled(example):
                raise ExampleError(
                    f"{where}: no label; expected one of 'label', 'labels', 'spans', "
                    "'prompt_label', 'prompt_labels' or 'contrast', found the keys "
                    f"{', '.join(map(repr, row))}"
                )
            if example.id in seen:
                raise ExampleError(
                    f"{where}: 'id': {example.id!r} is that of {unit} {seen[example.id]}, too; "
                    "expected one that no other row has"
                )
            seen[example.id] = number
            yield example


def _is_labelled(example: Example) -> bool:
    labels = example.labels or example.prompt_labels or example.contrast
    return bool(labels) or example.spans is not None


def _rows(path: Path, format: Format | None) -> Iterator[tuple[str, int, Any]]:
    """Rows of a file, each with what its number counts, and its number."""
    given = format or path.suffix.removeprefix(".") or ("jsonl" if path == Path("-") else "")
    if given == "jsonl":
        for number, row in records(path, "jsonl"):
            yield "line", number, row
    elif given == "csv":
        for number, row in records(path, "csv"):
            if None in row:
                raise ExampleError(f"{path}, line {number}: more fields than the header names")
            # An empty field is how a CSV says that it has no value.
            yield "line", number, {key: value or None for key, value in row.items()}
    elif given == "parquet":
        yield from _parquet(path)
    else:
        raise ExampleError(
            f"{path}: cannot tell its format; name it .jsonl, .csv or .parquet, or give format= "
            f"one of {', '.join(get_args(Format))}"
        )


def _parquet(path: Path) -> Iterator[tuple[str, int, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'midstream[learn]'") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield "row", number, row
    except pa.ArrowInvalid as error:
        raise ExampleError(f"{path}, after row {number}: not Parquet: {error}") from error
