"""``score`` in Triton: one program per row, sums over ``d`` in an order that ``d`` and P fix."""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from midstream.kernels.backends import BoundScore
from midstream.kernels.checks import check_probes, check_score_call
from midstream.kernels.launch import score_launch


@triton.jit
def score_kernel(
    hidden,
    hidden_stride,
    weight,
    bias,
    out,
    out_stride,
    eps,
    PROBES: tl.constexpr,
    WIDTH: tl.constexpr,
    RMS_NORM: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Logits of one row for one block of probes. Strides count elements."""
    row = tl.program_id(0).to(tl.int64)
    probe = tl.program_id(1) * BLOCK_PROBES + tl.arange(0, BLOCK_PROBES)
    real = probe < PROBES
    # Each accumulator element adds its columns in order; elements are summed once, at the end.
    dot = tl.zeros((BLOCK_PROBES, BLOCK_WIDTH), tl.float32)
    square = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for begin in range(0, WIDTH, BLOCK_WIDTH):
        column = begin + tl.arange(0, BLOCK_WIDTH)
        inside = column < WIDTH
        # fp32 at once: Triton's interpreter computes wrongly on bf16, without a word.
        x = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            weight + probe[:, None] * WIDTH + column[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        dot += x[None, :] * w
        if RMS_NORM:
            square += x * x
    logit = tl.sum(dot, axis=1)
    if RMS_NORM:
        total = tl.sum(square, axis=0)
        scale = 1.0 / tl.sqrt(total / WIDTH + eps)
        # An infinite sum of squares would scale every logit to 0, a finite lie.
        logit *= tl.where(total == float("inf"), float("nan"), scale)
    logit += tl.load(bias + probe, mask=real, other=0.0)
    tl.store(out + row * out_stride + probe, logit, mask=real)


def bind_score(weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float) -> BoundScore:
    """Check the probes of a tap once and return ``score(hidden, out)`` for them."""
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device
    launch = score_launch(probes, width)

    def score(hidden: Tensor, out: Tensor) -> None:
        rows, stride, out_stride = check_score_call(hidden, out, probes, width, device)
        if rows == 0:
            return
        with torch.cuda.device_of(hidden):
            score_kernel[launch.grid(rows, probes)](
                hidden,
                stride,
                weight,
                bias,
                out,
                out_stride,
                eps,
                PROBES=probes,
                WIDTH=width,
                RMS_NORM=rms_norm,
                BLOCK_PROBES=launch.block_probes,
                BLOCK_WIDTH=launch.block_width,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,  # Triton 3.10 turns its default; bits must not follow
            )

    return score
