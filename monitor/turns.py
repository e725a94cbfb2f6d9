"""The turn gate: whether a whole response may be delivered, given the conversation so far.

    turn = gate.open(conversation, messages)      # one read of the ledger
    ... the engine writes a response, whose tokens wait ...
    decision = gate.judge(turn, report)
    decision = gate.commit(turn, decision, text)  # text: what the client is given
    ... it leaves only if decision.delivers ...

The ledger holds the belief after each turn under a key made of the whole history up to it. So
nothing is kept in the process: a retry, a branch, an edited turn, a prefix-cache hit or another
replica find just the turns that their history has in common with what was judged before. Cost: one
hash over the history, one read, one write, O(K^2) for K states and turn that the ledger lacks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from midstream.bundle import Bundle
from midstream.ledger.ledger import Ledger, LedgerError, TurnRecord, conversation_key, turn_key
from midstream.policy import PolicyError
from midstream.streams import StreamReport
from midstream.turn_decision import COUNTED, Cause, Turn, TurnDecision
from midstream.turn_evidence import DETECT, TurnEvidence
from midstream.turn_history import History
from midstream.turn_model import TurnBelief

_SWEEP = 60.0  # seconds between two expiries of one gate
_TOLERANCE = 1e-6  # of a stored belief's sum


class TurnGate:
    """Judges whole responses; thread-safe, and stateless but for its ledger.

    Parameters
    ----------
    bundle : Bundle
        With a turn model, and a policy with a section ``turns``.
    ledger : Ledger
        May be shared by any number of gates, threads and processes.

    Raises
    ------
    PolicyError
        When one of the two is missing.
    """

    def __init__(self, bundle: Bundle, ledger: Ledger) -> None:
        if bundle.turns is None or bundle.policy.turns is None:
            missing = "turn model (turns.json)" if bundle.turns is None else "policy section turns"
            raise PolicyError(
                f"bundle {bundle.hash}: has no {missing}, which a turn gate needs; "
                "`midstream gate fit` adds both"
            )
        self.bundle, self.ledger = bundle, ledger
        self.model, self.policy = bundle.turns, bundle.policy.turns
        self._evidence = TurnEvidence(bundle)
        # Of all that a belief depends on: another threshold or date must not forget conversations.
        self._made_by = replace(bundle, policy=DETECT, notes={}, created=None, midstream="").hash
        self._swept = time.monotonic()

    def hold_back(self, tokens: int | Literal["turn"]) -> int | Literal["turn"]:
        """Hold-back of a gated stream, where the policy's own is ``tokens``.

        With a depth of n + 1 the last n judged tokens wait (`midstream.holdback.HoldBack`).
        """
        if tokens == "turn" or self.policy.hold == "whole":
            return "turn"
        return max(tokens, self.policy.hold + 1)

    def open(self, conversation: str, messages: Sequence[Mapping[str, Any]]) -> Turn:
        """Find what is known of a conversation; never fails for a store that does.

        Parameters
        ----------
        conversation : str
            Any id, of any length; only its hash is stored.
        messages : sequence of mappings
            The history in the form of OpenAI's chat API, up to what is to be answered.

        Raises
        ------
        HistoryError
            For messages that are no such history.
        """
        history = History.of(messages)
        name = conversation_key(conversation)
        error, withheld = None, 0
        turns = len(history.keys)
        known: list[TurnRecord | None] = [None] * turns
        again = [_withheld_key(history.parent, n) for n in range(1, COUNTED + 1)]
        try:
            found = self.ledger.read(name, [*history.keys, *again])
            withheld = sum(record is not None for record in found[turns:])
            known = [self._checked(*at) for at in zip(found[:turns], history.keys, strict=True)]
        except LedgerError as failure:
            error = str(failure)
        last = max((i for i, record in enumerate(known) if record is not None), default=-1)
        record = known[last] if last >= 0 else None
        gap = len(known) - 1 - last
        belief = self.model.start if record is None else np.array(record.belief)
        belief = self.model.move(belief, gap)
        return Turn(
            conversation=name,
            parent=history.parent,
            asked=history.asked,
            number=len(known) + 1,
            belief=belief,
            unseen=known.count(None),
            gap=gap,
            withheld=withheld,
            store_error=error,
            token_prior=self.model.token_prior(belief),
        )

    def judge(
        self,
        turn: Turn,
        evidence: StreamReport | float | None,
        *,
        halted: bool = False,
        tokens: int | None = None,
    ) -> TurnDecision:
        """Decide about a candidate response. Deterministic, and changes nothing.

        Parameters
        ----------
        turn : Turn
        evidence : StreamReport, float or None
            The response's report, its log-hazard in nats, or None where no token was scored.
        halted : bool
            Whether the token monitor ended it, so that it is withheld whatever the risk.
        tokens : int, optional
            Read only so many of the report's response, such as those that have left already.

        Raises
        ------
        TurnEvidenceError
            For a report of another bundle, or one whose trace is too short.
        ChainError
            For a log-hazard that is negative or not finite.
        """
        if isinstance(evidence, StreamReport):
            evidence = self._evidence.log_hazard(evidence, tokens)
        if evidence is None:
            moved = self.model.move(turn.belief)
            after = TurnBelief(moved, moved)
        else:
            after = self.model.read(turn.belief, evidence)
        risk = self.model.risk(after.delivered, self.policy.horizon)
        cause: Cause = "none"
        if halted:
            cause = "halted"
        elif turn.store_error is not None and self.policy.on_store_down == "closed":
            cause = "store"
        elif risk >= self.policy.block_at:
            cause = "risk"
        elif evidence is None and self.bundle.policy.on_unscored != "pass":
            cause = "unscored"
        elif turn.unseen and turn.store_error is None and self.policy.on_unseen == "block":
            cause = "unseen"
        return TurnDecision(
            verdict="DELIVER" if cause == "none" else "BLOCK",
            cause=cause,
            risk=risk,
            horizon=self.policy.horizon,
            block_at=self.policy.block_at,
            log_hazard=evidence,
            if_delivered=tuple(after.delivered.tolist()),
            if_withheld=tuple(after.withheld.tolist()),
            turn=turn.number,
            unseen=turn.unseen,
            gap=turn.gap,
            withheld=turn.withheld,
            store_error=turn.store_error,
        )

    def commit(
        self, turn: Turn, decision: TurnDecision, text: str, *, delivered: bool | None = None
    ) -> TurnDecision:
        """Write the turn down, before anything of it leaves; a second time changes nothing.

        Parameters
        ----------
        turn : Turn
        decision : TurnDecision
            What `judge` said.
        text : str
            What the client is given and will send back as the assistant's: the response, or in its
            place what it is told. The turn is found again under this text alone.
        delivered : bool, optional
            Whether the response leaves; as decided when not given. Others only observe.

        Returns
        -------
        TurnDecision
            The decision that holds: where the store is down and the policy is closed, a response
            that could not be written down is withheld.
        """
        delivered = decision.delivers if delivered is None else delivered
        record = TurnRecord(
            conversation=turn.conversation,
            key=turn_key(turn.parent, turn.asked, text),
            parent=turn.parent,
            turn=turn.number,
            belief=decision.if_delivered if delivered else decision.if_withheld,
            log_hazard=0.0 if decision.log_hazard is None else decision.log_hazard,
            delivered=delivered,
            bundle=self._made_by,
            at=time.time(),
        )
        records = [record]
        if not delivered and turn.withheld < COUNTED:
            key = _withheld_key(turn.parent, turn.withheld + 1)
            records.append(record.model_copy(update={"key": key}))
        try:
            self.ledger.write(records)
        except LedgerError as failure:
            failed: dict[str, object] = {"store_error": str(failure)}
            if decision.delivers and self.policy.on_store_down == "closed":
                failed |= {"verdict": "BLOCK", "cause": "store"}
            return decision.model_copy(update=failed)
        try:
            self._sweep(record.at)
        except LedgerError as failure:  # the turn itself is written down
            return decision.model_copy(update={"store_error": str(failure)})
        return decision

    def _sweep(self, now: float) -> None:
        if self.policy.expiry is not None and time.monotonic() - self._swept >= _SWEEP:
            self._swept = time.monotonic()
            self.ledger.expire(now - self.policy.expiry)

    def _checked(self, record: TurnRecord | None, key: str) -> TurnRecord | None:
        """Return a record that this bundle wrote, None for another's; LedgerError if corrupted."""
        if record is None or record.bundle != self._made_by:
            return None
        belief, states = np.array(record.belief), self.model.chain.states + 1
        whole = belief.shape == (states,) and (belief >= 0).all()
        if record.key != key or not whole or abs(belief.sum() - 1) > _TOLERANCE:
            raise LedgerError(
                f"turn {key}: its record is corrupted: a belief over {states} states was expected; "
                "restore the store, or remove the conversation"
            )
        return record


def _withheld_key(parent: str, number: int) -> str:
    """Key under which the withheld response of this number behind ``parent`` is counted."""
    # No JSON, and so never the text that `turn_key` hashes.
    return hashlib.sha256(f"withheld/{parent}/{number}".encode()).hexdigest()
