"""Launch configurations of the Triton kernels, as data: no GPU and no Triton needed to look at one.

What decides the order of adds (:class:`ScoreOrder`, the warps of ``advance``) follows from sizes
and dtypes alone. Only :class:`ScoreTile` follows the number of rows too, and it decides which
program computes a logit, not how: so no result depends on the number of rows (batch invariance).

Sizes of an H100 are used where one is needed: 132 SMs; some 64 B a cycle, 110 GB/s, from L2 into
one SM; 5.5 TB/s from L2 in all; 3.35 TB/s from HBM; 1 to 2 us from one kernel of a CUDA graph to
the next. They choose between equal results, so a wrong one costs time and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from midstream.kernels.checks import Sizes


def _power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


@dataclass(frozen=True)
class ScoreOrder:
    """How one logit is computed: the order of its adds, and what is multiplied.

    Column ``c`` belongs to slice ``c // block_width % slices``. A slice adds its columns in
    ascending order, and the slices are added pairwise at the end.
    """

    slices: int
    block_width: int
    operand: str
    """Dtype that the products are taken in."""
    pieces: int
    """Numbers of 8 bits that a weight is split into; 1: it is taken as it is."""
    precision: str
    """Of fp32 operands: ``tf32`` where that is exact, else ``ieee``. No matter to 16 bits."""

    @property
    def by_fma(self) -> bool:
        """Whether the products are taken outside the tensor cores."""
        return self.operand == "fp32" and self.precision == "ieee"

    def stages(self, rows: int, probes: int) -> int:
        """Pipeline stages, 5 at most, whose buffers (one less) fit 96 KiB.

        A block has 99 KiB of shared memory on the smallest GPUs that matter (sm_86, 89, 120); two
        blocks fit on the large ones.
        """
        hidden, weight = 4 if self.by_fma else 2, 4 if self.by_fma or self.pieces == 3 else 2
        tile = self.slices * self.block_width * (rows * hidden + probes * weight)
        return 1 + max(1, min(4, (96 << 10) // tile))


def score_order(probes: int, width: int, hidden: torch.dtype, weight: torch.dtype) -> ScoreOrder:
    """Choose by sizes and dtypes alone.

    Tensor cores multiply exactly and add in fp32, and they serve every 16-bit ``hidden``: a weight
    of a wider kind is split into numbers of 8 bits, whose products are exact as well (3 for fp32,
    2 for fp16). bf16 numbers have 8 bits; an fp16 number has 11, as tf32 has. An fp32 ``hidden``
    is multiplied in fp32, by FMA: no model of size keeps its residual stream so.

    8 slices: a warp each, and independent chains to hide latencies with. Blocks of 64 columns are
    128 B of 16 bits, the unit in which memory is read best; 16 columns are one step of a tensor
    core, and all that FMA operands leave registers for. Of more than 16 probes 32 share a read of
    the row, and half the columns keep the tile of weights at its size.
    """
    if hidden == torch.float32:
        return ScoreOrder(8, 16, "fp32", 1, "ieee")
    block_width = min(64 if probes <= 16 else 32, max(16, _power_of_2(_blocks(width, 8))))
    if weight == hidden:
        return ScoreOrder(8, block_width, "bf16" if hidden == torch.bfloat16 else "fp16", 1, "ieee")
    if hidden == torch.bfloat16:
        return ScoreOrder(8, block_width, "bf16", 2 if weight == torch.float16 else 3, "ieee")
    return ScoreOrder(8, block_width, "fp32", 1 if weight == torch.bfloat16 else 3, "tf32")


class Batch(IntEnum):
    """Numbers of rows that are served alike."""

    LONE = 0
    FEW = 1
    SOME = 2
    MANY = 3


def batch_of(rows: int, probes: int) -> Batch:
    """Sort by how many programs fill a GPU.

    LONE: a program per row and probe still fits on 128 SMs. FEW: a program per row. In both, an
    SM has little to read. SOME and MANY: with 16 and 32 rows a program, so that the weights are
    read from L2 less often than the rows are from HBM; 2048 rows are 128 programs of 16.
    """
    if rows * probes <= 128:
        return Batch.LONE
    if rows <= 64:
        return Batch.FEW
    return Batch.SOME if rows <= 2048 else Batch.MANY


@dataclass(frozen=True)
class ScoreTile:
    """Which logits one program computes. No choice here can change a bit.

    An element of a matrix product follows from its row and its column of the operands, step by step
    along ``d``. Every tile is lowered to the same instruction with the same steps (m16n8k16, padded
    if need be; the tests look at the PTX), and sums across slices are written out as single adds.
    """

    rows: int
    probes: int
    num_warps: int
    num_stages: int

    def programs(self, rows: int, probes: int) -> int:
        """Programs for a call. Those that share rows are neighbours, so that L2 serves them."""
        return _blocks(rows, self.rows) * _blocks(probes, self.probes)


def score_tile(batch: Batch, order: ScoreOrder, probes: int) -> ScoreTile:
    """Choose the tile of ``score``.

    One row against 8 fp32 probes of d = 4096 is 136 KB, 1.3 us for one SM; against one probe it is
    24 KB, 0.2 us, on each of 8 SMs. Beside some 1 us to start, fill and drain, nothing is left
    that splitting ``d`` over programs could gain: the partial sums would need a second kernel, and
    that starts 1 to 2 us later.

    Of 32 rows three stages must fit, or it is 16: without loads in flight reading stalls.
    """
    block_probes = 1 if batch == Batch.LONE else min(_power_of_2(probes), 32)
    if order.by_fma:
        block_probes, most_rows = min(block_probes, 8), 4
    else:
        most_rows = 32 if order.stages(32, block_probes) >= 3 else 16
    rows = {Batch.SOME: min(16, most_rows), Batch.MANY: most_rows}.get(batch, 1)
    return ScoreTile(rows, block_probes, 8, order.stages(rows, block_probes))


def norm_tile(batch: Batch, order: ScoreOrder, probes: int) -> ScoreTile:
    """Choose the tile of ``add_rms_norm_score``, whose rows are changed by one program each.

    A program per row while rows are few. Then 4, which share the weights, and whose sums (4 rows of
    d = 8192, 64 KB, twice on each of 132 SMs) are still in L2 when they are read again. 8 rows, or
    more than 16 probes at once, spill at the 128 registers that let two programs share an SM.
    """
    rows = 1 if batch <= Batch.FEW or order.by_fma else 4
    block_probes = min(16, score_tile(Batch.FEW, order, probes).probes)
    return ScoreTile(rows, block_probes, 8, order.stages(rows, block_probes))


def norm_columns(tile: ScoreTile, width: int) -> int:
    """Columns that are added, kept in registers and normed at once.

    In decode the whole row up to d = 16384, 64 numbers a thread: 32 registers where they have 16
    bits, beside the 80 of the products. Several rows need more registers for the products and get
    a quarter of that: with half, d = 5120 spilled. The rest of a wider row goes through L2, in
    pieces of that size.
    """
    return min(_power_of_2(width), 16384 if tile.rows == 1 else 4096 // tile.rows)


def chunk_tile(order: ScoreOrder, probes: int) -> ScoreTile:
    """Choose the tile of ``score_advance``: up to 8 rows of one stream, as speculation yields."""
    block_probes = score_tile(Batch.FEW, order, probes).probes
    return ScoreTile(8, block_probes, 8, order.stages(8, block_probes))


def fuses(rows: int, weight_bytes: int, order: ScoreOrder, num_warps: int) -> bool:
    """Whether ``score_advance`` is one kernel, or ``score`` and ``advance``: to the same bits.

    One kernel reads all weights into the SM of each stream. Up to 256 KB a stream and 16 MiB in all
    that costs less than 3 us, the price of a second kernel and of the logits' way through memory.
    FMA operands do not fit into registers beside a stream, and the sums of ``advance`` follow its
    warps, which must be those of the products.
    """
    few_bytes = weight_bytes <= 1 << 18 and rows * weight_bytes <= 1 << 24
    return few_bytes and not order.by_fma and num_warps == 8


@dataclass(frozen=True)
class AdvanceLaunch:
    """One program per stream: padded sizes of its register tiles."""

    block_probes: int
    block_states: int
    block_edges: int
    block_prompt_edges: int
    block_window: int
    num_warps: int


def advance_launch(sizes: Sizes) -> AdvanceLaunch:
    """Choose tiles for a monitor's sizes.

    A stream's state is small (P = 8, K = 5: under 100 numbers): one warp holds it, and more hold
    copies of it at the price of a barrier of some 30 cycles per row. It is 8 all the same, because
    ``score_advance`` needs them for its products (with 4 it spilled), and the order in which a
    matrix is summed, or more than 32 probes or states, follows the warps. The two large tiles are
    the logit ring ``P x M`` and the transition matrix ``(K+1)^2``; warps are added to keep each at
    32 registers a thread.
    """
    block_probes = _power_of_2(sizes.probes)
    block_states = _power_of_2(sizes.states)
    block_window = _power_of_2(sizes.window)
    largest = max(block_probes * block_window, block_states**2)
    return AdvanceLaunch(
        block_probes=block_probes,
        block_states=block_states,
        block_edges=_power_of_2(sizes.bins - 1),
        block_prompt_edges=_power_of_2(sizes.prompt_bins - 1),
        block_window=block_window,
        num_warps=min(16, max(8, _power_of_2(_blocks(largest, 32 * 32)))),
    )
