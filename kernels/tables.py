"""The tensors that live on the device: slot state, evidence rules, chain and policy.

Everything that may change after a CUDA graph was captured is a tensor here, never a Python number,
so that a replayed graph sees the change. All tables are structures of arrays: one tensor per field.

Sizes used in every docstring of this package:

=====  ==========================================================================
``N``  rows of a packed batch, one token each
``d``  width of the residual stream
``P``  probes
``S``  slots (streams that can be watched at the same time)
``K``  transient risk states; state ``K`` itself is *violated*
``O``  bins of the evidence
``T``  rows of the policy table (tier x segment)
``L``  tokens of trace kept per slot
=====  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor


class Verdict(IntEnum):
    """What may happen to a stream. The order is the order of severity; HALT is absorbing."""

    CONTINUE = 0
    HOLD = 1
    HALT = 2


class Rule(IntEnum):
    """How a probe's logits are smoothed over a stream into its evidence (design section 4.3)."""

    LAST = 0
    EMA = 1
    MEAN = 2
    CUSUM = 3
    COUNT = 4
    RUN = 5
    MAX = 6


class Phase(IntEnum):
    """Which part of a stream a probe reads."""

    PROMPT = 0
    RESPONSE = 1


class OnUnscored(IntEnum):
    """What an unscored response token does to its stream (design section 4.5)."""

    PASS = 0
    HOLD = 1
    HALT = 2


NO_CAUSE = -1
"""``cause`` of a stream that was not halted."""

UNSCORED_CAUSE = -2
"""``cause`` of a stream that was halted because a token could not be scored."""

MAX_POSITION = 1 << 30
"""Positions are below this, so that a gap and its end fit int32; a row beyond is refused."""

LEAST_MASS = 1e-30
"""Belief left by a step power below which fp32 has lost too much of it: shorter powers are used."""

GAP_BITS = 20
"""A gap of up to 2**20 - 1 unscored tokens is bridged exactly, by small products of step powers."""


