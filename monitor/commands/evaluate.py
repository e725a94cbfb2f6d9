"""``midstream evaluate``: what a bundle is worth on labelled data, as a page and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from midstream.commands.options import (
    BatchSize,
    BundleOption,
    DataFormat,
    Json,
    Model,
    Tier,
    UnnamedHazard,
    load,
    load_bundle,
    progress_bar,
)


def evaluate(
    out: Annotated[Path, typer.Option(help="New folder for report.html and report.json.")],
    data: Annotated[
        Path | None, typer.Option(help="Labelled texts; they go through the model once.")
    ] = None,
    recording: Annotated[
        list[Path] | None,
        typer.Option(help="Recorded streams instead, again for more; the model is not needed."),
    ] = None,
    model: Model = None,
    bundle: BundleOption = None,
    data_format: DataFormat = None,
    hazard: UnnamedHazard = None,
    tier: Tier = None,
    columns: Annotated[
        str | None, typer.Option(help="Keys of the data to break figures down by, with commas.")
    ] = None,
    look_alikes: Annotated[
        str | None,
        typer.Option(help="COLUMN=VALUE of benign texts that look harmful: over-refusal."),
    ] = None,
    batch_size: BatchSize = 16,
    json_: Json = False,
) -> None:
    """Measure a bundle on labelled data and write a report.

    With --data the folder also holds recording.parquet, which `midstream replay` judges again.
    """
    from midstream.measure.evaluate import evaluate_data, evaluate_recording, summary
    from midstream.measure.report import to_json

    if (data is None) == (recording is None):
        raise typer.BadParameter("give either --data or --recording")
    keys = None if columns is None else [key.strip() for key in columns.split(",")]
    if data is None:
        ours = load_bundle(bundle)
        content = evaluate_recording(
            recording or [], out, ours, tier=tier, columns=keys, look_alikes=look_alikes
        )
    else:
        loaded, tokenizer, ours = load(model, bundle)
        with progress_bar(json_) as bar:
            content = evaluate_data(
                data,
                out,
                loaded,
                tokenizer,
                ours,
                data_format=data_format,
                hazard=hazard,
                tier=tier,
                columns=keys,
                look_alikes=look_alikes,
                batch_size=batch_size,
                progress=lambda done, total: bar("score", done, total),
            )
    if json_:
        print(to_json(content))
        return
    console = Console()
    table = Table(title="95 % intervals by bootstrap over responses", title_justify="left")
    for header in ("figure", "value", "interval"):
        table.add_column(header, justify="left" if header == "figure" else "right")
    for row in summary(content):
        table.add_row(*row)
    console.print(table)
    if unscored := content["data"]["unscored_tokens"]:
        console.print(
            f"{unscored} of {content['data']['response_tokens']} tokens have no score: their "
            "logits are not finite. The figures say nothing about them.",
            style="yellow",
        )
    console.print(f"wrote {out / 'report.html'}", highlight=False, markup=False)
