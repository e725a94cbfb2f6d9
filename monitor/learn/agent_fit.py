"""Fitting the chains over the levels of agents: by counts, one per category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from midstream.agents.forecast import FLAG_AT, FLAG_AT_CATEGORY, AgentError, AgentModel
from midstream.agents.levels import StepLevel, trace_levels
from midstream.agents.rules import Rules
from midstream.agents.state import Level
from midstream.agents.steps import AgentTrace
from midstream.learn.chains.categories import fit_categories
from midstream.learn.chains.counts import count
from midstream.learn.chains.symbols import SymbolStream


def violating_step(trace: AgentTrace) -> int | None:
    """Index of the step that violates, None in a trace that does not.

    Where a trace is labelled as a whole it is taken to be the last step with a call, or the last
    step of a trace without one: what follows a harmful call mostly reports it. A trace whose harm
    was done earlier is then credited with a longer lead than it had, and never with a detection
    that came after the harm unless that lies between the two.
    """
    if not trace.violates:
        return None
    if trace.violating_step is not None:
        return trace.violating_step
    calls = [at for at, step in enumerate(trace.steps) if step.call is not None]
    return calls[-1] if calls else len(trace.steps) - 1


def are_labelled(traces: Sequence[AgentTrace]) -> bool:
    """Whether the traces say if they violate; an AgentError where only some do."""
    unlabelled = [trace.id for trace in traces if trace.violates is None]
    if unlabelled and len(unlabelled) < len(traces):
        raise AgentError(
            f"violates: {len(unlabelled)} of {len(traces)} traces have no label, for instance "
            f"{unlabelled[0]!r}; label all, or none, so that the rules say what violates"
        )
    return not unlabelled


def label_by_rules(
    traces: Sequence[AgentTrace], levels: Sequence[Sequence[StepLevel]]
) -> list[AgentTrace]:
    """Label unlabelled traces: the first step whose level is violated."""
    labelled = []
    for trace, steps in zip(traces, levels, strict=True):
        first = next((at for at, step in enumerate(steps) if step.level is Level.VIOLATED), None)
        update = {"violates": first is not None, "violating_step": first}
        labelled.append(trace.model_copy(update=update))
    return labelled


def symbols(trace: AgentTrace, levels: Sequence[StepLevel]) -> SymbolStream:
    """Levels before the first step and after each; violated from the violating step on.

    What the rules call violated where the labels do not counts as critical.
    """
    violates_at = violating_step(trace)
    after = np.arange(len(levels) + 1) - 1
    return SymbolStream(
        bins=np.array([Level.SAFE, *(min(step.level, Level.CRITICAL) for step in levels)]),
        violated=(after >= violates_at) if violates_at is not None else np.zeros(len(after), bool),
        violates=trace.violates,
        ended=trace.ended,
        category=trace.category,
    )


def fit_agents(
    traces: Sequence[AgentTrace],
    rules: Rules,
    *,
    levels: Sequence[Sequence[StepLevel]] | None = None,
    prior_count: float = 1.0,
    flag_at: float = FLAG_AT,
    flag_at_category: float = FLAG_AT_CATEGORY,
) -> AgentModel:
    """Fit one chain for all and one per category, the latter shrunk towards the former.

    SafetyDrift counts without a prior, or with 1e-6 per category. Categories here may hold a
    handful of traces: see `midstream.learn.chains.categories.fit_categories`. A trace starts in the
    level safe, so that the first step counts as a move, too.

    Parameters
    ----------
    traces : sequence of AgentTrace
        All labelled, or none: then it is the first step the rules call violated that violates.
    rules : Rules
    levels : optional
        Of the traces by these rules, where they have been found already.
    prior_count : float
        Of the pooled chain, more than 0.
    flag_at, flag_at_category : float

    Raises
    ------
    AgentError
        For no trace, or labels on some.
    ChainError
        Where no trace violates.
    ImportError
        Without scipy.
    """
    if not traces:
        raise AgentError("traces: expected at least one to fit on")
    if levels is None:
        levels = [trace_levels(trace, rules) for trace in traces]
    by_labels = are_labelled(traces)
    labelled = traces if by_labels else label_by_rules(traces, levels)
    streams: dict[str, list[SymbolStream]] = defaultdict(list)
    for trace, steps in zip(labelled, levels, strict=True):
        streams[trace.category].append(symbols(trace, steps))
    chains = fit_categories(
        {name: count(each, int(Level.VIOLATED)) for name, each in sorted(streams.items())},
        edges=[level + 0.5 for level in list(Level)[:-2]],
        prior_count=prior_count,
    )
    return AgentModel(
        pooled=chains.pooled,
        categories=dict(chains.chains),
        violation="labels" if by_labels else "rules",
        flag_at=flag_at,
        flag_at_category=flag_at_category,
        rules_hash=rules.hash,
        traces=len(traces),
    )
