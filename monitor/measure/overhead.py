"""What watching costs: the same generation with and without a monitor, in pairs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from midstream.monitor import Monitor

Inputs = dict[str, torch.Tensor]


class UnequalRunsError(RuntimeError):
    """The two runs of a pair did not write the same tokens, so their times cannot be compared."""


def overhead(
    model: Any,
    monitor: Monitor,
    inputs: Inputs,
    *,
    new_tokens: int,
    pairs: int,
    tier: str | None = None,
) -> float:
    """Median ratio of the times of paired greedy runs, monitored to unmonitored.

    Both runs write exactly ``new_tokens`` tokens per row, with the same options, in alternating
    order. The monitor enforces its verdicts; a halt would end a row early and is refused, so pick
    prompts or a tier that do not halt.

    Parameters
    ----------
    inputs : dict
        ``input_ids`` and ``attention_mask`` [B, T].
    pairs : int
        Counted pairs, after one that is not.

    Raises
    ------
    UnequalRunsError
    """
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    def plain() -> tuple[float, torch.Tensor]:
        return _timed(lambda: model.generate(**inputs, disable_compile=True, **options))

    def watched() -> tuple[float, torch.Tensor]:
        with monitor.attach(model, tier=tier) as m:
            processors = [m.halting()]
            return _timed(lambda: model.generate(**inputs, logits_processor=processors, **options))

    ratios = []
    for pair in range(pairs + 1):
        if pair % 2:
            bare, with_monitor = plain(), watched()
        else:
            with_monitor, bare = watched(), plain()
        if not torch.equal(bare[1], with_monitor[1]):
            raise UnequalRunsError("a row was halted, or the monitor changed what was written")
        ratios.append(with_monitor[0] / bare[0])
    return float(np.median(ratios[1:]))


def _timed(generate: Any) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    sequences: torch.Tensor = generate()
    return time.perf_counter() - begin, sequences
