"""Plots of a chain, as files: SVG, PNG or what else matplotlib writes."""

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
from midstream.measure.outcomes import MeasureError

if TYPE_CHECKING:
    from midstream.learn.chains.report import Bands

_MOST_STATES = 8
"""Curves that can be told apart; of more states so many are drawn, from calm to critical."""


@dataclass(frozen=True)
class Band:
    """A curve with its interval, all [n]; ``low`` and ``high`` are None where there is none."""

    x: NDArray[Any]
    value: Array
    low: Array | None = None
    high: Array | None = None


def horizon_curves(
    chain: Chain,
    tokens: int,
    *,
    bands: dict[int, Band] | None = None,
    clock: str = "token",
    never_seen: Sequence[int] = (),
) -> Callable[[Any], None]:
    """Risk ``a_h`` of the states for h up to ``tokens``, over SafetyDrift's zones.

    Those that were ``never_seen`` are left out: what a prior says of them is no finding.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        curve = chain.horizon_curve(tokens)
        for state, colour in _shown(chain, never_seen):
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


def first_passage(
    chain: Chain, tokens: int, *, clock: str = "token", never_seen: Sequence[int] = ()
) -> Callable[[Any], None]:
    """When streams violate first, by the state they are in now, and whether they ever do."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        passage = chain.first_passage(tokens)
        n = np.arange(1, tokens + 1)
        for state, colour in _shown(chain, never_seen):
            left.plot(n, passage[state], color=colour, linewidth=1.4, label=f"state {state}")
        left.set(xlim=(1, tokens), xlabel=f"{clock}s from now", ylabel="P(first violated then)")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        states = np.setdiff1d(np.arange(chain.states), never_seen)
        within = passage.sum(axis=1)[states]
        right.barh(states, within, color=BLUE, label=f"within {tokens}")
        with suppress(SingularChainError):  # then nobody knows how many ever do
            later = chain.first_passage_tail(tokens)[states]
            right.barh(states, later, left=within, color=GREY, alpha=0.5, label="later")
        right.set(xlim=(0, 1), xlabel="P(ever violated)", ylabel="state", yticks=states)
        right.invert_yaxis()
        right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return draw


def transitions(chain: Chain, *, never_seen: Sequence[int] = ()) -> Callable[[Any], None]:
    """The matrix ``P`` of looking ahead: moves, violation, and the end."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        k = chain.states
        names = [*map(str, range(k)), "violated", "ended"]
        p = chain.absorbing[:k]
        p[list(never_seen)] = 0.0
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
        for state in never_seen:
            axes.text(
                (k + 2) / 2,
                state + 0.5,
                "never seen here",
                ha="center",
                va="center",
                color=GREY,
                fontsize=7,
            )
        axes.set(xlabel="next", ylabel="now")
        for side in axes.spines.values():
            side.set_visible(False)

    return draw


def render(draw: Callable[[Any], None], size: tuple[float, float], suffix: str = "svg") -> bytes:
    """Draw into a file's bytes; the suffix chooses the format.

    Raises
    ------
    MeasureError
        For a format that matplotlib does not write.
    ImportError
        Without matplotlib, naming the extra to install.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    if suffix not in (known := Figure().canvas.get_supported_filetypes()):
        raise MeasureError(
            f"no plot can be a .{suffix}; expected one of {', '.join(sorted(known))}"
        )
    buffer = io.BytesIO()
    settings: Any = {**STYLE, "svg.hashsalt": "chain"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
    return buffer.getvalue()


def chain_plots(
    chain: Chain,
    *,
    bands: dict[int, Band] | None = None,
    tokens: int = 32,
    clock: str = "token",
    never_seen: Sequence[int] = (),
) -> dict[str, bytes]:
    """All plots of a chain by file name."""
    side = 1.6 + 0.42 * chain.states
    return {
        "horizon_curves.svg": render(
            horizon_curves(chain, tokens, bands=bands, clock=clock, never_seen=never_seen),
            (6, 3.6),
        ),
        "first_passage.svg": render(
            first_passage(chain, tokens, clock=clock, never_seen=never_seen), (8, 3.4)
        ),
        "transitions.svg": render(transitions(chain, never_seen=never_seen), (side + 0.6, side)),
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


def _shown(chain: Chain, never_seen: Sequence[int]) -> list[tuple[int, Any]]:
    """States to draw, spread over all by their risk, with colours from calm to critical."""
    order = np.argsort(chain.risk(32), kind="stable")
    order = order[~np.isin(order, list(never_seen))]
    places = np.linspace(0, len(order) - 1, min(len(order), _MOST_STATES)).round().astype(int)
    states = [int(state) for state in order[places]]
    return list(zip(states, colours_of(len(states)), strict=True))


def colours_of(count: int) -> list[Any]:
    """Return colours from calm to critical."""
    import matplotlib as mpl

    return list(mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, count)))


def _zones(axes: Any) -> None:
    for low, high, colour in ((0, WATCH, GREEN), (WATCH, NO_RETURN, GREY), (NO_RETURN, 1, RED)):
        axes.axhspan(low, high, color=colour, alpha=0.07, linewidth=0)
        if low:
            axes.axhline(low, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
