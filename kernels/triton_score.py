"""``score`` in Triton: tiles of rows and probes, on tensor cores where ``hidden`` has 16 bits."""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from midstream.kernels.backends import BoundScore
from midstream.kernels.call_checks import check_score_call
from midstream.kernels.checks import check_probes
from midstream.kernels.launch import Batch, ScoreTile, score_order, score_tile
from midstream.kernels.triton_dot import (
    batch_for,
    constants,
    dot_rows,
    options,
    store_logits,
)


@triton.jit(do_not_specialize=["rows"])
def score_kernel(
    hidden,
    hidden_stride,
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
):
    """Logits of one block of rows for one block of probes. Strides count elements."""
    blocks: tl.constexpr = (PROBES + BLOCK_PROBES - 1) // BLOCK_PROBES
    program = tl.program_id(0)
    first_probe = program % blocks * BLOCK_PROBES
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < rows
    at_row = row * hidden_stride
    dot, square = dot_rows(
        hidden,
        at_row,
        real,
        weight,
        first_probe,
        PROBES,
        WIDTH,
        RMS_NORM,
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


@cache
def _launch(
    probes: int,
    width: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    rms_norm: bool,
    batch: Batch,
) -> tuple[ScoreTile, dict[str, object]]:
    """Tile and compile-time arguments. Cached here: ops without a binding bind at every call."""
    order = score_order(probes, width, hidden, weight)
    tile = score_tile(batch, order, probes)
    return tile, {
        "PROBES": probes,
        "WIDTH": width,
        "RMS_NORM": rms_norm,
        **constants(order, tile),
        **options(tile),
    }


def bind_score(weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float) -> BoundScore:
    """Check the probes of a tap once and return ``score(hidden, out)`` for them.

    The first call with a new dtype of ``hidden`` or size of batch (:class:`.launch.Batch`) compiles
    a kernel: warm up before a CUDA graph is captured. A call costs Triton's launcher 5 to 9 us of
    host time, and nothing in a graph.
    """
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device

    def score(hidden: Tensor, out: Tensor) -> None:
        rows, stride, out_stride = check_score_call(hidden, out, probes, width, device)
        if rows == 0:
            return
        batch = batch_for(rows, probes)
        tile, arguments = _launch(probes, width, hidden.dtype, weight.dtype, rms_norm, batch)
        with torch.cuda.device_of(hidden):
            score_kernel[(tile.programs(rows, probes),)](
                hidden, stride, weight, bias, out, out_stride, rows, eps, **arguments
            )

    return score
