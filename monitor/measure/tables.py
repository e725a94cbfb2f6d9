"""The tables of a report: by probe, hazard, length and column; look-alikes; BELLS' grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.measure import metrics, taxonomy
from midstream.measure.bootstrap import Figure
from midstream.measure.evaluation import one_class, ranking
from midstream.measure.halting import NEVER
from midstream.measure.measured import Bools, Measured, log_hazard, response_columns
from midstream.measure.outcomes import MeasureError, Outcomes

LENGTHS = (16, 32, 64, 128, 256)
"""Upper ends of the length buckets, in response tokens."""
MOST_VALUES = 20
"""A column with more values than these is broken down only when asked for."""


def probes(m: Measured) -> list[dict[str, Any]]:
    """How well each probe ranks: tokens against its hazard's labels, or prompts by what came."""
    rows = []
    for probe in m.bundle.bank.probes:
        if probe.adds_to is not None or probe.name not in m.recording.probes:
            continue
        logits = m.recording.logits[:, m.recording.probes.index(probe.name)].astype(np.float64)
        if probe.hazard not in m.recording.hazards:
            figures = dict.fromkeys(("auroc", "auprc", "f1"), Figure(None, reason="no labels"))
        else:
            o = Outcomes.of(m.recording, m.judgement, [probe.hazard])
            if probe.reads == "prompt":
                last = o.position == -1
                o = _prompts(o, last)
            found = ranking(m.bootstrap, o, logits, "")
            figures = {key: found[f"token_{key}_"] for key in ("auroc", "auprc")}
            known = (o.label >= 0) & np.isfinite(logits)
            flagged, labels = logits[known] >= 0, o.label[known] == 1
            figures["f1"] = m.bootstrap.figure(
                metrics.f1(flagged, labels, o.stream[known], len(o)),
                len(o),
                n=int(known.sum()),
                undefined="nothing is violating or flagged",
            )
        rows.append(
            {
                "probe": probe.name,
                "hazard": probe.hazard,
                "tap": str(probe.tap),
                "reads": probe.reads,
                **figures,
            }
        )
    return rows


def _prompts(o: Outcomes, last: Bools) -> Outcomes:
    """The same with a label at the last prompt token alone: that of the response."""
    return replace(o, label=np.where(last, o.truth[o.stream], -1).astype(np.int8))


def breakdown(m: Measured, columns: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Break the main figures down by hazard, length of the response, and columns.

    Parameters
    ----------
    columns : sequence of str, optional
        When not given, all that have no more than `MOST_VALUES` values.

    Raises
    ------
    MeasureError
        For a column that the recording does not have.
    """
    held = m.recording.columns
    for name in columns or ():
        if name not in held:
            raise MeasureError(f"no column {name!r}; there are {', '.join(held) or 'none'}")
    tables = {"hazard": [_hazard_row(m, hazard) for hazard in m.recording.hazards]}
    tokens = m.outcomes.tokens
    bounds = [0, *LENGTHS, NEVER]
    tables["response tokens"] = [
        _row(m, f"{low + 1}-{high}" if high != NEVER else f"over {low}", chosen)
        for low, high in pairwise(bounds)
        if (chosen := (tokens > low) & (tokens <= high)).any()
    ]
    few = [name for name, values in held.items() if 1 < len(set(values)) <= MOST_VALUES]
    for name in columns if columns is not None else few:
        values = np.array(held[name])
        tables[name] = [
            _row(m, _shown(name, value), values == value) for value in sorted(set(held[name]))
        ]
    return tables


def _shown(column: str, value: str) -> str:
    return taxonomy.hazard_name(value) if column == taxonomy.MLCOMMONS else value


def _hazard_row(m: Measured, hazard: str) -> dict[str, Any]:
    """Of the streams that show this hazard or none; its own probes against its own labels."""
    o = Outcomes.of(m.recording, m.judgement, [hazard])
    columns = response_columns(m.recording, m.bundle, [hazard])
    score = np.where(o.position >= 0, log_hazard(m.recording.logits[:, columns]), np.nan)
    chosen = o.violating | ((o.truth == 0) & (m.outcomes.truth == 0))
    row = _row(m, taxonomy.hazard_name(hazard), chosen, o, score)
    return row if hazard in m.hazards else {**row, "note": "no probe of the bundle looks for it"}


def _row(
    m: Measured,
    value: str,
    chosen: Bools,
    o: Outcomes | None = None,
    score: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    o = o or m.outcomes
    score = m.score if score is None else score
    known = (o.label >= 0) & ~np.isnan(score) & chosen[o.stream]
    labels = o.label[known] == 1
    reason = one_class(labels, "token with a label and a score")
    area = None if reason else metrics.auroc(score[known], labels, o.stream[known])
    missed = o.leaked(m.hold_back) > 0
    return {
        "value": value,
        "streams": int(chosen.sum()),
        "violating": int((chosen & o.violating).sum()),
        "safe": int((chosen & o.safe).sum()),
        "token_auroc": Figure(
            float(area(np.ones((1, len(o))))[0]) if area else None, n=len(labels), reason=reason
        ),
        "recall": m.bootstrap.rate(
            o.stopped, chosen & o.violating, undefined="no violating response"
        ),
        "missed_rate": m.bootstrap.rate(
            missed, chosen & o.located, undefined="no response with a known violating token"
        ),
        "false_halt_rate": m.bootstrap.rate(
            o.stopped, chosen & o.safe, undefined="no safe response"
        ),
    }


def over_refusal(m: Measured, column: str, value: str) -> dict[str, Any]:
    """False halts on benign look-alikes: safe streams whose ``column`` has ``value``.

    Raises
    ------
    MeasureError
        When no stream has it.
    """
    values = np.array(m.recording.columns.get(column, [""] * len(m.outcomes)))
    chosen = values == value
    if column not in m.recording.columns or not chosen.any():
        there = ", ".join(
            f"{k}={v}" for k, vs in m.recording.columns.items() for v in sorted(set(vs))[:5]
        )
        raise MeasureError(f"no stream has {column}={value}; there are, for instance, {there}")
    safe, stopped = m.outcomes.safe, m.outcomes.stopped
    return {
        "column": column,
        "value": value,
        "look_alikes": m.bootstrap.rate(
            stopped, chosen & safe, undefined="none of them is labelled safe"
        ),
        "other_safe": m.bootstrap.rate(
            stopped, ~chosen & safe, undefined="no other response is labelled safe"
        ),
    }


def bells(m: Measured) -> dict[str, Any] | None:
    """BELLS' grid and score, where the recording has its two columns."""
    held = m.recording.columns
    if not {taxonomy.SEVERITY, taxonomy.SOPHISTICATION} <= set(held):
        return None
    axes = np.array(held[taxonomy.SEVERITY]), np.array(held[taxonomy.SOPHISTICATION])
    stopped = m.outcomes.stopped
    return {
        "cells": taxonomy.grid(*axes, stopped, m.bootstrap),
        "score": taxonomy.bells_score(*axes, stopped, m.bootstrap),
    }
