"""Softmax-weighted loss over windows, for labels of responses (Constitutional Classifiers++)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.evidence import Ema
from midstream.learn.methods.checks import labels_of
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.ragged import cross_entropy, running_mean
from midstream.learn.methods.sgd import DESCENT, Batch, Descent, require, train
from midstream.learn.tokens import UNKNOWN, Source


@dataclass(frozen=True)
class Windowed:
    """The linear probe of Constitutional Classifiers++ (arXiv 2601.04603), one per tap.

    See `windowed_loss`. As in the paper an exponential moving average stands in for the window when
    serving: ``alpha = 2 / (window + 1)``, whose tokens are as old on average. The paper's alpha is
    not known to us, nor its optimiser, and its probe reads all layers together.

    Cost: see `Descent`, and O(window) per token and tap on the logits.

    Attributes
    ----------
    window : int
        Tokens averaged, M in the paper.
    temperature : float
        tau: the lower, the more the most harmful window alone is taught.
    descent : Descent
    """

    window: int = 16
    temperature: float = 1.0
    descent: Descent = DESCENT

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above zero")

    @property
    def name(self) -> str:
        """As on the command line."""
        return "windowed"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train on response labels; see `Method`."""
        response = labels_of(self.name, source.tokens, task.hazard, "response")

        def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
            return windowed_loss(
                batch.padded(logits[0]),
                batch.mask,
                torch.from_numpy(response[batch.examples]),
                self.window,
                self.temperature,
            )

        heads = train(self.name, source, task, response != UNKNOWN, loss, self.descent)
        evidence = Ema(alpha=2 / (self.window + 1))
        return [
            ReadOut(
                self.name,
                (heads.probe(self.name, task, index, evidence),),
                {"loss": float(heads.loss[index])},
            )
            for index in range(len(source.taps))
        ]


def windowed_loss(
    logits: Tensor, mask: Tensor, response: Tensor, window: int, temperature: float
) -> Tensor:
    """``sum_t softmax_t(m / tau) BCE(y, m_t)`` of each tap, averaged over the examples.

    ``m_t`` is the mean logit of the ``window`` tokens up to t, for t from the first whole window
    on. A response shorter than a window has one, of all its tokens. The gradient flows through the
    weights, too.

    Parameters
    ----------
    logits : fp32 [T, B, L]
    mask : bool [B, L]
        Where there is a token; those of a row come first.
    response : int8 [B]
        0 or 1.

    Returns
    -------
    fp32 [T]
    """
    means = running_mean(logits, window)
    first = mask.sum(dim=1).clamp(max=window) - 1
    whole = mask & (torch.arange(mask.shape[1]) >= first[:, None])
    weights = (means / temperature).masked_fill(~whole, -torch.inf).softmax(dim=-1)
    losses = cross_entropy(means, response[:, None].expand_as(mask))
    return (weights * losses).sum(dim=-1).mean(dim=1)
