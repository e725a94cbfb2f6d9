"""Turn CSVs of ``make bench`` into one page of plots that needs nothing else.

python bench/page.py results/*.csv --out results/page
"""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import records
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import Record

COLORS = {
    "cpu": "#d1495b",
    "triton": "#d1495b",
    "cuda": "#8c2f39",
    "reference": "#e9a6ae",
    "eager": "#30638e",
    "compile": "#003d5b",
    "F.linear": "#00798c",
    "numpy": "#edae49",
}
CENTER = {"probes": 8, "width": 4096, "dtype": "bf16"}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for index.html")
    arguments = parser.parse_args()
    print(write([r for path in arguments.csv for r in records.read(path)], arguments.out))


def write(rows: Sequence[Record], folder: Path) -> Path:
    """Write ``index.html`` with plots and the whole table; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page(rows), encoding="utf-8")
    return path


def page(rows: Sequence[Record]) -> str:
    """Return the page: per machine and op three plots, then every row."""
    parts = ["<h1>midstream kernels</h1>"]
    for device in sorted({r.device for r in rows}):
        here = [r for r in rows if r.device == device]
        first = here[0]
        parts.append(
            f"<h2>{html.escape(first.machine)}</h2><p>{first.cores} cores, instruction set "
            f"{first.isa or 'none'}, Python {first.python}, torch {html.escape(first.torch)}, "
            f"midstream {first.midstream}, {first.date}. Medians, bars from p20 to p80. What the "
            "numbers mean: docs/kernels.md.</p>"
        )
        for op in dict.fromkeys(r.op for r in here):
            mine = [r for r in here if r.op == op]
            parts.append(f"<h3>{op}</h3><div>{latency(mine)}{cost(mine)}{roofline(mine)}</div>")
        parts.append(table(here))
    style = (
        "body{font:15px sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}"
        "svg{width:32%;height:auto}table{border-collapse:collapse;font-size:12px}"
        "td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:right}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>midstream kernels</title>"
        f"<style>{style}</style><body>{''.join(parts)}</body></html>\n"
    )


def latency(rows: Iterable[Record]) -> str:
    """Plot time against N at the center of the other axes."""
    chosen = [r for r in rows if _at_center(r, "probes", "width", "dtype")]
    return _lines(chosen, "rows", "N, rows", "time against rows (P=8, d=4096, bf16)")


def cost(rows: Iterable[Record]) -> str:
    """Plot time against P at N = 8."""
    chosen = [r for r in rows if r.rows == 8 and _at_center(r, "width", "dtype")]
    return _lines(chosen, "probes", "P, probes", "time against probes (N=8, d=4096, bf16)")


def roofline(rows: Iterable[Record]) -> str:
    """Plot achieved flops against flops per byte; dashes are the ceilings of the same bytes."""

    def draw(axes: Axes) -> None:
        for who, mine in _by_who(rows):
            axes.scatter(
                [r.flops / r.bytes for r in mine],
                [r.flops / r.us_median * 1e-3 for r in mine],
                s=14,
                color=COLORS.get(who, "gray"),
                label=who,
            )
        tops = sorted({(r.flops / r.bytes, r.ceiling_gbs * r.flops / r.bytes) for r in rows})
        axes.scatter(
            [x for x, _ in tops], [y for _, y in tops], marker="_", color="black", label="ceiling"
        )
        axes.set(xlabel="flops per byte", ylabel="Gflop/s", title="roofline, all points")

    rows = list(rows)
    return _figure(draw)


def table(rows: Iterable[Record]) -> str:
    """Return every row."""
    heads = ("op", "who", "N", "P", "d", "dtype", "threads", "p20 us", "median us", "p80 us")
    heads = (*heads, "GB/s", "ceiling GB/s", "share")
    lines = []
    for r in rows:
        cells = (r.op, r.who, r.rows, r.probes, r.width, r.dtype, r.threads)
        numbers = (r.us_p20, r.us_median, r.us_p80, r.gbs, r.ceiling_gbs)
        shown = (*cells, *(f"{n:.4g}" for n in numbers), f"{r.share:.0%}")
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in shown) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _at_center(row: Record, *axes: str) -> bool:
    return all(getattr(row, axis) == CENTER[axis] for axis in axes)


def _by_who(rows: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    rows = list(rows)
    return [(who, [r for r in rows if r.who == who]) for who in dict.fromkeys(r.who for r in rows)]


def _lines(rows: list[Record], axis: str, label: str, title: str) -> str:
    def draw(axes: Axes) -> None:
        for who, mine in _by_who(rows):
            mine = sorted(mine, key=lambda r: int(getattr(r, axis)))
            middle = [r.us_median for r in mine]
            spread = [
                [max(0.0, r.us_median - r.us_p20) for r in mine],
                [max(0.0, r.us_p80 - r.us_median) for r in mine],
            ]
            axes.errorbar(
                [getattr(r, axis) for r in mine],
                middle,
                yerr=spread,
                marker="o",
                markersize=3,
                color=COLORS.get(who, "gray"),
                label=who,
            )
        axes.set(xlabel=label, ylabel="microseconds per call", title=title)

    return _figure(draw)


def _figure(draw: Callable[[Axes], None]) -> str:
    """Draw on logarithmic axes; return the SVG alone, without the XML prologue."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "midstream"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


if __name__ == "__main__":
    main()
