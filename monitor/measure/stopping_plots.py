"""Plots of optimal stopping: what a threshold costs, and where halting is best."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from midstream.chain import Array
from midstream.kernels.tables import Verdict
from midstream.learn.stopping import StoppingPolicy
from midstream.measure.stopping import ORACLE, SHIPPED, SUGGESTED, Study

_COLOURS = {Verdict.CONTINUE: "#cfe3f5", Verdict.HOLD: "#f6d27a", Verdict.HALT: "#e05252"}
_LINES = ("#3f8fd2", "#8a8f98", "#8d5fc4")
_EDGE_STEPS, _TRIANGLE_STEPS = 240, 120


def cost_by_threshold(study: Study, suffix: str = "svg") -> bytes:
    """Cost per stream against ``halt_at``, at the horizons that matter.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra to install.
    """
    figure = _figure(6.8, 5.0)
    axes = figure.subplots()
    choice, policies = study.choice, study.result["simulated"]["policies"]
    horizons = {choice.halting_only.horizon: "best", choice.thresholds.horizon: "best"}
    if study.shipped is not None:
        horizons.setdefault(study.shipped.horizon, "shipped")
    horizons.setdefault(max(choice.sweep), "longest")
    lowest = min(curve.min() for curve in choice.sweep.values())
    for (horizon, why), colour in zip(horizons.items(), _LINES, strict=False):
        label = f"risk within {horizon} tokens ({why})" if horizon else f"risk by now ({why})"
        axes.plot(choice.levels, choice.sweep[horizon], color=colour, label=label)
    least = study.result["grid"]["least_cost_at_least"]
    axes.axhline(least, color="black", linewidth=1, label=f"optimal policy, {least:.3g}")
    oracle = policies[ORACLE]["cost"]["value"]
    axes.axhline(oracle, color="#2fa36b", linestyle="--", label=f"sees the state, {oracle:g}")
    low = min(0.1, choice.levels[choice.levels > 1e-5].min())  # a log axis needs a decade
    marks = {SUGGESTED: (choice.thresholds, "o", "#e05252"), SHIPPED: (study.shipped, "s", "black")}
    top = 4 * max(lowest, least)
    for name, (thresholds, marker, colour) in marks.items():
        if thresholds is not None:
            cost = policies[name]["cost"]["value"]
            held = "" if thresholds.hold_at is None else f", hold at {thresholds.hold_at:g}"
            label = f"{name}: {thresholds.halt_at:g}{held}, {cost:.3g}"
            at = max(thresholds.halt_at, low)
            axes.plot(at, cost, marker, color=colour, label=label, clip_on=False)
            top = max(top, 1.2 * cost)
    axes.set(
        xscale="log", xlim=(low, 1), ylim=(-0.03 * top, top),
        xlabel="halt_at", ylabel="cost per stream",
        title="Halting at a level, without HOLD, on streams of the chain",
    )  # fmt: skip
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=2)
    return _saved(figure, suffix)


def regions(study: Study, suffix: str = "svg") -> bytes:
    """Where each verdict is best: over the beliefs, where they can be drawn, and over the risk.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra to install.
    """
    policy = study.policy
    k = policy.chain.states
    draw = None
    if all(len(set(support) - {k}) <= 1 for support in policy.grid.grids):
        draw = _by_bin
    elif k == 2:
        draw = _triangle
    figure = _figure(10.5 if draw else 6.5, 4.4)
    panels = figure.subplots(1, 2 if draw else 1, squeeze=False)[0]
    if draw is not None:
        draw(panels[0], policy)
    _by_risk(panels[-1], study)
    handles = [_patch(colour, verdict.name) for verdict, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return _saved(figure, suffix)


def _by_bin(axes: Any, policy: StoppingPolicy) -> None:
    """One column per transient state that the evidence shows, P(violated) upwards."""
    k = policy.chain.states
    chance = np.geomspace(1e-5, 1.0, _EDGE_STEPS)
    columns = np.empty((len(chance), k), np.uint8)
    for state in range(k):
        beliefs = np.zeros((len(chance), k + 1))
        beliefs[:, state], beliefs[:, k] = 1 - chance, chance
        columns[:, state] = policy.verdicts(beliefs, np.ones(len(chance)))
    edges = np.sqrt(chance[1:] * chance[:-1])
    edges = np.concatenate([[chance[0]], edges, [1.0]])
    axes.pcolormesh(
        np.arange(k + 1) - 0.5, edges, columns, cmap=_colour_map(), vmin=0, vmax=2, rasterized=True
    )
    axes.set(
        yscale="log", xlabel="state that the evidence shows, if not violated",
        ylabel="P(violated by now)", title="Best verdict by belief",
    )  # fmt: skip


def _triangle(axes: Any, policy: StoppingPolicy) -> None:
    """Beliefs over two latent states and V as a triangle."""
    from midstream.learn.stopping_grid import SimplexGrid

    beliefs = SimplexGrid(3, _TRIANGLE_STEPS).points
    verdicts = policy.verdicts(beliefs, np.ones(len(beliefs)))
    x, y = _flat(beliefs)
    axes.tripcolor(
        x, y, verdicts.astype(float), cmap=_colour_map(), vmin=0, vmax=2, rasterized=True
    )
    for corner, name in zip(np.eye(3), ("state 0", "state 1", "violated"), strict=True):
        at = _flat(corner[None] * 1.12 - 0.04)
        axes.text(float(at[0][0]), float(at[1][0]), name, ha="center", va="center")
    axes.set_title("Best verdict by belief", pad=16)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _flat(beliefs: Array) -> tuple[Array, Array]:
    return beliefs[:, 1] + beliefs[:, 2] / 2, beliefs[:, 2] * np.sqrt(3) / 2


def _by_risk(axes: Any, study: Study) -> None:
    """Share of each verdict among the streams' beliefs, before their halt, by risk."""
    streams, thresholds = study.streams, study.choice.thresholds
    risk = study.beliefs @ study.policy.chain.horizon(thresholds.horizon)
    rows = np.arange(len(risk))
    halts = np.where(study.verdicts == Verdict.HALT, rows, len(rows))
    halt = np.minimum.reduceat(halts, streams.starts[:-1])
    reached = rows <= np.repeat(halt, np.diff(streams.starts))
    lowest = float(np.clip(np.quantile(risk[reached], 0.01), 1e-6, 0.1))
    edges = np.geomspace(lowest, 1.0, 41)
    place = np.clip(np.searchsorted(edges, risk[reached], side="right") - 1, 0, len(edges) - 2)
    counts = np.zeros((len(edges) - 1, len(Verdict)))
    np.add.at(counts, (place, study.verdicts[reached]), 1)
    total = counts.sum(axis=1)
    base = np.zeros(len(total))
    for verdict, colour in _COLOURS.items():
        share = np.divide(counts[:, verdict], total, out=np.zeros_like(total), where=total > 0)
        axes.bar(edges[:-1], share, np.diff(edges), base, align="edge", color=colour)
        base += share
    for level, style in ((thresholds.halt_at, "-"), (thresholds.hold_at, "--")):
        if level is not None:
            axes.axvline(level, color="black", linewidth=1.2, linestyle=style)
    ahead = f"within {thresholds.horizon} tokens" if thresholds.horizon else "by now"
    axes.set(
        xscale="log", xlim=(lowest, 1), ylim=(0, 1), xlabel=f"risk of a violation {ahead}",
        ylabel="share of the places with this risk",
        title="Optimal verdicts by risk; lines: suggested levels",
    )  # fmt: skip


def _colour_map() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([_COLOURS[verdict] for verdict in Verdict])


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150)
    return buffer.getvalue()
