"""The interface of every ledger, and the content-addressed keys of turns.

A turn is named by what was said up to and with it, so the same history finds the same turn whoever
asks: another replica, a retry, a prefix-cache hit. An edited turn has another key, and so have all
turns after it; a branch shares the keys up to where it parts. Writing a turn twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

ROOT = ""
"""Parent of a conversation's first turn."""


Hash = Annotated[str, Field(max_length=64)]
"""SHA-256 in hex: a conversation's id of any length, given by mistake, never gets into a store."""


class LedgerError(RuntimeError):
    """A store that is down or corrupted; the message says which store, what failed, what to do."""


class TurnRecord(BaseModel):
    """One delivered (or withheld) turn.

    Attributes
    ----------
    conversation : str
        Hash of the conversation's id (`conversation_key`).
    key, parent : str
        `turn_key` of this turn; that of the turn before it, or ``ROOT``.
    turn : int
        1 for the first.
    belief : tuple of float
        Belief over the states of the turn chain after this turn.
    log_hazard : float
        The turn's evidence.
    delivered : bool
        False where the gate withheld the candidate.
    bundle : str
        Hash of the bundle that judged it, without its policy and notes: a belief means nothing to
        another chain.
    at : float
        Unix time of the write, seconds; set by the writer, for expiry alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    conversation: Hash
    key: Hash
    parent: Hash
    turn: int = Field(ge=1)
    belief: tuple[float, ...]
    log_hazard: float
    delivered: bool
    bundle: Hash
    at: float


class Ledger(Protocol):
    """A store of turn records. Thread-safe; several processes may share one store."""

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        """Records of these turns, None where there is none; one round trip for all keys."""
        ...

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        """Store these, durably when it returns; False where the turn was there before.

        The record that was there first stays.
        """
        ...

    def expire(self, before: float) -> int:
        """Forget conversations whose newest turn is older than ``before``; count the turns.

        Clocks of machines differ and are put right at times, so stores compare ages, not times: of
        ``before`` and of each record's ``at`` only the distance to the clock of the machine that
        makes the call counts, and is taken from the store's own clock. A record from the future was
        written now.
        """
        ...

    def close(self) -> None:
        """Release the store; everything written stays."""
        ...


def conversation_key(conversation: str) -> str:
    """SHA-256 of an id, which may be of any length and is never stored itself."""
    return hashlib.sha256(conversation.encode("utf-8", "surrogatepass")).hexdigest()


def turn_key(parent: str, asked: Sequence[tuple[str, str]], answered: str) -> str:
    """Key of a turn: SHA-256 over its parent's key and its content.

    Parameters
    ----------
    parent : str
    asked : sequence of (role, content)
        Messages since the turn before, the user's last. White space around a content does not
        count: clients trim it.
    answered : str
        What the client was given.
    """
    content = [parent, [[role, text.strip()] for role, text in asked], answered.strip()]
    plain = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
