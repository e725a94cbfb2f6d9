"""What a gate says of a call, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from midstream.agents.steps import ToolCall
from midstream.agents.voters import Vote


class GateVerdict(StrEnum):
    """What happens to a call, in ascending order of strictness."""

    ALLOW = "ALLOW"
    ASK = "ASK"
    BLOCK = "BLOCK"


Stage = Literal["form", "scope", "veto", "consensus"]


@dataclass(frozen=True)
class MalformedCall:
    """Text that set out to be a tool call and is none.

    Attributes
    ----------
    reason : str
        What is wrong, and where.
    text : str
        Its beginning.
    """

    reason: str
    text: str = ""


@dataclass(frozen=True)
class Decision:
    """A verdict with its explanation.

    Attributes
    ----------
    verdict : GateVerdict
    stage : {"form", "scope", "veto", "consensus"}
        The stage that decided; ``form`` for what is no call at all.
    rule : str
    matched : str
        What in the call (or before it) the rule found.
    because, remedy : str
        Why that matters, and what would make the call pass.
    call : ToolCall or MalformedCall
    votes : tuple of Vote
        Of the voters, where it came to them.
    """

    verdict: GateVerdict
    stage: Stage
    rule: str
    matched: str
    because: str
    remedy: str
    call: ToolCall | MalformedCall
    votes: tuple[Vote, ...] = ()

    def __str__(self) -> str:
        tool = self.call.tool if isinstance(self.call, ToolCall) else "malformed call"
        text = f"{self.verdict} {tool}: {self.stage}/{self.rule}: {self.because}"
        text += f" [{self.matched}]" if self.matched else ""
        return text + (f". To pass: {self.remedy}" if self.remedy else "")
