"""transformers: the logits processor that halts rows of ``generate``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from midstream.engines.hf.attachment import Attachment


class HaltingProcessor(LogitsProcessor):
    """Forces the end of sequence on halted rows; the other rows pass through untouched."""

    supports_continuous_batching = False

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge the rows fed; return ``scores`` [B, vocabulary], those of halted rows replaced."""
        self.attachment.step(input_ids)
        if not self.attachment.may_have_halted():
            return scores
        return self.end(self.attachment.halted(), scores)

    # generate asks for the signature in every step: 9 us, 3 where it is at hand.
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]

    def end(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` with only the end of sequence possible where ``rows`` [B] is true."""
        return only_end(rows, scores, self.attachment.end_token)


def only_end(rows: Tensor, scores: Tensor, end_token: int) -> Tensor:
    """Return ``scores`` with only the end of sequence possible where ``rows`` [B] is true."""
    stop = torch.full_like(scores[0], -torch.inf)
    stop[end_token] = 0.0
    return torch.where(rows[:, None], stop, scores)
