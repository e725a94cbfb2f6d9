"""Forecasts of agents: R-Judge with levels from the rules, and testbed traces beside the oracle.

    MIDSTREAM_DATA=folder python bench/agents.py [--traces 4000]

R-Judge: chains and thresholds come from the other folds. The rules were written while looking at
one half of the traces (even first byte of the id's SHA-256); the figures by name are those of the
other half. Its halves share attacks and tools that were combined by template, and its folds, too,
so neither is as strange to the rules as another set would be.

Testbed: the rules are the archive's own, every step's label is known, and the Bayes oracle says
what can be reached. Its threshold is chosen on other traces, as the chain's are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from midstream import testbed
from midstream.agents.forecast import FLAG_HORIZON
from midstream.agents.readers import read_traces
from midstream.agents.rules import Rules
from midstream.agents.steps import AgentTrace
from midstream.measure.agent_report import COMPARED_WITH_PAPER, flag_figures, report
from midstream.measure.agents import (
    CHAIN,
    SWEEP,
    Judged,
    choose,
    cross_validated,
    first_at,
)

Floats = NDArray[np.float64]


def was_seen(trace: AgentTrace) -> bool:
    """Whether the trace is of the half that was looked at while the rules were written."""
    return hashlib.sha256(trace.id.removeprefix("r_judge/").encode()).digest()[0] % 2 == 0


def r_judge(path: Path, seed: int) -> dict[str, Any]:
    read = read_traces(path, "r_judge")
    judged = cross_validated(read.traces, Rules.default(), seed=seed)
    return {
        "actions": {"calls": read.calls, "text": read.texts, "malformed": read.malformed},
        "unseen_half": without_sweep(report([one for one in judged if not was_seen(one.trace)])),
        "seen_half": without_sweep(report([one for one in judged if was_seen(one.trace)])),
        "all": report(judged),
    }


def without_sweep(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("sweep", "compared_with_paper")}


def on_testbed(traces: int, seed: int) -> dict[str, Any]:
    rules = Rules.load(testbed.AGENT_RULES)
    sampled = testbed.sample_traces(traces, seed)
    judged = cross_validated(sampled, rules, seed=seed)
    others = testbed.sample_traces(traces, seed + 1)
    threshold = choose(oracle_risk(others), [trace.violating_step for trace in others], SWEEP)
    best = oracle_risk(sampled)
    flags = [first_at(risk, threshold) for risk in best]
    return {
        "traces": traces,
        "seed": seed,
        "detectors": {
            **report(judged)["detectors"],
            "oracle": flag_figures(flags, [one.violates_at for one in judged]),
        },
        "oracle_threshold": threshold,
        "brier_within_5": brier(judged, best),
    }


def oracle_risk(traces: Sequence[AgentTrace]) -> list[Floats]:
    """P(violated within 5 more steps) after each step."""
    readings = testbed.TraceOracle().read(traces, horizons=(FLAG_HORIZON,))
    return [reading.risk[0, 1:] for reading in readings]


def brier(judged: Sequence[Judged], best: Sequence[Floats]) -> dict[str, float]:
    """Mean squared error of the risk within 5 steps, over the steps before the violation."""
    truth, ours, pooled, oracle = [], [], [], []
    for one, known in zip(judged, best, strict=True):
        end = len(one.steps) if one.violates_at is None else one.violates_at
        comes = np.inf if one.violates_at is None else one.violates_at
        truth.append(comes - np.arange(end) <= FLAG_HORIZON)
        ours.append(one.risk[:end])
        pooled.append(one.pooled[:end])
        oracle.append(known[:end])
    came = np.concatenate(truth).astype(np.float64)
    return {
        name: float(((np.concatenate(risk) - came) ** 2).mean())
        for name, risk in (("chain_of_category", ours), ("chain_of_all", pooled), ("oracle", oracle))
    } | {"base_rate": float(came.mean() * (1 - came.mean())), "steps": len(came)}


def main(
    traces: Annotated[int, typer.Option(help="Testbed traces.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of folds and testbed traces.")] = 42,
) -> None:
    result: dict[str, Any] = {}
    folder = os.environ.get("MIDSTREAM_DATA")
    if folder is None:
        result["r_judge"] = "skipped: MIDSTREAM_DATA names no folder with r_judge/rjudge.json"
    else:
        found = r_judge(Path(folder) / "r_judge" / "rjudge.json", seed)
        ours = found["unseen_half"]["detectors"][CHAIN]
        result |= {
            "r_judge_detection": ours["detection"],
            "r_judge_fpr": ours["fpr"],
            "r_judge_lead_steps": ours["lead_steps"],
            "how_they_differ": COMPARED_WITH_PAPER,
            "r_judge": found,
        }
    result["testbed"] = on_testbed(traces, seed)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
