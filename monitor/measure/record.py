"""Labelled examples to a recording: teacher-forced through the model, scored by a bundle's probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from midstream.bundle import Bundle
from midstream.learn.examples import Example
from midstream.measure.recording import Recording


def record(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    bundle: Bundle,
    *,
    hazards: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Score every token of each example as if the model had just generated its response."""
    raise NotImplementedError
