"""Plots of risk over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Curve:
    """One stream to draw.

    Attributes
    ----------
    title : str
    risk, oracle : float64 [tokens + 1]
        From the end of the prompt on.
    threshold : float
        Risk at which the stream is halted.
    halted_at, violates_at : int or None
        Response positions.
    """

    title: str
    risk: NDArray[np.float64]
    oracle: NDArray[np.float64]
    threshold: float
    halted_at: int | None
    violates_at: int | None


def risk_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw the curves below each other into ``path``; its suffix chooses the format.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    figure = Figure(figsize=(8, 2.2 * len(curves)), layout="constrained")
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(len(curves), 1, index + 1)
        position = np.arange(-1, len(curve.risk) - 1)
        axes.plot(position, curve.oracle, color="0.65", label="Bayes oracle")
        axes.plot(position, curve.risk, color="tab:blue", label="midstream")
        axes.axhline(curve.threshold, color="0.3", linewidth=0.8, linestyle=":")
        if curve.violates_at is not None:
            axes.axvline(curve.violates_at, color="tab:red", label="violating token")
        if curve.halted_at is not None:
            axes.axvline(curve.halted_at, color="tab:green", linestyle="--", label="halt")
        axes.set(ylim=(0, 1.02), ylabel="risk", title=curve.title)
        axes.legend(loc="upper left", fontsize="small")
    axes.set_xlabel("response token")
    figure.savefig(path, dpi=150)
