"""``midstream testbed``: its model and bundle from nothing, dialogues of its grammar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from midstream.commands.options import Json, progress_bar


def build_testbed(
    out: Annotated[Path, typer.Option(help="New folder for model/ and bundle/.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of corpus, weights and sampling.")] = 0,
) -> None:
    """Train the testbed's model from scratch and fit its bundle; minutes on two cores."""
    from midstream.testbed.build import build

    with progress_bar(False) as progress:
        build(out, seed=seed, progress=progress)
    typer.echo(f"wrote {out / 'model'} and {out / 'bundle'}")


def sample_testbed(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Dialogues.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the grammar.")] = 0,
    json_: Json = False,
) -> None:
    """Sample labelled dialogues from the grammar."""
    from midstream import testbed

    if json_:
        for row in testbed.corpus_rows(count, seed):
            print(json.dumps(row))
        return
    console = Console()
    for dialogue in testbed.sample_dialogues(count, seed):
        for message in dialogue.prompt.messages:
            console.print(f"{message['role']}: {message['content']}", markup=False, highlight=False)
        first = dialogue.labels.first
        harmless = dialogue.response if first < 0 else dialogue.response[:first]
        console.print(f"assistant: {testbed.text_of(harmless)}", end=" ", highlight=False)
        console.print(testbed.text_of(dialogue.response[len(harmless) :]), style="red")
        console.print()
