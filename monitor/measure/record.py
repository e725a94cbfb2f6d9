"""Labelled examples to a recording: through the model once, teacher-forced, read by the probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from midstream.bundle import Bundle, Fingerprint
from midstream.engines.hf.checks import window
from midstream.engines.hf.scoring import GivenTokens, feed
from midstream.learn.align import encode
from midstream.learn.examples import Example
from midstream.learn.public_sets import read_labelled
from midstream.measure.recording import TIER, Recording, RecordingError, probes_hash
from midstream.measure.recording_file import refuse_existing
from midstream.measure.traces import trace_rows
from midstream.monitor import Monitor


def record(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    bundle: Bundle,
    *,
    hazards: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Score every token of each example as if the model had just generated its response.

    The prompt's tokens are in it as well. The special tokens around a plain text, which serving
    never scores, are not; tokens of a response behind the end of the window neither, and such a
    stream counts as cut off.

    Costs a forward pass per token without the head, padding little since batches are of like
    length. Beside the recording it takes the slots of one batch, ``batch_size`` traces of the
    longest example.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    examples : sequence of Example
        A column that one of them lacks is empty there.
    bundle : Bundle
        Made for the model.
    hazards : sequence of str, optional
        Columns of the labels; by default those that the bundle's probes look for.
    batch_size : int
    progress : callable, optional
        Called as ``progress(examples done, examples in all)``.

    Raises
    ------
    WrongModelError
        When the bundle was made for another model.
    AlignmentError
        As `midstream.learn.align.encode`.
    RecordingError
        Without examples, with two of one id, and when they have labels of other hazards alone.
    """
    if not examples:
        raise RecordingError("no examples to record; give at least one")
    if any(TIER in example.columns for example in examples):
        raise RecordingError(
            f"column {TIER!r} is kept for the strictness that a stream was judged by; rename it"
        )
    bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
    looked_for = tuple(dict.fromkeys(bundle.bank.hazards)) if hazards is None else tuple(hazards)
    _check_hazards(examples, looked_for)
    longest = window(getattr(model, model.base_model_prefix, model))
    encoded = [encode(example, tokenizer, looked_for, window=longest) for example in examples]
    judged = [~one.special for one in encoded]
    lengths = [int(mask.sum()) for mask in judged]
    prompts = [int(m[: e.prompt_tokens].sum()) for m, e in zip(judged, encoded, strict=True)]
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    logits = np.empty((starts[-1], len(bundle.bank.names)), np.float32)

    monitor = Monitor(bundle, slots=batch_size, trace=max(lengths), device=model.device)
    monitor.recognise_segments(tokenizer)
    order = sorted(range(len(encoded)), key=lambda e: len(encoded[e].ids))
    for done in range(0, len(order), batch_size):
        batch = order[done : done + batch_size]
        given = [
            GivenTokens(encoded[e].id, encoded[e].ids.tolist(), judged[e].tolist(), prompts[e])
            for e in batch
        ]
        for e, report in zip(batch, feed(model, given, monitor), strict=True):
            logits[starts[e] : starts[e + 1]] = trace_rows(report, bundle)[1]
        if progress is not None:
            progress(done + len(batch), len(order))

    def rows(name: str) -> Any:
        parts = [getattr(one, name)[m] for one, m in zip(encoded, judged, strict=True)]
        return np.concatenate(parts)

    columns = dict.fromkeys(name for example in examples for name in example.columns)
    return Recording(
        bundle=bundle.hash,
        probes=bundle.bank.names,
        hazards=looked_for,
        streams=tuple(one.id for one in encoded),
        starts=starts,
        prompt_tokens=np.array(prompts, np.int32),
        ended=np.array([one.cut_tokens == 0 for one in encoded], np.bool_),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        logits=logits,
        labels=rows("labels"),
        response_labels=np.stack([one.response_labels for one in encoded]),
        characters=rows("characters"),
        texts=tuple(example.response for example in examples),
        columns={
            name: tuple(example.columns.get(name, "") for example in examples) for name in columns
        },
        probes_hash=probes_hash(bundle.bank),
    )


def _check_hazards(examples: Sequence[Example], looked_for: Sequence[str]) -> None:
    """Refuse labels that all speak of other hazards: each would be recorded as free of ours."""
    named = {
        name
        for one in examples
        for name in (*one.labels, *one.prompt_labels, *(span.hazard for span in one.spans or ()))
    }
    if named and not named & set(looked_for):
        raise RecordingError(
            f"the data have labels of {_quoted(named)}, and the bundle looks for "
            f"{_quoted(looked_for)}; where labels in the data have no name of their own, give "
            "--hazard (hazard=) with the name that the bundle uses"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def record_file(
    source: Path,
    output: Path,
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    *,
    data_format: str | None = None,
    hazard: str | None = None,
    columns: Sequence[str] = (),
    labelled: bool = True,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read data as `midstream.learn.public_sets.read_labelled` does, and save their recording.

    Parameters
    ----------
    source, output : path
        A file of examples, and the Parquet file to be written.
    model, tokenizer, bundle, batch_size, progress
        As for `midstream.measure.record.record`.
    data_format, hazard, columns, labelled
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
        read_labelled(source, data_format, hazard=hazard, columns=columns, labelled=labelled)
    )
    recording = record(model, tokenizer, examples, bundle, batch_size=batch_size, progress=progress)
    recording.save(output)
    return {
        "streams": len(recording),
        "tokens": len(recording.position),
        "bytes": output.stat().st_size,
    }
