"""``midstream record``: streams as their probes see them, to be judged again without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from midstream.commands.options import (
    BatchSize,
    BundleOption,
    DataFormat,
    Json,
    Model,
    UnnamedHazard,
    load,
    progress_bar,
)


def record(
    data: Annotated[Path, typer.Option(help="Texts or conversations; JSONL, CSV or Parquet.")],
    out: Annotated[Path, typer.Option(help="New Parquet file.")],
    model: Model = None,
    bundle: BundleOption = None,
    data_format: DataFormat = None,
    hazard: UnnamedHazard = None,
    columns: Annotated[
        str, typer.Option(help="Keys of the data to keep, with commas between.")
    ] = "",
    labelled: Annotated[
        bool, typer.Option(help="Whether every row must have a label of some kind.")
    ] = True,
    batch_size: BatchSize = 16,
    json_: Json = False,
) -> None:
    """Feed given texts to a model and keep what the bundle's probes say at every token.

    Some ten bytes per token, for `midstream replay` and `midstream evaluate --recording`.
    """
    from midstream.measure.record import record_file

    loaded, tokenizer, ours = load(model, bundle)
    with progress_bar(json_) as bar:
        told = record_file(
            data,
            out,
            loaded,
            tokenizer,
            ours,
            data_format=data_format,
            hazard=hazard,
            columns=[key.strip() for key in columns.split(",") if key.strip()],
            labelled=labelled,
            batch_size=batch_size,
            progress=lambda done, total: bar("record", done, total),
        )
    if json_:
        print(json.dumps(told))
    else:
        typer.echo(
            f"{out}: {told['streams']} streams, {told['tokens']} tokens, {told['bytes']} bytes"
        )
