"""Trained read-outs side by side, on examples that trained none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.learn.examples import Level
from midstream.learn.methods.method import ReadOut
from midstream.learn.tokens import Source, Tokens, TrainingDataError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """One read-out and its area under the ROC curve.

    Attributes
    ----------
    level : {"token", "response", "prompt"}
        What was ranked: response tokens; responses, by the largest logit of any token; or prompts,
        by the logit of the last token. Prompts without labels are ranked by what they lead to.
    auroc : float
    """

    read_out: ReadOut
    level: Level
    auroc: float

    def row(self) -> dict[str, Any]:
        """As tables and JSON take it."""
        return {
            "method": self.read_out.method + (" (prompt)" if self.level == "prompt" else ""),
            "hazard": self.read_out.probes[0].hazard,
            "tap": "+".join(map(str, sorted(self.read_out.taps))),
            "level": self.level,
            "auroc": self.auroc,
            "facts": dict(self.read_out.facts),
        }


def compare(read_outs: Sequence[ReadOut], source: Source) -> list[Compared]:
    """Rank read-outs, each by the labels of its own hazard, best first.

    Ties, to three digits, go to the one that reads fewer and earlier taps.
    One pass over the residuals; memory is 4 bytes per read-out and token.

    Raises
    ------
    TrainingDataError
        When the labels hold one class alone.
    """
    logits = read_logits(read_outs, source)
    found = []
    for read_out, values in zip(read_outs, logits, strict=True):
        hazard = read_out.probes[0].hazard
        level = level_of(read_out, source.tokens, hazard)
        found.append(Compared(read_out, level, auroc(values, source.tokens, hazard, level)))
    return sorted(
        found, key=lambda c: (-round(c.auroc, 3), len(c.read_out.taps), sorted(c.read_out.taps))
    )


def read_logits(read_outs: Sequence[ReadOut], source: Source) -> Floats:
    """Logit of each read-out at each token, fp32 [R, N]."""
    logits = np.full((len(read_outs), int(source.tokens.starts[-1])), np.nan, np.float32)
    for chunk in source.chunks():
        for index, read_out in enumerate(read_outs):
            logits[index, chunk.rows] = read_out.logits(chunk.hidden).numpy()
    return logits


def level_of(read_out: ReadOut, tokens: Tokens, hazard: str) -> Level:
    """Return the finest level at which the labels can judge this read-out."""
    if read_out.probes[0].reads == "prompt":
        return "prompt"
    return "token" if (tokens.labels[:, tokens.column(hazard)] == 1).any() else "response"


def auroc(logits: Floats, tokens: Tokens, hazard: str, level: Level) -> float:
    """Area under the ROC curve at one level, over what has a label; ``logits`` [N]."""
    from sklearn.metrics import roc_auc_score

    scores, labels = labels_at(logits, tokens, hazard, level)
    return float(roc_auc_score(labels, scores))


def labels_at(
    logits: Floats, tokens: Tokens, hazard: str, level: Level
) -> tuple[Floats, NDArray[np.bool_]]:
    """Score and label of whatever has a label at this level; a TrainingDataError without both."""
    column = tokens.column(hazard)
    if level == "token":
        scores, labels = logits, tokens.labels[:, column]
    elif level == "response":
        scores = response_maxima(logits, tokens)
        # One without a token is not scored, so there is nothing to rank.
        labels = np.where(np.isneginf(scores), -1, tokens.response_labels[:, column])
    else:
        last = tokens.starts[:-1] + np.maximum(tokens.prompt_tokens - 1, 0)
        scores = logits[last]
        of_prompts = tokens.prompt_labels[:, column]
        if (of_prompts < 0).all():  # what the prompt leads to, then
            of_prompts = tokens.response_labels[:, column]
        # What opens a plain text is no prompt, and serving never scores it.
        labels = np.where((tokens.prompt_tokens > 0) & ~tokens.special[last], of_prompts, -1)
    known = labels >= 0
    if not 0 < labels[known].sum() < known.sum():
        raise TrainingDataError(
            f"{hazard!r}: the examples to choose by hold {int(known.sum())} {level} labels of one "
            "class; give more examples, or another seed for the split"
        )
    return scores[known], labels[known] == 1


def response_maxima(values: Floats, tokens: Tokens) -> Floats:
    """Largest value of any response token of each example, [E]; -inf where there is none."""
    inside = np.where(tokens.in_response, values, -np.inf)
    found: Floats = np.maximum.reduceat(inside, tokens.starts[:-1])
    return found
