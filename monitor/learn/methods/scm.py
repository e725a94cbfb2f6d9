"""The streaming content monitor's dual supervision: token, response and logic loss (SCM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Count
from midstream.learn.methods.checks import labels_of
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.ragged import cross_entropy, mean_where
from midstream.learn.methods.sgd import Batch, Descent, require, train
from midstream.learn.tokens import UNKNOWN, Source

_DESCENT = Descent(rate=2e-2)
_FLOOR = 1e-8  # of the logic loss's argument, as in the released code
_DELAYS = np.arange(1, 51)  # that Delay-k is tried with, as in the released code


@dataclass(frozen=True)
class SCM:
    """SCM (Li et al. 2025, arXiv 2506.09996), its heads linear on frozen residuals.

    See `scm_loss`. Only the token head is served. Departures from the paper, which trains the
    language model with the heads: two outputs and a softmax are one logit and a sigmoid, which is
    the same; there is no dropout, a costly form of weight decay where inputs are frozen; the rate
    is 2e-2, not 1e-4, and falls to zero.

    Cost: see `Descent`, and one pass more to choose k.

    Attributes
    ----------
    alpha, gamma : float
        Weights of the losses.
    theta : float
        Probability from which on a token counts as harmful.
    k : int, optional
        Harmful tokens it takes to alarm (Delay-k). When not given, the least of 1 to 50 with the
        best F1 over the training responses; the released script chooses on the test predictions.
    descent : Descent
        The weight decay is the paper's.
    """

    alpha: float = 0.6
    gamma: float = 1.0
    theta: float = 0.5
    k: int | None = None
    descent: Descent = _DESCENT

    def __post_init__(self) -> None:
        require(0 < self.theta < 1, "theta", self.theta, "between 0 and 1")
        require(self.k is None or self.k >= 1, "k", self.k, "at least 1")

    @property
    def name(self) -> str:
        """As on the command line."""
        return "scm"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train on token and response labels; see `Method`."""
        tokens = source.tokens
        labels = labels_of(self.name, tokens, task.hazard, "token")
        response = labels_of(self.name, tokens, task.hazard, "response")
        known = response != UNKNOWN

        def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
            return scm_loss(
                batch.padded(logits[0]),
                batch.last(logits[1]),
                batch.padded(torch.from_numpy(labels[batch.rows]), UNKNOWN),
                torch.from_numpy(response[batch.examples]),
                self.alpha,
                self.gamma,
            )

        labelled = np.bincount(tokens.example_of, labels != UNKNOWN, len(tokens)) > 0
        heads = train(
            self.name, source, task, labelled | known, loss, self.descent, biases=(True, False)
        )
        cut = math.log(self.theta / (1 - self.theta))
        harmful, which = heads.per_example(
            source, known, lambda logits, batch: batch.padded((logits[0] >= cut).int()).sum(dim=-1)
        )
        delays = _DELAYS if self.k is None else np.array([self.k])
        read_outs = []
        for index, counts in enumerate(harmful):
            f1 = delay_f1(counts, response[which] == 1, delays)
            k = int(delays[f1.argmax()])
            probe = heads.probe(self.name, task, index, Count(theta=cut, k=k))
            facts = {
                "loss": float(heads.loss[index]),
                "delay_k": float(k),
                "delay_f1": float(f1.max()),
            }
            read_outs.append(ReadOut(self.name, (probe,), facts))
        return read_outs


def delay_f1(
    counts: NDArray[np.integer], harmful: NDArray[np.bool_], delays: NDArray[np.int64]
) -> NDArray[np.float64]:
    """F1 of "at least k harmful tokens" as a sign of a harmful response, for each k.

    Parameters
    ----------
    counts : integer [E]
        Tokens of each response taken for harmful.
    harmful : bool [E]
    delays : int64 [D]

    Returns
    -------
    float64 [D]
    """
    alarms = counts[:, None] >= delays
    hits = (alarms & harmful[:, None]).sum(axis=0)
    f1: NDArray[np.float64] = 2 * hits / (alarms.sum(axis=0) + harmful.sum())
    return f1


def scm_loss(
    token: Tensor, holistic: Tensor, labels: Tensor, response: Tensor, alpha: float, gamma: float
) -> Tensor:
    """``alpha L_token + (1 - alpha) L_holistic + gamma L_logic`` of each tap.

    L_token is the cross-entropy averaged over the labelled tokens of the batch, L_holistic over
    the labelled responses. L_logic, "a harmful response has a harmful token", is
    ``-log(1 - c + c max_i c_i)``, c the holistic probability, the probabilities c_i of unlabelled
    tokens set to zero, the argument kept above 1e-8; averaged over the responses with a labelled
    token, for without one it would only say that c is zero.

    Parameters
    ----------
    token : fp32 [T, B, L]
        Logits.
    holistic : fp32 [T, B]
    labels : int8 [B, L]
        `UNKNOWN` in the padding.
    response : int8 [B]

    Returns
    -------
    fp32 [T]
    """
    labelled = labels != UNKNOWN
    token_loss = mean_where(cross_entropy(token, labels), labelled)
    response_loss = mean_where(cross_entropy(holistic, response), response != UNKNOWN)
    most = token.sigmoid().mul(labelled).amax(dim=-1)
    whole = holistic.sigmoid()
    logic = -(1 - whole + whole * most).clamp(min=_FLOOR).log()
    logic_loss = mean_where(logic, labelled.any(dim=-1))
    return alpha * token_loss + (1 - alpha) * response_loss + gamma * logic_loss
