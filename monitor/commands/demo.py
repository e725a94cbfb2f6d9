"""``midstream demo``: the main job, shown and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from midstream.commands.options import Json, new_monitor, progress_bar, without_nan


def demo(
    streams: Annotated[int, typer.Option(min=2, help="Responses to generate, per run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and sampling.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw risk curves of a halted, a released and a missed stream."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show a model that watches itself: live, then in figures against the Bayes oracle.

    The testbed's model writes the same responses without a monitor, observed, in detect mode and in
    forecast mode.
    """
    from midstream import testbed
    from midstream.measure import plots
    from midstream.testbed import demo as job

    console = Console()
    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    monitor = new_monitor(bundle, slots=job.BATCH)
    if not json_:
        console.print(testbed.describe(), markup=False, highlight=False)
        _show_one(console, model, tokenizer, monitor, seed)
    with progress_bar(json_) as progress:
        run = job.run(model, tokenizer, monitor, streams=streams, seed=seed, progress=progress)
        cost = job.overheads(model, bundle, progress=progress)
    figures = job.figures(run, backend=monitor.backend.name, overhead=cost)
    if plot is not None:
        threshold = bundle.policy.tiers[bundle.policy.tier_for(job.MODES["forecast"])].halt_at
        plots.risk_curves(job.examples(run, threshold), plot)
    if json_:
        print(json.dumps(without_nan(figures), indent=2, allow_nan=False))
        return
    from midstream.show import figures_tables

    for table in figures_tables(figures):
        console.print(table)
    console.print(
        f"{figures['violating_unmonitored']} of {streams} unmonitored responses violate the rule; "
        f"watching costs {cost['batch_1'] - 1:+.1%} of the time per token at batch 1, "
        f"{cost['batch_8'] - 1:+.1%} at batch 8.",
        highlight=False,
    )
    if plot is not None:
        console.print(f"risk curves: {plot}", highlight=False)


def _show_one(console: Console, model: Any, tokenizer: Any, monitor: Any, seed: int) -> None:
    """Stream one response to an attack, the first of the seed, as a user would see it."""
    from midstream import testbed
    from midstream.engines.hf import stream
    from midstream.show import show_stream

    index = next(i for i in range(1000) if testbed.sample_prompt(seed, i).attack)
    prompt = testbed.sample_prompt(seed, index)
    for message in prompt.messages:
        console.print(f"{message['role']}: {message['content']}", style="dim", markup=False)
    events = stream(model, tokenizer, prompt.messages, monitor, do_sample=True, top_k=0)
    show_stream(console, "assistant", events)
