"""A turn model from labelled conversations, and the threshold of its gate.

The states of the chain are latent and fitted by EM. Counting evidence bins as states, which suits a
clock whose evidence says where the stream stands, forgets: a quiet turn after an alarming one would
be the same state as one before it, and a harm that takes two turns could not be told from one that
was only begun. Latent states keep what happened as long as the labels ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Chain, ChainError
from midstream.learn.chains.choice import choose_states
from midstream.learn.chains.em import fit_em
from midstream.learn.chains.symbols import SymbolStream
from midstream.turn_model import TurnModel

Floats = NDArray[np.float64]

STATES = (2, 3, 4, 5)
"""Numbers of transient states that are tried when none is given."""

_CHANCES = (0.5, 0.1, 0.9, 0.01, 0.99)
_QUANTILES = (0.25, 0.5, 0.75)
_LEAST_SHARE, _LEAST_TURNS = 0.01, 10


@dataclass(frozen=True)
class LabelledTurns:
    """One conversation for fitting.

    Attributes
    ----------
    log_hazard : sequence of float or None
        Evidence of each turn, at least one; None where nothing was scored.
    harmful : bool
    target : int, optional
        First turn that completes the harm, from 1; None where harmless, or where nobody knows.
    """

    log_hazard: Sequence[float | None]
    harmful: bool
    target: int | None


@dataclass(frozen=True)
class TurnFit:
    """A fitted model and how its number of states was chosen.

    Attributes
    ----------
    model : TurnModel
    held_out : dict of int to float
        Mean log-likelihood per held-out conversation of each number of states, natural log; empty
        where the number was given.
    """

    model: TurnModel
    held_out: dict[int, float]


def fit_turns(
    conversations: Sequence[LabelledTurns],
    *,
    token_chain: Chain | None = None,
    states: int | None = None,
    seed: int = 0,
) -> TurnFit:
    """Fit the chain of turns, and what it carries to the token chain.

    A harmful conversation is read up to its target, behind which a gate would not let it go. Turns
    without evidence are left out; where the target is one, the harm has no place any more. Cost:
    EM's, linear in turns, for each number of states and fold.

    Parameters
    ----------
    conversations : sequence of LabelledTurns
        With some harmful and some harmless among them.
    token_chain : Chain, optional
        The bundle's; without it nothing is carried over.
    states : int, optional
        Of the chain, the transient ones; chosen among `STATES` by cross-validation, the smallest
        within one standard error of the best, when not given.
    seed : int
        Of EM's restarts.

    Raises
    ------
    ChainError
        When no conversation is harmful, or too few of a kind to choose the number of states.
    """
    known = [one for one in map(_until_target, conversations) if one.log_hazard]
    if not known:
        raise ChainError("conversations: none has a turn with evidence")
    hazards = np.array([hazard for one in known for hazard in one.log_hazard], dtype=np.float64)
    edges = edges_of(hazards)
    streams = [_symbols(one, edges) for one in known]
    options: dict[str, Any] = {"bins": len(edges) + 1, "edges": edges, "seed": seed}
    held_out: dict[int, float] = {}
    if states is None:
        chosen = choose_states(streams, STATES, **options)
        states, held_out = chosen.states, chosen.held_out
    model = TurnModel(chain=fit_em(streams, states, **options).chain)
    if token_chain is not None:
        carry = carry_of(model, [one.log_hazard for one in known], token_chain)
        model = TurnModel(chain=model.chain, carry=carry.tolist())
    return TurnFit(model, held_out)


def edges_of(hazards: Floats) -> list[float]:
    """Edges between the evidence bins of turns, nats.

    They stand at chances of 50, 10, 90, 1 and 99 % that the response violates, and at the quartiles
    of the turns there are, so that evidence that is weak throughout is told apart as well. In this
    order, each is left out if a bin beside it would have less than 1 % of the turns, or less than
    10: a quartile must not take the place of an edge that parts what is seen from what is not.
    """
    wanted = [*-np.log1p(-np.array(_CHANCES)), *np.quantile(hazards, _QUANTILES)]
    least = max(_LEAST_TURNS, _LEAST_SHARE * len(hazards))
    ordered = np.sort(hazards)
    below = {0.0: 0, np.inf: len(ordered)}  # turns below each edge, and below the two ends
    for edge in map(float, wanted):
        count = int(np.searchsorted(ordered, edge, side="left"))  # an edge belongs to the bin above
        before = max(n for at, n in below.items() if at <= edge)
        behind = min(n for at, n in below.items() if at >= edge)
        if count - before >= least and behind - count >= least:
            below[edge] = count
    return sorted(below)[1:-1]


def carry_of(
    model: TurnModel, hazards: Sequence[Sequence[float | None]], token_chain: Chain
) -> Floats:
    """Belief of the token chain before a response, given the turn state before it; [K+1, k+1].

    In turn state i the next response violates, by its own evidence, with chance p[i]: the mean of
    ``1 - exp(-log-hazard)`` over the turns that follow, weighed by the belief in i. The token
    chain's prior says the same of its states s through B[s], their chance to end violated. Moving
    the odds of the two outcomes to p[i], and nothing else (Jeffrey's rule), gives

        carry[i, s] = p[i] prior[s] B[s] / sum(prior B) + (1 - p[i]) prior[s] (1 - B[s]) / ...

    From there the token chain moves by itself, so its own forecast lies between the prior's and
    p[i]. Where violating or not is certain by the token chain, or a state is never believed in, its
    prior stays as it is.
    """
    weight = np.zeros(model.chain.states + 1)
    violates = np.zeros(model.chain.states + 1)
    for turns in hazards:
        belief = model.start
        for hazard in turns:
            if hazard is None:
                belief = model.move(belief)
                continue
            weight += belief
            violates += belief * -np.expm1(-hazard)
            belief = model.read(belief, hazard).delivered
    prior = np.array(token_chain.prior)
    ends_violated = np.append(token_chain.absorption()[:, 0], 1.0)
    overall = float(prior @ ends_violated)
    seen = weight > 1e-9 * max(weight.sum(), 1.0)
    chance = np.divide(violates, weight, out=np.full(len(weight), overall), where=seen)
    if not 0 < overall < 1:
        return np.tile(prior, (len(weight), 1))
    if_violates = prior * ends_violated / overall
    if_not = prior * (1 - ends_violated) / (1 - overall)
    return np.asarray(chance[:, None] * if_violates + (1 - chance)[:, None] * if_not)


def _until_target(one: LabelledTurns) -> LabelledTurns:
    turns = one.log_hazard[: one.target]
    target = one.target if turns and turns[-1] is not None else None  # the turn before is not it
    return LabelledTurns([h for h in turns if h is not None], one.harmful, target)


def _symbols(one: LabelledTurns, edges: Sequence[float]) -> SymbolStream:
    bins = np.searchsorted(edges, np.array(one.log_hazard, dtype=np.float64), side="right")
    violated = None
    if one.target is not None:
        violated = np.zeros(len(bins), dtype=np.bool_)
        violated[-1] = True
    # Cut at its target, a conversation did not end there.
    return SymbolStream(bins.astype(np.int64), violated, one.harmful, ended=one.target is None)
