"""``midstream train``: from collected residuals to a calibrated bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from midstream.commands.options import Json, progress_bar
from midstream.policy import TIERS, TierName


def train(
    collection: Annotated[Path, typer.Argument(help="Folder that `midstream collect` wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the bundle.")],
    hazard: Annotated[
        str | None, typer.Option(help="Hazard to train for; needed where the labels have several.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names with commas between, or all that the labels allow.")
    ] = "all",
    refusal: Annotated[
        str | None,
        typer.Option(help="Label that says a response refuses, for latent-guard and harc."),
    ] = None,
    horizon: Annotated[int, typer.Option(min=0, help="Tokens to look ahead; 0 detects.")] = 0,
    false_halts: Annotated[
        str,
        typer.Option(
            help="Share of safe responses that may be halted, of the moderate tier, or by tier: "
            "strict=0.1,moderate=0.05,loose=0.01."
        ),
    ] = "0.05",
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="With which that is guaranteed.")
    ] = 0.95,
    report: Annotated[
        Path | None, typer.Option(help="HTML page that compares methods and layers.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of training.")] = 0,
    json_: Json = False,
) -> None:
    """Train every method at every tap, choose, calibrate with a guarantee, and write a bundle.

    Half of the examples train, a quarter choose, a quarter set the thresholds. An example and its
    near-duplicates stay together.
    """
    from rich.console import Console

    from midstream.bundle import BundleExistsError
    from midstream.learn.activations import Activations
    from midstream.learn.methods import METHODS, methods_for
    from midstream.learn.methods.method import Task
    from midstream.learn.train import train as fit
    from midstream.show import comparison_table

    if out.exists():
        raise BundleExistsError(f"{out} exists: choose a new folder or remove this one")
    data = Activations.open(collection)
    name = _hazard(hazard, data.tokens.hazards)
    task = Task(name, refusal, seed)
    wanted = list(METHODS) if methods == "all" else [one.strip() for one in methods.split(",")]
    if unknown := [one for one in wanted if one not in METHODS]:
        raise typer.BadParameter(f"--methods: no {unknown[0]!r}; there are {', '.join(METHODS)}")
    with progress_bar(json_) as progress:
        trained = fit(
            data,
            task,
            methods_for(wanted, data.tokens, name),
            data.fingerprint,
            horizon=horizon,
            false_halts=_rates(false_halts),
            confidence=confidence,
            calibration_set=f"set aside from {collection.name}",
            notes={"data_sha256": data.manifest.data_sha256},
            progress=progress,
        )
    rows = [compared.row() for compared in trained.compared]
    chosen: Any = trained.bundle.notes["chosen"]
    trained.bundle.save(out)
    if report is not None:
        from midstream.measure.training_report import training_report

        page = training_report(
            [_shortened(row) for row in sorted(rows, key=lambda row: row["level"] == "prompt")],
            title=f"Probes for {name}",
            about={
                "collection": f"{collection.name}, {len(data.tokens)} examples",
                "data": data.manifest.data_sha256,
                "model": data.fingerprint.architecture,
                "bundle": trained.bundle.hash,
                "chosen": ", ".join(f"{row['method']} at {row['tap']}" for row in chosen),
                "guarantee": trained.bundle.policy.provenance.guarantee,
            },
            limits=[
                "The best of many read-outs is chosen on the examples shown here, so its figure is "
                "optimistic; the guarantee is not, it comes from others.",
                *(f"Not trained: {why}" for why in trained.left_out.values()),
            ],
        )
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(page, encoding="utf-8")
    summary = {
        "bundle": str(out),
        "hash": trained.bundle.hash,
        "chosen": chosen,
        "compared": rows,
        "left_out": trained.left_out,
        "policy": trained.bundle.policy.model_dump(mode="json", exclude_none=True),
    }
    if json_:
        print(json.dumps(summary, indent=2))
        return
    console = Console()
    console.print(comparison_table(rows, name))
    for reason in trained.left_out.values():
        console.print(f"not trained: {reason}", highlight=False, markup=False)
    console.print(trained.bundle.policy.provenance.guarantee, highlight=False, markup=False)
    console.print(f"wrote {out}", highlight=False, markup=False)


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a read-out over many taps, with a tap that fits into a column's head."""
    count = row["tap"].count("+") + 1
    return row if count == 1 else {**row, "tap": f"{count} taps"}


def _hazard(asked: str | None, there: tuple[str, ...]) -> str:
    if asked is not None:
        return asked
    if len(there) == 1:
        return there[0]
    raise typer.BadParameter(f"give --hazard, one of {', '.join(there)}")


def _rates(text: str) -> dict[TierName, float]:
    rates: dict[TierName, float] = {}
    for item in text.split(","):
        name, _, value = item.rpartition("=")
        tier = next((tier for tier in TIERS if tier == (name or "moderate").strip()), None)
        try:
            rate = float(value)
        except ValueError:
            rate = -1.0
        if tier is None or not 0 < rate < 1 or tier in rates:
            raise typer.BadParameter(
                f"--false-halts: {item!r} is none; write 0.05, or each of {', '.join(TIERS)} once "
                "as in strict=0.1,moderate=0.05"
            )
        rates[tier] = rate
    return rates
