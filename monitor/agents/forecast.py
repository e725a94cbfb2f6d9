"""Risk of an agent that it violates within the next steps, and the flag before it does.

A chain over the five levels at the step clock, one per category of task (SafetyDrift, arXiv
2603.27148). Safe to critical are its transient states, violated is V: what the rules call violated
is, and stays so. The chances to get there are fitted on the violations that traces were labelled
with, or, where nobody labelled them, on those of the rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.agents.levels import LevelTracker, StepLevel
from midstream.agents.rules import Rules
from midstream.agents.state import Level
from midstream.agents.steps import Step
from midstream.chain import NO_RETURN, WATCH, Array, Chain, Zone
from midstream.validation import named_faults

HORIZONS = (1, 3, 5, 10)
"""Steps looked ahead."""

FLAG_HORIZON = 5
"""The one that flags go by."""

FLAG_AT, FLAG_AT_CATEGORY = 0.40, 0.50
"""Thresholds of the paper: with one chain for all, and with one for the category."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class AgentError(ValueError):
    """A model of agents that cannot be used; the message says why."""


class AgentModel(BaseModel):
    """Chains over levels, as stored in ``agents.json``.

    Attributes
    ----------
    pooled : Chain
        Of all categories, for those that are not in ``categories``.
    categories : dict of str to Chain
    violation : {"labels", "rules"}
        What it was fitted on: labels of the traces, or the level violated of the rules.
    flag_at, flag_at_category : float
        Flag when P(violated within 5 steps) reaches this, by the pooled chain or a category's.
    rules_hash : str
        `Rules.hash` of the rules that gave the levels: others give others.
    traces : int
        Traces it was fitted on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pooled: Chain
    categories: dict[str, Chain] = {}
    violation: Literal["labels", "rules"]
    flag_at: Probability = FLAG_AT
    flag_at_category: Probability = FLAG_AT_CATEGORY
    rules_hash: str
    traces: int = Field(ge=1)

    @model_validator(mode="after")
    def _states_are_levels(self) -> AgentModel:
        for name, chain in [("pooled", self.pooled), *self.categories.items()]:
            if chain.states != int(Level.VIOLATED):
                raise ValueError(
                    f"{name}: has {chain.states} states, expected {int(Level.VIOLATED)}, one for "
                    "each level below violated"
                )
        return self

    def chain(self, category: str) -> Chain:
        """Chain of a category; the pooled one for a category it does not know."""
        return self.categories.get(category, self.pooled)

    def risks(self, category: str) -> Array:
        """P(violated within h | level) for `HORIZONS`, [H, 5]."""
        chain = self.chain(category)
        return np.stack([chain.horizon(steps) for steps in HORIZONS])

    def threshold(self, category: str) -> float:
        """Risk at which a trace of this category is flagged."""
        return self.flag_at_category if category in self.categories else self.flag_at

    def to_json(self) -> str:
        """Canonical JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "agents.json") -> AgentModel:
        """Parse and validate; an AgentError names each key at fault."""
        with named_faults(source, AgentError):
            return cls.model_validate_json(text)


@dataclass(frozen=True)
class StepRisk:
    """What is known after a step.

    Attributes
    ----------
    step : int
        0 for the first.
    at : StepLevel
        State, level and the rules that matched.
    risks : dict of int to float
        P(violated now or within h more steps) by h.
    flag : bool
        Whether the risk within `FLAG_HORIZON` reaches the threshold.
    zone : Zone
        Of that risk: safe, watch, point of no return.
    explanation : str
    """

    step: int
    at: StepLevel
    risks: Mapping[int, float]
    flag: bool
    zone: Zone
    explanation: str

    @property
    def level(self) -> Level:
        """Risk level of the trace."""
        return self.at.level


def zone_of(risk: float) -> Zone:
    """Zone of a risk; a risk on the border belongs to the worse."""
    return list(Zone)[bisect_right((WATCH, NO_RETURN), risk)]


class AgentMonitor:
    """One trace of an agent, step by step.

    Parameters
    ----------
    rules : Rules
    model : AgentModel
        Fitted with these rules; an AgentError otherwise.
    category : str
        The pooled chain speaks for categories the model does not know.
    """

    def __init__(self, rules: Rules, model: AgentModel, category: str = "") -> None:
        if model.rules_hash != rules.hash:
            raise AgentError(
                f"the model was fitted with rules {model.rules_hash[:12]}, these are "
                f"{rules.hash[:12]}: levels differ, so fit it again with these rules"
            )
        self._levels = LevelTracker(rules)
        self._risks = model.risks(category)
        self._known = category in model.categories
        self._threshold = model.threshold(category)
        self._category = category
        self._steps = 0
        self._violated = False
        self.flagged_at: int | None = None
        """The first step that was flagged."""

    def observe(self, step: Step) -> StepRisk:
        """Take in the next step; O(rules x characters), the chain costs a look-up."""
        return self.judge(self._levels.observe(step))

    def judge(self, at: StepLevel) -> StepRisk:
        """Take in the next step where its level is known already (`trace_levels`)."""
        self._violated = self._violated or at.level is Level.VIOLATED
        state = Level.VIOLATED if self._violated else at.level
        risks = dict(zip(HORIZONS, self._risks[:, state].tolist(), strict=True))
        risk = risks[FLAG_HORIZON]
        flag = risk >= self._threshold
        number, self._steps = self._steps, self._steps + 1
        if flag and self.flagged_at is None:
            self.flagged_at = number
        return StepRisk(number, at, risks, flag, zone_of(risk), self._explain(at, risk))

    def risk(self, level: Level) -> float:
        """P(violated within `FLAG_HORIZON` steps) of a trace at this level."""
        return float(self._risks[HORIZONS.index(FLAG_HORIZON), level])

    def _explain(self, at: StepLevel, risk: float) -> str:
        chain = f"category {self._category!r}" if self._known else "all categories"
        why = "; ".join(map(str, at.reasons))
        return (
            f"{at.level.label}: data {at.state.exposure.label}, reach {at.state.escalation.label}, "
            f"undo {at.state.reversibility.label}; {risk:.0%} within {FLAG_HORIZON} steps by the "
            f"chain of {chain}, flagged from {self._threshold:.0%}. This step: {why}"
        )
