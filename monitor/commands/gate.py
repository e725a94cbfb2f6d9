"""``midstream gate``: fit the gate of turns on labelled conversations, and replay it over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from midstream.commands.options import BatchSize, BundleOption, Json, Model, load, progress_bar

if TYPE_CHECKING:
    from midstream.measure.conversations import Conversation

Data = Annotated[
    Path, typer.Option(help="Conversations as JSON lines (also MTID's), or R-Judge's .json.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--data-format", help="jsonl or r_judge; by the end of the file's name when not given."
    ),
]
Shown = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="What the model reads before a response: turn (the system's messages and this turn's) "
        "or history. The testbed's model reads turns, others the history when not given.",
    ),
]


def replay(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for decisions, figures and plots.")],
    model: Model = None,
    bundle: BundleOption = None,
    data_format: Format = None,
    context: Shown = None,
    ledger: Annotated[
        str, typer.Option(help="memory:, a file of SQLite, or redis://host:port/db.")
    ] = "memory:",
    batch_size: BatchSize = 16,
    json_: Json = False,
) -> None:
    """Score every response once, and let the gate judge the conversations turn by turn."""
    from midstream.atomic import write_folder
    from midstream.ledger.open import open_ledger
    from midstream.measure.turn_report import replay_files
    from midstream.turns import TurnGate

    _refuse_existing(out)
    loaded = load(model, bundle)
    try:
        store = open_ledger(ledger)
    except ValueError as error:
        raise typer.BadParameter(f"--ledger: {error}") from error
    gate = TurnGate(loaded[2], store)
    conversations, hazards, about = _scored(
        data, data_format, loaded, context or _default(model), batch_size, json_
    )
    files, metrics = replay_files(gate, conversations, hazards, about)
    gate.ledger.close()
    write_folder(out, files)
    if json_:
        print(json.dumps(metrics, indent=2))
        return
    _show(metrics)
    typer.echo(f"wrote {out}: {', '.join(sorted(files))}")


def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the new bundle.")],
    model: Model = None,
    bundle: BundleOption = None,
    data_format: Format = None,
    context: Shown = None,
    states: Annotated[
        int | None,
        typer.Option(min=1, help="Transient states; by cross-validation when not given."),
    ] = None,
    blocked: Annotated[
        float | None,
        typer.Option(
            help="Bound on the share of harmless conversations that are blocked; without one the "
            "threshold is that of the largest F1phi2.",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of that bound.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the split and of the fit.")] = 0,
    batch_size: BatchSize = 16,
    json_: Json = False,
) -> None:
    """Put a turn model, and a policy for it, into a copy of a bundle.

    Three fifths of the labelled conversations fit the model, the others choose the threshold.
    """
    from midstream.bundle import BundleExistsError
    from midstream.learn.turn_gate_fit import fit_gate

    if out.exists():
        raise BundleExistsError(f"{out} exists: choose a new folder or remove this one")
    for name, share in (("blocked", blocked), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise typer.BadParameter(f"--{name}: expected a number between 0 and 1, got {share:g}")
    loaded = load(model, bundle)
    conversations, hazards, about = _scored(
        data, data_format, loaded, context or _default(model), batch_size, json_
    )
    made, summary = fit_gate(
        loaded[2],
        conversations,
        hazards,
        source=data.name,
        states=states,
        blocked=blocked,
        confidence=confidence,
        seed=seed,
    )
    made.save(out)
    summary = {**about, "out": str(out), "hash": made.hash, **summary}
    if json_:
        print(json.dumps(summary, indent=2))
        return
    for key, value in summary.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {_number(found)}" for name, found in value.items()) or "-"
        elif isinstance(value, list):
            shown = ", ".join(f"{edge:.3g}" for edge in value)
        elif isinstance(value, float):
            shown = _number(value)
        typer.echo(f"{key.replace('_', ' ')}: {shown}")


def _default(model: str | None) -> str:
    return "turn" if model is None else "history"


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists: choose a new folder or remove this one")


def _scored(
    data: Path, data_format: str | None, loaded: Any, context: str, batch_size: int, quiet: bool
) -> tuple[list[Conversation], list[list[float | None]], dict[str, Any]]:
    from midstream.measure.conversations import read_conversations
    from midstream.measure.turn_scoring import turn_hazards

    if context not in ("turn", "history"):
        raise typer.BadParameter(f"--context: no {context!r}; there are turn and history")
    chosen: Literal["turn", "history"] = "turn" if context == "turn" else "history"
    conversations = read_conversations(data, data_format)
    model, tokenizer, bundle = loaded
    with progress_bar(quiet) as bar:
        hazards = turn_hazards(
            model,
            tokenizer,
            conversations,
            bundle,
            context=chosen,
            batch_size=batch_size,
            progress=lambda done, total: bar("score", done, total),
        )
    reads = chosen if tokenizer.chat_template is not None else "each response by itself"
    return conversations, hazards, {"data": data.name, "model_reads": reads}


def _show(metrics: dict[str, Any]) -> None:
    console = Console()
    told = (
        "conversations", "labelled", "turns", "turns_without_evidence", "turns_unseen",
        "conversations_blocked",
    )  # fmt: skip
    console.print(", ".join(f"{key.replace('_', ' ')}: {metrics[key]}" for key in told))
    if "gate" in metrics:
        table = Table(title=f"Turn gate at block_at {metrics['policy']['block_at']:.4g}")
        for column in ("figure", "value", "95 % interval", "n", "of", "note"):
            table.add_column(column)
        for name, figure in metrics["gate"].items():
            of = {"benign_score": "harmless", "f1phi2": "all"}.get(name, "harmful")
            if figure["value"] is None:  # the limits say why
                continue
            value, interval = _number(figure["value"]), _interval(figure)
            table.add_row(name, value, interval, str(figure["n"]), of, figure["reason"])
        console.print(table)
        _show_methods(console, metrics["at_best_threshold_here"])
    for limit in metrics["limits"]:
        console.print(f"- {limit}", highlight=False, markup=False)


def _show_methods(console: Console, methods: dict[str, Any]) -> None:
    located = all(method["f1phi2"]["value"] is not None for method in methods.values())
    shown = ("f1phi2", "phi2") if located else ("detected",)
    table = Table(title="At the threshold that is the best on these very conversations")
    for column in ("method", shown[0], "95 % interval", *shown[1:], "benign_score"):
        table.add_column(column)
    for name, method in methods.items():
        others = [_number(method[figure]["value"]) for figure in (*shown[1:], "benign_score")]
        first = method[shown[0]]
        interval = _interval(first)
        table.add_row(name, _number(first["value"]), interval, *others)
    console.print(table)
    for name, method in methods.items():
        console.print(f"{name}: {method['score']}", highlight=False, markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(figure: dict[str, Any]) -> str:
    return "" if figure["low"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"
