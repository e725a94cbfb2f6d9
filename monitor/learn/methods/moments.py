"""Means of classes and the scatter within them, per tap, in one pass over the residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.learn.methods.units import Units, read
from midstream.learn.tokens import Source
from midstream.taps import Tap


@dataclass
class Moments:
    """First and second moments of C classes at one tap, fp64.

    Attributes
    ----------
    count : [C]
    mean : [C, d]
    scatter : [d, d]
        Sum over all classes of the squares around the mean of the own class. Empty, [0, 0], where
        only the means were asked for.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Within-class covariance, maximum likelihood, [d, d]."""
        return self.scatter / self.count.sum()

    @property
    def deviation(self) -> Tensor:
        """Within-class standard deviation, [d]; 1 for a constant feature, whose scale is free."""
        deviation = self.covariance.diagonal().sqrt()
        return torch.where(deviation > 0, deviation, 1.0)


def class_moments(
    method: str, source: Source, units: Units, *, scatter: bool = False
) -> dict[Tap, Moments]:
    """Stream the moments of the units' classes at every tap.

    Blocks are joined by the pairwise update of Chan, Golub and LeVeque (1979), so that a far
    offset costs no digits. Cost: one pass, ``O(n d)`` a tap, ``O(n d^2)`` with the scatter; memory
    ``8 d^2`` bytes a tap.
    """
    classes = int(units.classes.max()) + 1
    side = source.width if scatter else 0
    moments = {
        tap: Moments(
            count=torch.zeros(classes, dtype=torch.float64),
            mean=torch.zeros(classes, source.width, dtype=torch.float64),
            scatter=torch.zeros(side, side, dtype=torch.float64),
        )
        for tap in source.taps
    }
    for chunk in source.chunks():
        which, vectors = read(method, source.tokens, chunk, units)
        of_unit = torch.from_numpy(units.classes[which])
        for tap, values in vectors.items():
            for c in range(classes):
                _add(moments[tap], c, values[of_unit == c], scatter)
    return moments


def _add(moments: Moments, c: int, block: Tensor, scatter: bool) -> None:
    if not len(block):
        return
    rows = block.double()
    mean = rows.mean(dim=0)
    before = float(moments.count[c])
    total = before + len(block)
    step = mean - moments.mean[c]
    if scatter:
        # The rows are centred, so that fp32 products keep 6 digits of every correlation, and
        # take half the time.
        centred = (rows - mean).float()
        moments.scatter += (centred.T @ centred).double()
        moments.scatter += torch.outer(step, step) * (before * len(block) / total)
    moments.mean[c] += step * (len(block) / total)
    moments.count[c] = total
