"""``midstream chain``: fit an absorbing chain, look at it, and see how well it forecasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from midstream.commands.chain_tables import fit_lines, number, summary, tables, with_interval
from midstream.commands.options import BundleOption, Json, load_bundle, without_nan

if TYPE_CHECKING:
    from midstream.chain import Chain
    from midstream.learn.chains.report import FitReport

_AHEAD = (5, 10, 32)
"""Horizons that are shown; within 1 is what the moves say."""

Recordings = Annotated[
    list[Path], typer.Option("--recording", help="Recorded streams; again for more.")
]
Hazards = Annotated[
    list[str] | None,
    typer.Option("--hazard", help="What counts as a violation, again for more; all of the bundle."),
]


def fit(
    recording: Recordings,
    out: Annotated[Path, typer.Option(help="New folder for chain.json, fit.json and plots.")],
    bundle: BundleOption = None,
    by: Annotated[
        str, typer.Option(help="counts: states are bins of the evidence; em: states are latent.")
    ] = "counts",
    states: Annotated[
        int | None, typer.Option(min=1, help="Latent states, by em; chosen when not given.")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Column of the recording: a chain for each of its values.")
    ] = None,
    response_labels: Annotated[
        bool, typer.Option("--response-labels", help="Look at no label of a single token.")
    ] = False,
    hazard: Hazards = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of intervals, hold-out and EM.")] = 0,
    draws: Annotated[int, typer.Option(min=100, help="Chains drawn for the intervals.")] = 1000,
    json_: Json = False,
) -> None:
    """Fit a chain to recorded streams, and say how far it can be trusted."""
    from midstream.learn.chains.fit_recording import fit_recording

    if by not in ("counts", "em"):
        raise typer.BadParameter(f"--by: expected counts or em, got {by}")
    found = fit_recording(
        recording,
        load_bundle(bundle),
        out,
        by="em" if by == "em" else "counts",
        states=states,
        category=category,
        response_labels=response_labels,
        hazards=hazard,
        seed=seed,
        draws=draws,
    )
    if json_:
        print(found.report.model_dump_json(indent=2))
        return
    console = Console()
    for part in tables(summary(found.chain, found.report, list(_AHEAD)), found.report):
        console.print(part)
    for line in fit_lines(found.report):
        console.print(line, highlight=False, markup=False)
    console.print(f"wrote {out}", highlight=False, markup=False)


def show(
    chain: Annotated[Path, typer.Argument(help="A chain.json, or a folder with one: a bundle.")],
    horizon: Annotated[
        list[int] | None, typer.Option(min=0, help="Show the risk within so many tokens; again.")
    ] = None,
    level: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Risk of a point of no return.")
    ] = 0.85,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the horizon curves into this file, .svg or .png.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show a chain: states, moves, risks by horizon, expected tokens, points of no return.

    Intervals are shown where a fit.json lies beside the chain.
    """
    loaded, report = _load(chain)
    horizons = sorted(set(horizon or _AHEAD))
    if plot is not None:
        from midstream.measure.chain_plots import bands_of, horizon_curves, render

        tokens = max(max(horizons), 1)
        bands = bands_of(report.intervals, tokens) if report and report.intervals else None
        clock = report.clock if report else "token"
        never_seen = report.never_seen if report else []
        draw = horizon_curves(loaded, tokens, bands=bands, clock=clock, never_seen=never_seen)
        plot.write_bytes(render(draw, (6, 3.6), plot.suffix.lstrip(".") or "svg"))
    found = summary(loaded, report, horizons, level)
    if json_:
        print(json.dumps(without_nan(found), indent=2))
        return
    console = Console()
    for part in tables(found, report):
        console.print(part)


def forecast(
    recording: Recordings,
    out: Annotated[Path, typer.Option(help="New folder for forecast.json and plots.")],
    bundle: BundleOption = None,
    chain: Annotated[
        Path | None, typer.Option(help="A chain.json in place of the bundle's.")
    ] = None,
    horizon: Annotated[
        list[int] | None, typer.Option(min=0, help="Tokens to look ahead; again for more.")
    ] = None,
    hazard: Hazards = None,
    json_: Json = False,
) -> None:
    """Forecast along recorded streams, and compare with what came: calibration, Brier scores."""
    from midstream.learn.chains.fit import SHOWN_HORIZONS
    from midstream.measure.chain_forecast import forecast_recording

    found = forecast_recording(
        recording,
        load_bundle(bundle),
        out,
        chain=None if chain is None else _load(chain)[0],
        horizons=sorted(set(horizon or SHOWN_HORIZONS)),
        hazards=hazard,
    )
    if json_:
        print(json.dumps(without_nan(found), indent=2))
        return
    console = Console()
    for kind, title in (
        ("forecast", "Violated within the horizon, at tokens not violated yet"),
        ("risk", "Violated now or within the horizon, at every token"),
    ):
        table = Table(title=title, title_justify="left")
        for header in ("horizon", "tokens", "true", "Brier score", "of base rate", "calibration"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in found["horizons"]:
            of = row[kind]
            table.add_row(
                str(row["horizon"]),
                str(of["tokens"]),
                f"{of['base_rate']:.2%}",
                with_interval(of["brier"]),
                number(of["brier_of_base_rate"]),
                with_interval(of["calibration_error"]),
            )
        console.print(table)
    console.print("Below a figure: 95 % by bootstrap over responses. Calibration is the error.")
    console.print(f"wrote {out}", highlight=False, markup=False)


def _load(path: Path) -> tuple[Chain, FitReport | None]:
    """Chain of a file, a folder or a bundle, and the report that lies beside it."""
    from midstream.chain import Chain
    from midstream.learn.chains.report import FitReport

    file = path / "chain.json" if path.is_dir() else path
    if (file.parent / "monitor.json").exists() and path.is_dir():
        return load_bundle(path).chain, None
    chain = Chain.from_json(file.read_text(encoding="utf-8"), str(file))
    beside = file.with_name("fit.json")
    if not beside.exists():
        return chain, None
    report = FitReport.from_json(beside.read_text(encoding="utf-8"), str(beside))
    of_category = {one.file: one.intervals for one in report.categories.values()}
    if file.name in of_category:
        return chain, report.model_copy(update={"intervals": of_category[file.name]})
    return chain, report if file.name == "chain.json" else None
