"""From the steps of a trace to its states and risk levels, each explained."""

from __future__ import annotations

from dataclasses import dataclass

from midstream.agents.rules import Reason, Rules
from midstream.agents.state import Level, State
from midstream.agents.steps import AgentTrace, Step


@dataclass(frozen=True)
class StepLevel:
    """Where a trace stands after a step.

    Attributes
    ----------
    state, level
        Of the trace: exposure and escalation of all steps so far, reversibility of this one.
    alone
        Level of this step without its past.
    reasons : tuple of Reason
        Rules that matched this step; what it did first, then the data it touched.
    """

    state: State
    level: Level
    alone: Level
    reasons: tuple[Reason, ...]


class LevelTracker:
    """One trace, step by step."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._state = State()

    def observe(self, step: Step) -> StepLevel:
        """Take in the next step; O(rules x characters), see `Rules.read`."""
        alone, reasons = self._rules.read(step)
        self._state = self._state.after(alone)
        return StepLevel(self._state, self._state.level, alone.level, reasons)


def trace_levels(trace: AgentTrace, rules: Rules) -> list[StepLevel]:
    """Return one `StepLevel` per step."""
    tracker = LevelTracker(rules)
    return [tracker.observe(step) for step in trace.steps]
