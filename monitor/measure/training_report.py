"""The report of a training: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from midstream.measure import drawing
from midstream.measure.pages import render


def training_report(
    comparison: Sequence[Mapping[str, Any]],
    *,
    title: str,
    about: Mapping[str, str],
    limits: Sequence[str] = (),
) -> str:
    """HTML that compares methods layer by layer.

    Parameters
    ----------
    comparison : sequence of mappings
        One per trained read-out: ``method`` (str), ``tap`` (str), ``auroc`` (float; None or NaN
        where it is not defined), ``facts`` (mapping of str to float).
    title : str
    about : mapping of str to str
        Data, hashes, sizes: whatever a reader must know.
    limits : sequence of str
        What the figures do not say.

    Raises
    ------
    ValueError
        For an empty comparison, or a method given twice at one tap.
    ImportError
        Without jinja2 or matplotlib, naming the extra.
    """
    methods = list(dict.fromkeys(str(row["method"]) for row in comparison))
    taps = list(dict.fromkeys(str(row["tap"]) for row in comparison))
    values = np.full((len(methods), len(taps)), np.nan)
    filled = np.zeros(values.shape, dtype=bool)
    for row in comparison:
        place = methods.index(str(row["method"])), taps.index(str(row["tap"]))
        if filled[place]:
            raise ValueError(f"{row['method']} at {row['tap']} is in the comparison twice")
        filled[place] = True
        values[place] = np.nan if row["auroc"] is None else row["auroc"]
    if not comparison:
        raise ValueError("nothing to compare: no method was trained")
    best = None if np.isnan(values).all() else np.unravel_index(np.nanargmax(values), values.shape)
    ranked = sorted(
        comparison,
        key=lambda row: -1.0 if _undefined(row["auroc"]) else float(row["auroc"]),
        reverse=True,
    )
    return render(
        "training.html.j2",
        title=title,
        about=about,
        limits=limits,
        methods=methods,
        taps=taps,
        values=[[None if _undefined(v) else float(v) for v in row] for row in values],
        filled=filled.tolist(),
        best=best if best is None else (int(best[0]), int(best[1])),
        ranked=ranked,
        undefined=_undefined,
        heat=drawing.heat_map(methods, taps, values),
    )


def _undefined(value: Any) -> bool:
    return value is None or math.isnan(value)
