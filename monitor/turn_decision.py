"""A turn that is being answered, and what the turn gate says of its response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from midstream.turn_model import Floats

Cause = Literal["none", "risk", "unseen", "store", "unscored", "halted"]

COUNTED = 16
"""Withheld responses that are counted at one place of a conversation."""


@dataclass(frozen=True)
class Turn:
    """A turn that is being answered.

    Attributes
    ----------
    conversation : str
        Hash of the conversation's id.
    parent : str
        Key of the turn before it.
    asked : tuple of (role, content)
    number : int
        1 for the first.
    belief : float64 [K+1]
        Over the states of the turn chain, after the turns before.
    unseen : int
        Turns before it that the ledger does not know, or knows from another bundle.
    gap : int
        Those of them behind the last one it knows: ``belief`` moved so often without evidence. The
        others are in the belief of a later turn.
    withheld : int
        Responses that were withheld right here before, `COUNTED` at most: a client that leaves
        them out and asks again sends the same history.
    store_error : str, optional
        What the ledger said when it could not be read.
    token_prior : float64 [k+1], optional
        Belief of the token chain to start from (`midstream.monitor.Monitor.admit`).
    """

    conversation: str
    parent: str
    asked: tuple[tuple[str, str], ...]
    number: int
    belief: Floats
    unseen: int
    gap: int
    withheld: int
    store_error: str | None
    token_prior: Floats | None


class TurnDecision(BaseModel):
    """What the gate says of one response, and why.

    Attributes
    ----------
    verdict : {"DELIVER", "BLOCK"}
    cause : str
        Why it is withheld: ``risk``; ``unseen`` turns; the ``store`` is down; ``unscored``, no
        token of it has a score; ``halted``, the token monitor ended it. ``none`` if delivered.
    risk : float
        P(harm complete within the horizon | delivered).
    log_hazard : float, optional
        Evidence of this turn; None where there is none.
    if_delivered, if_withheld : tuple of float [K+1]
        Belief after this turn (`midstream.turn_model.TurnBelief`).
    turn, unseen, gap, withheld, store_error
        As in `Turn`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    verdict: Literal["DELIVER", "BLOCK"]
    cause: Cause
    risk: float
    horizon: int
    block_at: float
    log_hazard: float | None
    if_delivered: tuple[float, ...]
    if_withheld: tuple[float, ...]
    turn: int
    unseen: int
    gap: int
    withheld: int
    store_error: str | None

    @property
    def delivers(self) -> bool:
        """Whether the response may leave."""
        return self.verdict == "DELIVER"

    @property
    def explanation(self) -> str:
        """The decision in one line."""
        evidence = "no evidence" if self.log_hazard is None else f"{self.log_hazard:.2f} nats"
        after = f"within {self.horizon} more turns" if self.horizon else "by this response"
        why = {
            "none": "",
            "risk": ": the risk is too high",
            "unseen": f": {self.unseen} earlier turns are unknown",
            "store": f": the ledger is down: {self.store_error}",
            "unscored": ": no token of it has a score",
            "halted": ": the token monitor halted it",
        }[self.cause]
        told = f"turn {self.turn} {'delivered' if self.delivers else 'withheld'}{why}; "
        told += f"risk {self.risk:.4f} of harm {after}, limit {self.block_at:g}; {evidence}"
        if self.unseen and self.cause != "unseen":
            told += f"; {self.unseen} earlier turns unknown, {self.gap} passed without evidence"
        if self.withheld:
            many = f"{COUNTED} or more" if self.withheld == COUNTED else str(self.withheld)
            told += f"; withheld here before: {many}"
        if self.store_error and self.cause != "store":
            told += f"; the ledger is down: {self.store_error}"
        return told
