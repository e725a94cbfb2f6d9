"""``midstream watch``: one response, live, or given text coloured by risk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from midstream.commands.options import BundleOption, Json, Model, Tier, load, new_monitor, window

if TYPE_CHECKING:
    from midstream.bundle import Bundle

HALTED = 3
"""Exit code: the stream that was shown was halted."""


def watch(
    prompt: Annotated[str | None, typer.Argument(help="What to ask the model.")] = None,
    model: Model = None,
    bundle: BundleOption = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Colour this file's lines by score instead of generating; - is stdin."),
    ] = None,
    tier: Tier = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the tokenizer's chat template aside.")
    ] = False,
    observe: Annotated[bool, typer.Option("--observe", help="Halt nothing, only look.")] = False,
    json_: Json = False,
) -> None:
    """Generate one response, live: text coloured by risk, the risk curve, verdict and cause."""
    import torch

    from midstream.engines.hf import stream
    from midstream.show import show_stream

    loaded, tokenizer, ours = load(model, bundle)
    if text is not None:
        _watch_text(loaded, tokenizer, ours, text, tier, json_)
        return
    if model is None:
        from midstream import testbed

        # The system message says which vessel is sealed; without it nothing could violate.
        system, user = testbed.sample_prompt(seed, 0).messages
        messages = [system, {"role": "user", "content": prompt} if prompt else user]
    elif prompt is None:
        raise typer.BadParameter("give a PROMPT, or --text FILE")
    else:
        messages = [{"role": "user", "content": prompt}]
    templated = tokenizer.chat_template is not None and not raw
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(seed)
    events = stream(
        loaded,
        tokenizer,
        messages if templated else messages[-1]["content"],
        new_monitor(ours, slots=1),
        max_new_tokens=max_new_tokens,
        tier=tier,
        enforce=not observe,
        **(sampling if temperature else {"do_sample": False}),
    )
    if json_:
        halted = False
        for event in events:
            print(event.model_dump_json(exclude_none=True), flush=True)
            halted |= event.type == "halted"
    else:
        console = Console()
        for message in messages:
            console.print(f"{message['role']}: {message['content']}", style="dim", markup=False)
        report = show_stream(console, "assistant", events)
        halted = report.halted_at is not None and not observe
        if halted and (told := ours.policy.on_halt.message):
            console.print(told, style="italic", markup=False)
    if halted:
        raise typer.Exit(HALTED)


def _watch_text(
    model: Any, tokenizer: Any, bundle: Bundle, path: Path, tier: str | None, as_json: bool
) -> None:
    from midstream import texts
    from midstream.engines.hf import score as score_texts
    from midstream.show import coloured

    lines = texts.read_lines(path)
    monitor = new_monitor(bundle, slots=16, trace=window(model))
    console = Console()
    for line, scored in zip(
        lines, score_texts(model, tokenizer, lines, monitor, tier=tier), strict=True
    ):
        if as_json:
            print(json.dumps(texts.scored_record({"text": line}, scored)), flush=True)
        else:
            console.print(coloured(texts.pieces(line, scored)), soft_wrap=True)
