"""``midstream chain stop``: what costs of a false halt, a leak and a delay imply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from midstream.commands.options import Json, Tier


def stop(
    source: Annotated[
        Path, typer.Argument(metavar="CHAIN_OR_BUNDLE", help="A chain.json, or a bundle's folder.")
    ],
    false_halt: Annotated[float, typer.Option(help="Cost of halting a safe stream, once.")],
    leak: Annotated[float, typer.Option(help="Cost of each violating token that leaves.")],
    delay: Annotated[float, typer.Option(help="Cost of each token during which a stream is held.")],
    out: Annotated[Path, typer.Option(help="New folder for policy.yaml, stop.json and two plots.")],
    recording: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled recorded streams to price on, too; needs a bundle."),
    ] = None,
    tier: Tier = None,
    streams: Annotated[int, typer.Option(min=100, help="Streams to simulate.")] = 4000,
    points: Annotated[int, typer.Option(min=10, help="Beliefs of the grid.")] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    json_: Json = False,
) -> None:
    """Find when to halt at least expected cost, and the thresholds that come closest to it."""
    from midstream.atomic import write_folder
    from midstream.bundle import Bundle
    from midstream.chain import Chain
    from midstream.learn.stopping import Costs
    from midstream.measure.recording import Recording
    from midstream.measure.recording_file import refuse_existing
    from midstream.measure.stopping import study
    from midstream.measure.stopping_plots import cost_by_threshold, regions
    from midstream.measure.stopping_words import sentences

    costs = Costs(false_halt, leak, delay)
    refuse_existing(out)
    bundle = Bundle.load(source) if source.is_dir() else None
    if bundle is None and (recording or tier):
        raise typer.BadParameter("--recording and --tier need a bundle, not a chain alone")
    chain = bundle.chain if bundle else Chain.from_json(source.read_text("utf-8"), str(source))
    shipped = bundle.policy.tiers[bundle.policy.tier_for(tier)] if bundle else None
    found = study(
        chain,
        costs,
        shipped=shipped,
        recording=(Recording.load(*recording), bundle) if bundle and recording else None,
        streams=streams,
        points=points,
        seed=seed,
    )
    said = sentences(found.result)
    content = json.dumps({**found.result, "sentences": said}, indent=2) + "\n"
    write_folder(
        out,
        {
            "policy.yaml": found.suggestion().to_yaml().encode(),
            "stop.json": content.encode(),
            "cost.svg": cost_by_threshold(found),
            "regions.svg": regions(found),
        },
    )
    if json_:
        print(content, end="")
        return
    console = Console()
    for part, title in (("simulated", "simulated from the chain"), ("recorded", "recorded")):
        if (priced := found.result[part]) is not None:
            console.print(_table(priced, f"{priced['streams']} streams {title}"))
    for line in said:
        console.print(line, highlight=False, markup=False)
    console.print(f"wrote {out}", highlight=False, markup=False)


def _table(priced: dict[str, object], title: str) -> Table:
    table = Table(title=f"{title}; 95 % by bootstrap", title_justify="left", box=box.SIMPLE)
    for header in ("policy", "cost", "false halts", "others halted", "leaked", "held"):
        kept = header in ("policy", "cost", "false halts")  # on one line
        table.add_column(header, justify="left" if header == "policy" else "right", no_wrap=kept)
    policies = priced["policies"]
    assert isinstance(policies, dict)
    for name, row in policies.items():
        table.add_row(
            name,
            _value(row["cost"]) + _interval(row["cost"]),
            _value(row["false_halts"], 100, " %") + _interval(row["false_halts"], 100),
            _value(row["violating_halted"], 100, " %"),
            *(_value(row[key]) for key in ("leaked_tokens", "held_tokens")),
        )
    return table


def _value(figure: dict[str, float | None], unit: float = 1, sign: str = "") -> str:
    return "-" if figure["value"] is None else f"{unit * figure['value']:.3g}{sign}"


def _interval(figure: dict[str, float | None], unit: float = 1) -> str:
    low, high = figure["low"], figure["high"]
    return (
        ""
        if low is None or high is None or low == high
        else (f"\n{unit * low:.2g}–{unit * high:.2g}")
    )
