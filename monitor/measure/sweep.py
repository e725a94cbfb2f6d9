"""A grid of thresholds over recorded streams in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.measure.recording import Recording


@dataclass(frozen=True)
class Sweep:
    """T thresholds at G horizons with B hold-backs over E streams.

    Attributes
    ----------
    thresholds : float64 [T]
    horizons : tuple of int
        [G]
    hold_backs : tuple of int or "turn"
        [B]
    halted_at : int32 [G, T, E]
        Position of each halt from the start of the prompt; -1 where there is none.
    safe, violating : int
        Streams without and with a violation; what is known of neither counts in no figure.
    false_halts : int64 [G, T]
        Safe streams that are halted.
    missed : int64 [G, T, B]
        Violating streams of which a violating token leaves.
    leaked_tokens : int64 [G, T, B]
        Violating tokens that leave.
    lead : float64 [G, T]
        Tokens from the halt to the first violating token, median over the violating streams; 0
        where the halt comes with it, later or never.
    """

    thresholds: NDArray[np.float64]
    horizons: tuple[int, ...]
    hold_backs: tuple[int | Literal["turn"], ...]
    halted_at: NDArray[np.int32]
    safe: int
    violating: int
    false_halts: NDArray[np.int64]
    missed: NDArray[np.int64]
    leaked_tokens: NDArray[np.int64]
    lead: NDArray[np.float64]


def sweep(
    recording: Recording,
    bundle: Bundle,
    thresholds: Sequence[float],
    *,
    horizons: Sequence[int] | None = None,
    hold_backs: Sequence[int | Literal["turn"]] | None = None,
) -> Sweep:
    """Say what each threshold would do; the risk is computed once per horizon."""
    raise NotImplementedError
