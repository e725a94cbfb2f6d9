"""A small world of two seals for tests of the turn gate, and ledgers that misbehave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import toy

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.ledger.ledger import LedgerError, TurnRecord
from midstream.ledger.memory import MemoryLedger
from midstream.policy import Thresholds
from midstream.turn_model import TurnModel
from midstream.turn_policy import TurnPolicy

QUIET, OPENS = 0.0, 9.0
"""Log-hazards of a turn that opens nothing, and of one that opens a seal."""

NOTHING, JUST_OPENED, LOOSENED, COMPLETE = range(4)


def two_seals(**changes: Any) -> TurnModel:
    """A chain that remembers one opening; the second completes the harm."""
    chain = {
        "transition": [
            [0.7, 0.3, 0.0, 0.0],
            [0.0, 0.0, 0.6, 0.4],
            [0.0, 0.0, 0.6, 0.4],
            [0.0, 0.0, 0.0, 1.0],
        ],
        "ending": [0.05] * 4,
        "emission": [[0.99, 0.01], [0.01, 0.99], [0.99, 0.01], [0.01, 0.99]],
        "edges": [1.0],
        "prior": [1.0, 0.0, 0.0, 0.0],
        "prompt_emission": [[1.0]] * 4,
        "prompt_edges": [],
    }
    return TurnModel(chain=Chain.model_validate(chain | changes.pop("chain", {})), **changes)


def bundle(model: TurnModel | None = None, **policy: Any) -> Bundle:
    """The toy's bundle with `two_seals`; its token monitor lets a single bad word pass."""
    halt_at = policy.pop("halt_at", 1.0)
    fields = {name: policy.pop(name) for name in ("hold_back", "on_halt") if name in policy}
    turns = TurnPolicy(**{"block_at": 0.5, **policy})
    tiers = {"moderate": Thresholds(horizon=0, halt_at=halt_at)}
    return toy.bundle(tiers=tiers, turns=turns, **fields).with_turns(model or two_seals())


class CountingLedger(MemoryLedger):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = 0

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        self.reads += 1
        return super().read(conversation, keys)

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        self.writes += 1
        return super().write(records)


class DownLedger(MemoryLedger):
    """Fails where it is told to."""

    def __init__(self, *, reads: bool = True, writes: bool = True) -> None:
        super().__init__()
        self.fails_reads, self.fails_writes = reads, writes

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        if self.fails_reads:
            raise LedgerError("ledger fake: cannot read: nobody answers")
        return super().read(conversation, keys)

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        if self.fails_writes:
            raise LedgerError("ledger fake: cannot write: nobody answers")
        return super().write(records)


def asks(*said: str) -> list[dict[str, str]]:
    """A history: user and assistant in turn, the user first and last."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
