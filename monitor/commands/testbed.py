"""``midstream testbed``: its model and bundle from nothing, samples of what it knows."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from midstream.commands.options import Json, progress_bar

if TYPE_CHECKING:
    from midstream import testbed


class Kind(StrEnum):
    """What can be sampled; one clock of the monitor each."""

    DIALOGUES = "dialogues"
    CONVERSATIONS = "conversations"
    TRACES = "traces"


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
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    kind: Annotated[
        Kind,
        typer.Option(
            help="dialogues of one turn; conversations whose harm takes two turns; traces of an "
            "agent and its tools."
        ),
    ] = Kind.DIALOGUES,
    json_: Json = False,
) -> None:
    """Sample labelled dialogues, conversations or agent traces."""
    from midstream import testbed

    rows, show = {
        Kind.DIALOGUES: (testbed.corpus_rows, _show_dialogue),
        Kind.CONVERSATIONS: (testbed.conversation_rows, _show_conversation),
        Kind.TRACES: (testbed.trace_rows, _show_trace),
    }[kind]
    if json_:
        for row in rows(count, seed):
            print(json.dumps(row))
        return
    console = Console(highlight=False)
    for index in range(count):
        show(console, seed, index)
        console.print()


def _show_dialogue(console: Console, seed: int, index: int) -> None:
    from midstream import testbed

    dialogue = testbed.sample_dialogue(seed, index)
    for message in dialogue.prompt.messages:
        console.print(_said(message))
    console.print(_answered(dialogue.prompt, dialogue.response))


def _show_conversation(console: Console, seed: int, index: int) -> None:
    from midstream import testbed

    conversation = testbed.sample_conversation(seed, index)
    target = conversation.labels.target_turn
    end = "no harm" if target is None else f"harm complete at turn {target}"
    console.rule(f"conversation {index}: {len(conversation.turns)} turns, {end}", align="left")
    console.print(_said(conversation.turns[0].prompt.messages[0]))
    for number, turn in enumerate(conversation.turns, 1):
        style = "bold red" if number == target else "bold"
        console.print(Text(f"turn {number}", style=style))
        console.print(_said(turn.prompt.messages[1]))
        console.print(_answered(turn.prompt, turn.response))


def _show_trace(console: Console, seed: int, index: int) -> None:
    from midstream import testbed

    trace = testbed.sample_trace(seed, index)
    end = "" if trace.violating_step is None else f", violates at step {trace.violating_step}"
    console.rule(f"trace {index}: {trace.category}{end}", align="left")
    console.print(Text(f"task: {trace.task}"))
    for place, step in enumerate(trace.steps):
        style = "red" if place == trace.violating_step else ""
        if step.call is not None:
            given = ", ".join(f"{key}={value}" for key, value in step.call.arguments.items())
            line = f"{place:>2} {step.call.tool}({given}) → {step.observed}"
            console.print(Text(line, style=style))


def _said(message: dict[str, str]) -> Text:
    return Text(f"{message['role']}: {message['content']}")


def _answered(prompt: testbed.Prompt, response: tuple[int, ...]) -> Text:
    """The response, red from the violating token on."""
    from midstream import testbed

    first = testbed.violating_index(prompt.sealed, response)
    harmless = response if first < 0 else response[:first]
    return Text.assemble(
        "assistant: ",
        testbed.text_of(harmless),
        " ",
        (testbed.text_of(response[len(harmless) :]), "red"),
    )
