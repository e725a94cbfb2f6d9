"""What one would write in plain PyTorch instead, as fast as we could make it.

The step of ``score_advance`` for probes that are smoothed by EMA, and add + RMSNorm + probes. What
a monitor needs besides is left out, to the advantage of PyTorch: positions, unscored tokens, causes
and counts, a stream's first token, a held stream's release, a policy per stream.

Two forms of the step. ``direct`` follows the definition. ``folded`` has everything folded that can
be, beforehand: the EMA's weight and the bias minus its center into the read-out; the emission, the
sum for normalising and the look-ahead into one matrix per evidence bin; all state of a stream into
one row, so that there is one gather and one scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable, Verdict

Step = Callable[..., None]

COMPILED: dict[str, dict[str, Any]] = {
    "default": {},
    "cpp_wrapper": {"options": {"cpp_wrapper": True}},
    "autotuned": {"options": {"cpp_wrapper": True, "max_autotune": True}},
}
"""Settings of ``torch.compile``, besides whole graph and static shapes. The C++ wrapper spares
Inductor's calls from Python; autotuning looks for a faster product of matrices."""


def compiled(function: Callable[..., Any], how: str = "default") -> Callable[..., Any]:
    """Compile without graph breaks for the shapes of the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False, **COMPILED[how])


class PlainStep:
    """A monitor's step in plain PyTorch, with state of its own taken from the tables.

    Parameters
    ----------
    weight, bias
        As for ``bind_score``; ``weight`` in the dtype of the hidden rows.
    slots, evidence, chain, policy
        As for ``bind_advance``; every probe is an EMA, every slot has the first row of the policy.
    rows
        Rows of a call, for which buffers are kept.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        slots: SlotTable,
        evidence: EvidenceTable,
        chain: ChainTable,
        policy: PolicyTable,
        rows: int,
    ) -> None:
        device, dtype = weight.device, weight.dtype
        self.probes, self.states = weight.shape[0], chain.prior.shape[0]
        ends = (self.probes, self.probes + self.states)
        # direct
        self.weight, self.bias = weight, bias.to(dtype)
        self.alpha, self.center = evidence.parameter.clone(), evidence.center.clone()
        self.edges = chain.edges.clone()
        self.step = chain.step_powers[0].clone()
        self.emission = chain.emission.T.contiguous()
        self.ahead = policy.ahead[0].clone()
        self.thresholds = torch.stack([policy.hold_at[0], policy.halt_at[0]])
        self.evidence, self.belief = slots.evidence.clone(), slots.belief.clone()
        self.risk, self.verdict = slots.risk.clone(), slots.verdict.long()
        # folded: columns are evidence minus center, belief, risk, verdict
        alpha = self.alpha[:, None]
        self.read_out = (weight.float() * alpha).to(dtype).T.contiguous()
        self.offset = (self.alpha * (bias - self.center)).to(dtype)
        self.rows_out = self.read_out.T.contiguous()
        self.read_out_fp32, self.offset_fp32 = self.read_out.float(), self.offset.float()
        self.decay = 1 - self.alpha
        joint = self.step * self.emission[:, None, :]  # [O, K+1, K+1]
        looks = torch.stack([joint @ self.ahead, joint.sum(dim=2)], dim=2)
        self.joint = torch.cat([joint, looks], dim=2)
        self.state = torch.cat(
            [
                self.evidence - self.center,
                self.belief,
                self.risk[:, None],
                slots.verdict.float()[:, None],
            ],
            dim=1,
        )
        # buffers of the calls with out=
        self.z = torch.empty(rows, self.probes, dtype=dtype, device=device)
        self.z_fp32 = torch.empty(rows, self.probes, device=device)
        self.hidden_fp32 = torch.empty(rows, weight.shape[1], device=device)
        self.old = torch.empty(rows, self.state.shape[1], device=device)
        self.new = torch.empty_like(self.old)
        self.old_evidence, self.new_evidence = self.old[:, : ends[0]], self.new[:, : ends[0]]
        self.old_belief = self.old[:, None, ends[0] : ends[1]]
        self.new_belief_risk = self.new[:, ends[0] : ends[1] + 1]
        self.new_risk, self.new_verdict = self.new[:, ends[1]], self.new[:, ends[1] + 1]
        self.old_verdict = self.old[:, ends[1] + 1]
        self.hazard = torch.empty(rows, self.probes, device=device)
        self.log_hazard = torch.empty(rows, device=device)
        self.bin = torch.empty(rows, dtype=torch.int64, device=device)
        self.moves = torch.empty(rows, *self.joint.shape[1:], device=device)
        self.moved = torch.empty(rows, 1, self.states + 2, device=device)
        self.moved_rows, self.total = self.moved[:, 0, :-1], self.moved[:, 0, -1:]
        self.exceeded = torch.empty(rows, 2, dtype=torch.bool, device=device)
        self.decided = torch.empty(rows, dtype=torch.int64, device=device)

    def direct(self, hidden: Tensor, slot: Tensor) -> None:
        """Follow the definition; ``slot`` is int64, which spares PyTorch a conversion."""
        self._direct(F.linear(hidden, self.weight, self.bias).float(), slot)

    def direct_advance(self, logits: Tensor, slot: Tensor) -> None:
        """Only what follows the read-out, from fp32 logits."""
        self._direct(logits, slot)

    def _direct(self, z: Tensor, slot: Tensor) -> None:
        evidence = torch.lerp(self.evidence[slot], z, self.alpha)
        log_hazard = F.softplus(evidence - self.center).sum(dim=1)
        likelihood = self.emission[torch.bucketize(log_hazard, self.edges, right=True)]
        belief = (self.belief[slot] @ self.step) * likelihood
        belief = belief / belief.sum(dim=1, keepdim=True)
        risk = belief @ self.ahead
        decided = torch.bucketize(risk, self.thresholds, right=True)
        self.verdict[slot] = torch.maximum(self.verdict[slot], decided)
        self.evidence[slot] = evidence
        self.belief[slot] = belief
        self.risk[slot] = risk

    def folded(self, hidden: Tensor, slot: Tensor) -> None:
        """Write into buffers kept from call to call: eager PyTorch at its best."""
        torch.addmm(self.offset, hidden, self.read_out, out=self.z)
        self._fold_into_buffers(self.z, slot)

    def folded_fp32(self, hidden: Tensor, slot: Tensor) -> None:
        """Convert the rows first: for few of them a CPU's fp32 product costs less than its bf16."""
        self.hidden_fp32.copy_(hidden)
        torch.addmm(self.offset_fp32, self.hidden_fp32, self.read_out_fp32, out=self.z_fp32)
        self._fold_into_buffers(self.z_fp32, slot)

    def _fold_into_buffers(self, z: Tensor, slot: Tensor) -> None:
        torch.index_select(self.state, 0, slot, out=self.old)
        torch.addcmul(z, self.decay, self.old_evidence, out=self.new_evidence)
        torch._C._nn.softplus(self.new_evidence, out=self.hazard)
        torch.sum(self.hazard, dim=1, out=self.log_hazard)
        torch.bucketize(self.log_hazard, self.edges, right=True, out=self.bin)
        torch.index_select(self.joint, 0, self.bin, out=self.moves)
        torch.bmm(self.old_belief, self.moves, out=self.moved)
        torch.div(self.moved_rows, self.total, out=self.new_belief_risk)
        torch.ge(self.new_risk[:, None], self.thresholds, out=self.exceeded)
        torch.sum(self.exceeded, dim=1, out=self.decided)
        torch.maximum(self.old_verdict, self.decided, out=self.new_verdict)
        self.state.index_copy_(0, slot, self.new)

    def folded_whole(self, hidden: Tensor, slot: Tensor) -> None:
        """Fold as ``folded`` does, without buffers: for a compiler."""
        self._folded(torch.addmm(self.offset, hidden, self.read_out).float(), slot)

    def folded_products(self, hidden: Tensor, slot: Tensor) -> None:
        """Write the read-out as products and sums, which a compiler can fuse with what follows."""
        products = hidden[:, None, :].float() * self.rows_out
        self._folded(products.sum(dim=2) + self.offset, slot)

    def _folded(self, z: Tensor, slot: Tensor) -> None:
        ends = (self.probes, self.probes + self.states)
        old = self.state[slot]
        evidence = z + self.decay * old[:, : ends[0]]
        log_hazard = F.softplus(evidence).sum(dim=1)
        moves = self.joint[torch.bucketize(log_hazard, self.edges, right=True)]
        moved = (old[:, ends[0] : ends[1], None] * moves).sum(dim=1)
        moved = moved[:, :-1] / moved[:, -1:]
        decided = (moved[:, -1:] >= self.thresholds).sum(dim=1)
        verdict = torch.maximum(old[:, -1], decided.float())
        self.state[slot] = torch.cat([evidence, moved, verdict[:, None]], dim=1)

    def result(self, form: str) -> tuple[Tensor, Tensor]:
        """Risk [S] and verdict [S] after calls of one form: ``direct`` or ``folded``."""
        if form == "direct":
            return self.risk, self.verdict
        return self.state[:, -2], self.state[:, -1].long()


