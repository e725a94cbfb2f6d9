"""Plots of a report, as SVG to stand inside a page: no external parts, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK = "#0badca"  # stands for the text colour of the page
BLUE, RED, GREEN, GREY = "#3f8fd2", "#e05252", "#2fa36b", "#8a8f98"  # legible on both grounds

STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and is small
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""Settings of matplotlib that all plots share."""


@dataclass(frozen=True)
class RiskCurve:
    """Risk of one stream over its response.

    Attributes
    ----------
    title : str
    risk : float64 [tokens + 1]
        From the end of the prompt on; NaN where a token was not judged.
    halted_at, violates_at : int, optional
        Response positions.
    """

    title: str
    risk: NDArray[np.float64]
    halted_at: int | None
    violates_at: int | None


def ranking(roc: Sequence[Any] | None, pr: Sequence[Any] | None, base_rate: float) -> str:
    """ROC and precision-recall curve side by side, each [n, 2]."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _square(left, "false-positive rate", "true-positive rate")
        left.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        left.plot(*np.transpose(roc or [(0, 0)]), color=BLUE)
        _square(right, "recall", "precision")
        right.axhline(base_rate, color=GREY, linestyle=":", linewidth=1)
        right.plot(*np.transpose(pr or [(0, 0)]), color=BLUE)

    return _svg(draw, "ranking", (6.6, 3.2))


def operating(points: Sequence[Any], false_halts: float, recall: float) -> str:
    """Recall against false halts over all thresholds, [n, 2], and where the tier stands."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _square(axes, "false halts, share of safe responses", "halted, share of violating ones")
        axes.plot(*np.transpose(points), color=BLUE, label="threshold on the peak risk")
        axes.plot([false_halts], [recall], "o", color=RED, label="this tier", clip_on=False)
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw, "operating", (3.6, 3.2))


def leaks(depths: Sequence[int], shares: Sequence[tuple[float, float, float]], now: int) -> str:
    """Share of the violating tokens that leave, with its interval, by hold-back."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        value, low, high = np.transpose(shares)
        axes.fill_between(depths, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(depths, value, color=BLUE, marker="o", markersize=3)
        if now in depths:
            axes.axvline(now, color=RED, linewidth=1, linestyle="--", label="this policy")
            axes.legend(frameon=False)
        axes.set(xlabel="hold-back, tokens", ylabel="violating tokens that left, share")
        axes.set_ylim(bottom=0, top=max(0.01, float(high.max()) * 1.15))
        axes.set_xticks(list(depths)[::2])

    return _svg(draw, "leaks", (3.6, 3.2))


def reliability(points: Sequence[dict[str, float]], horizon: int) -> str:
    """Reliability diagram with the number of tokens of each bin below."""

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        risk, true, tokens = (
            [point[key] for point in points] for key in ("risk", "came_true", "tokens")
        )
        _square(top, "", f"violated within {horizon}" if horizon else "violated by now")
        top.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        top.plot(risk, true, color=BLUE, marker="o", markersize=4)
        bottom.bar(risk, tokens, width=0.06, color=BLUE, alpha=0.6)
        bottom.set(yscale="log", ylabel="tokens", xlabel="risk said")
        bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bottom.yaxis.set_minor_formatter(lambda value, _: "")

    return _svg(draw, "reliability", (3.6, 3.6))


def timing(offsets: Sequence[int]) -> str:
    """Histogram of the halt's position less the violating token's."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        low, high = min(*offsets, 0), max(*offsets, 0)
        width = max(1, round((high - low + 1) / 30))
        edges = np.arange(low // width * width, high + width + 1, width) - 0.5
        axes.hist(offsets, bins=edges, color=BLUE, alpha=0.75)
        axes.axvline(0, color=RED, linewidth=1, linestyle="--", label="violating token")
        axes.set(xlabel="halt, tokens after the violating token", ylabel="responses")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)

    return _svg(draw, "timing", (3.6, 3.2))


def risk_curves(curves: Sequence[RiskCurve], threshold: float) -> str:
    """Risk over the response of a few streams, below each other."""

    def draw(figure: Any) -> None:
        for axes, curve in zip(np.atleast_1d(figure.subplots(len(curves), 1)), curves, strict=True):
            position = np.arange(-1, len(curve.risk) - 1)
            axes.plot(position, curve.risk, color=BLUE, linewidth=1.4, label="risk")
            axes.axhline(threshold, color=GREY, linewidth=1, linestyle=":", label="threshold")
            if curve.violates_at is not None:
                axes.axvline(curve.violates_at, color=RED, linewidth=1.4, label="violating token")
            if curve.halted_at is not None:
                axes.axvline(
                    curve.halted_at, color=GREEN, linewidth=1.4, linestyle="--", label="halt"
                )
            axes.set(ylim=(-0.02, 1.05), yticks=(0, 0.5, 1), ylabel="risk")
            axes.set_title(_short(curve.title, 90), loc="left")
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xlabel("response token")

    return _svg(draw, "curves", (7.6, 1.5 * len(curves) + 0.4))


def heat_map(rows: Sequence[str], columns: Sequence[str], values: NDArray[np.float64]) -> str:
    """AUROC [rows, columns] in colours, NaN left blank."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        # cells one by one: a picture of pixels would blur, and stand in the page as one
        axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", vmin=0.5, vmax=1.0)
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(columns)) + 0.5, below, rotation=45, ha="right")
        axes.set_yticks(np.arange(len(rows)) + 0.5, beside)
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                shade = "#ffffff" if value < 0.74 else "#111111"
                place = (column + 0.5, row + 0.5)
                axes.text(*place, f"{value:.3f}", ha="center", va="center", color=shade)
        for side in axes.spines.values():
            side.set_visible(False)

    below, beside = ([_short(name) for name in names] for names in (columns, rows))
    widest, deepest = (max(map(len, names)) for names in (beside, below))
    size = (
        0.5 + 0.08 * widest + 0.06 * deepest + 0.75 * len(columns),
        0.5 + 0.06 * deepest + 0.42 * len(rows),
    )
    return _svg(draw, "heat", size)


def _short(name: str, most: int = 40) -> str:
    """What a plot has room for; the tables have the whole name."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _square(axes: Any, x: str, y: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)


def _svg(draw: Callable[[Any], None], name: str, size: tuple[float, float]) -> str:
    """Draw and return the SVG element alone; ids are prefixed, so that a page can hold many."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    settings: Any = {
        **STYLE,
        "svg.hashsalt": name,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("font-family: 'DejaVu Sans', ", "font-family: ")
    # The picture's words are given by the page, around it; it grows no larger than it reads well.
    opening = f'<svg aria-hidden="true" style="max-width:{112 * size[0]:.0f}px" '
    return text.replace(INK, "currentColor").replace("<svg ", opening, 1)
