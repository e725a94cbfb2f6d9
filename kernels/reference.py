"""The definition of correct, in fp32 PyTorch.

Every other backend is measured against these functions and :func:`.reference_advance.advance`. They
are written to be read, not to be fast, yet they also serve where no compiled backend can be had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from midstream.kernels.call_checks import check_advance_call, check_norm_call, check_score_call
from midstream.kernels.checks import check_probes, check_rows, check_score_advance, check_tables
from midstream.kernels.reference_advance import advance
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

_SCORE_CHUNK = 1 << 22  # elements of the [rows, P, d] product held at once: 16 MiB in fp32


@torch.no_grad()
def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
) -> None:
    """Write ``out[n, p] = weight[p] . phi(hidden[n]) + bias[p]``.

    ``phi`` is the identity, or with ``rms_norm`` the division by ``sqrt(mean(hidden[n] ** 2) +
    eps)``, applied once after the dot product (FlashNorm, arXiv 2407.09577: exact in real
    arithmetic, one pass over the row).

    Sums run pairwise over ``d`` by elementwise adds, so a row's result cannot depend on the other
    rows.

    Parameters
    ----------
    hidden : bf16, fp16 or fp32 [N, d]
        Rows may be strided; the last dimension is contiguous.
    weight : bf16, fp16 or fp32 [P, d]
    bias : fp32 [P]
    out : fp32 [N, P]
        May be a column slice of a wider buffer. A row with a NaN or Inf in ``hidden``, or whose sum
        of squares overflows under ``rms_norm``, is NaN or Inf in every column.
    """
    weight = weight.float()
    rows_at_once = max(1, _SCORE_CHUNK // max(1, weight.numel()))
    for begin in range(0, hidden.shape[0], rows_at_once):
        rows = hidden[begin : begin + rows_at_once].float()
        logits = _pairwise_sum(rows[:, None, :] * weight)
        if rms_norm:
            mean_square = _pairwise_sum(rows * rows) / hidden.shape[1]
            # An infinite sum of squares would scale every logit to 0, a finite lie.
            scale = torch.where(mean_square.isinf(), torch.nan, torch.rsqrt(mean_square + eps))
            logits = logits * scale[:, None]
        out[begin : begin + rows_at_once] = logits + bias


def _pairwise_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension by halving it; the order of adds is fixed by its length alone."""
    while (length := terms.shape[-1]) > 1:
        half = (length + 1) // 2
        paired = terms[..., : length - half] + terms[..., half:]
        terms = torch.cat([paired, terms[..., length - half : half]], dim=-1)
    return terms.squeeze(-1)


@torch.no_grad()
def add_rms_norm_score(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    norm_eps: float,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
) -> None:
    """Add, normalise and score: what precedes a decoder's next block, with probes riding along.

    In this order, every result rounded to the dtype of ``x``::

        residual = x + residual
        x = gamma * round(residual / sqrt(mean(residual ** 2) + norm_eps))
        out = score(residual, weight, bias)

    The roundings are those of transformers' ``LlamaRMSNorm`` and of vLLM's ``fused_add_rms_norm``.

    Parameters
    ----------
    x : bf16, fp16 or fp32 [N, d]
        Output of the block before; the normed rows afterwards. Rows may be strided.
    residual : [N, d], the dtype of ``x``
        The residual stream before; after the addition afterwards. Rows may be strided.
    gamma : [d], the dtype of ``x``
        Gain of the norm (for Gemma, one plus its weight).
    norm_eps : float
        Of the model's norm.
    weight, bias, out, rms_norm, eps
        As for :func:`score`, of the residual stream after the addition.
    """
    residual.copy_(x + residual)
    rows = residual.float()
    scale = torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + norm_eps)
    score(residual, weight, bias, out, rms_norm=rms_norm, eps=eps)
    x.copy_(gamma * (rows * scale).to(x.dtype))


def bind_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor], None]:
    """Check the probes of a tap once and return ``score(hidden, out)`` for them."""
    check_probes(weight, bias)
    probes, width = weight.shape

    def bound(hidden: Tensor, out: Tensor) -> None:
        check_score_call(hidden, out, probes, width, weight.device)
        score(hidden, weight, bias, out, rms_norm=rms_norm, eps=eps)

    return bound


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Check the tables once and return ``advance(logits, slot, position)`` for them."""
    sizes = check_tables(slots, evidence, chain, policy)

    def bound(logits: Tensor, slot: Tensor, position: Tensor) -> None:
        check_advance_call(logits, slot, position, sizes.probes, slots.device)
        check_rows(slot, position, slots, sizes)
        advance(logits, slot, position, slots, evidence, chain, policy)

    return bound


def bind_score_advance(
    weight: Tensor,
    bias: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
    *,
    rms_norm: bool,
    eps: float,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Check everything once; return ``score_advance(hidden, logits, slot, position)``."""
    check_score_advance(weight, bias, slots)
    score_rows = bind_score(weight, bias, rms_norm=rms_norm, eps=eps)
    advance_rows = bind_advance(slots, evidence, chain, policy)

    def bound(hidden: Tensor, logits: Tensor, slot: Tensor, position: Tensor) -> None:
        score_rows(hidden, logits)
        advance_rows(logits, slot, position)

    return bound


def bind_add_rms_norm_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor, Tensor, float, Tensor], None]:
    """Check the probes once; return ``add_rms_norm_score(x, residual, gamma, norm_eps, out)``."""
    check_probes(weight, bias)
    probes, width = weight.shape

    def bound(x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, out: Tensor) -> None:
        check_norm_call(x, residual, gamma, out, probes, width, weight.device)
        add_rms_norm_score(
            x, residual, gamma, norm_eps, weight, bias, out, rms_norm=rms_norm, eps=eps
        )

    return bound
