"""``midstream doctor``: what this installation can do."""

from __future__ import annotations

import json

from rich.console import Console

from midstream.commands.options import Json


def doctor(json_: Json = False) -> None:
    """Say what this installation can do, and why it cannot do the rest."""
    from midstream.doctor import facts

    found = facts()
    if json_:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    for name, version in found["versions"].items():
        console.print(f"{name:14}{version}", highlight=False, markup=False)
    for name, backend in found["backends"].items():
        state = "yes" if backend["available"] else f"no: {backend['reason']}"
        console.print(f"backend {name:10}{state}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"built with    {found['build']}", highlight=False, markup=False, soft_wrap=True)
