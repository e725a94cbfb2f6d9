"""``midstream record``: labelled data through a model once, to a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from midstream.bundle import Bundle
from midstream.learn.readers import Format, read_examples
from midstream.measure.record import record
from midstream.measure.recording_file import refuse_existing


def record_file(
    source: Path,
    output: Path,
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    *,
    format: Format | None = None,
    hazard: str | None = None,
    columns: Sequence[str] = (),
    labelled: bool = True,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read data as `midstream.learn.readers.read_examples` does, and save their recording.

    Parameters
    ----------
    source, output : path
        A file of examples, and the Parquet file to be written.
    model, tokenizer, bundle, batch_size, progress
        As for `midstream.measure.record.record`.
    format, hazard, columns, labelled
        As for the reader. Without labels a recording can be replayed, and not evaluated.

    Returns
    -------
    dict
        Streams, tokens, and bytes of the file.

    Raises
    ------
    FileExistsError
        If there is anything at ``output``; before the work, not after it.
    ValueError
        As the reader and `record` do.
    """
    refuse_existing(output)
    examples = list(
        read_examples(source, format=format, hazard=hazard, columns=columns, labelled=labelled)
    )
    recording = record(model, tokenizer, examples, bundle, batch_size=batch_size, progress=progress)
    recording.save(output)
    return {
        "streams": len(recording),
        "tokens": len(recording.position),
        "bytes": output.stat().st_size,
    }
