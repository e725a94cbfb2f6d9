"""Plots of a turn gate over conversations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.measure.turn_metrics import Outcomes
from midstream.measure.turn_replay import Scored

_BLUE, _RED, _GREEN, _GREY = "tab:blue", "tab:red", "tab:green", "0.65"
_SHOWN = 40  # characters of a conversation's id


@dataclass(frozen=True)
class Talk:
    """One conversation to draw.

    Attributes
    ----------
    id : str
    harmful : bool, optional
    risk : sequence of float
        After each turn.
    log_hazard : sequence of float or None
        Evidence of each turn, nats.
    target, blocked : int, optional
        Turns, from 1.
    """

    id: str
    harmful: bool | None
    risk: Sequence[float]
    log_hazard: Sequence[float | None]
    target: int | None
    blocked: int | None


def risk_over_turns(talks: Sequence[Talk], threshold: float, suffix: str = "svg") -> bytes:
    """Risk of a few conversations after each turn, two beside each other, over their evidence."""
    rows = -(-len(talks) // 2)
    figure = _figure((9, 2.1 * rows + 0.4))
    top = max([1.0, *(h for talk in talks for h in talk.log_hazard if h is not None)])
    for number, talk in enumerate(talks, start=1):
        axes = figure.add_subplot(rows, 2, number)
        turn = np.arange(1, len(talk.risk) + 1)
        behind = axes.twinx()
        hazards = [hazard or 0.0 for hazard in talk.log_hazard]
        behind.bar(turn, hazards, color=_GREY, alpha=0.45, width=0.5, label="evidence, nats")
        behind.set(ylim=(0, 1.1 * top))
        if number % 2 == 0 or number == len(talks):
            behind.set_ylabel("nats", color="0.45")
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
        until = len(turn) if talk.blocked is None else talk.blocked
        if until < len(turn):  # said without a block, so only to look at
            rest = slice(until - 1, None)
            axes.plot(turn[rest], talk.risk[rest], color=_BLUE, alpha=0.3, marker="o",
                      markersize=3, linestyle=":", label="had it not been blocked")  # fmt: skip
        axes.plot(
            turn[:until], talk.risk[:until], color=_BLUE, marker="o", markersize=4, label="risk"
        )
        axes.axhline(threshold, color="0.3", linewidth=0.8, linestyle=":", label="block_at")
        if talk.target is not None:
            axes.axvline(talk.target, color=_RED, linewidth=3, alpha=0.5, label="harm complete")
        if talk.blocked is not None:
            axes.axvline(talk.blocked, color=_GREEN, linestyle="--", label="blocked")
        kind = {True: "harmful", False: "harmless", None: "no label"}[talk.harmful]
        name = talk.id if len(talk.id) <= _SHOWN else f"...{talk.id[-_SHOWN:]}"
        axes.set_title(f"{name} ({kind})", fontsize="small", loc="left")
        axes.set(ylim=(-0.03, 1.05), xlim=(0.4, len(talk.risk) + 0.6), ylabel="risk")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if number > len(talks) - 2:
            axes.set_xlabel("turn")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6,
                  frameon=False, fontsize="small")  # fmt: skip
    return _saved(figure, suffix)


def merit_by_threshold(
    gate: Scored, baselines: dict[str, float], threshold: float, suffix: str = "svg"
) -> bytes:
    """Merit of the gate over its threshold, and the best that each baseline could reach.

    Parameters
    ----------
    gate : Scored
    baselines : mapping of name to merit
        At the threshold that is the best on these very conversations.
    threshold : float
        The policy's.
    """
    figure = _figure((6.4, 4.2))
    axes = figure.add_subplot()
    grid = np.linspace(0.002, 1.0, 250)
    outcomes = [gate.outcomes(float(at)) for at in grid]
    located = outcomes[0].located
    parts = {"phi2" if located else "detected": _GREY, "benign_score": _GREY}
    for (name, colour), style in zip(parts.items(), ("--", ":"), strict=True):
        curve = [_once(found, name) for found in outcomes]
        axes.plot(grid, curve, color=colour, linestyle=style, label=name.replace("_", " "))
    name = "F1φ2" if located else "detected and benign, harmonic mean"
    axes.plot(grid, [gate.merit(float(at)) for at in grid], color=_BLUE, label=f"gate: {name}")
    for (name, merit), colour in zip(
        baselines.items(), ("tab:orange", "tab:purple", "tab:brown", "tab:pink"), strict=True
    ):
        said = f"{name.replace('_', ' ')}, at its best here: {merit:.3f}"
        axes.axhline(merit, color=colour, linewidth=1.2, linestyle="-.", label=said)
    axes.axvline(threshold, color="0.3", linewidth=0.8, linestyle=":", label="block_at")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.04), xlabel="threshold on the gate's risk")
    axes.legend(fontsize="small", loc="lower center", framealpha=0.9)
    return _saved(figure, suffix)


def block_timing(outcomes: Outcomes, suffix: str = "svg") -> bytes:
    """Histogram of the blocked turn less the target; where none is known, of the blocked turn."""
    figure = _figure((6.4, 3.4))
    axes = figure.add_subplot()
    stopped = outcomes.blocked > 0
    if outcomes.located:
        offset = (outcomes.blocked - outcomes.target)[outcomes.harmful & stopped]
        _bars(axes, offset, 0.0, "harmful", _BLUE)
        axes.axvline(0, color=_RED, linewidth=1, linestyle="--", label="harm complete")
        reach = max(2, *abs(offset).tolist(), 0) + 0.7
        axes.set(xlabel="blocked turn less target turn", ylabel="harmful conversations")
        axes.set_xlim(-reach, reach)
    else:
        _bars(axes, outcomes.blocked[outcomes.harmful & stopped], -0.2, "harmful", _RED)
        _bars(axes, outcomes.blocked[~outcomes.harmful & stopped], 0.2, "harmless", _GREY)
        axes.set(xlabel="blocked turn (no target turns are known)", ylabel="conversations")
    never = int((outcomes.harmful & ~stopped).sum())
    wrongly = int((~outcomes.harmful & stopped).sum())
    axes.set_title(
        f"harmful: {int(outcomes.harmful.sum())}, never blocked {never}; "
        f"harmless: {int((~outcomes.harmful).sum())}, blocked {wrongly}",
        fontsize="small",
        loc="left",
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize="small")
    return _saved(figure, suffix)


def _bars(axes: Any, turns: NDArray[np.int64], shift: float, label: str, colour: str) -> None:
    at, count = np.unique(turns, return_counts=True)
    width = 0.4 if shift else 0.8
    axes.bar(at + shift, count, width=width, color=colour, alpha=0.75, label=label)
    for x, n in zip(at, count, strict=True):
        axes.annotate(str(n), (x + shift, n), ha="center", va="bottom", fontsize="small")
    axes.margins(y=0.12)


def _once(outcomes: Outcomes, name: str) -> float:
    return float(outcomes.statistics()[name](np.ones((1, len(outcomes.harmful))))[0])


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def _saved(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150)
    return buffer.getvalue()
