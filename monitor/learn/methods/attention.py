"""Heads that pool a response while they are trained: attention, and the largest rolling mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.evidence import Max, Mean
from midstream.learn.methods.checks import auroc, labels_of
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.ragged import cross_entropy, running_mean
from midstream.learn.methods.sgd import DESCENT, Batch, Descent, require, train
from midstream.learn.tokens import UNKNOWN, Source


@dataclass(frozen=True)
class Attention:
    """Attention probe of one head, its values served as MultiMax does (arXiv 2601.11516).

    Trained is ``sum_t softmax_t(q . h) v . h_t + b`` against the response's label; served is the
    value read-out ``v . h_t + b`` with the evidence `Max`. A linear read-out cannot follow the
    weights, so the query is lost: a value that no attention held down may now be the largest, and
    the maximum is never below the weighted mean the head was trained on. The thresholds must be
    calibrated anew, and ``auroc_served`` beside ``auroc_pooled`` says what the ranking of the
    training responses lost. The paper's ten heads, each with a maximum of its own, cannot be summed
    before the evidence: there is one head.

    Cost: see `Descent`, with two columns per tap, and one pass more for the facts.

    Attributes
    ----------
    descent : Descent
    """

    descent: Descent = DESCENT

    @property
    def name(self) -> str:
        """As on the command line."""
        return "attention"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train on response labels; see `Method`."""
        response = labels_of(self.name, source.tokens, task.hazard, "response")

        def pooled(logits: Tensor, batch: Batch) -> Tensor:
            return attention_pool(batch.padded(logits[0]), batch.padded(logits[1]), batch.mask)

        def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
            labels = torch.from_numpy(response[batch.examples])
            return cross_entropy(pooled(logits, batch), labels).mean(dim=1)

        def both(logits: Tensor, batch: Batch) -> Tensor:
            served = batch.padded(logits[0], -torch.inf).amax(dim=-1)
            return torch.stack([pooled(logits, batch), served])

        known = response != UNKNOWN
        heads = train(self.name, source, task, known, loss, self.descent, biases=(True, False))
        scores, which = heads.per_example(source, known, both)
        return [
            ReadOut(
                self.name,
                (heads.probe(self.name, task, index, Max()),),
                {
                    "loss": float(heads.loss[index]),
                    "auroc_pooled": auroc(scores[0, index], response[which] == 1),
                    "auroc_served": auroc(scores[1, index], response[which] == 1),
                },
            )
            for index in range(len(source.taps))
        ]


@dataclass(frozen=True)
class RollingMax:
    """The largest rolling mean of a linear read-out, as trained so served.

    The pooled logit of a response is the largest mean over ``window`` consecutive logits, over all
    so far at its beginning. The evidence `Mean` over the same window, compared with a threshold at
    every token, alarms exactly when the pooled logit of what was read so far does: nothing is lost.
    This is the rolling-mean head of arXiv 2601.11516 without the attention inside its windows,
    which a linear read-out cannot follow.

    Cost: see `Descent`, and O(window) per token and tap on the logits.

    Attributes
    ----------
    window : int
        Tokens averaged.
    descent : Descent
    """

    window: int = 10
    descent: Descent = DESCENT

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "at least 1")

    @property
    def name(self) -> str:
        """As on the command line."""
        return "rolling-max"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train on response labels; see `Method`."""
        response = labels_of(self.name, source.tokens, task.hazard, "response")

        def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
            pooled = rolling_max(batch.padded(logits[0]), batch.mask, self.window)
            labels = torch.from_numpy(response[batch.examples])
            return cross_entropy(pooled, labels).mean(dim=1)

        heads = train(self.name, source, task, response != UNKNOWN, loss, self.descent)
        return [
            ReadOut(
                self.name,
                (heads.probe(self.name, task, index, Mean(window=self.window)),),
                {"loss": float(heads.loss[index])},
            )
            for index in range(len(source.taps))
        ]


def attention_pool(values: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax-weighted mean of the values [T, B, L] where ``mask`` [B, L] holds: [T, B]."""
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights * values).sum(dim=-1)


def rolling_max(values: Tensor, mask: Tensor, window: int) -> Tensor:
    """Largest running mean over ``window`` of values [T, B, L] where ``mask`` holds: [T, B]."""
    means: Tensor = running_mean(values, window).masked_fill(~mask, -torch.inf).amax(dim=-1)
    return means
