"""What the command line shows: text coloured by risk, risk curves, tables. Rendering only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from midstream.streams import Event, StreamReport

BARS = "▁▂▃▄▅▆▇█"


def risk_style(risk: float | None) -> str:
    """Colour of a risk: green at 0, yellow at one half, red at 1; grey where there is none."""
    if risk is None:
        return "grey50"
    red, green = min(1.0, 2 * risk), min(1.0, 2 - 2 * risk)
    return f"rgb({int(90 + 165 * red)},{int(70 + 150 * green)},70)"


def risk_curve(risks: Sequence[float | None], width: int) -> Text:
    """Sparkline of the last ``width`` risks, one bar per token; a gap where a token has none."""
    curve = Text()
    for risk in risks[-width:]:
        bar = " " if risk is None else BARS[min(len(BARS) - 1, int(risk * len(BARS)))]
        curve.append(bar, style=risk_style(risk))
    return curve


def coloured(pieces: Iterable[tuple[str, float | None]]) -> Text:
    """Text whose pieces carry the colour of their risk."""
    text = Text()
    for piece, risk in pieces:
        text.append(piece, style=risk_style(risk))
    return text


class StreamView:
    """The state of one watched stream on screen."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._text = Text()
        self._risks: list[float | None] = []
        self._status = Text("generating", style="bold")

    def take(self, event: Event) -> None:
        """Take one event of the stream."""
        if event.risk is not None and event.type in ("released", "halted", "verdict"):
            self._risks.append(event.risk)
        if event.type == "released" and event.text:
            self._text.append(event.text, style=risk_style(event.risk))
        elif event.type == "verdict":
            self._status = Text("held" if event.verdict == "HOLD" else "generating", style="bold")
        elif event.type == "halted":
            self._status = Text(
                f"HALTED at token {event.position}, risk {event.risk:.2f}, cause: {event.cause}",
                style="bold red",
            )
        elif event.type == "finished" and event.report is not None:
            self._risks = list(event.report.trace.risk)
            if event.report.verdict != "HALT":
                self._status = Text(f"finished ({event.message})", style="bold green")
            self._status.append(f"  ·  {tokens_line(event.report)}", style="not bold")

    def render(self, width: int) -> RenderableType:
        """Panel with the text, the risk curve and the status."""
        body = Group(
            self._text,
            Text(),
            Text("risk ", style="dim") + risk_curve(self._risks, max(8, width - 12)),
            self._status,
        )
        return Panel(body, title=self._title, title_align="left", border_style="dim")


def tokens_line(report: StreamReport) -> str:
    """One line of counts."""
    line = f"{report.scored} tokens scored, {report.unscored} unscored, peak risk {report.peak:.2f}"
    return f"{line}, tier {report.tier}"


def show_stream(console: Console, title: str, events: Iterable[Event]) -> StreamReport:
    """Show a stream as it happens, and return its report.

    On a terminal the panel is redrawn in place; elsewhere the released text is printed as it comes
    and the outcome after it.
    """
    view, report = StreamView(title), None
    if console.is_terminal:
        with Live(console=console, refresh_per_second=20) as live:
            for event in events:
                view.take(event)
                live.update(view.render(console.width))
                report = event.report or report
    else:
        for event in events:
            if event.text:
                console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
            if event.type == "halted":
                outcome = (
                    f"[halted at token {event.position}, risk {event.risk:.2f}: {event.cause}]"
                )
                console.print(f"\n{outcome}", markup=False)
            report = event.report or report
        if report is not None:
            console.print(f"\n{tokens_line(report)}", markup=False)
    if report is None:
        raise RuntimeError("the stream ended without a report")
    return report


@contextmanager
def stages(console: Console) -> Iterator[Any]:
    """Progress bars, one per stage; yields ``progress(stage, done, total)``."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def figures_tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Tables of the demo's figures."""
    rows = {
        "midstream": figures["modes"],
        "Bayes oracle": figures["oracle"],
        "single-token threshold": figures["baselines"]["threshold"],
        "EMA threshold": figures["baselines"]["ema"],
    }
    detect = Table(title="Detect: halt on the violating token", title_justify="left")
    forecast = Table(
        title="Forecast: halt before it, at the oracle's own false-halt rate",
        title_justify="left",
    )
    for table, headers in (
        (detect, ("", "violating tokens leaked", "missed", "false halts", "tokens seen, median")),
        (forecast, ("", "false halts", "lead in tokens, median", "Brier score")),
    ):
        for header in headers:
            table.add_column(header, justify="right" if header else "left")
    for name, row in rows.items():
        d, f = row["detect"], row["forecast"]
        detect.add_row(
            name,
            str(d["leaked_tokens"]),
            f"{d['missed_rate']:.1%}",
            f"{d['false_halt_rate']:.1%}",
            f"{d['median_tokens_seen']:.0f}",
        )
        forecast.add_row(
            name,
            f"{f['false_halt_rate']:.1%}",
            f"{f['lead_tokens_median']:.1f}",
            f"{f['brier']:.4f}",
        )
    yield detect
    yield forecast


def inspect_table(summary: dict[str, Any]) -> Iterator[RenderableType]:
    """Tables for ``midstream inspect``."""
    model = summary["model"]
    yield Text(
        f"made for {model['architecture']}: {model['layers']} layers, d = {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}"
    )
    yield Text(f"bundle {summary['hash'][:16]}, {summary['chain']['states']} risk states")
    probes = Table(title="Probes", title_justify="left")
    for header in ("name", "hazard", "tap", "reads", "evidence", "norm"):
        probes.add_column(header)
    for probe in summary["probes"]:
        probes.add_row(
            *(str(probe[key]) for key in ("name", "hazard", "tap", "reads")),
            f"adds to {probe['adds_to']}" if "adds_to" in probe else probe["evidence"],
            probe["norm"],
        )
    yield probes
    tiers = Table(title="Policy", title_justify="left")
    for header in ("tier", "horizon", "halt at", "hold at"):
        tiers.add_column(header)
    for name, tier in summary["policy"]["tiers"].items():
        default = " (default)" if name == summary["policy"]["default_tier"] else ""
        tiers.add_row(
            name + default,
            str(tier["horizon"]),
            str(tier["halt_at"]),
            str(tier.get("hold_at", "–")),
        )
    yield tiers
    provenance = summary["policy"]["provenance"]
    yield Text(f"calibrated on: {provenance['calibration_set']}\n{provenance['guarantee']}")


def comparison_table(rows: Sequence[dict[str, Any]], hazard: str, many: int = 12) -> RenderableType:
    """Methods and taps of ``midstream train``, best first, what reads the response before prompts.

    Some methods train a read-out of another label as well; those are left to the report.
    """
    ordered = sorted(rows, key=lambda row: row["level"] == "prompt")
    first = [row for row in ordered if row["hazard"] == hazard]
    shown = [*first[:many], *[row for row in first[many:] if row["level"] == "prompt"][:2]]
    left = f", {len(shown)} of {len(rows)}" if len(rows) > len(shown) else ""
    table = Table(title=f"AUROC on examples that trained none{left}", title_justify="left")
    for header in ("method", "tap", "level"):
        table.add_column(header)
    table.add_column("AUROC", justify="right")
    for row in shown:
        table.add_row(row["method"], row["tap"], row["level"], f"{row['auroc']:.4f}")
    return table
