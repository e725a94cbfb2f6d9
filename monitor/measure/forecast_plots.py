"""Plots of what a chain said and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Array
from midstream.measure.chain_plots import Band, colours_of
from midstream.measure.drawing import BLUE, GREY, RED


@dataclass(frozen=True)
class Reliability:
    """What was said and what came of it, by bin of the risk, all [b].

    Attributes
    ----------
    horizon : int
    risk, came_true, low, high : float64
        Mean risk, share that came true, and its interval.
    count : int64
        Forecasts.
    """

    horizon: int
    risk: Array
    came_true: Array
    low: Array
    high: Array
    count: NDArray[np.int64]


def reliability(found: Sequence[Reliability]) -> Callable[[Any], None]:
    """One reliability diagram per horizon, with the number of forecasts below."""

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, len(found), height_ratios=(3, 1), sharex=True, squeeze=False)
        for column, one in enumerate(found):
            top, bottom = grid[:, column]
            top.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
            reach = np.abs(np.stack([one.came_true - one.low, one.high - one.came_true]))
            top.errorbar(
                one.risk, one.came_true, yerr=reach, color=BLUE, marker="o", markersize=4, capsize=2
            )
            title = f"violated within {one.horizon}" if one.horizon else "violated by now"
            top.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=title)
            bottom.bar(one.risk, one.count, width=0.05, color=BLUE, alpha=0.6)
            bottom.set(yscale="log", xlabel="risk said")
            bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            bottom.yaxis.set_minor_formatter(lambda value, _: "")
        grid[0, 0].set_ylabel("came true")
        grid[1, 0].set_ylabel("forecasts")

    return draw


def brier(horizons: Sequence[int], score: Band, base: Array) -> Callable[[Any], None]:
    """Brier score by horizon, beside that of saying the base rate every time."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        place = np.arange(len(horizons))
        axes.plot(
            place, base, color=GREY, linestyle="--", marker="o", markersize=3, label="base rate"
        )
        axes.fill_between(place, score.low, score.high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(place, score.value, color=BLUE, marker="o", markersize=4, label="chain")
        axes.set_xticks(place, [str(h) for h in horizons])
        axes.set(xlabel="horizon, tokens", ylabel="Brier score")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    return draw


def passage_forecast(said: Band, seen: Band) -> Callable[[Any], None]:
    """Share violated by each token, as forecast at the prompt's end and as it came."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.fill_between(seen.x, seen.low, seen.high, color=GREY, alpha=0.3, linewidth=0)
        left.plot(seen.x, seen.value, color=GREY, drawstyle="steps-post", label="came true")
        left.plot(said.x, said.value, color=BLUE, label="forecast at the prompt's end")
        left.set(xlabel="response tokens", ylabel="share violated by then")
        left.set_xlim(left=0)
        left.set_ylim(bottom=0)
        left.legend(frameon=False, loc="upper left")
        width = max(1, round((len(said.x) - 1) / 40))
        edges = np.arange(0, len(said.x) - 1 + width, width).clip(max=len(said.x) - 1)
        for band, colour, label in ((seen, GREY, "came true"), (said, BLUE, "forecast")):
            mass = np.diff(band.value[edges]) / np.maximum(np.diff(edges), 1)
            right.stairs(
                mass,
                edges,
                color=colour,
                fill=band is seen,
                alpha=1 if band is said else 0.4,
                label=label,
            )
        right.set(xlabel="response tokens", ylabel="first violated, share per token")
        right.legend(frameon=False)

    return draw


def risk_along(curves: Sequence[tuple[str, dict[int, Array], int | None]]) -> Callable[[Any], None]:
    """Risk over the response of a few streams at several horizons, below each other.

    Each is a title, the risk [tokens + 1] by horizon from the prompt's end on, and the position of
    the violating token.
    """

    def draw(figure: Any) -> None:
        for axes, (title, risks, violates_at) in zip(
            np.atleast_1d(figure.subplots(len(curves), 1)), curves, strict=True
        ):
            colours = colours_of(len(risks))
            for (horizon, risk), colour in zip(risks.items(), colours, strict=True):
                position = np.arange(-1, len(risk) - 1)
                axes.plot(position, risk, color=colour, linewidth=1.3, label=f"within {horizon}")
            if violates_at is not None:
                axes.axvline(violates_at, color=RED, linewidth=1.4, label="violating token")
            axes.set(ylim=(-0.02, 1.05), yticks=(0, 0.5, 1), ylabel="risk")
            axes.set_title(title, loc="left")
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xlabel("response token")

    return draw
