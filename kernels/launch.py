"""Launch configurations of the Triton kernels, as data: no GPU and no Triton needed to look at one.

None depends on the number of rows, so that neither does any result (batch invariance).
"""

from __future__ import annotations

from dataclasses import dataclass

from midstream.kernels.checks import Sizes


def _power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class ScoreLaunch:
    """One program per row and block of probes."""

    block_probes: int
    block_width: int
    num_warps: int

    def grid(self, rows: int, probes: int) -> tuple[int, int]:
        """Programs for a call; rows come first because only that axis can exceed 65535."""
        return rows, -(-probes // self.block_probes)


def score_launch(probes: int, width: int) -> ScoreLaunch:
    """Choose blocks for ``probes`` read-outs of a residual stream of ``width``.

    The accumulators of a program are ``block_probes x block_width`` in fp32. 4096 of them over 128
    threads are 32 registers a thread, which leaves room for the loads in flight. 16 probes share
    one read of the row; more would leave fewer than 256 columns per step, less than 128-bit loads
    for 4 warps of 16-bit numbers would like.
    """
    block_probes = min(_power_of_2(probes), 16)
    block_width = min(_power_of_2(width), 4096 // block_probes)
    return ScoreLaunch(block_probes, block_width, num_warps=4)


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

    A stream's state is small (P = 8, K = 5: under 100 numbers), so one warp holds it and needs no
    barriers that cost anything. The two large tiles are the logit ring ``P x M`` and the transition
    matrix ``(K+1)^2``; warps are added to keep each at 32 registers a thread or less.
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
        num_warps=min(16, _power_of_2(-(-largest // (32 * 32)))),
    )