@dataclass(frozen=True)
class _Table:
    def tensors(self) -> list[Tensor]:
        """All fields in declaration order, the form in which the ops take a table."""
        return [getattr(self, field.name) for field in fields(self)]

    def nbytes(self) -> int:
        """Bytes held by all tensors of the table."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.tensors()[0].device


@dataclass(frozen=True)
class EvidenceTable(_Table):
    """One smoothing rule per probe.

    Attributes
    ----------
    rule : int32 [P]
        A :class:`Rule`.
    parameter : float32 [P]
        alpha for EMA (weight of the newest logit), kappa for CUSUM, theta for COUNT and RUN; else
        unused.
    window : int32 [P]
        Tokens averaged by MEAN; else 1.
    center : float32 [P]
        Evidence at which the probe's hazard is one half: hazard = sigmoid(evidence - center).
    phase : int32 [P]
        A :class:`Phase`: the tokens the probe reads.
    """

    rule: Tensor
    parameter: Tensor
    window: Tensor
    center: Tensor
    phase: Tensor


@dataclass(frozen=True)
class ChainTable(_Table):
    """The absorbing chain as the belief filter needs it (design section 4.4).

    Attributes
    ----------
    step_powers : float32 [GAP_BITS, K+1, K+1]
        ``step ** (2**g)``, each divided by its largest entry (the filter normalises), where
        ``step[i, j] = (1 - c[i]) * A[i, j]``.
    emission : float32 [K+1, O]
        P(evidence bin | state), floored above 0.
    edges : float32 [O-1]
        Ascending bin edges on the cumulative log-hazard; bin = number of edges <= value.
    prior : float32 [K+1]
        Belief before the first response token when no prompt evidence is there.
    prompt_emission : float32 [K+1, O']
        P(prompt evidence bin | state before the first response token), floored above 0.
    prompt_edges : float32 [O'-1]
        Edges for the prompt probes' cumulative log-hazard.
    """

    step_powers: Tensor
    emission: Tensor
    edges: Tensor
    prior: Tensor
    prompt_emission: Tensor
    prompt_edges: Tensor


@dataclass(frozen=True)
class PolicyTable(_Table):
    """Thresholds, one row per (tier, segment); a slot names its row.

    Attributes
    ----------
    ahead : float32 [T, K+1]
        a_h of the row's horizon: P(violated now or within h more tokens | state).
    halt_at, hold_at, release_at : float32 [T]
        Risk at or above which a stream is halted; held; and below which a held stream goes on.
        2.0 means never.
    on_unscored : int32 [T]
        An :class:`OnUnscored`.
    """

    ahead: Tensor
    halt_at: Tensor
    hold_at: Tensor
    release_at: Tensor
    on_unscored: Tensor


@dataclass(frozen=True)
class SlotTable(_Table):
    """State of every watched stream, one row per slot (design section 4.2).

    Attributes
    ----------
    position : int32 [S]
        Next position expected; rows below it were folded before and are ignored.
    start : int32 [S]
        Position of the first response token = number of prompt tokens.
    policy : int32 [S]
        Row of the policy table.
    evidence : float32 [S, P]
        Smoothed logits.
    folds : int32 [S, P]
        Tokens folded into each evidence.
    ring : float32 [S, P, M]
        The last M logits for MEAN; M is the longest window, 0 where no probe averages.
    belief : float32 [S, K+1]
        Distribution over risk states, ``[:, K]`` is *violated*.
    risk, peak : float32 [S]
        Risk at the last judged token; its maximum so far.
    verdict : uint8 [S]
        A :class:`Verdict`.
    cause : int16 [S]
        Probe with the largest hazard when the stream was halted, ``NO_CAUSE`` or
        ``UNSCORED_CAUSE``.
    halted_at : int32 [S]
        Position of the token that halted the stream, -1 if none did.
    scored, unscored : int32 [S]
        Tokens scored; tokens that had no finite score or were never shown. A prompt token counts
        only when some probe reads prompts.
    trace_position : int32 [S, L]
        Position whose values stand in this cell (``cell = position % L``), -1 where none.
    trace_risk : float32 [S, L]
        Risk after this token, NaN where it was not judged.
    trace_verdict : uint8 [S, L]
        Verdict after this token.
    trace_logits : float32 [S, L, P]
        The token's logits.
    """

    position: Tensor
    start: Tensor
    policy: Tensor
    evidence: Tensor
    folds: Tensor
    ring: Tensor
    belief: Tensor
    risk: Tensor
    peak: Tensor
    verdict: Tensor
    cause: Tensor
    halted_at: Tensor
    scored: Tensor
    unscored: Tensor
    trace_position: Tensor
    trace_risk: Tensor
    trace_verdict: Tensor
    trace_logits: Tensor

    @classmethod
    def allocate(
        cls,
        slots: int,
        probes: int,
        states: int,
        *,
        window: int = 0,
        trace: int = 0,
        device: torch.device | str = "cpu",
    ) -> SlotTable:
        """Allocate a table of empty slots.

        ``states`` is K. See :meth:`bytes_per_slot` for its size.
        """

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        table = cls(
            position=empty(dtype=torch.int32),
            start=empty(dtype=torch.int32),
            policy=empty(dtype=torch.int32),
            evidence=empty(probes, dtype=torch.float32),
            folds=empty(probes, dtype=torch.int32),
            ring=empty(probes, window, dtype=torch.float32),
            belief=empty(states + 1, dtype=torch.float32),
            risk=empty(dtype=torch.float32),
            peak=empty(dtype=torch.float32),
            verdict=empty(dtype=torch.uint8),
            cause=empty(dtype=torch.int16),
            halted_at=empty(dtype=torch.int32),
            scored=empty(dtype=torch.int32),
            unscored=empty(dtype=torch.int32),
            trace_position=empty(trace, dtype=torch.int32),
            trace_risk=empty(trace, dtype=torch.float32),
            trace_verdict=empty(trace, dtype=torch.uint8),
            trace_logits=empty(trace, probes, dtype=torch.float32),
        )
        table.trace_position.fill_(-1)
        return table

    @cached_property
    def host(self) -> SimpleNamespace:
        """The fields as NumPy arrays over the same memory on the CPU; elsewhere the tensors.

        To read or write one number of a tensor costs 2 us, of an array 0.1: a stream is admitted
        and retired by some 40 of these.
        """
        on_host = self.device.type == "cpu"
        return SimpleNamespace(
            **{
                name: tensor.numpy() if on_host else tensor
                for name, tensor in zip(_SLOT_FIELDS, self.tensors(), strict=True)
            }
        )

    def __getstate__(self) -> dict[str, Tensor]:
        # A copy must not keep `host`: its arrays would be copies apart from the tensors.
        return dict(zip(_SLOT_FIELDS, self.tensors(), strict=True))

    @staticmethod
    def bytes_per_slot(probes: int, states: int, window: int = 0, trace: int = 0) -> int:
        """``35 + 8 P + 4 P M + 4 (K + 1) + L (9 + 4 P)`` bytes: linear in every size."""
        fixed = 4 * 3 + 4 * 2 + 1 + 2 + 4 * 3
        return (
            fixed + 8 * probes + 4 * probes * window + 4 * (states + 1) + trace * (9 + 4 * probes)
        )

    def admit(self, slot: int, *, start: int, policy: int, prior: Tensor) -> None:
        """Re-initialise one slot completely: nothing of the stream that had it before survives."""
        host = self.host
        for name in _SLOT_FIELDS:
            getattr(host, name)[slot] = 0
        host.start[slot] = start
        host.policy[slot] = policy
        host.belief[slot] = prior
        host.cause[slot] = NO_CAUSE
        host.halted_at[slot] = -1
        host.trace_position[slot] = -1


_SLOT_FIELDS = tuple(field.name for field in fields(SlotTable))
