"""Temperature, top-k and top-p, each row by what its own request asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)

# What they are made with does not matter: every row that they see brings its own value.
_TEMPERATURE = ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0))
_TOP_K = ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(1))
_TOP_P = ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0))


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes
    ----------
    temperature : float
        0 takes the likeliest token, and of several the first, as ``argmax`` does.
    top_k : int
        0 keeps all.
    top_p : float
        1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected above 0, 1 at most; got {self.top_p}")

    @classmethod
    def of(cls, config: Any) -> Self:
        """What a model's generation config asks for."""
        if config.do_sample is False:
            return cls(temperature=0.0)
        given = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def with_asked(self, asked: Mapping[str, float]) -> Sampling:
        """Return this with what a request asked for in its place."""
        return Sampling(
            temperature=float(asked.get("temperature", self.temperature)),
            top_k=int(asked.get("top_k", self.top_k)),
            top_p=float(asked.get("top_p", self.top_p)),
        )


def shape(scores: Tensor, asked: Sequence[Sampling]) -> Tensor:
    """Return logits to sample from; only rows that need it are worked on, and copied.

    Parameters
    ----------
    scores : float [n, vocabulary]
        Not changed.
    asked : sequence of Sampling
        Of the first rows; the others stay as they are.
    """
    vocabulary = scores.shape[1]
    warm = [(i, s) for i, s in enumerate(asked) if s.temperature != 0.0]
    for warper, dtype, rows in (
        (_TEMPERATURE, torch.float32, [(i, s.temperature) for i, s in warm if s.temperature != 1]),
        (_TOP_K, torch.int32, [(i, s.top_k) for i, s in warm if 0 < s.top_k < vocabulary]),
        (_TOP_P, torch.float32, [(i, s.top_p) for i, s in warm if s.top_p < 1.0]),
    ):
        if rows:
            index, values = zip(*rows, strict=True)
            at = torch.tensor(index, device=scores.device)
            argument = torch.tensor(values, dtype=dtype, device=scores.device).view(torch.int32)
            scores = scores.index_copy(0, at, warper(scores[at], argument))
    if greedy := [i for i, s in enumerate(asked) if s.temperature == 0.0]:
        at = torch.tensor(greedy, device=scores.device)
        chosen = scores[at].argmax(dim=1, keepdim=True)
        only = torch.full_like(scores[at], -torch.inf).scatter_(1, chosen, 0.0)
        scores = scores.index_copy(0, at, only)
    return scores
