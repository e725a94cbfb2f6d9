"""Contrast-consistent search (Burns et al. 2022), and its polarity-aware reading (PA-CCS).

A statement stands in two texts, one that affirms it ("yes") and one that denies it ("no"). With
``p1`` and ``p0`` the probe's answers to both, each side centred on its own mean, the loss is
``mean((p0 - (1 - p1))^2) + mean(min(p0, p1)^2)``: the two answers have to be consistent, and
confident. No label is needed to train. The prediction for the pair is ``(p1 + 1 - p0) / 2``.

PA-CCS asks for the opposite statement, not-A, in two texts as well, and measures how far the probe
takes A for the contrary of not-A (see `polar_consistency` and `contradiction_index`).

What is served reads one token, which is not known to be a yes or a no: it is centred midway between
the two means. The fact ``answer_offset`` is what the answer's word alone adds to the logit of a
yes, and takes from that of a no. It was trained on the last token of each text.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from midstream.learn.methods.checks import probe_name
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.units import Units, gather_units
from midstream.learn.tokens import UNKNOWN, MissingLabelsError, Source, Tokens, TrainingDataError
from midstream.probe import Probe, Reads


@dataclass(frozen=True)
class CCS:
    """CCS, all taps and restarts trained side by side.

    The sign of the loss's optimum is arbitrary. The labels of the "yes" texts set it, where there
    are any; the fact ``labelled_pairs`` says how many, and a warning is given when there are none.
    All pairs are trained on: hold out by splitting the source.

    Cost: one pass, then O(restarts x pairs x d) an epoch and tap: 9 s for 4 taps and 1,000 pairs of
    width 128 on one core. Memory ``8 pairs d`` bytes a tap, four times over while centring.

    Attributes
    ----------
    epochs, restarts, learning_rate, weight_decay
        Full-batch AdamW; of the restarts the one with the lowest loss is kept.
    supervision : float
        Weight of the cross-entropy between prediction and label of the pairs that have one.
    """

    name: ClassVar[str] = "ccs"
    _polar: ClassVar[bool] = False

    epochs: int = 1500
    restarts: int = 10
    learning_rate: float = 0.015
    weight_decay: float = 0.01
    supervision: float = 0.0

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Fit one probe per tap; see `Method`.

        The facts are ``loss``, ``pairs``, ``labelled_pairs``, ``answer_offset``; with labels
        ``accuracy`` on the training pairs; with opposite statements ``polar_consistency`` and
        ``contradiction_index``, means over them.
        """
        tokens = source.tokens
        pairs = _pairs(self.name, tokens)
        reads = _reads(self.name, tokens, pairs)
        opposites = _opposites(tokens, pairs)
        if self._polar and 2 * len(opposites) != len(pairs):
            raise MissingLabelsError(
                f"{self.name}: {len(pairs) - 2 * len(opposites)} of {len(pairs)} statements have "
                "no opposite; give both A and not-A, each with a yes and a no, or use ccs"
            )
        table = tokens.response_labels if reads == "response" else tokens.prompt_labels
        labels = table[pairs[:, 1], tokens.column(task.hazard)]
        labelled = torch.from_numpy(labels != UNKNOWN)
        if self.supervision and not labelled.any():
            raise TrainingDataError(
                f"{self.name}: hazard {task.hazard!r}: no yes text has a {reads} label to "
                "supervise with; label some, or leave supervision at 0"
            )
        if not labelled.any():
            warnings.warn(
                f"{self.name}: hazard {task.hazard!r}: no yes text has a {reads} label, so the "
                "sign is not known and higher may mean safer; label at least one",
                stacklevel=2,
            )
        truth = torch.from_numpy(labels.astype(np.float32))

        no, yes = gather_units(
            self.name, source, *(_last_tokens(tokens, pairs[:, side]) for side in (0, 1))
        )
        x = torch.stack([torch.stack([no[tap], yes[tap]]) for tap in source.taps])
        means = x.mean(dim=2, keepdim=True, dtype=torch.float64)  # [taps, 2, 1, d]
        x = (x - means).float()
        weight, bias, loss = self._train(x, truth, labelled, task.seed)

        found = []
        for index, tap in enumerate(source.taps):
            w, b = weight[index].double(), float(bias[index])
            p0, p1 = torch.sigmoid(x[index].double() @ w + b)
            facts = {
                "loss": float(loss[index]),
                "pairs": float(len(pairs)),
                "labelled_pairs": float(labelled.sum()),
            }
            sign = 1.0
            if labelled.any():
                right = (((p1 + 1 - p0) / 2 > 0.5) == (truth == 1))[labelled]
                accuracy = float(right.double().mean())
                facts["accuracy"] = max(accuracy, 1 - accuracy)
                if accuracy < 0.5:
                    sign, p0, p1 = -1.0, 1 - p0, 1 - p1
            if len(opposites):
                a, not_a = torch.from_numpy(opposites).T
                answers = p1[a], p0[a], p1[not_a], p0[not_a]
                facts["polar_consistency"] = float(polar_consistency(*answers).mean())
                facts["contradiction_index"] = float(contradiction_index(*answers).mean())
            mean_no, mean_yes = means[index, :, 0]
            facts["answer_offset"] = sign * float(w @ (mean_yes - mean_no)) / 2
            probe = Probe.folded(
                probe_name(task.hazard, self.name, tap),
                task.hazard,
                tap,
                w,
                b,
                mean=(mean_no + mean_yes) / 2,
                slope=sign,
                reads=reads,
            )
            found.append(ReadOut(self.name, (probe,), facts))
        return found

    def _train(
        self, x: Tensor, truth: Tensor, labelled: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [taps, d], biases and losses [taps] of the best restarts.

        ``x`` is [taps, 2, pairs, d]. AdamW works on each number alone and the losses are added up,
        so no tap or restart feels another.
        """
        taps, _, pairs, width = x.shape
        draws = torch.Generator().manual_seed(seed)
        bound = width**-0.5  # as torch.nn.Linear draws them
        weight = torch.empty(taps, width, self.restarts).uniform_(-bound, bound, generator=draws)
        bias = torch.empty(taps, 1, self.restarts).uniform_(-bound, bound, generator=draws)
        optimiser = torch.optim.AdamW(
            [weight.requires_grad_(), bias.requires_grad_()],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        flat = x.reshape(taps, 2 * pairs, width)

        def losses() -> Tensor:  # [taps, restarts]
            p = torch.sigmoid(torch.baddbmm(bias, flat, weight))
            p0, p1 = p[:, :pairs], p[:, pairs:]
            total = (p0 - (1 - p1)).square().mean(dim=1)
            total = total + torch.minimum(p0, p1).square().mean(dim=1)
            if self.supervision:
                predicted = ((p1 + 1 - p0) / 2)[:, labelled]
                target = truth[labelled][:, None].expand_as(predicted)
                entropy = binary_cross_entropy(predicted, target, reduction="none").mean(dim=1)
                total = total + self.supervision * entropy
            return total

        for _ in range(self.epochs):
            optimiser.zero_grad()
            losses().sum().backward()
            optimiser.step()
        with torch.no_grad():
            loss, best = losses().min(dim=1)
            index = torch.arange(taps)
            return weight.detach()[index, :, best], bias.detach()[index, 0, best], loss


@dataclass(frozen=True)
class PolarityAwareCCS(CCS):
    """CCS that insists on the opposite of every statement, so that its consistency is measured."""

    name: ClassVar[str] = "pa-ccs"
    _polar: ClassVar[bool] = True


def polar_consistency(a_yes: Tensor, a_no: Tensor, not_a_yes: Tensor, not_a_no: Tensor) -> Tensor:
    """Polar consistency of a statement and its opposite, elementwise.

    ``((a_yes - not_a_no)^2 + (a_no - not_a_yes)^2) / 2`` times the signs of ``a_yes - not_a_yes``
    and ``not_a_no - a_no`` (PA-CCS): 0 is consistent.
    """
    distance = ((a_yes - not_a_no).square() + (a_no - not_a_yes).square()) / 2
    return distance * torch.sign(a_yes - not_a_yes) * torch.sign(not_a_no - a_no)


def contradiction_index(a_yes: Tensor, a_no: Tensor, not_a_yes: Tensor, not_a_no: Tensor) -> Tensor:
    """``a_yes not_a_yes + a_no not_a_no``: how far both a statement and its opposite are held."""
    return a_yes * not_a_yes + a_no * not_a_no


def _pairs(method: str, tokens: Tokens) -> NDArray[np.int64]:
    """The no and the yes example of each statement, [n, 2], in order of pair and polarity."""
    statements: dict[tuple[int, int], list[int]] = {}
    for example in np.flatnonzero(tokens.contrast[:, 0] >= 0):
        pair, negated, _ = tokens.contrast[example].tolist()
        statements.setdefault((pair, negated), []).append(int(example))
    if len(statements) < 2:
        raise MissingLabelsError(
            f"{method}: {len(statements)} contrast pairs in {len(tokens)} examples; give texts "
            "that affirm and deny a statement, with `contrast`, of at least two statements"
        )
    for examples in statements.values():
        if sorted(tokens.contrast[examples, 2].tolist()) != [0, 1]:
            raise TrainingDataError(
                f"{method}: a contrast pair is one yes and one no, found "
                f"{tokens.contrast[examples, 2].tolist()} in examples "
                f"{', '.join(tokens.ids[e] for e in examples)}; keep pairs whole when splitting"
            )
    return np.array(
        [
            sorted(statements[key], key=lambda example: int(tokens.contrast[example, 2]))
            for key in sorted(statements)
        ]
    )


def _opposites(tokens: Tokens, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of ``pairs`` that hold A and not-A, [m, 2]."""
    places = {
        (int(pair), int(negated)): index
        for index, (pair, negated, _) in enumerate(tokens.contrast[pairs[:, 0]])
    }
    both = [
        (index, places[pair, 1])
        for (pair, negated), index in places.items()
        if not negated and (pair, 1) in places
    ]
    return np.array(both, dtype=np.int64).reshape(-1, 2)


def _reads(method: str, tokens: Tokens, pairs: NDArray[np.int64]) -> Reads:
    """Whether the last tokens are tokens of responses or of prompts."""
    examples = pairs.ravel()
    in_prompt = np.diff(tokens.starts)[examples] == tokens.prompt_tokens[examples]
    if in_prompt.any() and not in_prompt.all():
        raise TrainingDataError(
            f"{method}: {int(in_prompt.sum())} of {len(examples)} contrast texts end in the "
            "prompt, the others in the response; put all into one of them"
        )
    return "prompt" if in_prompt.all() else "response"


def _last_tokens(tokens: Tokens, examples: NDArray[np.int64]) -> Units:
    """The last token of each example that is not a special one: serving scores none of those."""
    of_row = np.full(tokens.starts[-1], -1)
    last = np.maximum.accumulate(np.where(tokens.special, -1, np.arange(len(tokens.special))))
    of_row[last[tokens.starts[examples + 1] - 1]] = np.arange(len(examples))
    return Units(of_row, np.zeros(len(examples), dtype=np.int64))
