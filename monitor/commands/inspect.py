"""``midstream inspect``: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from midstream.commands.options import Json


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")], json_: Json = False
) -> None:
    """Show what is in a bundle: its model, probes, chain, policy and where they come from."""
    from midstream.bundle import Bundle
    from midstream.kernels.tables import SlotTable
    from midstream.monitor import DEFAULT_TRACE
    from midstream.show import inspect_table

    loaded = Bundle.load(bundle)
    spec = loaded.bank.spec()
    summary = {
        "hash": loaded.hash,
        "model": loaded.fingerprint.model_dump(mode="json"),
        "probes": [
            {
                **probe.model_dump(mode="json"),
                "tap": str(tap.tap),
                "norm": tap.norm,
                "evidence": probe.evidence.rule,
            }
            for tap in spec.taps
            for probe in tap.probes
        ],
        "chain": {"states": loaded.chain.states, "bins": len(loaded.chain.edges) + 1},
        "policy": loaded.policy.model_dump(mode="json", exclude_none=True),
        "notes": dict(loaded.notes),
        "bytes_per_slot": SlotTable.bytes_per_slot(
            len(loaded.bank.names), loaded.chain.states, loaded.bank.window, DEFAULT_TRACE
        ),
    }
    if json_:
        print(json.dumps(summary, indent=2))
        return
    console = Console()
    for part in inspect_table(summary):
        console.print(part)
