"""Token loss annealed into a loss on the largest logit of each span (hallucination probes)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Max
from midstream.learn.methods.checks import labels_of
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.ragged import cross_entropy, mean_where, pad, ranges
from midstream.learn.methods.sgd import Batch, Descent, train
from midstream.learn.tokens import UNKNOWN, Source, Tokens

_CLIP = 100.0  # of the logits, as in the released code
_DESCENT = Descent(steps=4000, batch=4, rate=1e-3)  # batch and rate are the paper's


@dataclass(frozen=True)
class SpanMax:
    """Linear probe with the annealed span-max loss (Obeso et al. 2025, arXiv 2509.03531).

    See `span_max_loss` and `segments`. The paper's regularisers hold a LoRA in check, which changes
    the model; with frozen residuals they are zero. Served with the evidence `Max`: the paper
    abstains when any token exceeds a threshold.

    Cost: see `Descent`; the batch and the rate are the paper's.

    Attributes
    ----------
    span_weight : float
        Of tokens in a span of the hazard; others weigh 1.
    descent : Descent
    """

    span_weight: float = 10.0
    descent: Descent = _DESCENT

    @property
    def name(self) -> str:
        """As on the command line."""
        return "span-max"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train on token labels; see `Method`."""
        tokens = source.tokens
        labels = labels_of(self.name, tokens, task.hazard, "token")
        begin, table = segments(tokens, task.hazard)

        def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
            count = begin[batch.examples + 1] - begin[batch.examples]
            chosen = table[ranges(begin[batch.examples], count)]
            # The rows of a response are consecutive: its spans move with its first token.
            chosen[:, 1] += np.repeat(batch.first - batch.rows[batch.first], count)
            return span_max_loss(
                logits[0],
                torch.from_numpy(labels[batch.rows]),
                chosen,
                self.span_weight,
                done,
            )

        labelled = np.bincount(tokens.example_of, labels != UNKNOWN, len(tokens)) > 0
        heads = train(self.name, source, task, labelled, loss, self.descent)
        return [
            ReadOut(
                self.name,
                (heads.probe(self.name, task, index, Max()),),
                {"loss": float(heads.loss[index])},
            )
            for index in range(len(source.taps))
        ]


def segments(tokens: Tokens, hazard: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spans to take the largest logit of, with and without the hazard.

    Those with it are the labelled spans of the hazard. The paper's spans without are the supported
    entities; nothing like them is labelled here, so every longest run of response tokens labelled 0
    is one: its largest logit is what a false alarm there depends on.

    Returns
    -------
    begin : int64 [E + 1]
        Example e has the rows ``begin[e]:begin[e + 1]`` of the table.
    table : int64 [S, 3]
        Label, first row, number of rows.
    """
    column = tokens.column(hazard)
    spans = tokens.spans[tokens.spans[:, 0] == column, 1:]
    clear = (tokens.labels[:, column] == 0) & tokens.in_response
    goes_on = np.zeros_like(clear)
    goes_on[1:] = clear[1:] & clear[:-1] & (tokens.position[1:] > 0)
    first = np.flatnonzero(clear & ~goes_on)
    length = np.bincount(np.cumsum(clear & ~goes_on)[clear] - 1, minlength=len(first))
    table = np.concatenate(
        [
            np.column_stack(
                [np.ones(len(spans), np.int64), spans[:, 0], spans[:, 1] - spans[:, 0]]
            ),
            np.column_stack([np.zeros(len(first), np.int64), first, length]),
        ]
    )
    table = table[np.argsort(table[:, 1], kind="stable")]
    return np.searchsorted(table[:, 1], tokens.starts), table


def span_max_loss(
    logits: Tensor,
    labels: Tensor,
    spans: NDArray[np.int64],
    span_weight: float,
    annealed: float,
) -> Tensor:
    """``(1 - omega) L_token + omega L_span`` of each tap.

    L_token is the cross-entropy of labelled tokens, each times its weight, divided by their number;
    L_span that of the largest logit of each span, averaged over the spans. Logits are clipped to
    +-100 first.

    Parameters
    ----------
    logits : fp32 [T, R]
    labels : int8 [R]
        1 in spans of the hazard.
    spans : int64 [S, 3]
        Label, first of the R tokens, number of tokens.
    span_weight : float
        Weight of tokens labelled 1; the others' is 1.
    annealed : float
        omega.

    Returns
    -------
    fp32 [T]
    """
    clipped = logits.clamp(-_CLIP, _CLIP)
    weights = 1 + (span_weight - 1) * (labels == 1)
    token_loss = mean_where(cross_entropy(clipped, labels) * weights, labels != UNKNOWN)
    if not len(spans):
        return (1 - annealed) * token_loss
    inside = clipped[:, torch.from_numpy(ranges(spans[:, 1], spans[:, 2]))]
    largest = pad(inside, spans[:, 2], -torch.inf).amax(dim=-1)
    span_loss = cross_entropy(largest, torch.from_numpy(spans[:, 0])).mean(dim=1)
    return (1 - annealed) * token_loss + annealed * span_loss
