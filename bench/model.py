"""Bytes and flops that an op cannot avoid, counted from its definition: see docs/kernels.md.

Bytes are the least traffic with main memory when nothing is in a cache: every input is read once,
every output written once, and what one call both makes and uses up stays on the chip. A step, a
comparison, an exponential and a logarithm count as one flop each.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What a call must move and compute."""

    bytes: int
    flops: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    @property
    def intensity(self) -> float:
        """Flops per byte: the place on the roofline's x axis."""
        return self.flops / self.bytes


FP32 = INT32 = 4


def score(rows: int, probes: int, width: int, element: int) -> Work:
    """``out = hidden @ weight.T + bias``; ``element`` is the bytes of a hidden or weight number."""
    read = (rows + probes) * width * element + probes * FP32
    return Work(read + rows * probes * FP32, rows * probes * (2 * width + 1))


def advance(rows: int, probes: int, states: int, bins: int) -> Work:
    """One response token of ``rows`` streams, no trace, no window; ``states`` is K.

    A row's state that is read and written: evidence and folds (P each), belief (K + 1), and
    position, peak, scored, unscored and (one byte) verdict. Only read: start, policy, and the row's
    policy (``ahead`` and four numbers). Only written: risk.
    """
    belief = states + 1
    row = 2 * probes * FP32  # logits: read, and NaN written
    row += 2 * INT32  # slot and position of the row
    row += 2 * (2 * probes * FP32 + belief * FP32 + 4 * FP32 + 1)
    row += 2 * INT32 + FP32
    row += belief * FP32 + 4 * FP32
    tables = 5 * probes * FP32 + (belief * belief + belief * bins + bins - 1) * FP32
    # EMA 3, minus center 1, softplus 4 (exp, 1 +, log, max), sum 1; search of the bin; product with
    # the step, times emission, sum, divide; product with ahead; the peak and three thresholds
    flops = 9 * probes + (bins - 1) + belief * (2 * belief) + 3 * belief + 2 * belief + 4
    return Work(rows * row + tables, rows * flops)


def score_advance(rows: int, probes: int, width: int, element: int, states: int, bins: int) -> Work:
    """Both; the logits are neither written nor read in between, and NaN at the end."""
    both = score(rows, probes, width, element) + advance(rows, probes, states, bins)
    return Work(both.bytes - 2 * rows * probes * FP32, both.flops)


def add_rms_norm_score(rows: int, probes: int, width: int, element: int) -> Work:
    """``x`` and ``residual`` are read and written; the probes read the sum on its way."""
    scored = score(rows, probes, width, element)
    extra = 3 * rows * width * element + width * element
    # add 1, square and sum 2, times scale and gain 2; mean, epsilon and root 3 a row
    return Work(scored.bytes + extra, scored.flops + rows * (5 * width + 3))
