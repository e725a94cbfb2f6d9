"""``midstream score``: every token of given texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midstream.commands.options import (
    BatchSize,
    BundleOption,
    Model,
    Tier,
    load,
    new_monitor,
    progress_bar,
    window,
)


def score(
    model: Model = None,
    bundle: BundleOption = None,
    input_: Annotated[
        Path, typer.Option("--input", "-i", help="JSONL, or CSV by its name's end; - is stdin.")
    ] = Path("-"),
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL; - is standard output.")
    ] = Path("-"),
    field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    batch_size: BatchSize = 16,
    tier: Tier = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
) -> None:
    """Score given texts token by token, one JSON object per line in and out."""
    from midstream import texts
    from midstream.engines.hf import score as score_texts

    loaded, tokenizer, ours = load(model, bundle)
    records = list(texts.read(input_, field))
    monitor = new_monitor(ours, slots=batch_size, trace=window(loaded))
    with texts.writer(output) as write, progress_bar(not progress) as bar:
        scores = score_texts(
            loaded,
            tokenizer,
            (record[field] for record in records),
            monitor,
            batch_size=batch_size,
            tier=tier,
        )
        for done, (record, scored) in enumerate(zip(records, scores, strict=True), start=1):
            write(texts.scored_record(record, scored))
            bar("score", done, len(records))
