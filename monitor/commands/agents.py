"""``midstream agents``: levels, forecasts and flags over traces of agents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from midstream.commands.options import Json, without_nan

if TYPE_CHECKING:
    from midstream.agents.forecast import AgentModel
    from midstream.agents.readers import ReadTraces
    from midstream.measure.agent_gate import StepDecisions
    from midstream.measure.agents import Judged

Data = Annotated[Path, typer.Argument(help="Traces: rows of AgentTrace as JSON lines, or R-Judge.")]
Format = Annotated[
    str | None,
    typer.Option("--data-format", help="jsonl or r_judge; by the end of the name when not given."),
]
GateOption = Annotated[
    Path | None, typer.Option("--gate-rules", help="YAML of the action gate; the default's.")
]
RulesOption = Annotated[
    Path | None, typer.Option("--rules", help="YAML, 'extends: default' or its own; the default's.")
]

VERDICT_STYLES = {"ALLOW": "green", "ASK": "dark_orange", "BLOCK": "red"}
STYLES = ("green", "yellow", "dark_orange", "red", "bold white on red")
"""Of the levels, from safe to violated."""


def check(
    data: Data,
    data_format: Format = None,
    rules: RulesOption = None,
    gate_rules: GateOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="agents.json to judge by; cross-validated chains when not given."),
    ] = None,
    trace: Annotated[
        list[str] | None, typer.Option(help="Id of a trace to show step by step; again for more.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the cross-validation.")] = 42,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for report.json, decisions.jsonl and plots."),
    ] = None,
    json_: Json = False,
) -> None:
    """Flag traces of agents before they violate, gate their calls, measure how well that works."""
    from midstream.agents.action_gate import ActionGate
    from midstream.agents.forecast import AgentModel
    from midstream.agents.gate_rules import GateRules
    from midstream.agents.readers import read_traces
    from midstream.agents.rules import Rules
    from midstream.learn.agent_fit import fit_agents
    from midstream.measure import agents
    from midstream.measure.agent_gate import decisions_of, stopped
    from midstream.measure.agent_report import report
    from midstream.measure.report import to_json

    read, known = read_traces(data, data_format), Rules.load(rules)
    gate = ActionGate(GateRules.load(gate_rules))
    wanted = list(trace or [])
    if len(read.traces) == 1 and not wanted:
        wanted = [read.traces[0].id]
    if missing := set(wanted) - {each.id for each in read.traces}:
        raise typer.BadParameter(f"{data} has no trace {', '.join(sorted(missing))}")
    if model is None:
        judged = agents.cross_validated(read.traces, known, folds=folds, seed=seed)
        fitted = fit_agents(read.traces, known)
    else:
        fitted = AgentModel.from_json(model.read_text(encoding="utf-8"), str(model))
        judged = agents.judged_by(fitted, read.traces, known)
    gated = [decisions_of(one.trace, gate) for one in judged]
    content = without_nan(
        {
            "source": data.name,
            "judged_by": "cross-validation" if model is None else model.name,
            "folds": folds if model is None else None,
            "seed": seed if model is None else None,
            "rules": known.hash,
            "actions": {"calls": read.calls, "text": read.texts, "malformed": read.malformed},
            **report(judged),
            "gate": stopped(gated, [one.violates_at for one in judged]),
        }
    )
    if out is not None:
        _write(out, judged, gated, content, fitted)
    if json_:
        print(to_json(content))
        return
    console = Console()
    for one, decisions in zip(judged, gated, strict=True):
        if one.trace.id in wanted:
            _print_trace(console, one, decisions)
    _print_figures(console, content)
    _print_notes(console, read, content)
    if out is not None:
        console.print(f"wrote {out}", highlight=False, markup=False)


def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="New file for the model, for instance agents.json.")],
    data_format: Format = None,
    rules: RulesOption = None,
    flag_at: Annotated[
        float, typer.Option(min=0, max=1, help="Risk within 5 steps to flag at, chain of all.")
    ] = 0.40,
    flag_at_category: Annotated[
        float, typer.Option(min=0, max=1, help="The same by the chain of a category.")
    ] = 0.50,
) -> None:
    """Fit the chains over levels on labelled traces; unlabelled ones are labelled by the rules."""
    from midstream.agents.readers import read_traces
    from midstream.agents.rules import Rules
    from midstream.learn.agent_fit import fit_agents

    read = read_traces(data, data_format)
    model = fit_agents(
        read.traces, Rules.load(rules), flag_at=flag_at, flag_at_category=flag_at_category
    )
    with open(out, "x", encoding="utf-8") as file:
        file.write(model.to_json())
    typer.echo(
        f"wrote {out}: {model.traces} traces, {len(model.categories)} categories, violations by "
        f"{model.violation}"
    )


def _write(
    out: Path,
    judged: Sequence[Judged],
    gated: Sequence[StepDecisions],
    content: dict[str, Any],
    model: AgentModel,
) -> None:
    from tempfile import TemporaryDirectory

    from midstream.atomic import write_folder
    from midstream.measure.agent_plots import write_plots
    from midstream.measure.agent_report import decisions
    from midstream.measure.report import to_json

    with TemporaryDirectory() as scratch:
        plots = write_plots(Path(scratch), judged, content, model)
        files = {path.name: path.read_bytes() for path in plots}
    files["report.json"] = to_json(content).encode()
    files["decisions.jsonl"] = decisions(judged, gated).encode()
    write_folder(out, files)


def _print_trace(console: Console, one: Judged, gated: StepDecisions) -> None:
    from midstream.agents.forecast import HORIZONS
    from midstream.measure.agents import CHAIN

    kind = "does not violate" if one.violates_at is None else f"violates at {one.violates_at + 1}"
    table = Table(
        title=Text(_shown(f"{one.trace.id} ({one.trace.category or 'no category'}; {kind})")),
        title_justify="left",
        show_lines=True,
        expand=True,
    )
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("does, and the rules that matched", ratio=1)
    table.add_column("level", no_wrap=True)
    ahead = ", ".join(map(str, HORIZONS))
    table.add_column(f"risk within {ahead}", max_width=20)
    for step in one.steps:
        call = one.trace.steps[step.step].call
        marks = "⚑" * (step.step == one.flags[CHAIN]) + "✗" * (step.step == one.violates_at)
        does = Text(_shown(call.tool) if call is not None else "(speaks)", style="bold")
        for reason in step.at.reasons:
            does.append(f"\n{_shown(str(reason))}", style="not bold dim")
        decision = gated[step.step]
        if decision is not None:
            verdict = decision.verdict.value
            does.append(f"\ngate: {verdict}", style=f"not bold {VERDICT_STYLES[verdict]}")
            why = f" {decision.stage}/{decision.rule}: {decision.because}"
            does.append(_shown(f"{why} [{decision.matched}]"), style="not bold dim")
        table.add_row(
            f"{step.step + 1} {marks}".rstrip(),
            does,
            Text(step.level.label, style=STYLES[step.level]),
            " ".join(f"{risk:.2f}" for risk in step.risks.values()) + f"\n{step.zone.value}",
        )
    console.print(table)
    console.print("⚑ first flag, ✗ violating step")


def _shown(text: str) -> str:
    """Text without what could steer a terminal: traces come from strangers."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _print_figures(console: Console, content: dict[str, Any]) -> None:
    table = Table(
        title="95 % intervals: Wilson for rates, bootstrap over traces for the lead",
        title_justify="left",
    )
    table.add_column("detector")
    for header in ("detected before", "by the violating step", "false positives", "lead, steps"):
        table.add_column(header, justify="right")
    for name, figures in content["detectors"].items():
        cells = [_cell(figures[key], 100) for key in ("detection", "by_violating_step", "fpr")]
        table.add_row(name, *cells, _cell(figures["lead_steps"], 1))
    gate = content["gate"]
    for kind in ("stopped", "blocked"):
        shares = [_cell(gate[f"{of}_{kind}"], 100) for of in ("violating", "other")]
        table.add_row(f"action gate, {kind}", "–", *shares, "–")
    console.print(table)


def _print_notes(console: Console, read: ReadTraces, content: dict[str, Any]) -> None:
    data, bounds = content["data"], content["bounds"]
    console.print(
        f"{data['traces']} traces, {data['violating']} violate; {data['steps']} steps, median "
        f"{data['median_steps']:g}. {read.calls} calls, {read.texts} steps of text.",
        highlight=False,
    )
    if read.malformed:
        console.print(
            f"{read.malformed} calls could not be parsed; the rules read them as text.",
            style="yellow",
            highlight=False,
        )
    if data["violating"] and not data["labels_of_steps"]:
        console.print(
            "No label says which step violates; it is taken to be the last call of the trace.",
            style="yellow",
        )
    console.print(
        f"{bounds['at_first_step']} traces violate with their first step; {bounds['same_calls']} "
        "more begin with the same calls as a trace that does not violate.",
        highlight=False,
    )


def _cell(figure: dict[str, Any], scale: int) -> str:
    if figure["value"] is None:
        return "–"
    digits, unit = (1, " %") if scale == 100 else (2, "")
    value, low, high = (
        "–" if figure[key] is None else f"{scale * figure[key]:.{digits}f}"
        for key in ("value", "low", "high")
    )
    return f"{value}{unit}\n{low} – {high}"
