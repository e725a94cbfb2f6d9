"""Plots of judged traces of agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from midstream.agents.forecast import AgentModel
from midstream.agents.state import Level
from midstream.measure.agents import CHAIN, POOLED, Judged

COLOURS = ("#d9e8d5", "#f2e2a0", "#f0b267", "#d9603b", "#7d1d2f")
"""Of the levels, from safe to violated."""

_BLUE, _GREY = "#3f8fd2", "#8a8f98"
_ROWS = 70  # traces of a kind in the heat map
_STEPS = 16  # and their steps
_AHEAD = 10  # steps


def write_plots(
    folder: Path, judged: Sequence[Judged], report: Mapping[str, Any], model: AgentModel
) -> list[Path]:
    """Draw everything into an existing folder as SVG.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra to install.
    """
    drawings: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
        "levels.svg": (lambda figure: levels(figure, judged), (9.0, 7.0)),
        "horizons.svg": (lambda figure: horizons(figure, model, judged), (9.5, 5.6)),
        "sweep.svg": (lambda figure: sweep(figure, report), (5.6, 5.0)),
        "leads.svg": (lambda figure: leads(figure, judged), (6.4, 3.4)),
    }
    paths = []
    for name, (draw, size) in drawings.items():
        save(draw, size, folder / name)
        paths.append(folder / name)
    return paths


def save(draw: Callable[[Any], None], size: tuple[float, float], path: Path) -> None:
    """Draw into a new file; its suffix chooses the format."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'midstream[plot]'") from error
    settings: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a dollar sign in a category is no formula
        "svg.fonttype": "none",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=130)


def levels(figure: Any, judged: Sequence[Judged]) -> None:
    """Level of each trace after each step, with its violating step and its first flag."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(list(COLOURS))
    left, right = figure.subplots(1, 2)
    for axes, violating in ((left, True), (right, False)):
        group = sorted(
            (one for one in judged if (one.violates_at is not None) is violating),
            key=lambda one: [step.level for step in one.steps],
        )
        kind = "violate" if violating else "do not violate"
        if not group:
            axes.set(title=f"no trace that {kind}", xticks=[], yticks=[])
            continue
        chosen = [group[i] for i in np.unique(np.linspace(0, len(group) - 1, _ROWS).astype(int))]
        width = min(_STEPS, max(len(one.steps) for one in judged))
        grid = np.full((len(chosen), width), np.nan)
        for row, one in enumerate(chosen):
            path = [step.level for step in one.steps][:width]
            grid[row, : len(path)] = path
            for at, marker, colour in (
                (one.flags[CHAIN], "o", _BLUE),
                (one.violates_at, "x", "black"),
            ):
                if at is not None and at < width:
                    axes.plot(at + 0.5, row + 0.5, marker, color=colour, markersize=3)
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, vmin=-0.5, vmax=4.5)
        axes.invert_yaxis()
        axes.set(
            title=f"{len(chosen)} of {len(group)} traces that {kind}",
            xlabel="step",
            xticks=np.arange(0, width, max(1, width // 8)) + 0.5,
            yticks=[],
        )
        axes.set_xticklabels(np.arange(0, width, max(1, width // 8)) + 1)
    left.plot([], [], "x", color="black", markersize=4, label="violating step")
    left.plot([], [], "o", color=_BLUE, markersize=4, label="first flag")
    figure.legend(loc="outside lower left", frameon=False, ncols=2)
    bar = figure.colorbar(mesh, ax=[left, right], shrink=0.5, ticks=range(len(Level)))
    bar.ax.set_yticklabels([level.label for level in Level])


def horizons(figure: Any, model: AgentModel, judged: Sequence[Judged]) -> None:
    """P(violated within h | level) over h: by the chain of all and by the largest categories'."""
    sizes = {name: sum(one.trace.category == name for one in judged) for name in model.categories}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5] if len(sizes) > 1 else []
    chains = {
        "all categories": model.pooled,
        **{f"{name or 'no category'} ({sizes[name]})": model.categories[name] for name in largest},
    }
    columns = min(3, len(chains))
    grid = figure.subplots(-(-len(chains) // columns), columns, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(chains) :]:
        axes.set_visible(False)
    shown = list(zip(panels, chains.items(), strict=False))
    for axes, (name, chain) in shown:
        curves = chain.horizon_curve(_AHEAD)
        for level in list(Level)[:-1]:
            axes.plot(
                curves[:, level], color=COLOURS[level], linewidth=2, marker="o", markersize=3,
                markeredgecolor="#00000055", label=level.label,
            )  # fmt: skip
        threshold = model.flag_at if name == "all categories" else model.flag_at_category
        axes.axhline(threshold, color=_GREY, linewidth=1, linestyle=":")
        axes.set(title=name[:40], ylim=(-0.02, 1.02), xlabel="steps ahead", ylabel="risk")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )


def sweep(figure: Any, report: Mapping[str, Any]) -> None:
    """Detection before the violating step against false positives, beside the baselines."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    for name, colour in ((POOLED, "#7fb069"), (CHAIN, _BLUE)):
        points = [(p[f"{name}: fpr"], p[f"{name}: detection"]) for p in report["sweep"]]
        axes.plot(*zip(*points, strict=True), "-o", color=colour, markersize=3, label=name)
    for (name, figures), marker in zip(report["detectors"].items(), "*P*Psvd", strict=False):
        if name == POOLED:  # its curve is there, and its threshold a point of it
            continue
        x, y = figures["fpr"], figures["detection"]
        if x["value"] is None or y["value"] is None:
            continue
        axes.errorbar(
            [x["value"]], [y["value"]],
            xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
            yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]],
            marker=marker, linewidth=0, elinewidth=0.8,
            label=f"{name}, threshold chosen" if name == CHAIN else name,
        )  # fmt: skip
    axes.set(
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.02),
        xlabel="flagged, share of traces that do not violate",
        ylabel="flagged before the violating step, share of those that do",
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def leads(figure: Any, judged: Sequence[Judged]) -> None:
    """Histogram of the steps between first flag and violating step."""
    axes = figure.subplots()
    gaps = [
        None if (flag := one.flags[CHAIN]) is None else one.violates_at - flag
        for one in judged
        if one.violates_at is not None
    ]
    flagged = [gap for gap in gaps if gap is not None]
    low, high = min([*flagged, 0]), max([*flagged, 1])
    values = np.arange(low, high + 1)
    counts = [flagged.count(int(value)) for value in values]
    axes.bar(values, counts, color=[_BLUE if value > 0 else _GREY for value in values])
    axes.bar([high + 1.5], [gaps.count(None)], color="#e05252")
    axes.axvline(0.5, color=_GREY, linestyle=":", linewidth=1)
    step = max(1, len(values) // 12)
    axes.set_xticks([*values[::step], high + 1.5], [*map(str, values[::step]), "never"])
    axes.set(
        xlabel="first flag, steps before the violating step (blue: in time)",
        ylabel="violating traces",
        title=f"{CHAIN}, threshold chosen out of fold",
    )
