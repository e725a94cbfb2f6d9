"""What chains are fitted on: one sequence of evidence bins per stream, with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.chain import ChainError


@dataclass(frozen=True)
class SymbolStream:
    """One stream at one clock: a response of tokens, a conversation of turns, a trace of steps.

    Attributes
    ----------
    bins : int64 [n]
        Evidence bin of each token (turn, step), n >= 1.
    violated : bool [n], optional
        Whether the stream has violated at or before this token; None where nobody knows where.
    violates : bool, optional
        Whether it violates at all: known from ``violated``, or on its own, or (None) not known.
    ended : bool
        False where the stream was cut off: its last token says nothing about ending.
    prompt_bin : int
        Evidence bin before the first token.
    category : str
        Streams of one category share a chain.
    """

    bins: NDArray[np.int64]
    violated: NDArray[np.bool_] | None
    violates: bool | None
    ended: bool
    prompt_bin: int = 0
    category: str = ""

    def __post_init__(self) -> None:
        if len(self.bins) == 0 or (self.bins < 0).any() or self.prompt_bin < 0:
            raise ChainError("bins: expected at least one, each 0 or more")
        if self.violated is None:
            return
        if len(self.violated) != len(self.bins):
            raise ChainError("violated: expected one label per bin")
        if (self.violated[:-1] & ~self.violated[1:]).any():
            raise ChainError("violated: a stream that has violated stays violated")
        if self.violates is not None and self.violates != bool(self.violated[-1]):
            raise ChainError("violates: contradicts the labels of the tokens")
