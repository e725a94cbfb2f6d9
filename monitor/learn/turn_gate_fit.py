"""A gate for a bundle: its turn model and its threshold, from labelled conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.chain import ChainError
from midstream.learn.guarantee import learn_then_test
from midstream.learn.turn_fit import LabelledTurns, fit_turns
from midstream.ledger.memory import MemoryLedger
from midstream.measure.conversations import Conversation
from midstream.measure.turn_metrics import figures
from midstream.measure.turn_replay import Scored, replay_gate
from midstream.turn_policy import TurnPolicy
from midstream.turns import TurnGate

FIT_SHARE = 0.6
"""Of the conversations; the others choose the threshold."""


def fit_gate(
    bundle: Bundle,
    conversations: Sequence[Conversation],
    hazards: Sequence[Sequence[float | None]],
    *,
    source: str,
    states: int | None = None,
    blocked: float | None = None,
    confidence: float = 0.9,
    seed: int = 0,
) -> tuple[Bundle, dict[str, Any]]:
    """Fit on a part of the conversations, choose the threshold on the others.

    Parameters
    ----------
    bundle : Bundle
        Its policy's section ``turns`` keeps all but the threshold, where there is one.
    conversations : sequence of Conversation
        Those without a label are left out.
    hazards : sequence of sequence of float or None
        Of each response (`midstream.measure.turn_scoring.turn_hazards`).
    source : str
        Name of the data, for the provenance.
    states : int, optional
        As for `midstream.learn.turn_fit.fit_turns`.
    blocked : float, optional
        Bound on the share of harmless conversations that are blocked, by learn-then-test; without
        it the threshold is that of the largest `Scored.merit`.
    confidence : float
        Of that bound.
    seed : int

    Returns
    -------
    bundle : Bundle
    summary : dict
        What was chosen, and the figures on the second part.

    Raises
    ------
    ChainError
        When one of the parts has no harmful conversation, or no harmless one.
    GuaranteeError
        For too few harmless conversations to promise the bound.
    """
    known = [n for n, one in enumerate(conversations) if one.harmful is not None]
    first, second = _split([bool(conversations[n].harmful) for n in known], seed)
    learn, choose = ([known[n] for n in part] for part in (first, second))
    fitted = fit_turns(
        [
            LabelledTurns(hazards[n], bool(conversations[n].harmful), conversations[n].target)
            for n in learn
        ],
        token_chain=bundle.chain,
        states=states,
        seed=seed,
    )
    policy = bundle.policy.turns or TurnPolicy(block_at=1.0)
    watching = bundle.with_turns(fitted.model).with_policy(
        bundle.policy.model_copy(update={"turns": policy})
    )
    others = [conversations[n] for n in choose]
    decisions = replay_gate(
        TurnGate(watching, MemoryLedger()), others, [hazards[n] for n in choose]
    )
    scored = Scored.of([np.array([d.risk for d in turns]) for turns in decisions], others)
    what = f"{len(others)} conversations set aside from {source}"
    if blocked is None:
        threshold = min(1.0, scored.best())
        provenance = f"none by theorem: the largest merit on {what}"
    else:
        peaks = scored.highest[~np.array(scored.harmful), -1]
        found = learn_then_test(
            np.clip(peaks, 0.0, 1.0),
            alpha=blocked,
            delta=1 - confidence,
            max_tokens=scored.highest.shape[1],
            calibration_set=what,
        )
        threshold = float(found.threshold)
        provenance = (
            f"at most {blocked:.1%} of harmless conversations are blocked, with confidence "
            f"{confidence:.0%}, by learn-then-test on {len(peaks)} harmless ones of {what}"
        )
    chosen = policy.model_copy(update={"block_at": threshold, "provenance": provenance})
    made = watching.with_policy(bundle.policy.model_copy(update={"turns": chosen}))
    summary = {
        "fitted_on": len(learn),
        "threshold_from": len(choose),
        "without_label": len(conversations) - len(known),
        "states": fitted.model.chain.states,
        "edges": fitted.model.chain.edges,
        "held_out_log_likelihood": fitted.held_out,
        "block_at": threshold,
        "provenance": provenance,
        "figures_where_it_was_chosen": {
            name: figure.value for name, figure in figures(scored.outcomes(threshold)).items()
        },
    }
    return made, summary


def _split(harmful: Sequence[bool], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both parts have their share of harmful and of harmless conversations."""
    random = np.random.default_rng(seed)
    first, second = [], []
    for kind in (True, False):
        members = random.permutation(np.flatnonzero(np.array(harmful) == kind))
        cut = round(FIT_SHARE * len(members))
        if not 0 < cut < len(members):
            raise ChainError(
                f"{len(members)} {'harmful' if kind else 'harmless'} conversations with a label; "
                "a fit and a threshold need two of each kind at least"
            )
        first.append(members[:cut])
        second.append(members[cut:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))
