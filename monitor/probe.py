"""A probe: a linear read-out ``z = weight . phi(h) + bias`` of the residual stream at one tap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from midstream.evidence import Evidence, Last
from midstream.kernels.tables import Phase
from midstream.taps import Tap

Norm = Literal["none", "rms"]
Reads = Literal["response", "prompt"]

PHASES: dict[Reads, Phase] = {"response": Phase.RESPONSE, "prompt": Phase.PROMPT}

_LAST = Last()
_FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear read-out of the residual stream at one tap.

    Parameters
    ----------
    name
        Unique in its bank; causes, reports and events use it.
    hazard
        What the probe looks for. Several probes may look for the same.
    tap
        Where it reads.
    weight : floating [d]
        Copied to fp32 on the CPU, so that later changes of the original do not reach the probe.
    bias
        Rounded to fp32.
    norm
        ``phi``: ``none`` is the identity, ``rms`` divides by ``sqrt(mean(h ** 2) + eps)``.
    eps
        Of the RMS norm; without effect under ``none``.
    evidence
        How the logits are smoothed over a stream.
    reads
        The tokens it reads.
    adds_to
        Name of the probe to whose logit this one's is added before the evidence: one read-out over
        several taps. Such a part has no evidence, hazard or cause of its own.

    Raises
    ------
    ValueError
        Names the probe and the key: an empty or unprintable name or hazard, a weight that is not
        1-D, not floating, empty or not finite in fp32, a bias or eps that is not finite in fp32, a
        negative eps, an unknown norm or phase.
    """

    name: str
    hazard: str
    tap: Tap
    weight: Tensor
    bias: float = 0.0
    norm: Norm = "none"
    eps: float = 1e-6
    evidence: Evidence = _LAST
    reads: Reads = "response"
    adds_to: str | None = None

    def __post_init__(self) -> None:
        for key, text in (("name", self.name), ("hazard", self.hazard)):
            if not text.strip() or not text.isprintable():
                raise self._invalid(key, f"{text!r} is empty or unprintable")
        if self.norm not in get_args(Norm):
            raise self._invalid("norm", f"{self.norm!r} is not one of none, rms")
        if self.reads not in PHASES:
            raise self._invalid("reads", f"{self.reads!r} is not one of response, prompt")
        if self.weight.ndim != 1 or not self.weight.numel():
            shape = list(self.weight.shape)
            raise self._invalid(
                "weight", f"shape {shape} is not [d] (of scikit-learn's coef_ pass one row)"
            )
        if not self.weight.is_floating_point():
            raise self._invalid("weight", f"{self.weight.dtype} is not a floating type")
        weight = self.weight.detach().to("cpu", torch.float32, copy=True).contiguous()
        if bad := int((~weight.isfinite()).sum()):
            raise self._invalid(
                "weight", f"{bad} of {weight.numel()} values are not finite in fp32"
            )
        bias = torch.tensor(self.bias, dtype=torch.float32).item()
        if not math.isfinite(bias):
            raise self._invalid("bias", f"{self.bias} is not finite in fp32")
        if not 0.0 <= self.eps <= _FP32_MAX:
            raise self._invalid("eps", f"{self.eps} is negative or not finite in fp32")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    def _invalid(self, key: str, problem: str) -> ValueError:
        return ValueError(f"probe {self.name!r}: {key}: {problem}")

    @classmethod
    def folded(
        cls,
        name: str,
        hazard: str,
        tap: Tap,
        weight: Any,
        bias: float = 0.0,
        *,
        mean: Any = 0.0,
        scale: Any = 1.0,
        slope: float = 1.0,
        intercept: float = 0.0,
        norm: Norm = "none",
        eps: float = 1e-6,
        evidence: Evidence = _LAST,
        reads: Reads = "response",
    ) -> Self:
        """Make the probe ``z = slope (weight . (phi(h) - mean) / scale + bias) + intercept``.

        Standardisation and Platt scaling are folded into one weight and bias, in fp64. Platt
        scaling here is ``P(harm) = sigmoid(slope z' + intercept)``; scikit-learn's ``a_`` and
        ``b_`` are the negatives of slope and intercept.

        Parameters
        ----------
        weight : array-like [d]
            As trained on standardised ``phi(h)``.
        mean, scale : array-like [d] or number
            What ``phi(h)`` was standardised with, as ``mean_`` and ``scale_`` of a
            ``StandardScaler``.

        Raises
        ------
        ValueError
            As for `Probe`; also a scale that is not above zero, or a mean or scale that is neither
            one number nor [d].
        """
        w, shift, divisor = (
            torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (weight, mean, scale)
        )
        for key, value in (("mean", shift), ("scale", divisor)):
            if value.ndim and value.shape != w.shape:
                problem = f"shape {list(value.shape)} is not that of weight {list(w.shape)}"
                raise ValueError(f"probe {name!r}: {key}: {problem}")
        if not bool((divisor > 0).all()):
            raise ValueError(
                f"probe {name!r}: scale: must be above zero everywhere (drop constant features)"
            )
        w = w / divisor
        bias = slope * (bias - float((w * shift).sum())) + intercept
        return cls(name, hazard, tap, slope * w, bias, norm, eps, evidence, reads)
