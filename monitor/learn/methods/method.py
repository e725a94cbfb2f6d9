"""What every way to train a read-out takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from midstream.learn.tokens import Source
from midstream.probe import Probe
from midstream.taps import Tap


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes
    ----------
    hazard : str
        The hazard whose labels are the target.
    refusal : str, optional
        The label that says that a response refuses, for the methods that tell refusing from harm.
    seed : int
        Of everything random.
    """

    hazard: str
    refusal: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class ReadOut:
    """A trained read-out: one logit per token, linear at run time.

    Attributes
    ----------
    method : str
    probes : tuple of Probe
        The first has the evidence rule and the name; the others, if any, read further taps and add
        their logit to it (``adds_to``).
    facts : mapping of str to float
        What training says about itself: final loss, consistency, a layer's score.
    """

    method: str
    probes: tuple[Probe, ...]
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where it reads."""
        return tuple(probe.tap for probe in self.probes)

    def logits(self, hidden: Mapping[Tap, Tensor]) -> Tensor:
        """Logit per row, fp32 [m], of residuals fp32 [m, d] at each of its taps."""
        total = torch.zeros(len(next(iter(hidden.values()))))
        for probe in self.probes:
            rows = hidden[probe.tap].float()
            if probe.norm == "rms":
                rows = rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + probe.eps)
            total = total + rows @ probe.weight + probe.bias
        return total


class Method(Protocol):
    """A way to train. Its parameters are dataclass fields with the paper's values as defaults."""

    @property
    def name(self) -> str:
        """As on the command line."""

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Train at every tap of the source in one go.

        Returns
        -------
        list of ReadOut
            One per tap, in order; or fewer, where the method reads several taps together.

        Raises
        ------
        TrainingDataError
            When the labels it needs are not there, a class is missing, or residuals are not finite;
            the message names method, hazard, label level and remedy.
        """
