"""Rows times probes in Triton: the one matrix product behind ``score`` and its fused forms.

The order of adds is written out (:class:`.launch.ScoreOrder`), so a logit has the same bits from
every kernel, in every tile. ``tl.dot`` takes the slices of ``d`` as its batch: a warp each. It adds
along ``d`` in order. What is left, sums over slices and over squares, is done by single adds:
``tl.sum`` would follow the layout, which follows the alignment of the pointers.
"""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from midstream.kernels.backends import triton_interprets
from midstream.kernels.launch import Batch, ScoreOrder, ScoreTile, batch_of

INTERPRETED = triton_interprets()

_OPERANDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def batch_for(rows: int, probes: int) -> Batch:
    """Sort as :func:`.launch.batch_of` does; in the interpreter all batches are alike.

    There NumPy multiplies, in an order of adds that follows the shapes.
    """
    return Batch.FEW if INTERPRETED else batch_of(rows, probes)


def constants(
    order: ScoreOrder, tile: ScoreTile, *, interpreted: bool = INTERPRETED
) -> dict[str, object]:
    """Compile-time arguments of :func:`dot_rows`.

    The interpreter multiplies bf16 bit patterns instead of numbers; there operands are fp32, which
    holds the same ones.
    """
    return {
        "SLICES": order.slices,
        "BLOCK_WIDTH": order.block_width,
        "OPERAND": tl.float32 if interpreted else _OPERANDS[order.operand],
        "PIECES": order.pieces,
        "PRECISION": order.precision,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_PROBES": tile.probes,
    }


def options(tile: ScoreTile) -> dict[str, object]:
    """Compiler options of a kernel with this tile."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # Triton 3.10 turns its default; bits must not follow
    }


@triton.constexpr_function
def _log2(power: int) -> int:
    return power.bit_length() - 1


@triton.jit
def sum_last(terms, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """Sum [ROWS, LENGTH] over its last dimension: neighbours, then neighbours of those."""
    for level in tl.static_range(_log2(LENGTH)):
        left, right = tl.split(tl.reshape(terms, (ROWS, LENGTH >> (level + 1), 2)))
        terms = left + right
    return tl.reshape(terms, (ROWS,))


@triton.jit
def dot_rows(
    hidden,
    at_row,
    real_row,
    weight,
    first_probe,
    PROBES: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
):
    """Return rows times probes [BLOCK_ROWS, BLOCK_PROBES] and sums of squares [BLOCK_ROWS]."""
    probe = first_probe + tl.arange(0, BLOCK_PROBES)
    inner = tl.arange(0, SLICES)[:, None] * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    dot = tl.zeros((SLICES, BLOCK_ROWS, BLOCK_PROBES), tl.float32)
    square = tl.zeros((SLICES, BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for begin in range(0, WIDTH, SLICES * BLOCK_WIDTH):
        column = begin + inner[:, None, :]
        inside = column < WIDTH
        # fp32 at once: Triton's interpreter computes wrongly on bf16, without a word.
        x = tl.load(
            hidden + at_row[None, :, None] + column,
            mask=real_row[None, :, None] & inside,
            other=0.0,
        ).to(tl.float32)
        w = tl.load(
            weight + probe[None, :, None] * WIDTH + column,
            mask=(probe < PROBES)[None, :, None] & inside,
            other=0.0,
        ).to(tl.float32)
        for _piece in tl.static_range(PIECES):
            high = w
            if PIECES > 1:
                high = w.to(tl.bfloat16).to(tl.float32)
                w -= high
            dot = tl.dot(
                x.to(OPERAND),
                tl.permute(high.to(OPERAND), (0, 2, 1)),
                dot,
                input_precision=PRECISION,
            )
        if SQUARES:
            square += x * x
    dot = tl.reshape(tl.permute(dot, (1, 2, 0)), (BLOCK_ROWS * BLOCK_PROBES, SLICES))
    dot = sum_last(dot, BLOCK_ROWS * BLOCK_PROBES, SLICES)
    square = tl.reshape(tl.permute(square, (1, 0, 2)), (BLOCK_ROWS, SLICES * BLOCK_WIDTH))
    square = sum_last(square, BLOCK_ROWS, SLICES * BLOCK_WIDTH)
    return tl.reshape(dot, (BLOCK_ROWS, BLOCK_PROBES)), square


@triton.jit
def store_logits(
    dot,
    square,
    bias,
    out,
    at_row,
    real_row,
    first_probe,
    eps,
    PROBES: tl.constexpr,
    WIDTH: tl.constexpr,
    RMS_NORM: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
):
    """Scale, add the bias and store what :func:`dot_rows` returned."""
    if RMS_NORM:
        scale = 1.0 / tl.sqrt(square / WIDTH + eps)
        # An infinite sum of squares would scale every logit to 0, a finite lie.
        dot *= tl.where(square == float("inf"), float("nan"), scale)[:, None]
    probe = first_probe + tl.arange(0, BLOCK_PROBES)
    dot += tl.load(bias + probe, mask=probe < PROBES, other=0.0)[None, :]
    mask = real_row[:, None] & (probe < PROBES)[None, :]
    tl.store(out + at_row[:, None] + probe[None, :], dot, mask=mask)
