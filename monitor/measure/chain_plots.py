"""Plots of a chain and of its forecasts, as files: SVG, PNG or what else matplotlib writes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from midstream.chain import NO_RETURN, WATCH, Array, Chain, SingularChainError
from midstream.measure.drawing import BLUE, GREEN, GREY, RED, STYLE

if TYPE_CHECKING:
    from midstream.learn.chains.fit import Bands

_MOST_STATES = 8
"""Curves that can be told apart; of more states so many are drawn, from calm to critical."""


@dataclass(frozen=True)
class Band:
    """A curve with its interval, all [n]; ``low`` and ``high`` are None where there is none."""

    x: NDArray[Any]
    value: Array
    low: Array | None = None
    high: Array | None = None


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


def horizon_curves(
    chain: Chain, tokens: int, *, bands: dict[int, Band] | None = None, clock: str = "token"
) -> Callable[[Any], None]:
    """Risk ``a_h`` of every state for h up to ``tokens``, over SafetyDrift's zones."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        curve = chain.horizon_curve(tokens)
        for state, colour in _shown(chain):
            band = (bands or {}).get(state)
            if band is not None and band.low is not None:
                axes.fill_between(
                    band.x, band.low, band.high, color=colour, alpha=0.18, linewidth=0
                )
            axes.plot(curve[:, state], color=colour, linewidth=1.4, label=f"state {state}")
        _zones(axes)
        axes.set(xlim=(0, tokens), xlabel=f"horizon, {clock}s", ylabel="P(violated within it)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.04, 0.5))

    return draw


def first_passage(chain: Chain, tokens: int, *, clock: str = "token") -> Callable[[Any], None]:
    """When streams violate first, by the state they are in now, and whether they ever do."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        passage = chain.first_passage(tokens)
        n = np.arange(1, tokens + 1)
        for state, colour in _shown(chain):
            left.plot(n, passage[state], color=colour, linewidth=1.4, label=f"state {state}")
        left.set(xlim=(1, tokens), xlabel=f"{clock}s from now", ylabel="P(first violated then)")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        within = passage.sum(axis=1)
        states = np.arange(chain.states)
        right.barh(states, within, color=BLUE, label=f"within {tokens}")
        with suppress(SingularChainError):  # then nobody knows how many ever do
            later = chain.first_passage_tail(tokens)
            right.barh(states, later, left=within, color=GREY, alpha=0.5, label="later")
        right.set(xlim=(0, 1), xlabel="P(ever violated)", ylabel="state", yticks=states)
        right.invert_yaxis()
        right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return draw


def transitions(chain: Chain) -> Callable[[Any], None]:
    """The matrix ``P`` of looking ahead: moves, violation, and the end."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        k = chain.states
        names = [*map(str, range(k)), "violated", "ended"]
        p = chain.absorbing[:k]
        axes.pcolormesh(p, cmap="Blues", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set_xticks(np.arange(k + 2) + 0.5, names, rotation=45, ha="right")
        axes.set_yticks(np.arange(k) + 0.5, names[:k])
        axes.tick_params(length=0)
        axes.axvline(k, color=GREY, linewidth=1)
        for (row, column), value in np.ndenumerate(p):
            if value >= 0.001:
                shade = "white" if value > 0.6 else "black"
                text = f"{value:.2f}" if value >= 0.095 else f"{value:.3f}".lstrip("0")
                place = (column + 0.5, row + 0.5)
                axes.text(*place, text, ha="center", va="center", color=shade, fontsize=7)
        axes.set(xlabel="next", ylabel="now")
        for side in axes.spines.values():
            side.set_visible(False)

    return draw


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
            colours = _colours(len(risks))
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


def render(draw: Callable[[Any], None], size: tuple[float, float], suffix: str = "svg") -> bytes:
    """Draw into a file's bytes; the suffix chooses the format.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra to install.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    buffer = io.BytesIO()
    settings: Any = {**STYLE, "svg.hashsalt": "chain"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
    return buffer.getvalue()


def chain_plots(
    chain: Chain, *, bands: dict[int, Band] | None = None, tokens: int = 32, clock: str = "token"
) -> dict[str, bytes]:
    """All plots of a chain by file name."""
    side = 1.6 + 0.42 * chain.states
    return {
        "horizon_curves.svg": render(
            horizon_curves(chain, tokens, bands=bands, clock=clock), (6, 3.6)
        ),
        "first_passage.svg": render(first_passage(chain, tokens, clock=clock), (8, 3.4)),
        "transitions.svg": render(transitions(chain), (side + 0.6, side)),
    }


def bands_of(intervals: Bands, tokens: int) -> dict[int, Band]:
    """Bands of every state up to ``tokens``, from the intervals of a fit."""
    kept = [row for row, horizon in enumerate(intervals.horizons) if horizon <= tokens]
    mean, low, high = (
        np.array(rows)[kept] for rows in (intervals.mean, intervals.low, intervals.high)
    )
    horizons = np.array(intervals.horizons)[kept]
    return {
        state: Band(horizons, mean[:, state], low[:, state], high[:, state])
        for state in range(mean.shape[1])
    }


def _shown(chain: Chain) -> list[tuple[int, Any]]:
    """States to draw, spread over all by their risk, with colours from calm to critical."""
    order = np.argsort(chain.risk(32), kind="stable")
    places = np.linspace(0, len(order) - 1, min(len(order), _MOST_STATES)).round().astype(int)
    states = [int(state) for state in order[places]]
    return list(zip(states, _colours(len(states)), strict=True))


def _colours(count: int) -> list[Any]:
    import matplotlib as mpl

    return list(mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, count)))


def _zones(axes: Any) -> None:
    for low, high, colour in ((0, WATCH, GREEN), (WATCH, NO_RETURN, GREY), (NO_RETURN, 1, RED)):
        axes.axhspan(low, high, color=colour, alpha=0.07, linewidth=0)
        if low:
            axes.axhline(low, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
