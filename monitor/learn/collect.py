"""Residual streams of given token sequences, read at taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.taps import Tap, attach_taps

Floats = NDArray[np.float32]


@torch.inference_mode()
def residuals(
    model: Any,
    sequences: Sequence[Sequence[int]],
    taps: Sequence[Tap],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Tap, list[Floats]]:
    """Feed each sequence once and keep what the taps read.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    sequences : sequence of token ids
    taps : sequence of Tap
    batch_size : int
        Sequences per forward pass, of like length: they are sorted, and padded on the right.
    progress : callable, optional
        Called as ``progress(sequences done, sequences in all)``.

    Returns
    -------
    dict of Tap to list of float32 [tokens, d]
        In the order of ``sequences``.
    """
    found: dict[Tap, list[Floats]] = {
        tap: [np.empty(0, np.float32)] * len(sequences) for tap in taps
    }
    body = getattr(model, model.base_model_prefix, model)  # the logits are not needed
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    rows: list[int] = []

    def keep(tap: Tap, hidden: Tensor) -> None:
        values = hidden.float().cpu().numpy()
        for row, sequence in enumerate(rows):
            found[tap][sequence] = values[row, : len(sequences[sequence])].copy()

    with attach_taps(model, taps, keep):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            longest = len(sequences[rows[-1]])
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(rows):
                length = len(sequences[sequence])
                ids[row, :length] = torch.as_tensor(sequences[sequence])
                mask[row, :length] = 1
            body(input_ids=ids.to(body.device), attention_mask=mask.to(body.device))
            if progress is not None:
                progress(begin + len(rows), len(order))
    return found
