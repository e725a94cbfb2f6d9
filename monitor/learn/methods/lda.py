"""Linear discriminant analysis with Ledoit-Wolf shrinkage, in closed form.

Two Gaussian classes with one covariance ``S`` have the log-odds ``z = (mu1 - mu0) . S^-1
(h - (mu1 + mu0) / 2) + log(n1 / n0)``. ``S`` is estimated on residuals divided by their
within-class standard deviation and shrunk, ``(1 - a) S + a tr(S) / d I``, with the ``a`` of least
expected squared error (Ledoit and Wolf 2004). That ``a`` is for independent rows; tokens of one
stream are not, so at the token level it is on the small side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from midstream.learn.examples import Level
from midstream.learn.methods.checks import probe_name
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.moments import Moments, class_moments
from midstream.learn.methods.units import SERVED, Units, read, units_of
from midstream.learn.tokens import Source
from midstream.probe import Probe
from midstream.taps import Tap


@dataclass(frozen=True)
class LDA:
    """Shrunken LDA. Cost: two passes, O(n d^2 + d^3) a tap, memory ``8 d^2`` bytes a tap.

    Attributes
    ----------
    level : {"token", "response", "prompt"}
        Labels to learn from; a response is the mean of its residuals, a prompt its last token.
    """

    name: ClassVar[str] = "lda"

    level: Level = "token"

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Fit one probe per tap; see `Method`. The facts have the ``shrinkage``."""
        units = units_of(self.name, source.tokens, task.hazard, self.level)
        moments = class_moments(self.name, source, units, scatter=True)
        scales = {tap: of_tap.deviation for tap, of_tap in moments.items()}
        fourth = self._fourth_powers(source, units, moments, scales)
        reads, evidence = SERVED[self.level]
        found = []
        for tap, of_tap in moments.items():
            scale = scales[tap]
            covariance = of_tap.covariance / torch.outer(scale, scale)
            amount = shrinkage(covariance, fourth[tap], len(units))
            width = len(covariance)
            target = covariance.trace() / width * torch.eye(width, dtype=torch.float64)
            step = (of_tap.mean[1] - of_tap.mean[0]) / scale
            probe = Probe.folded(
                probe_name(task.hazard, self.name, tap),
                task.hazard,
                tap,
                torch.linalg.solve((1 - amount) * covariance + amount * target, step),
                math.log(of_tap.count[1] / of_tap.count[0]),
                mean=of_tap.mean.mean(dim=0),
                scale=scale,
                reads=reads,
                evidence=evidence,
            )
            found.append(ReadOut(self.name, (probe,), {"shrinkage": amount}))
        return found

    def _fourth_powers(
        self, source: Source, units: Units, moments: dict[Tap, Moments], scales: dict[Tap, Tensor]
    ) -> dict[Tap, float]:
        """Sum of ``|x|^4`` over the units, ``x`` centred on the own class and scaled."""
        sums = dict.fromkeys(source.taps, 0.0)
        for chunk in source.chunks():
            which, vectors = read(self.name, source.tokens, chunk, units)
            of_unit = torch.from_numpy(units.classes[which])
            for tap, values in vectors.items():
                x = (values - moments[tap].mean[of_unit]) / scales[tap]
                sums[tap] += float(x.square().sum(dim=1).square().sum())
        return sums


def shrinkage(covariance: Tensor, fourth: float, rows: int) -> float:
    """Ledoit and Wolf's weight of the identity, from what can be streamed.

    Parameters
    ----------
    covariance : fp64 [d, d]
        Of ``rows`` centred vectors, maximum likelihood.
    fourth : float
        Sum of the fourth powers of their lengths.
    rows : int

    Returns
    -------
    float
        In [0, 1]: the mean squared error of an entry of the covariance over its mean squared
        distance from the scaled identity (lemma 3.2 to 3.4 of the paper).
    """
    mu = covariance.diagonal().mean()
    squares = float(covariance.square().sum())
    error = (fourth / rows - squares) / rows
    distance = squares - float(mu * mu) * len(covariance)
    return min(1.0, max(0.0, error / distance)) if distance > 0 else 1.0
