"""transformers: one pass over tokens of many texts, judged as it goes (see `forced`)."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from midstream.engines.hf.forced_stream import ForcedStream
from midstream.engines.hf.growing_text import Piece
from midstream.engines.hf.slot_cache import SlotCache
from midstream.monitor import Monitor


@torch.inference_mode()
def feed(
    monitor: Monitor,
    body: Any,
    cache: SlotCache,
    batch: Sequence[ForcedStream],
    taken: Sequence[Sequence[Piece]],
) -> float:
    """Feed the next tokens of some streams to a model, and fold what the monitor saw.

    Parameters
    ----------
    monitor : Monitor
        Observes the model.
    body : transformers.PreTrainedModel
        Without its head.
    cache : SlotCache
    batch : sequence of ForcedStream
    taken : sequence of sequences of Piece
        What is fed of each.

    Returns
    -------
    float
        Seconds that the host took to fold.
    """
    longest = max(map(len, taken))
    ids, position, present, rows = [], [], [], []
    # As lists: to fill tensors row by row took 70 us and 20 more for each stream.
    for stream, pieces in zip(batch, taken, strict=True):
        count, end = len(pieces), stream.fed + len(pieces)
        padding = longest - count
        ids.append([piece.token for piece in pieces] + [0] * padding)
        position.append([*range(stream.fed, end)] + [0] * padding)
        present.append([True] * count + [False] * padding)
        rows.append([stream.slot] * count + [-1] * padding)
    tokens, at, there = torch.tensor(ids), torch.tensor(position), torch.tensor(present)
    slot = torch.tensor([stream.slot for stream in batch])
    cache.run(body, tokens, slot, at, there)
    begun, device = perf_counter(), monitor.device
    folded = torch.tensor(rows, dtype=torch.int32).to(device)
    moments = at.flatten().to(device, torch.int32)
    if monitor.segments is None:
        monitor.advance(folded.flatten(), moments)
    else:
        start = torch.tensor([stream.prompt_tokens for stream in batch])
        response = (there & (at >= start[:, None])).to(device)
        _fold_segments(monitor, folded, moments, tokens.to(device), response)
    return perf_counter() - begun


def _fold_segments(
    monitor: Monitor, rows: Tensor, at: Tensor, ids: Tensor, response: Tensor
) -> None:
    """Fold column by column: a token's segment, which it may open, decides how it is judged."""
    last = rows.shape[1] - 1
    for column in range(last + 1):
        slot = rows[:, column]
        monitor.follow(torch.where(response[:, column], slot, -1), ids[:, column])
        only = torch.full_like(rows, -1)
        only[:, column] = slot
        monitor.advance(only.flatten(), at, keep=column < last)
