"""From labelled data, or a recording, to a report of what a monitor is worth."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from midstream.bundle import Bundle
from midstream.learn.public_sets import read_labelled
from midstream.measure import report
from midstream.measure.bootstrap import Figure
from midstream.measure.measured import Measured
from midstream.measure.outcomes import MeasureError
from midstream.measure.record import record
from midstream.measure.recording import Recording
from midstream.measure.recording_file import refuse_existing
from midstream.measure.rejudge import rejudge

RECORDING, HTML, JSON = "recording.parquet", "report.html", "report.json"


def evaluate_data(
    data: Path,
    out: Path,
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    *,
    data_format: str | None = None,
    hazard: str | None = None,
    tier: str | None = None,
    columns: Sequence[str] | None = None,
    look_alikes: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> report.Content:
    """Feed labelled data to a model, and report how a bundle judges it.

    Parameters
    ----------
    data : path
        Examples, in one of `midstream.learn.public_sets.DATA_FORMATS`.
    out : path
        A new folder for ``recording.parquet``, ``report.html`` and ``report.json``. The recording
        is there as soon as the model is done.
    model, tokenizer, bundle, batch_size, progress
        As for `midstream.measure.record.record`.
    data_format : str, optional
        By the end of the file's name when not given.
    hazard : str, optional
        What labels without a name speak of.
    tier : str, optional
        Any tier of the policy, its default when not given.
    columns : sequence of str, optional
        Keys of the data to break figures down by; when not given, the columns with few values.
    look_alikes : str, optional
        ``COLUMN=VALUE`` of benign texts that look harmful; a column of the data, or of ``columns``.

    Returns
    -------
    dict
        `midstream.measure.report.content`.

    Raises
    ------
    FileExistsError
        If there is anything at ``out``; before the work, not after it.
    ExampleError, AlignmentError, WrongModelError, RecordingError, MeasureError, PolicyError
        For data, a model, labels, columns or a tier that do not fit.
    """
    chosen = _look_alikes(look_alikes)
    bundle.policy.row(_tier(bundle, tier))
    refuse_existing(out)
    out.mkdir(parents=True)
    try:
        examples = list(read_labelled(data, data_format, hazard=hazard, columns=columns or ()))
        recording = record(
            model, tokenizer, examples, bundle, batch_size=batch_size, progress=progress
        )
        recording.save(out / RECORDING)
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    sources = {"data": data.name, "data_sha256": _sha256(data)}
    return _write(recording, bundle, out, sources, tier, columns, chosen)


def evaluate_recording(
    paths: Sequence[Path],
    out: Path,
    bundle: Bundle,
    *,
    tier: str | None = None,
    columns: Sequence[str] | None = None,
    look_alikes: str | None = None,
) -> report.Content:
    """Report how a bundle judges recorded streams; the model is not needed.

    Parameters
    ----------
    paths : sequence of path
        Files of one bundle, as `midstream.measure.recording.Recording.save` writes them.
    out : path
        A new folder for ``report.html`` and ``report.json``.
    bundle, tier, columns, look_alikes
        As for :func:`evaluate_data`; the bundle has the probes of the recording.

    Raises
    ------
    FileExistsError, RecordingError, MeasureError, PolicyError
        As :func:`evaluate_data`.
    """
    chosen = _look_alikes(look_alikes)
    bundle.policy.row(_tier(bundle, tier))
    recording = Recording.load(*paths)
    sources = {
        "recording": ", ".join(path.name for path in paths),
        "recording_sha256": ", ".join(_sha256(path) for path in paths),
    }
    refuse_existing(out)
    out.mkdir(parents=True)
    try:
        return _write(recording, bundle, out, sources, tier, columns, chosen)
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise


def summary(content: report.Content) -> list[tuple[str, str, str]]:
    """Title, value and interval of the figures that head the report, for a terminal."""
    rows = []
    for key in report.CARDS:
        unit, title, note = report.TITLES[key]
        figure: Figure = content["headline"][key]
        rows.append(
            (f"{title}, {note}", report.show(figure, unit), report.show_interval(figure, unit))
        )
    return rows


def _write(
    recording: Recording,
    bundle: Bundle,
    out: Path,
    sources: dict[str, str],
    tier: str | None,
    columns: Sequence[str] | None,
    look_alikes: tuple[str, str] | None,
) -> report.Content:
    name = _tier(bundle, tier)
    judgement = rejudge(recording, bundle, tier=name)
    measured = Measured.of(recording, judgement, bundle, tier=name)
    found = report.content(measured, sources=sources, columns=columns, look_alikes=look_alikes)
    for file, text in ((JSON, report.to_json(found)), (HTML, report.to_html(measured, found))):
        partial = out / f".{file}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out / file)
    return found


def _tier(bundle: Bundle, tier: str | None) -> Any:
    """An evaluation may look at a tier that clients may not ask for."""
    return tier or bundle.policy.default_tier


def _look_alikes(chosen: str | None) -> tuple[str, str] | None:
    if chosen is None:
        return None
    column, sign, value = chosen.partition("=")
    if not (column and sign and value):
        raise MeasureError(f"look-alikes: expected COLUMN=VALUE, got {chosen!r}")
    return column, value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
