"""A ledger in the memory of one process: for tests, and for one server that may forget on restart.

A turn takes about 1 kB, and `MemoryLedger` holds a stated number of them at most. Nothing is thrown
away to make room: whoever floods the store would make it forget his own conversation, too. A read
or write of one turn is one look-up; `expire` looks at every conversation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from midstream.ledger.clock import age, expiry_age
from midstream.ledger.ledger import LedgerError, TurnRecord

MAX_TURNS = 200_000
"""About 0.2 GB."""


@dataclass
class _Conversation:
    touched: float  # by the monotonic clock, which nobody puts forward or back
    turns: dict[str, TurnRecord] = field(default_factory=dict)


class MemoryLedger:
    """Turns in a dict behind a lock.

    Parameters
    ----------
    max_turns : int
        A write that would exceed it is refused with a `LedgerError`.
    """

    def __init__(self, max_turns: int = MAX_TURNS) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}, expected 1 or more")
        self._max_turns = max_turns
        self._lock = threading.Lock()
        self._conversations: dict[str, _Conversation] | None = {}
        self._size = 0

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        """See `Ledger.read`."""
        with self._lock:
            found = self._open("read").get(conversation)
            return [found.turns.get(key) if found else None for key in keys]

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        """See `Ledger.write`; all of them are stored, or none."""
        with self._lock:
            conversations = self._open("write")
            names = {(record.conversation, record.key) for record in records}
            known = sum(
                name in conversations and key in conversations[name].turns for name, key in names
            )
            if self._size + len(names) - known > self._max_turns:
                raise LedgerError(
                    f"ledger memory: cannot write: it holds {self._size} turns of at most "
                    f"{self._max_turns}; expire old conversations more often, raise max_turns, or "
                    "use a store on disk"
                )
            added = []
            for record in records:
                touched = time.monotonic() - age(record.at)
                kept = conversations.setdefault(record.conversation, _Conversation(touched))
                added.append(record.key not in kept.turns)
                if added[-1]:
                    kept.turns[record.key] = record
                    kept.touched = max(kept.touched, touched)
            self._size += sum(added)
            return added

    def expire(self, before: float) -> int:
        """See `Ledger.expire`."""
        oldest = time.monotonic() - expiry_age(before)
        with self._lock:
            conversations = self._open("expire")
            gone = [name for name, kept in conversations.items() if kept.touched < oldest]
            turns = sum(len(conversations.pop(name).turns) for name in gone)
            self._size -= turns
            return turns

    def close(self) -> None:
        """Forget everything: memory is all there was."""
        with self._lock:
            self._conversations = None

    def _open(self, operation: str) -> dict[str, _Conversation]:
        if self._conversations is None:
            raise LedgerError(f"ledger memory: cannot {operation}: it was closed; open another")
        return self._conversations
