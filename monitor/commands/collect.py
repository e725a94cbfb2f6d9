"""``midstream collect``: residuals of labelled texts, from any transformers model, on disk."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from midstream.commands.options import DataFormat, Json, Model

if TYPE_CHECKING:
    from midstream.learn.examples import Example
    from midstream.taps import Tap

MOST_TAPS = 8


def collect(
    data: Annotated[Path, typer.Option(help="Labelled texts; JSONL, CSV or Parquet.")],
    out: Annotated[
        Path, typer.Option(help="New folder; or one that the same command began, to go on with it.")
    ],
    model: Model = None,
    data_format: DataFormat = None,
    taps: Annotated[
        str | None,
        typer.Option(
            help="Where to read, such as resid_post.2,resid_post.3; when not given the output of "
            f"every layer, or of {MOST_TAPS} of them."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32, of the values on disk.")] = "bf16",
    hazard: Annotated[
        list[str] | None,
        typer.Option(
            help="Hazard to be labelled, again for more; all that the data names when not given. "
            "A single one is also what labels without a name speak of."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Feed labelled texts to a model and keep what its layers compute, for training probes.

    It can be killed at any moment: the same command goes on from there.
    """
    from midstream import testbed
    from midstream.engines.hf import load
    from midstream.learn import collect as job
    from midstream.learn.align import encode, tabulate, truncation
    from midstream.learn.collection import DTYPES
    from midstream.learn.public_sets import DATA_FORMATS, read_labelled
    from midstream.learn.splits import grouped

    if data_format is not None and data_format not in DATA_FORMATS:
        raise typer.BadParameter(
            f"--data-format {data_format}: use one of {', '.join(DATA_FORMATS)}"
        )
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    name = hazard[0] if hazard and len(hazard) == 1 else None
    # What is near the same stays together when the collection is split for training.
    examples = grouped(list(read_labelled(data, data_format, hazard=name)))
    hazards = chosen_hazards(examples, hazard)
    loaded, tokenizer = testbed.load() if model is None else load(model)
    places = chosen_taps(loaded, taps)
    window = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    encoded = [encode(example, tokenizer, hazards, window=window) for example in examples]
    tokens = tabulate(encoded)

    options = {"--data": data, "--out": out, "--model": model, "--data-format": data_format}
    command = ["midstream", "collect"]
    for name, value in options.items():
        command += [name, str(value)] if value is not None else []
    command += ["--taps", ",".join(map(str, places)), "--dtype", dtype]
    for name in hazard or ():
        command += ["--hazard", name]
    done: list[int] = []
    with progress_bar(quiet=json_) as bar:

        def progress(now: int, total: int) -> None:
            done.append(now)
            bar(now, total)

        begin = time.perf_counter()
        found = job.collect(
            loaded,
            tokenizer,
            [one.ids for one in encoded],
            tokens,
            places,
            out,
            dtype=dtype,
            command=shlex.join(command),
            progress=progress,
        )
        seconds = time.perf_counter() - begin
    fed = done[-1] - done[0]
    size = sum(path.stat().st_size for path in out.iterdir())
    summary = {
        "folder": str(out),
        "examples": len(tokens),
        "tokens": int(tokens.starts[-1]),
        "hazards": list(tokens.hazards),
        "taps": [str(tap) for tap in found.taps],
        "dtype": dtype,
        "bytes": size,
        "cut": truncation(encoded),
        "collected_tokens": fed,
        "seconds": seconds,
        "tokens_per_second": fed / seconds if fed else None,
    }
    if json_:
        print(json.dumps(summary, indent=2))
        return
    if summary["cut"]:
        Console(stderr=True).print(summary["cut"], style="yellow", markup=False, soft_wrap=True)
    console = Console()
    console.print(
        f"{out}: {len(tokens)} examples, {summary['tokens']} tokens, labels of "
        f"{', '.join(tokens.hazards)}; {len(places)} taps in {dtype}, "
        f"{size / 1e6:.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    speed = f"{fed} tokens in {seconds:.1f} s, {fed / seconds:.0f} tokens/s" if fed else "nothing"
    was = f"; {done[0]} were there already" if done[0] else ""
    console.print(f"collected {speed}{was}", markup=False, highlight=False, soft_wrap=True)


def chosen_hazards(examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the hazards asked for, or all that the examples name.

    Raises
    ------
    TrainingDataError
        For one that no example names, and where none names any.
    """
    from midstream.learn.tokens import TrainingDataError

    named = {
        name
        for one in examples
        for name in (*one.labels, *one.prompt_labels, *(span.hazard for span in one.spans or ()))
    }
    there = ", ".join(sorted(named)) or "none"
    for name in asked or ():
        if name not in named:
            raise TrainingDataError(f"no example has a label of {name!r}; there are {there}")
    if not named:
        raise TrainingDataError("no example names a hazard: label some, or give --hazard NAME")
    return tuple(asked) if asked else tuple(sorted(named))


def chosen_taps(model: Any, asked: str | None) -> list[Tap]:
    """Return the taps asked for, or the outputs of up to `MOST_TAPS` layers, the last among them.

    They are evenly spread: of 32 layers 3, 7, ... 31.
    """
    from midstream.taps import Tap, decoder_layers

    if asked is not None:
        try:
            return [Tap.parse(name.strip()) for name in asked.split(",")]
        except ValueError as error:
            raise typer.BadParameter(f"--taps: {error}") from error
    depth = len(decoder_layers(model))
    count = min(depth, MOST_TAPS)
    return [Tap(depth * n // count - 1, "resid_post") for n in range(1, count + 1)]


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} tokens/s")


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Bar on standard error with tokens per second; nothing where that is no terminal."""
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    columns = (TextColumn("collect"), BarColumn(), MofNCompleteColumn(), _Speed())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:

        def progress(done: int, total: int) -> None:
            if not bars.task_ids:  # what was there already is no part of the speed
                bars.add_task("collect", completed=done, total=total)
            bars.update(bars.task_ids[0], completed=done)

        yield progress
