"""``add_rms_norm_score`` in Triton: the sum is scored as it is made, then normed.

A program owns its rows. Going along ``d`` once it adds, stores the sum, multiplies it with the
probes and sums its squares; going along it again it norms what it stored. So ``x`` and
``residual`` are read from memory once and written once; the second reading finds the sum in L2,
however wide the row, and the logits have the bits that ``score`` gives for the sum.
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
from midstream.kernels.checks import check_norm_call, check_probes
from midstream.kernels.launch import Batch, ScoreTile, norm_tile, score_order
from midstream.kernels.triton_dot import (
    INTERPRETED,
    batch_for,
    constants,
    dot_rows,
    options,
    round_to,
    store_logits,
)


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
    at_x = row * x_stride
    at_residual = row * residual_stride
    dot, square = dot_rows(
        residual,
        at_residual,
        real,
        x,
        at_x,
        weight,
        0,
        PROBES,
        WIDTH,
        True,
        True,
        SLICES,
        BLOCK_WIDTH,
        OPERAND,
        PIECES,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_PROBES,
        INTERPRETED,
    )
    store_logits(
        dot,
        square,
        bias,
        out,
        row * out_stride,
        real,
        0,
        eps,
        PROBES,
        WIDTH,
        RMS_NORM,
        BLOCK_PROBES,
    )
    tl.debug_barrier()  # the sums that other threads stored are read below
    for first_probe in range(BLOCK_PROBES, PROBES, BLOCK_PROBES):
        dot, _ = dot_rows(
            residual,
            at_residual,
            real,
            x,
            at_x,
            weight,
            first_probe,
            PROBES,
            WIDTH,
            False,
            False,
            SLICES,
            BLOCK_WIDTH,
            OPERAND,
            PIECES,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_PROBES,
            INTERPRETED,
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
    columns: tl.constexpr = 4096 // BLOCK_ROWS  # 16 numbers a thread of 8 warps
    for begin in range(0, WIDTH, columns):
        column = begin + tl.arange(0, columns)[None, :]
        inside = column < WIDTH
        mask = real[:, None] & inside
        gain = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(residual + at_residual[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        normed = round_to(h * scale, x.dtype.element_ty, INTERPRETED).to(tl.float32)
        normed = round_to(gain * normed, x.dtype.element_ty, INTERPRETED)
        tl.store(x + at_x[:, None] + column, normed, mask=mask)


def bind_add_rms_norm_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> BoundNormScore:
    """Check the probes once; return ``add_rms_norm_score(x, residual, gamma, norm_eps, out)``.

    Compiles and costs what :func:`.triton_score.bind_score` says.
    """
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device

    @cache
    def launch(hidden: torch.dtype, batch: Batch) -> tuple[ScoreTile, dict[str, object]]:
        order = score_order(probes, width, hidden, weight.dtype)
        tile = norm_tile(batch, order, probes)
        return tile, {
            "PROBES": probes,
            "WIDTH": width,
            "RMS_NORM": rms_norm,
            "INTERPRETED": INTERPRETED,
            **constants(order, tile),
            **options(tile),
        }

    def add_rms_norm_score(
        x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, out: Tensor
    ) -> None:
        rows, x_stride, stride, out_stride = check_norm_call(
            x, residual, gamma, out, probes, width, device
        )
        if rows == 0:
            return
        tile, arguments = launch(residual.dtype, batch_for(rows, probes))
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
