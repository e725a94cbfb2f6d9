"""Latent Guard: harmfulness and refusal are told at different tokens of a prompt (2507.11878).

Harmfulness is read at ``t_inst``, the last token of the instruction, refusal at ``t_post``, the
last token of the prompt, after the chat template. The guard is, at ``t_inst``, ``cos(h, c1) -
cos(h, c0)`` with the centroids of refused harmful and of accepted harmless prompts, averaged over
the taps; above 0 the prompt is harmful. As ``cos(h, c) = rms(h) . c / (|c| sqrt(d))`` with ``rms(h)
= h / sqrt(mean(h^2))``, it is a sum of linear probes of RMS-normalised residuals. The paper takes
the inputs of all layers: collect at ``resid_pre``.

What is served is read elsewhere. A monitor judges a prompt once, at ``t_post``, and no evidence
rule picks out ``t_inst`` before it. Where a template follows the instruction, the guard and the
harmfulness probes are served on a token they were not fitted on. So the facts give the training
prompts' accuracy at logit 0 and AUROC at both: ``_instruction`` is the paper's, ``_served`` what
the monitor will see, and ``template_tokens`` the mean distance between them. Where only the
accuracy falls, a calibrated threshold mends it; where the AUROC falls, take the refusal probes,
which are served where they were fitted. On the testbed's model, with one token of template, the
last layer's harmfulness probe falls from 0.96 to 0.50 in accuracy and keeps an AUROC above 0.99.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.learn.methods.checks import auroc, joined, labels_of, probe_name, require_classes
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.units import (
    Units,
    gather_units,
    instruction_end_rows,
    of_examples,
    prompt_end_rows,
)
from midstream.learn.tokens import UNKNOWN, Source, Tokens
from midstream.probe import Probe
from midstream.taps import Tap


@dataclass(frozen=True)
class LatentGuard:
    """The guard over all taps, then per tap the harmfulness and the refusal direction.

    Read-outs, in this order: one ``latent-guard``, whose parts add up; ``latent-guard-harmfulness``
    and ``latent-guard-refusal`` for each tap, mean differences with 0 midway between the classes.
    All look for ``task.hazard`` but the refusal probes, which look for ``task.refusal`` where that
    is given.

    Without ``task.refusal`` the classes are all harmful and all harmless prompts. With it, refused
    harmful and accepted harmless ones; the other prompts only count in the facts. An accuracy is
    the mean of both classes' accuracies.

    Cost: one pass, O(prompts x d) a tap; memory ``8 prompts d`` bytes a tap.
    """

    name: ClassVar[str] = "latent-guard"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Fit all read-outs; see `Method`."""
        tokens = source.tokens
        labels = labels_of(self.name, tokens, task.hazard, "prompt")
        known = labels != UNKNOWN
        harmful = torch.from_numpy(labels[known] == 1)
        of_class = _classes(self.name, tokens, task, labels)[known]
        inst, post = gather_units(
            self.name,
            source,
            *(
                Units(of_examples(self.name, tokens, known, rows, what), of_class)
                for rows, what in (
                    (instruction_end_rows(tokens), "instruction"),
                    (prompt_end_rows(tokens), "prompt"),
                )
            ),
        )
        template = float((tokens.prompt_tokens - 1 - tokens.instruction_end)[known].mean())

        def facts(read_out: ReadOut) -> dict[str, float]:
            return {
                "template_tokens": template,
                "accuracy_instruction": _accuracy(read_out.logits(inst), harmful),
                "accuracy_served": _accuracy(read_out.logits(post), harmful),
                "auroc_instruction": auroc(read_out.logits(inst).numpy(), harmful.numpy()),
                "auroc_served": auroc(read_out.logits(post).numpy(), harmful.numpy()),
            }

        found = [self._guard(task, inst, of_class)]
        for tap in source.taps:
            for kind, hidden, hazard in (
                ("harmfulness", inst, task.hazard),
                ("refusal", post, task.refusal or task.hazard),
            ):
                method = f"{self.name}-{kind}"
                safe, harm = _centroids(hidden[tap], of_class)
                probe = Probe.folded(
                    probe_name(hazard, method, tap),
                    hazard,
                    tap,
                    harm - safe,
                    mean=(harm + safe) / 2,
                    reads="prompt",
                )
                found.append(ReadOut(method, (probe,)))
        return [ReadOut(r.method, r.probes, facts(r)) for r in found]

    def _guard(self, task: Task, inst: dict[Tap, Tensor], of_class: NDArray[np.int64]) -> ReadOut:
        parts = []
        for tap, hidden in inst.items():
            safe, harm = _centroids(hidden, of_class)
            parts.append(
                Probe(
                    probe_name(task.hazard, self.name, tap),
                    task.hazard,
                    tap,
                    (harm / harm.norm() - safe / safe.norm()) / (len(inst) * len(harm) ** 0.5),
                    norm="rms",
                    reads="prompt",
                )
            )
        return ReadOut(self.name, joined(task.hazard, self.name, parts))


def _classes(
    method: str, tokens: Tokens, task: Task, labels: NDArray[np.int8]
) -> NDArray[np.int64]:
    """1 for refused harmful, 0 for accepted harmless prompts, -1 for the rest, [E]."""
    if task.refusal is None:
        return labels.astype(np.int64)
    refused = tokens.response_labels[:, tokens.column(task.refusal)]
    of_class = np.where((labels == refused) & (labels != UNKNOWN), labels, UNKNOWN)
    require_classes(
        f"{method}: hazard {task.hazard!r}, refusal {task.refusal!r}",
        of_class,
        "prompts that were refused and harmful (1) or accepted and harmless (0)",
        "label the responses with refusal, or leave the refusal label out of the task",
    )
    return of_class.astype(np.int64)


def _centroids(hidden: Tensor, of_class: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean of class 0 and of class 1, fp64 [d]."""
    return (
        hidden[torch.from_numpy(of_class == 0)].double().mean(dim=0),
        hidden[torch.from_numpy(of_class == 1)].double().mean(dim=0),
    )


def _accuracy(logits: Tensor, harmful: Tensor) -> float:
    """Mean of both classes' accuracies at logit 0."""
    said = (logits > 0).double()
    return float((said[harmful].mean() + 1 - said[~harmful].mean()) / 2)