EAGER = ("direct", "folded", "folded_fp32")
TO_COMPILE = (
    ("direct", "default"),
    ("folded_whole", "cpp_wrapper"),
    ("folded_whole", "autotuned"),
    ("folded_products", "default"),
    ("folded_products", "cpp_wrapper"),
)
"""Forms of the step and settings that were the fastest somewhere, and the readable form."""
TO_COMPILE_CUDA = (("folded_whole", "default"), ("folded_products", "default"))
"""In a CUDA graph the wrapper costs nothing."""

assert list(Verdict) == [0, 1, 2]  # what bucketize gives for (hold_at, halt_at)


def add_rms_norm_score(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    norm_eps: float,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
) -> None:
    """Add, normalise, and read the probes out, ``weight`` and ``bias`` in the dtype of ``x``."""
    add_rms_norm(x, residual, gamma, norm_eps)
    out.copy_(F.linear(residual, weight, bias))


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float) -> None:
    """Add and normalise alone, in place."""
    residual.add_(x)
    x.copy_(F.rms_norm(residual, residual.shape[-1:], gamma, norm_eps))


def add_rms_norm_new(
    x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """Return the normed rows and the sum as new tensors: for a compiler.

    Inductor's C++ (seen with torch 2.13) fails on the form in place, with a KeyError.
    """
    total = x + residual
    rows = total.float()
    scale = torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + norm_eps)
    return gamma * (rows * scale).to(x.dtype), total


def add_rms_norm_score_new(
    x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits too."""
    normed, total = add_rms_norm_new(x, residual, gamma, norm_eps)
    return normed, total, F.linear(total, weight, bias).float()
