"""``add_rms_norm_score`` in Triton: a program adds, scores and norms its rows.

``x`` and ``residual`` are read from memory once and written once. The products read the sum that
was just stored, from L2, so that the logits have the bits that ``score`` gives for it. The norm
takes the sum from registers as far as it fits there (in decode, up to d = 16384), and else from L2.
"""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from midstream.kernels.backends import BoundNormScore
from midstream.kernels.call_checks import check_norm_call
from midstream.kernels.checks import check_probes
from midstream.kernels.launch import Batch, ScoreTile, norm_columns, norm_tile, score_order
from midstream.kernels.triton_dot import (
    INTERPRETED,
    batch_for,
    constants,
    dot_rows,
    options,
    store_logits,
)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round fp32 to ``DTYPE``, ties to even. The interpreter would cut bf16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _add(x, at_x, residual, at_residual, mask, INTERPRETED: tl.constexpr):
    """Replace a tile of ``residual`` by its sum with ``x``; return the sum, rounded."""
    total = tl.load(residual + at_residual, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    total = round_to(total, residual.dtype.element_ty, INTERPRETED)
    # Small tiles are replicated over threads: all must have read before one writes.
    tl.debug_barrier()
    tl.store(residual + at_residual, total, mask=mask)
    return total


@triton.jit
def _norm(total, scale, gain, x, at_x, mask, INTERPRETED: tl.constexpr):
    """Store a tile of normed rows."""
    normed = round_to(total.to(tl.float32) * scale, x.dtype.element_ty, INTERPRETED)
    normed = gain.to(tl.float32) * normed.to(tl.float32)
    tl.store(x + at_x, round_to(normed, x.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_score_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    gamma,
    norm_eps,
    weight,
    bias,
    out,
    out_stride,
    rows,
    eps,
    PROBES: tl.constexpr,
    WIDTH: tl.constexpr,
    RMS_NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add, score and norm one block of rows. Strides count elements."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < rows
    at_x = (row * x_stride)[:, None]
    at_residual = row * residual_stride
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    mask = real[:, None] & inside
    total = _add(x, at_x + column, residual, at_residual[:, None] + column, mask, INTERPRETED)
    gain = tl.load(gamma + column, mask=inside, other=0.0)
    for begin in range(COLUMNS, WIDTH, COLUMNS):
        at = begin + column
        more = real[:, None] & (at < WIDTH)
        _add(x, at_x + at, residual, at_residual[:, None] + at, more, INTERPRETED)
    tl.debug_barrier()  # the products read what other threads stored

    square = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first_probe in range(0, PROBES, BLOCK_PROBES):
        dot, square = dot_rows(
            residual,
            at_residual,
            real,
            weight,
            first_probe,
            PROBES,
            WIDTH,
            True,
            SLICES,
            BLOCK_WIDTH,
            OPERAND,
            PIECES,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_PROBES,
        )
        store_logits(
            dot,
            square,
            bias,
            out,
            row * out_stride,
            real,
            first_probe,
            eps,
            PROBES,
            WIDTH,
            RMS_NORM,
            BLOCK_PROBES,
        )

    scale = (1.0 / tl.sqrt(square / WIDTH + norm_eps))[:, None]
    _norm(total, scale, gain, x, at_x + column, mask, INTERPRETED)
    for begin in range(COLUMNS, WIDTH, COLUMNS):
        at = begin + column
        more = real[:, None] & (at < WIDTH)
        total = tl.load(residual + at_residual[:, None] + at, mask=more, other=0.0)
        gain = tl.load(gamma + at, mask=at < WIDTH, other=0.0)
        _norm(total, scale, gain, x, at_x + at, more, INTERPRETED)


@cache
def _launch(
    probes: int,
    width: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    rms_norm: bool,
    batch: Batch,
) -> tuple[ScoreTile, dict[str, object]]:
    order = score_order(probes, width, hidden, weight)
    tile = norm_tile(batch, order, probes)
    return tile, {
        "PROBES": probes,
        "WIDTH": width,
        "RMS_NORM": rms_norm,
        "COLUMNS": norm_columns(tile, width),
        "INTERPRETED": INTERPRETED,
        **constants(order, tile),
        **options(tile),
    }


def bind_add_rms_norm_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> BoundNormScore:
    """Check the probes once; return ``add_rms_norm_score(x, residual, gamma, norm_eps, out)``.

    Compiles and costs what :func:`.triton_score.bind_score` says.
    """
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device

    def add_rms_norm_score(
        x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, out: Tensor
    ) -> None:
        rows, x_stride, stride, out_stride = check_norm_call(
            x, residual, gamma, out, probes, width, device
        )
        if rows == 0:
            return
        batch = batch_for(rows, probes)
        tile, arguments = _launch(probes, width, residual.dtype, weight.dtype, rms_norm, batch)
        with torch.cuda.device_of(residual):
            add_rms_norm_score_kernel[(tile.programs(rows, 1),)](
                x,
                x_stride,
                residual,
                stride,
                gamma,
                norm_eps,
                weight,
                bias,
                out,
                out_stride,
                rows,
                eps,
                **arguments,
            )

    return add_rms_norm_score
