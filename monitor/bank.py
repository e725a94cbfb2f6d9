"""Probes in columns, and how they are stored.

One launch scores all probes of a tap, so they stand in neighbouring columns of the logits and share
``phi``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor

from midstream.evidence import Evidence, Last, Mean
from midstream.kernels.tables import EvidenceTable
from midstream.probe import PHASES, Norm, Probe, Reads
from midstream.taps import Tap

__all__ = ["BankSpec", "Probe", "ProbeBank", "ProbeSpec", "TapSpec"]


def _tap(value: object) -> object:
    return Tap.parse(value) if isinstance(value, str) else value


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProbeSpec(_Spec):
    """What JSON keeps of a probe: all but its numbers."""

    name: str
    hazard: str
    reads: Reads
    evidence: Evidence
    adds_to: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_most_have_not(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        if self.adds_to is None:
            del content["adds_to"]
        return content


class TapSpec(_Spec):
    """The probes of one tap, in column order."""

    tap: Annotated[Tap, BeforeValidator(_tap), PlainSerializer(str)]
    norm: Norm
    eps: float
    probes: tuple[ProbeSpec, ...] = Field(min_length=1)


class BankSpec(_Spec):
    """What JSON keeps of a bank; the weights and biases are tensors beside it."""

    hidden_size: int = Field(ge=1)
    taps: tuple[TapSpec, ...] = Field(min_length=1)


class ProbeBank:
    """All probes of a monitor, in columns: taps as in the forward pass, then in the order given.

    Parameters
    ----------
    probes
        At least one of them reads the response.

    Attributes
    ----------
    probes : tuple of Probe
        In column order, those that only add to another one included.
    heads : tuple of Probe
        Those with evidence of their own, P of them; all that follows with one entry per probe has
        one per head.
    taps : tuple of Tap
        In the order in which a model computes them.
    hidden_size : int
        d, the width of the residual stream.
    window : int
        Longest MEAN window, 0 where no probe averages: the ring that the slot table needs.

    Raises
    ------
    ValueError
        Names the probes: none given, none that reads the response, two of one name, of different
        widths, or of one tap with different norm or eps.
    """

    def __init__(self, probes: Iterable[Probe]) -> None:
        # Stable, so that the probes of a tap stay in the order given.
        self.probes = tuple(sorted(probes, key=lambda probe: probe.tap))
        self._groups: dict[Tap, list[Probe]] = {}
        for probe in self.probes:
            self._groups.setdefault(probe.tap, []).append(probe)
        self._check()
        self.taps = tuple(self._groups)
        self.hidden_size = len(self.probes[0].weight)
        self.heads = tuple(probe for probe in self.probes if probe.adds_to is None)
        rules = [probe.evidence for probe in self.heads]
        self.window = max((rule.window for rule in rules if isinstance(rule, Mean)), default=0)
        self._columns: dict[Tap, slice] = {}
        self._weights: dict[Tap, Tensor] = {}
        self._biases: dict[Tap, Tensor] = {}
        column = 0
        for tap, group in self._groups.items():
            self._columns[tap] = slice(column, column := column + len(group))
            self._weights[tap] = torch.stack([probe.weight for probe in group])
            self._biases[tap] = torch.tensor([probe.bias for probe in group])

    def _check(self) -> None:
        self._check_parts()
        if not any(probe.reads == "response" for probe in self.probes):
            raise ValueError(
                "probes: none reads the response, so no token could be scored; "
                "give at least one that does"
            )
        for name, count in Counter(probe.name for probe in self.probes).items():
            if count > 1:
                raise ValueError(
                    f"probes: name {name!r} is used {count} times: names are unique in a bank"
                )
        first = self.probes[0]
        for probe in self.probes:
            if len(probe.weight) != len(first.weight):
                raise ValueError(
                    f"probes {first.name!r} and {probe.name!r}: weights of {len(first.weight)} and "
                    f"{len(probe.weight)} numbers: a bank watches one residual stream"
                )
            head = self._groups[probe.tap][0]
            if (probe.norm, probe.eps) != (head.norm, head.eps):
                raise ValueError(
                    f"probes {head.name!r} and {probe.name!r}: norm {head.norm}, eps {head.eps} "
                    f"and norm {probe.norm}, eps {probe.eps}: one launch scores all probes of "
                    f"{probe.tap}, so they share both"
                )

    def _check_parts(self) -> None:
        named = {probe.name: probe for probe in self.probes}
        for part in (probe for probe in self.probes if probe.adds_to is not None):
            head = named.get(part.adds_to or "")
            if head is None or head.adds_to is not None:
                raise ValueError(
                    f"probe {part.name!r}: adds_to: {part.adds_to!r} is "
                    f"{'not in the bank' if head is None else 'itself a part of another'}"
                )
            if (part.hazard, part.reads) != (head.hazard, head.reads):
                raise ValueError(
                    f"probe {part.name!r}: looks for {part.hazard!r} in the {part.reads}, "
                    f"{head.name!r}, to which it adds, for {head.hazard!r} in the {head.reads}"
                )
            if part.evidence != Last():
                raise ValueError(
                    f"probe {part.name!r}: evidence: a part has none; give the rule to "
                    f"{head.name!r}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(probe.name for probe in self.heads)

    @property
    def hazards(self) -> tuple[str, ...]:
        """Hazard of each head; one hazard may have several."""
        return tuple(probe.hazard for probe in self.heads)

    def columns(self, tap: Tap) -> slice:
        """Columns that this tap writes, of the read-outs of all ``probes``."""
        return self._columns[tap]

    @property
    def terms(self) -> list[list[int]]:
        """Columns that make up each head's logit, its own first."""
        parts: dict[str, list[int]] = {}
        for column, probe in enumerate(self.probes):
            if probe.adds_to is not None:
                parts.setdefault(probe.adds_to, []).append(column)
        return [
            [column, *parts.get(probe.name, [])]
            for column, probe in enumerate(self.probes)
            if probe.adds_to is None
        ]

    def weight(self, tap: Tap) -> Tensor:
        """Weights of the tap's probes, fp32 [P_t, d] on the CPU unless moved by `to`."""
        return self._weights[tap]

    def bias(self, tap: Tap) -> Tensor:
        """Biases of the tap's probes, always fp32 [P_t]."""
        return self._biases[tap]

    def norm(self, tap: Tap) -> Norm:
        """``phi`` of the tap's probes."""
        return self._groups[tap][0].norm

    def eps(self, tap: Tap) -> float:
        """Eps of the tap's RMS norm."""
        return self._groups[tap][0].eps

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ProbeBank:
        """Return the bank with its tensors on ``device`` and the weights in ``dtype``.

        The biases stay fp32. ``probes``, and so what is saved, stay as they were given.
        """
        moved = copy.copy(self)
        moved._weights = {tap: w.to(device, dtype) for tap, w in self._weights.items()}
        moved._biases = {tap: b.to(device) for tap, b in self._biases.items()}
        return moved

    def evidence_table(self, device: torch.device | str = "cpu") -> EvidenceTable:
        """Return the smoothing rules as the ops take them, one entry per head in column order."""
        rules = [probe.evidence for probe in self.heads]

        def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        return EvidenceTable(
            rule=column((rule.code for rule in rules), torch.int32),
            parameter=column((rule.parameter for rule in rules), torch.float32),
            window=column((rule.tokens for rule in rules), torch.int32),
            center=column((rule.center for rule in rules), torch.float32),
            phase=column((PHASES[probe.reads] for probe in self.heads), torch.int32),
        )

    def spec(self) -> BankSpec:
        """Return all of the bank but its numbers, for JSON."""
        taps = []
        for tap, group in self._groups.items():
            probes = tuple(
                ProbeSpec(
                    name=p.name,
                    hazard=p.hazard,
                    reads=p.reads,
                    evidence=p.evidence,
                    adds_to=p.adds_to,
                )
                for p in group
            )
            taps.append(TapSpec(tap=tap, norm=self.norm(tap), eps=self.eps(tap), probes=probes))
        return BankSpec(hidden_size=self.hidden_size, taps=tuple(taps))

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers: per tap ``TAP.weight`` fp32 [P_t, d] and ``TAP.bias`` fp32 [P_t]."""
        numbers = {}
        for tap, group in self._groups.items():
            numbers[f"{tap}.weight"] = torch.stack([probe.weight for probe in group])
            numbers[f"{tap}.bias"] = torch.tensor([probe.bias for probe in group])
        return numbers

    @classmethod
    def from_parts(cls, spec: BankSpec, tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `spec` and `tensors` took apart.

        Raises
        ------
        ValueError
            If a tensor is missing, unknown, or not of the shape and type that ``spec`` asks for; or
            as for `ProbeBank`.
        """
        expected = {}
        for entry in spec.taps:
            expected[f"{entry.tap}.weight"] = [len(entry.probes), spec.hidden_size]
            expected[f"{entry.tap}.bias"] = [len(entry.probes)]
        if expected.keys() != tensors.keys():
            raise ValueError(f"tensors are {sorted(tensors)}, the bank needs {sorted(expected)}")
        for key, shape in expected.items():
            found = tensors[key]
            if list(found.shape) != shape or found.dtype != torch.float32:
                raise ValueError(
                    f"{key} is {found.dtype} {list(found.shape)}, "
                    f"the bank needs torch.float32 {shape}"
                )
        return cls(
            Probe(
                p.name,
                p.hazard,
                entry.tap,
                weight,
                bias,
                entry.norm,
                entry.eps,
                p.evidence,
                p.reads,
                p.adds_to,
            )
            for entry in spec.taps
            for p, weight, bias in zip(
                entry.probes,
                tensors[f"{entry.tap}.weight"],
                tensors[f"{entry.tap}.bias"].tolist(),
                strict=True,
            )
        )
