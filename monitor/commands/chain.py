"""``midstream chain``: fit an absorbing chain, look at it, and see how well it forecasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from midstream.commands.options import BundleOption, Json, load_bundle, without_nan

if TYPE_CHECKING:
    from midstream.chain import Chain
    from midstream.learn.chains.fit import FitReport


_MOVES = 3
"""Of the moves from a state so many are shown, the likeliest; --json has all."""

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
    for part in _tables(found.chain, found.report, _horizons(None)):
        console.print(part)
    for line in _fit_lines(found.report):
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
    horizons = _horizons(horizon)
    if plot is not None:
        from midstream.measure.chain_plots import bands_of, horizon_curves, render

        tokens = max(max(horizons), 1)
        bands = bands_of(report.intervals, tokens) if report and report.intervals else None
        clock = report.clock if report else "token"
        draw = horizon_curves(loaded, tokens, bands=bands, clock=clock)
        plot.write_bytes(render(draw, (6, 3.6), plot.suffix.lstrip(".") or "svg"))
    if json_:
        print(json.dumps(without_nan(_summary(loaded, report, horizons, level)), indent=2))
        return
    console = Console()
    for part in _tables(loaded, report, horizons, level):
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
    from midstream.measure.chain_forecast import forecast_recording

    found = forecast_recording(
        recording,
        load_bundle(bundle),
        out,
        chain=None if chain is None else _load(chain)[0],
        horizons=_horizons(horizon),
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
                _with_interval(of["brier"]),
                _number(of["brier_of_base_rate"]),
                _with_interval(of["calibration_error"]),
            )
        console.print(table)
    console.print("Below a figure: 95 % by bootstrap over responses. Calibration is the error.")
    console.print(f"wrote {out}", highlight=False, markup=False)


def _horizons(given: list[int] | None) -> list[int]:
    from midstream.learn.chains.fit import SHOWN_HORIZONS

    return sorted(set(given or SHOWN_HORIZONS))


def _load(path: Path) -> tuple[Chain, FitReport | None]:
    """Chain of a file, a folder or a bundle, and the report that lies beside it."""
    from midstream.chain import Chain
    from midstream.learn.chains.fit import FitReport

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


def _summary(
    chain: Chain, report: FitReport | None, horizons: list[int], level: float
) -> dict[str, Any]:
    """All that the tables show, for machines; absorbing quantities are null where infinite."""
    from midstream.chain import SingularChainError

    found: dict[str, Any] = {
        "states": chain.states,
        "transition": chain.transition,
        "ending": chain.ending,
        "absorbing": chain.absorbing.tolist(),
        "risk": {},
    }
    for tokens in horizons:
        interval = report.intervals.at(tokens) if report and report.intervals else None
        found["risk"][str(tokens)] = {
            "value": chain.horizon(tokens).tolist(),
            "low": interval and interval[0],
            "high": interval and interval[1],
        }
    try:
        found |= {
            "never_absorbed": None,
            "expected_tokens": chain.expected_tokens().tolist(),
            "violated_in_the_end": chain.risk().tolist(),
            "zones": [str(zone) for zone in chain.zones()],
            "points_of_no_return": chain.points_of_no_return(level),
        }
    except SingularChainError as error:
        nothing = ("expected_tokens", "violated_in_the_end", "zones", "points_of_no_return")
        found |= {"never_absorbed": str(error), **dict.fromkeys(nothing)}
    return found


def _tables(
    chain: Chain, report: FitReport | None, horizons: list[int], level: float = 0.85
) -> list[Any]:
    found = _summary(chain, report, horizons, level)
    clock = report.clock if report else "token"
    k = chain.states
    moves = Table(title=f"Chance to be there at the next {clock}", title_justify="left")
    for header in ("state", "stays", "moves to", "violated", "ended"):
        moves.add_column(header, justify="left" if header == "moves to" else "right")
    for state, row in enumerate(found["absorbing"][:k]):
        others = sorted((-chance, to) for to, chance in enumerate(row[:k]) if to != state)
        likely = [f"{to}: {_number(-less)}" for less, to in others[:_MOVES] if less < -0.0005]
        chances = map(_number, row[k:])
        moves.add_row(str(state), _number(row[state]), ", ".join(likely), *chances)
    risks = Table(title="Risk by state", title_justify="left")
    risks.add_column("state", justify="right")
    for tokens in horizons:
        risks.add_column(f"within {tokens}", justify="right")
    infinite = found["never_absorbed"]
    for header in () if infinite else ("ever", f"{clock}s to the end", "zone"):
        risks.add_column(header, justify="right" if header != "zone" else "left")
    for state in range(k):
        cells = []
        for tokens in horizons:
            of = found["risk"][str(tokens)]
            ends = (of["low"][state], of["high"][state]) if of["low"] else ()
            cells.append(_with_interval((of["value"][state], *ends)))
        if not infinite:
            zone = found["zones"][state]
            cells += [
                _number(found["violated_in_the_end"][state]),
                f"{found['expected_tokens'][state]:.1f}",
                zone,
            ]
        risks.add_row(str(state), *cells)
    last = infinite or (
        f"states with a risk of {level:g} or more: "
        + (", ".join(map(str, found["points_of_no_return"])) or "none")
    )
    return [moves, risks, last]


def _fit_lines(report: FitReport) -> list[str]:
    """What else there is to know about a fit, in words."""
    lines = [
        f"{report.streams} streams, {report.tokens} {report.clock}s, {report.violating} violate"
    ]
    if (test := report.order_test) is not None and test["p_value"] is not None:
        lines.append(
            f"order 1 against 2: χ² {test['statistic']:.1f} on {test['degrees']} degrees of "
            f"freedom, p = {test['p_value']:.3g}"
        )
    if test is not None and test["note"]:
        lines.append(test["note"])
    if "pooled" in report.held_out:
        told = [f"{report.held_out['pooled']:.4f}"]
        if "by_category" in report.held_out:
            told.append(f"{report.held_out['by_category']:.4f} by category")
        lines.append(f"held-out log-likelihood per {report.clock}: {', '.join(told)}")
    lines += [f"{key.replace('_', ' ')}: {value}" for key, value in report.notes.items() if value]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if 0 < value < 1e-9:
        return "<1e-09"
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"


def _with_interval(value: Any) -> str:
    """A value, and below it its interval where there is one."""
    first, *ends = value
    return _number(first) + (f"\n{_number(ends[0])} – {_number(ends[1])}" if ends else "")
