"""A turn gate over recorded conversations, and what it is compared with.

Every method gives each turn a score and blocks at the first turn whose score reaches its threshold.
The conversations are as they went: a turn behind a block is what was said without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.measure.bootstrap import ratio
from midstream.measure.conversations import Conversation
from midstream.measure.turn_metrics import Outcomes
from midstream.turn_decision import TurnDecision
from midstream.turn_history import content_of
from midstream.turn_model import TurnModel
from midstream.turns import TurnGate

Floats = NDArray[np.float64]

BASELINES = {
    "last_turn": "the same chain without a ledger: the last turn's evidence alone",
    "per_turn": "the last turn's log-hazard",
    "summed": "the sum of the log-hazards so far",
    "turn_number": "how many turns there were, whatever was said",
}
"""What the gate is compared with, in words.

The last one shows data whose labels can be told by the length of a conversation alone.
"""


def replay_gate(
    gate: TurnGate,
    conversations: Sequence[Conversation],
    hazards: Sequence[Sequence[float | None]],
) -> list[list[TurnDecision]]:
    """Let the gate judge every response in turn, through its ledger, and only observe.

    Parameters
    ----------
    gate : TurnGate
    conversations : sequence of Conversation
    hazards : sequence of sequence of float or None
        Of each response, as `midstream.measure.turn_scoring.turn_hazards` returns them.
    """
    decisions: list[list[TurnDecision]] = []
    for conversation, found in zip(conversations, hazards, strict=True):
        decisions.append([])
        for index, hazard in zip(conversation.responses, found, strict=True):
            before = conversation.messages[:index]
            turn = gate.open(conversation.id, before)
            text = content_of(conversation.messages[index])
            decision = gate.judge(turn, hazard)
            decisions[-1].append(gate.commit(turn, decision, text, delivered=True))
    return decisions


def baseline_scores(
    model: TurnModel, hazards: Sequence[Sequence[float | None]], horizon: int
) -> dict[str, list[Floats]]:
    """Scores of each of `BASELINES`; a turn without evidence counts as harmless to them."""
    found: dict[str, list[Floats]] = {name: [] for name in BASELINES}
    for turns in hazards:
        plain = np.array([hazard or 0.0 for hazard in turns])
        found["per_turn"].append(plain)
        found["summed"].append(np.cumsum(plain))
        found["turn_number"].append(np.arange(1.0, len(plain) + 1))
        belief, alone = model.start, []
        for hazard in plain.tolist():
            alone.append(model.risk(model.read(belief, hazard).delivered, horizon))
            belief = model.move(belief)
        found["last_turn"].append(np.array(alone))
    return found


@dataclass(frozen=True)
class Scored:
    """Scores of one method over E labelled conversations.

    Attributes
    ----------
    highest : float64 [E, T]
        Largest score so far, after each turn; the last one repeats to the end.
    harmful : sequence of bool [E]
    target : sequence of int or None [E]
    """

    highest: Floats
    harmful: Sequence[bool]
    target: Sequence[int | None]

    @classmethod
    def of(cls, scores: Sequence[Floats], conversations: Sequence[Conversation]) -> Scored:
        """Put the scores of labelled conversations, at least one, side by side."""
        width = max(len(turns) for turns in scores)
        highest = np.stack(
            [np.maximum.accumulate(np.pad(s, (0, width - len(s)), mode="edge")) for s in scores]
        )
        harmful = [bool(one.harmful) for one in conversations]
        return cls(highest, harmful, [one.target for one in conversations])

    def blocked(self, threshold: float) -> list[int | None]:
        """First turn of each conversation whose score reaches the threshold; from 1."""
        reached = self.highest >= threshold
        return [int(row.argmax()) + 1 if row[-1] else None for row in reached]

    def outcomes(self, threshold: float) -> Outcomes:
        """What becomes of the conversations at this threshold."""
        return Outcomes.of(self.harmful, self.target, self.blocked(threshold))

    def merit(self, threshold: float) -> float:
        """F1phi2; without targets the harmonic mean of ``detected`` and the benign score."""
        outcomes = self.outcomes(threshold)
        statistics = outcomes.statistics()
        once = np.ones((1, len(self.harmful)))
        if outcomes.located:
            return float(statistics["f1phi2"](once)[0])
        detected, benign = statistics["detected"](once), statistics["benign_score"](once)
        return float(ratio(2 * detected * benign, detected + benign)[0])

    def thresholds(self, most: int = 400) -> Floats:
        """Where the outcome can change: between neighbouring scores, and above all of them."""
        scores = np.unique(self.highest)
        between = np.append((scores[1:] + scores[:-1]) / 2, np.nextafter(scores[-1], np.inf))
        chosen = np.unique(np.linspace(0, len(between) - 1, most).astype(int))
        return np.asarray(between[chosen])

    def best(self) -> float:
        """Threshold of the largest merit; of several in a row, the one in the middle.

        There a little more or less on other data changes the least.
        """
        thresholds = self.thresholds()
        merits = np.nan_to_num([self.merit(threshold) for threshold in thresholds.tolist()])
        top = int(np.argmax(merits))
        last = top
        while last + 1 < len(merits) and merits[last + 1] == merits[top]:
            last += 1
        return float(thresholds[(top + last) // 2])
