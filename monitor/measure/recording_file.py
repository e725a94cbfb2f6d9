"""Recordings on disk: one Parquet file, one row per stream, whole or not there.

===================  ==============================================================
column               content
===================  ==============================================================
``stream``           string
``prompt_tokens``    int32
``ended``            bool
``position``         list of int32, one per recorded token
``logit/PROBE``      list of float32, one column per probe
``label/HAZARD``     list of int8, one column per hazard
``response/HAZARD``  int8
``begin``, ``end``   lists of int32: characters of each token; only where known
``text``             string; only where known
``column/NAME``      string
===================  ==============================================================

The file's metadata has, under the key ``midstream``, a JSON object: schema version, hash of the
bundle, hash and names of the probes, hazards and columns in order, streams and tokens in all.

A logit takes 4 bytes less what compression saves, and must: rounded, it could fall into another bin
of the evidence, and give another verdict. Random walks of three probes take 9.2 bytes per token in
all (bench/replay.py), of which positions and labels are under 0.01.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from midstream.measure.recording import Recording, RecordingError, concatenate
from midstream.validation import named_faults

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1

_KEY = b"midstream"
_TOKENS_PER_GROUP = 1 << 20
"""Read and written at a time, beside the recording itself."""


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: int
    bundle: str
    probes_hash: str | None
    probes: tuple[str, ...]
    hazards: tuple[str, ...]
    columns: tuple[str, ...]
    characters: bool
    texts: bool
    streams: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]


def save(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a new file, which appears whole or not at all.

    A process killed on the way leaves at most a sibling ``.NAME.partial-*``.

    Raises
    ------
    FileExistsError
        If there is anything at ``path``: a server writes many files, `load` takes several.
    OSError
        If the disk refuses; nothing is left behind then.
    ImportError
        Without pyarrow.
    """
    parquet = _pyarrow()
    target = Path(os.path.abspath(path))
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    header = _header_of(recording)
    schema = _schema(header)
    logits = [f"logit/{probe}.list.element" for probe in header.probes]
    try:
        with open(partial, "xb") as file:
            with parquet.ParquetWriter(
                file,
                schema,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=[
                    name if kind == "string" else f"{name}.list.element"
                    for name, kind in ((f.name, str(f.type)) for f in schema)
                    if name.startswith(("label/", "column/"))
                ],
                column_encoding={
                    "position.list.element": "DELTA_BINARY_PACKED",
                    **dict.fromkeys(logits, "BYTE_STREAM_SPLIT"),
                },
            ) as writer:
                for first, last in _groups(recording.starts):
                    writer.write_table(_table(recording, schema, first, last))
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(target)  # somebody was faster
        os.rename(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(*paths: str | os.PathLike[str]) -> Recording:
    """Read one file, or several of one bundle, end to end.

    Takes the memory of the recording and, beside it, that of some million tokens; twice that of
    the recording where there are several files.

    Raises
    ------
    FileNotFoundError
    RecordingError
        For a file that is no recording, was cut short or changed, comes from a newer midstream, or
        contradicts itself; for files that do not belong together, and for a stream that is in two
        of them.
    ImportError
        Without pyarrow.
    """
    return concatenate([_load(Path(path)) for path in paths])


def _load(path: Path) -> Recording:
    parquet = _pyarrow()
    import pyarrow as pa

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return _read(file)
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(
            f"{path}: no Parquet file, or cut short or changed: {error}"
        ) from error


def _read(file: Any) -> Recording:
    header = _parse_header(file.schema_arrow.metadata or {})
    expected = _schema(header)
    if not file.schema_arrow.equals(expected):
        raise RecordingError(
            f"its columns are {_columns(file.schema_arrow)}; a recording of these probes and "
            f"hazards has {_columns(expected)}"
        )
    streams, tokens, hazards = header.streams, header.tokens, len(header.hazards)
    starts = np.zeros(streams + 1, np.int64)
    names: dict[str, list[str]] = {key: [] for key in ["stream", "text", *header.columns]}
    arrays: dict[str, NDArray[Any]] = {
        "prompt_tokens": np.empty(streams, np.int32),
        "ended": np.empty(streams, np.bool_),
        "position": np.empty(tokens, np.int32),
        "logits": np.empty((tokens, len(header.probes)), np.float32),
        "labels": np.empty((tokens, hazards), np.int8),
        "response_labels": np.empty((streams, hazards), np.int8),
        "characters": np.empty((tokens, 2), np.int32),
    }
    stream = token = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        position, lengths = _lists(table, "position", None)
        rows = slice(token, token := token + len(position))
        entries = slice(stream, stream := stream + len(lengths))
        if stream > streams or token > tokens:
            break
        starts[entries.start + 1 : entries.stop + 1] = lengths
        arrays["position"][rows] = position
        for p, probe in enumerate(header.probes):
            arrays["logits"][rows, p] = _lists(table, f"logit/{probe}", lengths)[0]
        for h, hazard in enumerate(header.hazards):
            arrays["labels"][rows, h] = _lists(table, f"label/{hazard}", lengths)[0]
            arrays["response_labels"][entries, h] = _values(table, f"response/{hazard}")
        for edge, name in enumerate(("begin", "end") if header.characters else ()):
            arrays["characters"][rows, edge] = _lists(table, name, lengths)[0]
        arrays["prompt_tokens"][entries] = _values(table, "prompt_tokens")
        arrays["ended"][entries] = _values(table, "ended")
        names["stream"] += _strings(table, "stream")
        names["text"] += _strings(table, "text") if header.texts else []
        for key in header.columns:
            names[key] += _strings(table, f"column/{key}")
    if (stream, token) != (streams, tokens):
        raise RecordingError(
            f"{stream} streams of {token} tokens are in it, its header says {streams} of {tokens}"
        )
    characters = arrays.pop("characters")
    return Recording(
        bundle=header.bundle,
        probes=header.probes,
        hazards=header.hazards,
        streams=tuple(names["stream"]),
        starts=np.cumsum(starts),
        **arrays,
        characters=characters if header.characters else None,
        texts=tuple(names["text"]) if header.texts else None,
        columns={key: tuple(names[key]) for key in header.columns},
        probes_hash=header.probes_hash,
    )


def _header_of(recording: Recording) -> _Header:
    return _Header(
        schema_version=SCHEMA_VERSION,
        bundle=recording.bundle,
        probes_hash=recording.probes_hash,
        probes=recording.probes,
        hazards=recording.hazards,
        columns=tuple(recording.columns),
        characters=recording.characters is not None,
        texts=recording.texts is not None,
        streams=len(recording),
        tokens=len(recording.position),
    )


def _parse_header(metadata: dict[bytes, bytes]) -> _Header:
    try:
        content = json.loads(metadata.get(_KEY, b"null"))
    except ValueError as error:
        raise RecordingError(f"its header is not JSON: {error}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is not int:
        raise RecordingError(
            "a Parquet file, but no recording of midstream: there is no schema version in it"
        )
    if found > SCHEMA_VERSION:
        raise RecordingError(
            f"its schema version is {found}, this midstream ({version('midstream')}) reads up to "
            f"{SCHEMA_VERSION}: upgrade midstream"
        )
    with named_faults("its header", RecordingError):
        return _Header.model_validate_json(json.dumps(content))


def _schema(header: _Header) -> pa.Schema:
    import pyarrow as pa

    def lists(name: str, values: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", values, False)), False)

    fields = [
        pa.field("stream", pa.string(), False),
        pa.field("prompt_tokens", pa.int32(), False),
        pa.field("ended", pa.bool_(), False),
        lists("position", pa.int32()),
        *(lists(f"logit/{probe}", pa.float32()) for probe in header.probes),
        *(lists(f"label/{hazard}", pa.int8()) for hazard in header.hazards),
        *(pa.field(f"response/{hazard}", pa.int8(), False) for hazard in header.hazards),
    ]
    if header.characters:
        fields += [lists("begin", pa.int32()), lists("end", pa.int32())]
    if header.texts:
        fields.append(pa.field("text", pa.string(), False))
    fields += [pa.field(f"column/{name}", pa.string(), False) for name in header.columns]
    return pa.schema(fields, metadata={_KEY: header.model_dump_json().encode()})


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _groups(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of streams of about a million tokens each."""
    first, streams = 0, len(starts) - 1
    while first < streams:
        last = int(np.searchsorted(starts, starts[first] + _TOKENS_PER_GROUP, side="right")) - 1
        last = min(max(last, first + 1), streams)
        yield first, last
        first = last


def _table(recording: Recording, schema: pa.Schema, first: int, last: int) -> pa.Table:
    import pyarrow as pa

    entries = slice(first, last)
    rows = slice(int(recording.starts[first]), int(recording.starts[last]))
    offsets = pa.array((recording.starts[first : last + 1] - rows.start).astype(np.int32))
    values: list[Any] = [
        recording.streams[entries],
        recording.prompt_tokens[entries],
        recording.ended[entries],
        recording.position[rows],
        *recording.logits[rows].T,
        *recording.labels[rows].T,
        *recording.response_labels[entries].T,
    ]
    if recording.characters is not None:
        values += [*recording.characters[rows].T]
    if recording.texts is not None:
        values.append(recording.texts[entries])
    values += [column[entries] for column in recording.columns.values()]

    def column(field: pa.Field, of: Any) -> pa.Array:
        if not pa.types.is_list(field.type):
            return pa.array(of, field.type)
        flat = pa.array(np.ascontiguousarray(of), field.type.value_type)
        return pa.ListArray.from_arrays(offsets, flat, type=field.type)

    arrays = [column(field, of) for field, of in zip(schema, values, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _lists(
    table: pa.Table, name: str, lengths: NDArray[np.int64] | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values of all lists of a column side by side, and how many each list has."""
    column = table.column(name).combine_chunks()
    found = np.diff(column.offsets.to_numpy()).astype(np.int64)
    if lengths is not None and (found != lengths).any():
        bad = int(np.argmax(found != lengths))
        stream = table.column("stream")[bad].as_py()
        raise RecordingError(
            f"stream {stream!r}: {found[bad]} entries in {name!r} for {lengths[bad]} positions"
        )
    return column.flatten().to_numpy(), found


def _values(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def _strings(table: pa.Table, name: str) -> list[str]:
    strings: list[str] = table.column(name).to_pylist()
    return strings


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "recordings are Parquet files, which needs pyarrow: pip install 'midstream[learn]'"
        ) from error
    return pyarrow.parquet


def refuse_existing(target: Path) -> None:
    """Raise FileExistsError if there is anything, were it a broken link."""
    if os.path.lexists(target):
        raise FileExistsError(
            errno.EEXIST, "File exists; choose another name or remove it", str(target)
        )
