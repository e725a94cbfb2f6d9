"""Mass-mean probes: the difference of the class means (Marks and Tegmark 2023, section 5).

``z = theta . (h - m)`` with ``theta`` the mean of the hazard's rows less that of the others, and
``m`` the point midway between both means. The second kind corrects for the covariance within the
classes, ``z = theta . S^-1 (h - m)``: Fisher's direction, equal to `.lda` without its shrinkage and
class shares. Logits have the scale of the formula, so a threshold needs calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from midstream.learn.examples import Level
from midstream.learn.methods.checks import probe_name
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.moments import Moments, class_moments
from midstream.learn.methods.units import SERVED, units_of
from midstream.learn.tokens import Source
from midstream.probe import Probe


@dataclass(frozen=True)
class MassMean:
    """Difference of class means. Cost: one pass, O(n d) a tap.

    Attributes
    ----------
    level : {"token", "response", "prompt"}
        Labels to learn from; a response is the mean of its residuals, a prompt its last token.
    """

    name: ClassVar[str] = "mass-mean"
    _needs_covariance: ClassVar[bool] = False

    level: Level = "token"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Fit one probe per tap; see `Method`."""
        units = units_of(self.name, source.tokens, task.hazard, self.level)
        moments = class_moments(self.name, source, units, scatter=self._needs_covariance)
        reads, evidence = SERVED[self.level]
        found = []
        for tap, of_tap in moments.items():
            weight = self._direction(of_tap)
            probe = Probe.folded(
                probe_name(task.hazard, self.name, tap),
                task.hazard,
                tap,
                weight,
                mean=of_tap.mean.mean(dim=0),
                reads=reads,
                evidence=evidence,
            )
            found.append(ReadOut(self.name, (probe,)))
        return found

    def _direction(self, moments: Moments) -> Tensor:
        return moments.mean[1] - moments.mean[0]


@dataclass(frozen=True)
class MassMeanIID(MassMean):
    """Difference of class means through the inverse of the covariance within the classes.

    The inverse is taken of the correlations, as residual streams have features a thousand times
    larger than others; directions with less variance than fp32 residuals can show, ``d * 1.2e-7``
    of the largest, are left out. Cost: one pass, O(n d^2 + d^3) a tap; memory ``8 d^2`` bytes a
    tap.
    """

    name: ClassVar[str] = "mass-mean-iid"
    _needs_covariance: ClassVar[bool] = True

    def _direction(self, moments: Moments) -> Tensor:
        scale = moments.deviation
        correlation = moments.covariance / torch.outer(scale, scale)
        rtol = len(scale) * torch.finfo(torch.float32).eps
        inverse: Tensor = torch.linalg.pinv(correlation, rtol=rtol, hermitian=True)
        return inverse @ (super()._direction(moments) / scale) / scale
