"""Streams worth reading: the worst errors, with each token's risk, and a few risk curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.kernels.tables import NO_CAUSE, UNSCORED_CAUSE
from midstream.measure.drawing import RiskCurve
from midstream.measure.halting import NEVER
from midstream.measure.measured import Measured

EXAMPLES = 5
"""Shown of each kind."""


@dataclass(frozen=True)
class Piece:
    """A part of a response: a token, or what lies between two.

    Attributes
    ----------
    text : str
    risk : float, optional
    violating : bool
    halt : bool
        The stream was halted here.
    after : bool
        Behind the halt: never shown to anybody.
    """

    text: str
    risk: float | None = None
    violating: bool = False
    halt: bool = False
    after: bool = False


@dataclass(frozen=True)
class Exhibit:
    """One stream of the gallery."""

    stream: str
    facts: dict[str, Any]
    pieces: tuple[Piece, ...]


def worst(m: Measured) -> dict[str, list[Exhibit]]:
    """False halts with the highest peak, and misses that leaked most, the worst first."""
    o = m.outcomes
    peaks, leaked = o.peaks(), o.leaked(m.hold_back)
    unseen = o.violating & ~o.located & ~o.stopped
    return {
        "false halts": [_exhibit(m, e, peaks, leaked) for e in _top(o.safe & o.stopped, peaks)],
        "misses": [
            _exhibit(m, e, peaks, leaked)
            for e in _top((o.located & (leaked > 0)) | unseen, leaked + unseen)
        ],
    }


def curves(m: Measured) -> list[RiskCurve]:
    """Pick the clearest stream of each kind; a kind that did not occur is left out.

    Halted ahead by most tokens, halted with its violating token or after it, missed for longest,
    falsely halted at the highest risk, and safe with the highest peak that was spared.
    """
    o = m.outcomes
    peaks = o.peaks()
    lead = np.where(o.located & o.stopped, o.violates_at - o.halt, 0)
    kinds = {
        "halted ahead": (o.located & (lead > 0), lead),
        "halted on or after the violating token": (o.located & o.stopped & (lead <= 0), lead),
        "missed": (o.located & ~o.stopped, o.tokens - o.violates_at),
        "falsely halted": (o.safe & o.stopped, peaks),
        "safe, and spared": (o.safe & ~o.stopped & np.isfinite(peaks), peaks),
    }
    chosen = {kind: _top(among, by, 1) for kind, (among, by) in kinds.items()}
    return [
        RiskCurve(
            title=f"{kind}: {m.recording.streams[e]}",
            risk=o.risks[e],
            halted_at=None if o.halt[e] == NEVER else int(o.halt[e]),
            violates_at=int(o.violates_at[e]) if o.located[e] else None,
        )
        for kind, found in chosen.items()
        for e in found
    ]


def _top(
    among: NDArray[np.bool_],
    by: NDArray[np.float64] | NDArray[np.int64],
    most: int = EXAMPLES,
) -> list[int]:
    places = np.flatnonzero(among)
    return [int(e) for e in places[np.argsort(-by[places], kind="stable")][:most]]


def _exhibit(m: Measured, e: int, peaks: NDArray[np.float64], leaked: NDArray[np.int64]) -> Exhibit:
    o = m.outcomes
    halted = o.halt[e] != NEVER
    facts = {
        "peak risk": round(float(peaks[e]), 3) if np.isfinite(peaks[e]) else None,
        "halted at": int(o.halt[e]) if halted else None,
        "violates at": int(o.violates_at[e]) if o.violates_at[e] != NEVER else None,
        "violating tokens that left": int(leaked[e]),
        "cause": _cause(m, int(m.judgement.cause[e])) if halted else None,
        "response tokens": int(o.tokens[e]),
        **{name: values[e] for name, values in m.recording.columns.items()},
    }
    return Exhibit(m.recording.streams[e], facts, tuple(_pieces(m, e)))


def _cause(m: Measured, cause: int) -> str:
    if cause == UNSCORED_CAUSE:
        return "a token without a score"
    return "unknown" if cause == NO_CAUSE else m.recording.probes[cause]


def _pieces(m: Measured, e: int) -> list[Piece]:
    """Cut the response into its tokens; empty where the recording holds no texts."""
    o, recording = m.outcomes, m.recording
    if recording.texts is None or recording.characters is None:
        return []
    text, done = recording.texts[e], 0
    pieces = []
    for row in range(recording.starts[e], recording.starts[e + 1]):
        start, end = (int(at) for at in recording.characters[row])
        if start < 0 or o.position[row] < 0:
            continue
        after = bool(o.position[row] > o.halt[e])
        if start > done:
            pieces.append(Piece(text[done:start], after=after))
        risk = float(o.risk[row])
        pieces.append(
            Piece(
                text[max(start, done) : end],
                risk=None if np.isnan(risk) else risk,
                violating=bool(o.label[row] == 1),
                halt=bool(o.position[row] == o.halt[e]),
                after=after,
            )
        )
        done = max(done, end)
    rest = text[done:]
    return [*pieces, Piece(rest, after=bool(o.halt[e] != NEVER))] if rest else pieces
