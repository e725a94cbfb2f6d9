"""Character F1 on toxic spans: with the whole comment, and while it is being read.

One read-out over the embeddings and every layer of the encoder, seven sites of 384, is trained on
whole comments and on random beginnings of them. It is linear when served: seven probes whose
logits add up (`Probe.adds_to`), 2,688 multiplications a token where one probe takes 384. What
costs is the encoder: while a text is being read it is run again for each token.

Chosen on 1,500 of the training comments, of which 600 were also run on every beginning; the read-
out was trained on the 6,439 others. Mean character F1 of these 600, whole comment and k = 0, 4:

    trained on                       rule                    whole    k=0     k=4
    whole comments                   best threshold          0.644    0.612   0.635
    whole comments                   best set, level so far  0.685    0.617   0.642
    beginnings                       best set, level so far  0.679    0.632   0.646
    beginnings, one read-out per k   best set, level so far           0.623   0.649
    both                             best threshold          0.643    0.627   0.641
    both                             best set, level so far  0.690    0.634   0.653
    both                             level learnt from six numbers of the beginning (regression,
                                     trees, policy search)   up to    0.629   0.655
    both                             level of the whole comment, which cannot be known while
                                     reading: a bound                 0.656   0.681
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefix_runs import Comment, every_tap, prefixes, random_cuts, read_runs, whole
from span_rules import Bools, Floats, Rule, mark_streamed, mark_whole, score
from torch import Tensor
from weighted_logistic import Line, fit

LOOK_AHEAD = (0, 1, 2, 4, 8)


RULE = Rule(shift=-1.0, rise=1.15, floor=0.2)


@dataclass(frozen=True)
class Recipe:
    """How to train and decide.

    Attributes
    ----------
    cuts : int
        Random beginnings of each training comment.
    tail : int
        Tokens at the end of a beginning that are learnt from: those that are decided there.
    penalty : float
    steps : int
    negative : float
        Weight of a token that is not toxic. One that is weighs ``1 / sqrt(toxic tokens of the
        comment)``, so that a comment that is marked all over does not outvote the others: every
        comment counts alike in the score.
    rule : Rule
    """

    cuts: int = 4
    tail: int = 9
    penalty: float = 0.003
    steps: int = 40
    negative: float = 0.3
    rule: Rule = RULE


def train(encoder: Any, comments: Sequence[Comment], recipe: Recipe, seed: int = 0) -> Line:
    """Train the read-out.

    Memory: all rows in the encoder's dtype, 3.3 GB for 7,939 comments in bf16.
    """
    full = whole(comments)
    cut = random_cuts(comments, recipe.cuts, seed)
    runs = np.concatenate([full, cut])
    kept = np.concatenate([full[:, 1], np.minimum(cut[:, 1], recipe.tail)])
    taps = every_tap(encoder)
    rows = torch.empty(int(kept.sum()), len(taps) * encoder.config.hidden_size, dtype=encoder.dtype)
    labels = np.zeros(len(rows), np.bool_)
    weights = np.full(len(rows), recipe.negative)
    filled = 0
    for chosen, starts, states in read_runs(encoder, taps, comments, runs):
        for run, end in zip(chosen, starts[1:], strict=True):
            at, tokens = runs[run]
            to = slice(filled, filled + int(kept[run]))
            rows[to] = states[end - kept[run] : end]
            toxic = comments[at].toxic
            labels[to] = toxic[tokens - kept[run] : tokens]
            weights[to][labels[to]] = 1 / np.sqrt(max(1, toxic.sum()))
            filled = to.stop
    return fit(rows, labels, weights, penalty=recipe.penalty, steps=recipe.steps)


def logits_of(
    encoder: Any, comments: Sequence[Comment], runs: NDArray[np.int64], line: Line
) -> list[Floats]:
    """Logits of the tokens of each run."""
    found: list[Floats] = [np.zeros(0)] * len(runs)
    for chosen, starts, states in read_runs(encoder, every_tap(encoder), comments, runs):
        logits = _apply(states, line)
        for run, start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
            found[run] = logits[start:end]
    return found


def _apply(states: Tensor, line: Line) -> Floats:
    parts = [torch.mv(part.float(), line.weight) + line.bias for part in states.split(2048)]
    logits: Floats = torch.cat(parts).double().numpy()
    return logits


@dataclass(frozen=True)
class Curve:
    """What was decided about E comments; keys are "full" and the look-ahead.

    Attributes
    ----------
    f1 : dict of [E]
    logits : dict of list of [n]
        The logit that decided each token.
    """

    f1: dict[str, Floats]
    logits: dict[str, list[Floats]]


def curve(encoder: Any, comments: Sequence[Comment], line: Line, rule: Rule) -> Curve:
    """Decide each token of each comment, with the whole text and with each look-ahead.

    One run of the encoder per token: n (n + 1) / 2 tokens for a comment of n.
    """
    runs = prefixes(comments)
    logits = logits_of(encoder, comments, runs, line)
    ends = np.cumsum([len(comment.ids) for comment in comments])
    keys = ["full", *(f"k{k}" for k in LOOK_AHEAD)]
    f1: dict[str, list[float]] = {key: [] for key in keys}
    decided: dict[str, list[Floats]] = {key: [] for key in keys}
    for comment, end in zip(comments, ends, strict=True):
        count = len(comment.ids)
        own = logits[end - count : end]
        text, characters = comment.text, comment.characters
        last = own[-1] if count else np.zeros(0)
        marked: dict[str, Bools] = {"full": mark_whole(text, characters, last, rule)}
        decided["full"].append(last)
        for k, flags in mark_streamed(text, characters, own, LOOK_AHEAD, rule).items():
            marked[f"k{k}"] = flags
            decided[f"k{k}"].append(np.array([own[min(t + k, count - 1)][t] for t in range(count)]))
        for key, flags in marked.items():
            f1[key].append(score(text, comment.gold, characters, flags))
    return Curve({key: np.array(values) for key, values in f1.items()}, decided)
