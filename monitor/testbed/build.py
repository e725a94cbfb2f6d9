"""The whole testbed from nothing: model, then bundle. What ``midstream testbed build`` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import load
from .fit import build_bundle
from .train import build_model

Progress = Callable[[str, int, int], None]


def build(out: Path, *, seed: int, progress: Progress = lambda stage, done, total: None) -> None:
    """Train the model into ``out/model`` and fit ``out/bundle`` on what it writes.

    Raises
    ------
    FileExistsError
        When ``out`` is there already: nothing is overwritten.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose a new folder")
    out.mkdir(parents=True)
    build_model(
        out / "model", seed=seed, progress=lambda step, steps, loss: progress("train", step, steps)
    )
    model, tokenizer = load(out / "model")
    build_bundle(model, tokenizer, seed=seed + 1, progress=progress).save(out / "bundle")
