"""The whole testbed from nothing: model, then bundle. What ``midstream testbed build`` runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from . import load
from .fit import build_bundle
from .train import build_model

Progress = Callable[[str, int, int], None]


def build(out: Path, *, seed: int, progress: Progress = lambda stage, done, total: None) -> None:
    """Train the model into ``out/model`` and fit ``out/bundle`` on what it writes.

    ``out`` appears when both are done; a failure leaves nothing.

    Raises
    ------
    FileExistsError
        When ``out`` is there already: nothing is overwritten.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as holder:
        fresh = Path(holder) / "fresh"
        build_model(
            fresh / "model",
            seed=seed,
            progress=lambda step, steps, loss: progress("train", step, steps),
        )
        model, tokenizer = load(fresh / "model")
        build_bundle(model, tokenizer, seed=seed + 1, progress=progress).save(fresh / "bundle")
        fresh.rename(out)
