"""``midstream replay``: recorded streams under another policy, chain, tier or threshold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from midstream.commands.options import BundleOption, Json, Tier, load_bundle


def replay(
    recordings: Annotated[list[Path], typer.Argument(help="Files that hold recorded streams.")],
    bundle: BundleOption = None,
    policy: Annotated[
        Path | None, typer.Option(help="A policy.yaml in place of the bundle's.")
    ] = None,
    chain: Annotated[
        Path | None, typer.Option(help="A chain.json in place of the bundle's.")
    ] = None,
    tier: Tier = None,
    threshold: Annotated[
        str | None, typer.Option(help="Values of halt_at to go through, such as 0.1,0.2.")
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="So many values of halt_at, evenly spaced.")
    ] = None,
    json_: Json = False,
) -> None:
    """Judge recorded streams again, without the model, and show what would have changed."""
    from midstream.measure import what_if

    result = what_if.replay(
        recordings,
        load_bundle(bundle),
        policy=policy,
        chain=chain,
        tier=tier,
        thresholds=what_if.parse_thresholds(threshold, grid),
    )
    if json_:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    for part in what_if.tables(result):
        console.print(part)
