"""``midstream audit``: show the audit log of a service, and check that nobody changed it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from midstream.commands.options import Json

Log = Annotated[list[Path], typer.Argument(help="Folder of an audit log, or some of its files.")]


def show(
    log: Log,
    stream: Annotated[str | None, typer.Option(help="Records of this stream alone.")] = None,
    halts: Annotated[bool, typer.Option("--halts", help="Halts alone.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written; one folder.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show records in the order in which they were written."""
    from midstream.serve import audit_read

    if follow and (len(log) != 1 or not log[0].is_dir()):
        raise typer.BadParameter("--follow: takes the folder of one audit log")
    records = audit_read.follow(log[0]) if follow else audit_read.read(audit_read.files_of(log))
    chosen = (
        record
        for record in records
        if (stream is None or record.get("stream") == stream)
        and (not halts or record["kind"] == "halted")
    )
    if json_:
        for record in chosen:
            print(json.dumps(record), flush=True)
    elif follow:
        for record in chosen:
            print("  ".join(cell for cell in _cells(record) if cell), flush=True)
    else:
        _print_table(chosen)


def verify(
    log: Log,
    contains: Annotated[
        str | None,
        typer.Option(help="SHA-256 of a record that has to be there, such as an older head."),
    ] = None,
    json_: Json = False,
) -> None:
    """Check that no record was altered, removed or put in; exit code 1 when one was."""
    from midstream.serve import audit_read

    found = audit_read.verify(audit_read.files_of(log), contains)
    if json_:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console = Console()
        table = Table(title="The chain holds" if found.holds else "The chain is broken")
        table.add_column("what")
        table.add_column("found", overflow="fold")
        for name, value in found.as_json().items():
            if name not in ("holds", "problems"):
                shown = ", ".join(value) if isinstance(value, tuple) else value
                table.add_row(name.replace("_", " "), "-" if shown in ("", None) else str(shown))
        console.print(table)
        for problem in found.problems:
            console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    if not found.holds:
        raise typer.Exit(1)


_TOLD = {
    "schema",
    "seq",
    "time",
    "kind",
    "stream",
    "sha256",
    "verdict",
    "position",
    "risk",
    "cause",
}
_LEFT_OUT = {"model", "bundle", "prompt_tokens", "previous"}  # for --json
_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")


def _print_table(records: Iterator[dict[str, Any]]) -> None:
    table = Table("#")
    table.add_column("time", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for name in ("stream", "what"):
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_row(*(Text(cell) for cell in _cells(record)))
    Console().print(table)


def _cells(record: dict[str, Any]) -> list[str]:
    parts = [record.get("verdict")]
    for name, value in (("at", record.get("position")), ("risk", record.get("risk"))):
        parts.append(None if value is None else f"{name} {_short(value)}")
    parts.append(record.get("cause"))
    for name, value in record.items():
        if name not in _TOLD | _LEFT_OUT and value not in (None, ""):
            parts.append(f"{name.replace('_', ' ')} {_short(value)}")
    cells = [
        str(record["seq"]),
        datetime.fromtimestamp(record["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
        record["kind"],
        record.get("stream") or "",
        ", ".join(part for part in parts if part),
    ]
    cells[-1] = _HASH.sub(r"\1…", cells[-1])
    # Of what a model wrote, or a client, nothing may steer the terminal.
    return ["".join(c if c.isprintable() else repr(c)[1:-1] for c in cell) for cell in cells]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
