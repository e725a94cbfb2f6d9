"""What several commands share: options, and what stands behind them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from midstream.bundle import Bundle

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a transformers model; the testbed's when not given."),
]
BundleOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the bundle made for the model; the testbed's when not given."),
]
DataFormat = Annotated[
    str | None,
    typer.Option(
        help="jsonl, csv or parquet, or the layout of a public set: toxic_spans, xstest_prompts, "
        "xstest_completions, r_judge; by the end of the file's name when not given."
    ),
]
UnnamedHazard = Annotated[
    str | None, typer.Option("--hazard", help="What labels without a name speak of.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
Tier = Annotated[str | None, typer.Option(help="Strictness: strict, moderate or loose.")]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """Yield what takes ``(stage, done, total)``; shown on a terminal alone, on standard error."""
    from midstream.show import stages

    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with stages(console) as progress:
        yield progress


def load(model: str | None, bundle: Path | None) -> tuple[Any, Any, Bundle]:
    """Model, tokenizer and bundle; the testbed's where none is named."""
    from midstream import testbed
    from midstream.bundle import Fingerprint
    from midstream.engines.hf import load

    if model is not None and bundle is None:
        raise typer.BadParameter("a model needs the bundle that was made for it: give --bundle")
    ours = load_bundle(bundle)
    loaded, tokenizer = load(model) if model is not None else testbed.load()
    ours.fingerprint.check(Fingerprint.of(loaded, tokenizer))
    return loaded, tokenizer, ours


def load_bundle(bundle: Path | None) -> Bundle:
    """Bundle in a folder, or the testbed's."""
    from midstream import testbed
    from midstream.bundle import Bundle

    return Bundle.load(bundle) if bundle is not None else testbed.load_bundle()


def new_monitor(bundle: Bundle, **options: Any) -> Any:
    """Build a monitor; the import takes seconds, so only who needs one pays for it."""
    from midstream.monitor import Monitor

    return Monitor(bundle, **options)


def window(model: Any) -> int:
    """Tokens that the model takes."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))


def without_nan(value: Any) -> Any:
    """Replace what JSON does not have, a median of nothing for instance, by null."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if value != value else value
