"""Runs of unequal length side by side: laid out in a rectangle, averaged, compared with labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool1d, binary_cross_entropy_with_logits


def ranges(first: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``first[i], first[i] + 1, ...``, ``lengths[i]`` of them, one run after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(first - before, lengths) + np.arange(int(lengths.sum()))


def pad(values: Tensor, lengths: NDArray[np.int64], fill: float) -> Tensor:
    """Lay runs of ``lengths`` [B], side by side in ``values`` [..., R], out as [..., B, L].

    Cost: O(B L), L the longest run. Copied by index, whose gradient is a plain gather: the same in
    every run of the program.
    """
    count, longest = len(lengths), int(lengths.max())
    place = torch.from_numpy(ranges(np.arange(count) * longest, lengths))
    flat = values.new_full((*values.shape[:-1], count * longest), fill)
    flat = flat.index_copy(-1, place, values)
    return flat.view(*values.shape[:-1], count, longest)


def running_mean(values: Tensor, window: int) -> Tensor:
    """Mean over the last ``window`` of [T, B, L], over all so far while there are fewer.

    As `midstream.evidence.Mean` has it. Cost: O(window) per value.
    """
    taps, examples, longest = values.shape
    ahead = torch.nn.functional.pad(values.reshape(taps * examples, 1, longest), (window - 1, 0))
    total = avg_pool1d(ahead, window, stride=1) * window
    tokens = torch.arange(1, longest + 1).clamp(max=window)
    return total.view(taps, examples, longest) / tokens


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits [T, ...] with labels 0 or 1 [...]; any number where -1."""
    target = labels.clamp(min=0).to(logits.dtype).expand_as(logits)
    return binary_cross_entropy_with_logits(logits, target, reduction="none")


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean per tap of values [T, ...] where ``chosen`` [...]; 0 where nothing is."""
    total = (values * chosen).flatten(start_dim=1).sum(dim=1)
    return total / chosen.sum().clamp(min=1)
