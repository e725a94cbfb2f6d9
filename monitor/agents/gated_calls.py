"""A gate behind a scanner: pieces of a message in, decisions out, before anything runs."""

from __future__ import annotations

from typing import Any, Protocol

from midstream.agents.action_gate import GateSession
from midstream.agents.call_json import Found
from midstream.agents.decisions import Decision, GateVerdict, MalformedCall
from midstream.agents.steps import ToolCall
from midstream.agents.tool_calls import ToolCallScanner


class Scanner(Protocol):
    """Whatever finds calls in pieces of a message."""

    def feed(self, piece: Any) -> list[Found]:
        """Read a piece; return the calls that it ended."""
        ...

    def finish(self) -> list[Found]:
        """End the message; return what was begun and not ended, as malformed."""
        ...


class GatedToolCalls:
    """A scanner with a gate behind it: pieces in, decisions out, before anything runs.

    Parameters
    ----------
    session : GateSession
        Told of every call that it allows, so that limits on calls hold within one message, too. A
        call that a person allows later is for the caller to report (`GateSession.ran`).
    scanner : Scanner, optional
        A `ToolCallScanner` of all formats when not given.
    """

    def __init__(self, session: GateSession, scanner: Scanner | None = None) -> None:
        self._session = session
        self._scanner: Scanner = ToolCallScanner() if scanner is None else scanner

    def feed(self, piece: Any) -> list[Decision]:
        """Read a piece (text, or a chunk); judge the calls that it ended."""
        return [self._judged(found.call) for found in self._scanner.feed(piece)]

    def finish(self) -> list[Decision]:
        """End the message; judge what was left open."""
        return [self._judged(found.call) for found in self._scanner.finish()]

    def _judged(self, call: ToolCall | MalformedCall) -> Decision:
        decision = self._session.decide(call)
        if decision.verdict is GateVerdict.ALLOW and isinstance(call, ToolCall):
            self._session.ran(call)
        return decision
