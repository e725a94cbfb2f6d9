"""``advance`` and ``score_advance`` in Triton: what the kernel of :mod:`.triton_fold` is told."""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from midstream.kernels.backends import BoundAdvance, BoundScoreAdvance
from midstream.kernels.call_checks import check_advance_call, check_score_call
from midstream.kernels.checks import Sizes, check_score_advance, check_tables
from midstream.kernels.launch import (
    AdvanceLaunch,
    Batch,
    ScoreOrder,
    advance_launch,
    chunk_tile,
    fuses,
    score_order,
    score_tile,
)
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable
from midstream.kernels.triton_dot import INTERPRETED, constants, options
from midstream.kernels.triton_fold import advance_kernel
from midstream.kernels.triton_score import bind_score

# Nothing to score.
_WITHOUT_SCORES: dict[str, object] = {
    "SCORES": False,
    "WIDTH": 0,
    "RMS_NORM": False,
    "SLICES": 0,
    "BLOCK_WIDTH": 0,
    "OPERAND": tl.float32,
    "PIECES": 0,
    "PRECISION": "ieee",
    "BLOCK_ROWS": 0,
    "BLOCK_PROBES": 0,
}


def fold_arguments(sizes: Sizes, launch: AdvanceLaunch) -> dict[str, object]:
    """Compile-time arguments and compiler options of the kernel where it only folds rows."""
    return {
        **_WITHOUT_SCORES,
        "num_warps": launch.num_warps,
        "enable_fp_fusion": True,  # Triton 3.10 turns its default; bits must not follow
        "PROBES": sizes.probes,
        "STATES": sizes.states,
        "BINS": sizes.bins,
        "PROMPT_BINS": sizes.prompt_bins,
        "WINDOW": sizes.window,
        "TRACE": sizes.trace,
        "POLICIES": sizes.policies,
        "ALL_PROBES": launch.block_probes,
        "BLOCK_STATES": launch.block_states,
        "BLOCK_EDGES": launch.block_edges,
        "BLOCK_PROMPT_EDGES": launch.block_prompt_edges,
        "BLOCK_WINDOW": launch.block_window,
    }


def _pointers(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> list[Tensor]:
    """Tensors in the kernel's order. The prior is not among them: only admission reads it."""
    read_chain = [tensor for tensor in chain.tensors() if tensor is not chain.prior]
    return [*slots.tensors(), *evidence.tensors(), *read_chain, *policy.tensors()]


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> BoundAdvance:
    """Check the tables once and return ``advance(logits, slot, position)`` for them.

    The first call compiles the kernel: warm up before a CUDA graph is captured.
    """
    sizes = check_tables(slots, evidence, chain, policy)
    launch = advance_launch(sizes)
    device = slots.device
    tables = _pointers(slots, evidence, chain, policy)
    arguments = fold_arguments(sizes, launch)

    def advance(logits: Tensor, slot: Tensor, position: Tensor) -> None:
        rows, stride = check_advance_call(logits, slot, position, sizes.probes, device)
        if rows == 0:
            return
        with torch.cuda.device_of(logits):
            advance_kernel[(rows,)](
                *(None, 0, None, None, 0.0),
                logits,
                stride,
                slot,
                position,
                rows,
                sizes.slots,
                *tables,
                **arguments,
            )

    return advance


@cache
def _fused(
    sizes: Sizes, width: int, hidden: torch.dtype, weight: torch.dtype, rms_norm: bool
) -> tuple[ScoreOrder, dict[str, object]]:
    order = score_order(sizes.probes, width, hidden, weight)
    tile = chunk_tile(order, sizes.probes)
    if INTERPRETED:  # the order of adds follows the shapes of the product, which are score's
        tile = score_tile(Batch.FEW, order, sizes.probes)
    return order, {
        **fold_arguments(sizes, advance_launch(sizes)),
        "SCORES": True,
        "WIDTH": width,
        "RMS_NORM": rms_norm,
        **constants(order, tile),
        **options(tile),
    }


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
) -> BoundScoreAdvance:
    """Check all once; return ``score_advance(hidden, logits, slot, position)``.

    One kernel or two, as :func:`.launch.fuses` says; the first call of each kind compiles.
    """
    check_score_advance(weight, bias, slots)
    score = bind_score(weight, bias, rms_norm=rms_norm, eps=eps)
    advance = bind_advance(slots, evidence, chain, policy)
    sizes = check_tables(slots, evidence, chain, policy)
    warps = advance_launch(sizes).num_warps
    device = slots.device
    probes, width = weight.shape
    weight_bytes = weight.nbytes
    tables = _pointers(slots, evidence, chain, policy)

    def score_advance(hidden: Tensor, logits: Tensor, slot: Tensor, position: Tensor) -> None:
        rows, stride, logits_stride = check_score_call(hidden, logits, probes, width, device)
        check_advance_call(logits, slot, position, probes, device)
        if rows == 0:
            return
        order, arguments = _fused(sizes, width, hidden.dtype, weight.dtype, rms_norm)
        if not fuses(rows, weight_bytes, order, warps):
            score(hidden, logits)
            advance(logits, slot, position)
            return
        with torch.cuda.device_of(logits):
            advance_kernel[(rows,)](
                hidden,
                stride,
                weight,
                bias,
                eps,
                logits,
                logits_stride,
                slot,
                position,
                rows,
                sizes.slots,
                *tables,
                **arguments,
            )

    return score_advance
