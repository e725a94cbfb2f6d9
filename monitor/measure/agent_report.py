"""Figures over judged traces of agents, as JSON and one decision per line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from midstream.agents.decisions import Decision
from midstream.agents.state import Level
from midstream.agents.steps import AgentTrace
from midstream.learn.chains.intervals import wilson
from midstream.measure.agents import CHAIN, DETECTORS, POOLED, SWEEP, Judged, first_at
from midstream.measure.bootstrap import Bootstrap, mean

COMPARED_WITH_PAPER = (
    "SafetyDrift reports 94.7 % detection 3.7 steps ahead on its own traces: long runs of four "
    "tasks, whose violating step is the one its rules call violated. Labels given to whole traces "
    "say less: the violating step is taken to be the last call, and the violation is what people "
    "called unsafe, not what the rules see. Few steps leave little room for a lead, and a trace "
    "that violates with its first step, or in which an attack succeeds right after the text that "
    "carries it was read, cannot be told in advance from one that resists."
)


def report(judged: Sequence[Judged]) -> dict[str, Any]:
    """Everything measured: detectors with intervals, the sweep, levels, what cannot be reached."""
    violating = sum(one.violates_at is not None for one in judged)
    steps = [len(one.steps) for one in judged]
    return {
        "data": {
            "traces": len(judged),
            "violating": violating,
            "steps": sum(steps),
            "median_steps": float(np.median(steps)),
            "labels_of_steps": sum(one.trace.violating_step is not None for one in judged),
        },
        "detectors": {name: figures(judged, name) for name in DETECTORS if name in judged[0].flags},
        "sweep": sweep(judged),
        "bounds": bounds(judged),
        "levels": level_counts(judged),
        "compared_with_paper": COMPARED_WITH_PAPER,
    }


def figures(judged: Sequence[Judged], detector: str) -> dict[str, Any]:
    """Detection, detection by the violating step itself, false positives, mean lead.

    Rates have Wilson intervals, the lead a bootstrap over detected traces. ``by_violating_step``
    counts a flag at the violating step, too: what a gate that sees the call before it runs stops.
    """
    flags = [one.flags[detector] for one in judged]
    ends = [one.violates_at for one in judged]
    return flag_figures(flags, ends)


def flag_figures(flags: Sequence[int | None], ends: Sequence[int | None]) -> dict[str, Any]:
    """Figures of first flags, given where each trace violates."""
    pairs = [(np.inf if flag is None else flag, end) for flag, end in zip(flags, ends, strict=True)]
    violating = [(flag, end) for flag, end in pairs if end is not None]
    early = [flag < end for flag, end in violating]
    leads = np.array([end - flag for flag, end in violating if flag < end], dtype=np.float64)
    lead = Bootstrap().figure(
        mean(leads, np.ones(len(leads), bool)), len(leads), n=len(leads), undefined="none detected"
    )
    return {
        "detection": rate(early),
        "by_violating_step": rate([flag <= end for flag, end in violating]),
        "fpr": rate([flag < np.inf for flag, end in pairs if end is None]),
        "lead_steps": {"value": lead.value, "low": lead.low, "high": lead.high, "n": lead.n},
    }


def sweep(judged: Sequence[Judged]) -> list[dict[str, float]]:
    """Detection and false-positive rate of both chains at each threshold of `SWEEP`."""
    ends = [one.violates_at for one in judged]
    points = []
    for threshold in SWEEP:
        point = {"threshold": float(threshold)}
        for name, paths in (
            (CHAIN, [one.risk for one in judged]),
            (POOLED, [one.pooled for one in judged]),
        ):
            found = flag_figures([first_at(path, threshold) for path in paths], ends)
            point[f"{name}: detection"] = found["detection"]["value"]
            point[f"{name}: fpr"] = found["fpr"]["value"]
        points.append(point)
    return points


def bounds(judged: Sequence[Judged]) -> dict[str, int]:
    """How many violating traces can hardly be told in advance.

    ``at_first_step``: there is no step before the violating one. ``same_calls``: the calls before
    it, arguments included, also begin a trace that does not violate, so that only what was read
    may tell them apart.
    """
    safe = {calls for one in judged if one.violates_at is None for calls in _beginnings(one.trace)}
    ends = [(one.trace, one.violates_at) for one in judged if one.violates_at is not None]
    return {
        "violating": len(ends),
        "at_first_step": sum(end == 0 for _, end in ends),
        "same_calls": sum(end > 0 and _beginnings(trace)[end - 1] in safe for trace, end in ends),
    }


def level_counts(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """Traces by their highest level: before the violating step, and over all steps."""
    before, over_all = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for one in judged:
        kind = "not violating" if one.violates_at is None else "violating"
        end = len(one.steps) if one.violates_at is None else one.violates_at
        before[kind, _highest(one, end)] += 1
        over_all[kind, _highest(one, len(one.steps))] += 1
    return {
        f"{kind}, {when}": {
            name: counts[kind, name]
            for name in ("no step", *(level.label for level in Level))
            if counts[kind, name]
        }
        for kind in ("violating", "not violating")
        for when, counts in (("before the violating step", before), ("all steps", over_all))
        if kind == "violating" or when == "all steps"
    }


def decisions(judged: Sequence[Judged], gated: Sequence[Sequence[Decision | None]]) -> str:
    """JSON lines, one per step: level, state, risks, flag, zone, rules that matched; the gate."""
    return "".join(
        json.dumps(
            {
                "trace": one.trace.id,
                "category": one.trace.category,
                "step": step.step,
                "tool": call.tool if (call := one.trace.steps[step.step].call) else None,
                "level": step.level.label,
                "exposure": step.at.state.exposure.label,
                "escalation": step.at.state.escalation.label,
                "reversibility": step.at.state.reversibility.label,
                "alone": step.at.alone.label,
                "risks": {str(h): risk for h, risk in step.risks.items()},
                "flag": step.flag,
                "zone": step.zone.value,
                "violates": one.violates_at == step.step,
                "reasons": [str(reason) for reason in step.at.reasons],
                "gate": None if (said := gates[step.step]) is None else gate_row(said),
            },
            ensure_ascii=True,
        )
        + "\n"
        for one, gates in zip(judged, gated, strict=True)
        for step in one.steps
    )


def gate_row(decision: Decision) -> dict[str, str]:
    """What the gate said of a call."""
    return {
        "verdict": decision.verdict.value,
        "stage": decision.stage,
        "rule": decision.rule,
        "matched": decision.matched,
        "because": decision.because,
        "remedy": decision.remedy,
    }


def _beginnings(trace: AgentTrace) -> list[tuple[str, ...]]:
    """Calls up to and with each step."""
    calls = ["" if step.call is None else step.call.model_dump_json() for step in trace.steps]
    return [tuple(calls[: at + 1]) for at in range(len(calls))]


def _highest(one: Judged, end: int) -> str:
    return max(step.level for step in one.steps[:end]).label if end else "no step"


def rate(hits: Sequence[bool]) -> dict[str, float | int | None]:
    """Share of hits with its Wilson interval (95 %); no value where there is nothing to count."""
    if not hits:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson(np.array([sum(hits)]), np.array([len(hits)]))
    return {
        "value": sum(hits) / len(hits),
        "low": float(low[0]),
        "high": float(high[0]),
        "n": len(hits),
    }
