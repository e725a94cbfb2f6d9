"""What `midstream gate replay` leaves behind: decisions, figures with their limits, plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from midstream.measure.conversations import Conversation
from midstream.measure.turn_metrics import figures
from midstream.measure.turn_plots import Talk, block_timing, merit_by_threshold, risk_over_turns
from midstream.measure.turn_replay import BASELINES, Scored, baseline_scores, replay_gate
from midstream.turn_decision import TurnDecision
from midstream.turns import TurnGate

_DRAWN = 6  # conversations


def replay_files(
    gate: TurnGate,
    conversations: Sequence[Conversation],
    hazards: Sequence[Sequence[float | None]],
    about: dict[str, Any],
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Replay, measure and draw.

    Parameters
    ----------
    gate : TurnGate
    conversations : sequence of Conversation
    hazards : sequence of sequence of float or None
        Of each response, from `midstream.measure.turn_scoring.turn_hazards`.
    about : dict
        What else ``metrics.json`` should say.

    Returns
    -------
    files : dict of name to bytes
        ``decisions.jsonl``, ``metrics.json`` and the plots.
    metrics : dict
        The content of ``metrics.json``.
    """
    decisions = replay_gate(gate, conversations, hazards)
    blocked = [_first_block(turns) for turns in decisions]
    labelled = [n for n, one in enumerate(conversations) if one.harmful is not None]
    metrics: dict[str, Any] = {
        **about,
        "bundle": gate.bundle.hash,
        "policy": gate.policy.model_dump(mode="json"),
        "conversations": len(conversations),
        "labelled": len(labelled),
        "turns": sum(map(len, decisions)),
        "turns_without_evidence": sum(d.log_hazard is None for turns in decisions for d in turns),
        "turns_unseen": sum(d.unseen > 0 for turns in decisions for d in turns),
        "turns_while_the_store_was_down": sum(
            d.store_error is not None for turns in decisions for d in turns
        ),
        "conversations_blocked": sum(turn is not None for turn in blocked),
    }
    files = {"decisions.jsonl": _decision_lines(conversations, decisions, blocked)}
    talks = [
        Talk(one.id, one.harmful, [d.risk for d in turns], found, one.target, turn)
        for one, turns, found, turn in zip(conversations, decisions, hazards, blocked, strict=True)
    ]
    files["risk.svg"] = risk_over_turns(_chosen(talks), gate.policy.block_at)
    metrics["limits"] = _limits([conversations[n] for n in labelled], len(conversations))
    if "data" in about and f"from {about['data']}" in gate.policy.provenance:
        metrics["limits"].append(
            f"The gate was fitted on a file of this name, {about['data']}: if it is the same one, "
            "the figures are of the very conversations that it learned from."
        )
    if labelled:
        risks = [np.array([d.risk for d in turns]) for turns in decisions]
        scores = {"gate": risks}
        scores |= baseline_scores(gate.model, hazards, gate.policy.horizon)
        known = [conversations[n] for n in labelled]
        scored = {
            name: Scored.of([values[n] for n in labelled], known) for name, values in scores.items()
        }
        outcomes = scored["gate"].outcomes(gate.policy.block_at)
        metrics["gate"] = {name: asdict(found) for name, found in figures(outcomes).items()}
        metrics["at_best_threshold_here"] = {
            name: _best(method, BASELINES.get(name, "the gate's risk"))
            for name, method in scored.items()
        }
        best = {name: scored[name].merit(scored[name].best()) for name in BASELINES}
        files["thresholds.svg"] = merit_by_threshold(scored["gate"], best, gate.policy.block_at)
        files["timing.svg"] = block_timing(outcomes)
    files["metrics.json"] = json.dumps(metrics, indent=2).encode() + b"\n"
    return files, metrics


def _first_block(turns: Sequence[TurnDecision]) -> int | None:
    return next((decision.turn for decision in turns if not decision.delivers), None)


def _decision_lines(
    conversations: Sequence[Conversation],
    decisions: Sequence[Sequence[TurnDecision]],
    blocked: Sequence[int | None],
) -> bytes:
    lines = []
    for one, turns, first in zip(conversations, decisions, blocked, strict=True):
        for decision in turns:
            row = {
                "conversation": one.id,
                "harmful": one.harmful,
                "target_turn": one.target,
                "behind_a_block": first is not None and decision.turn > first,
                **decision.model_dump(mode="json"),
                "explanation": decision.explanation,
            }
            lines.append(json.dumps(row) + "\n")
    return "".join(lines).encode()


def _best(method: Scored, words: str) -> dict[str, Any]:
    threshold = method.best()
    found = figures(method.outcomes(threshold))
    return {"score": words, "threshold": threshold} | {
        name: asdict(figure) for name, figure in found.items()
    }


def _limits(known: Sequence[Conversation], conversations: int) -> list[str]:
    """Say in words what these data cannot tell."""
    limits = [
        "The conversations are as they went: what is said behind a block was said without one.",
        "at_best_threshold_here chooses thresholds on the very conversations it is measured on, so "
        "its figures are optimistic, for the baselines too.",
    ]
    if len(known) < conversations:
        limits.append(
            f"{conversations - len(known)} conversations have no label: they are replayed, and "
            "enter no figure."
        )
    unplaced = sum(bool(one.harmful) and one.target is None for one in known)
    if unplaced:
        limits.append(
            f"{unplaced} harmful conversations do not say at which turn the harm is complete: "
            "miss, early, l1, phi1, phi2 and f1phi2 cannot be computed. `detected` counts a block "
            "at any turn, were it too early or too late, and longer conversations have more turns "
            "to be blocked at: compare with turn_number, which reads nothing but the length."
        )
    return limits


def _chosen(talks: Sequence[Talk]) -> list[Talk]:
    """A few to look at: of the longer half of each kind, from the least risk to the largest."""
    kinds = [[t for t in talks if t.harmful is kind] for kind in (True, False, None)]
    longer = [[t for t in kind if len(t.risk) >= _median_length(kind)] for kind in kinds]
    kinds = [sorted(kind, key=lambda t: max(t.risk)) for kind in longer if kind]
    each = max(1, _DRAWN // len(kinds))
    chosen: list[Talk] = []
    for kind in kinds:
        places = np.unique(np.linspace(0, len(kind) - 1, each).astype(int))
        chosen += [kind[place] for place in places.tolist()]
    return chosen


def _median_length(talks: Sequence[Talk]) -> float:
    return float(np.median([len(talk.risk) for talk in talks])) if talks else 0.0
