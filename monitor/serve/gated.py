"""An engine whose responses wait, in conversations, for the turn gate (docs/turns.md).

A request that names its conversation is held as a whole: nothing of it leaves before the gate has
judged it and its ledger knows of it. So any replica with the same ledger goes on where another one
left the conversation. Those who look on see what left, not what was written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from midstream.bundle import Bundle, BundleError
from midstream.ledger.ledger import Ledger
from midstream.monitor import DEFAULT_TRACE
from midstream.policy import PolicyError
from midstream.serve.engine import Ask, Engine, Events, Released, Stream
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed, Observer, Opened
from midstream.serve.reloads import ReloadError
from midstream.streams import Event
from midstream.turn_decision import Turn, TurnDecision
from midstream.turn_history import HistoryError
from midstream.turns import TurnGate

_log = logging.getLogger(__name__)


class HeldFeed(Feed):
    """A feed that leaves out the events of some streams: who holds these tells what became of them.

    Parameters
    ----------
    observers : sequence of Observer
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        super().__init__(observers)
        self._held: dict[str, _Held] = {}

    def hold(self, stream: str) -> _Held:
        """Leave out what its engine tells of a stream that is about to begin, to its end."""
        held = self._held[stream] = _Held()
        return held

    def abandon(self, stream: str) -> None:
        """Nobody tells what becomes of it, and nothing of it leaves: hand on how it ends."""
        held = self._held.get(stream)
        if held is not None and held.opened is None:
            del self._held[stream]
        elif held is not None:
            held.abandoned = True

    def opened(self, stream: Opened) -> None:
        """Hand on."""
        if held := self._held.get(stream.ask.stream):
            held.opened = stream
        super().opened(stream)

    def event(self, stream: Opened, event: Event) -> None:
        """Hand on, unless the stream is held."""
        held = self._held.get(stream.ask.stream)
        if held is None:
            super().event(stream, event)
        elif event.type in ("finished", "error"):
            # Not earlier: engines may tell their feed after whoever follows the stream.
            del self._held[stream.ask.stream]
            if held.abandoned:
                super().event(stream, _withheld(event))

    def tell(self, stream: Opened, event: Event) -> None:
        """Hand on an event of a stream that is held."""
        super().event(stream, event)


@dataclass
class _Held:
    """A stream that is held, as it was taken in."""

    opened: Opened | None = None
    abandoned: bool = False


class JudgingEngine(Engine, Protocol):
    """An engine whose streams a bundle on this machine judges."""

    @property
    def bundle(self) -> Bundle | None:
        """What new streams are judged by; None before it was started."""

    def look_closely(self, stream: str, on: bool) -> None:
        """Tell ``scored`` events of a stream, or stop doing so."""

    async def reload(self, folder: str | Path) -> str:
        """Judge new streams by the bundle in a folder, and return its hash."""


class GatedEngine:
    """Another engine, whose conversations pass a turn gate.

    Parameters
    ----------
    engine : JudgingEngine
        Tells the same feed.
    feed : HeldFeed
    bundle : Bundle
        The engine's. With a turn model, and a policy with a section ``turns``.
    ledger : Ledger
        One for all replicas.
    trace : int
        Tokens that the engine's monitors keep of a stream; longer responses cannot be judged.

    Raises
    ------
    PolicyError
        For a bundle without one of the two.
    """

    def __init__(
        self,
        engine: JudgingEngine,
        feed: HeldFeed,
        bundle: Bundle,
        ledger: Ledger,
        *,
        trace: int = DEFAULT_TRACE,
    ) -> None:
        self._engine, self._feed, self._ledger, self._trace = engine, feed, ledger, trace
        self._gate = TurnGate(bundle, ledger)
        self._streams: set[GatedStream] = set()

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the engine."""
        return self._engine.models

    @property
    def unready(self) -> str | None:
        """Why the engine takes no requests."""
        return self._engine.unready

    @property
    def bundle(self) -> Bundle | None:
        """The engine's."""
        return self._engine.bundle

    def look_closely(self, stream: str, on: bool) -> None:
        """Pass on."""
        self._engine.look_closely(stream, on)

    async def submit(self, ask: Ask) -> Stream:
        """Begin a response; in a conversation, one that leaves as a whole or not at all.

        Raises
        ------
        ApiError
            For what the engine refuses, and in a conversation for what the gate cannot judge.
        """
        if ask.conversation_id is None:
            return await self._engine.submit(ask)
        gate = self._gate
        turn = await self._open(gate, ask)
        prior = None if turn.token_prior is None else tuple(turn.token_prior.tolist())
        held = self._feed.hold(ask.stream)
        try:
            stream = await self._engine.submit(replace(ask, prior=prior))
            opened = held.opened
            assert opened is not None, "an engine tells its feed before it returns the stream"
            try:
                self._check(gate, opened, stream)
            except ApiError:
                stream.cancel()
                raise
        except BaseException:
            self._feed.abandon(ask.stream)
            raise
        gated = GatedStream(stream, opened, self._feed, gate, turn)
        self._streams.add(gated)
        gated.ended.add_done_callback(lambda _: self._streams.discard(gated))
        return gated

    async def reload(self, folder: str | Path) -> str:
        """Judge new streams and new turns by another bundle; return its hash.

        Raises
        ------
        ReloadError
            When the engine refuses it, or it has no turn gate.
        """
        try:
            bundle = await asyncio.to_thread(Bundle.load, folder)
            gate = TurnGate(bundle, self._ledger)
        except (PolicyError, BundleError, OSError) as error:
            _log.error("the bundle was not reloaded: %s", error)
            facts = {"bundle": self._gate.bundle.hash, "reason": str(error)}
            self._feed.notice("reload_refused", facts)
            raise ReloadError(str(error)) from error
        found = await self._engine.reload(folder)
        if found == bundle.hash:  # else the folder was changed in between: `_check` refuses
            self._gate = gate
        return found

    async def close(self, drain: float) -> None:
        """Close the engine, and let the gate judge what has ended."""
        await self._engine.close(drain)
        # Shielded: who gives up on waiting would have them count as ended, and fail when they do.
        await asyncio.gather(*(asyncio.shield(stream.ended) for stream in self._streams))

    async def _open(self, gate: TurnGate, ask: Ask) -> Turn:
        if ask.messages is None:
            raise ApiError(
                400,
                "a conversation is made of messages; send them to /v1/chat/completions",
                code="unsupported_parameter",
                param="midstream.conversation",
            )
        if ask.body.get("stop"):
            raise ApiError(
                400,
                "in a conversation a response is judged as a whole, and cannot be cut at strings; "
                "leave stop out",
                code="unsupported_parameter",
                param="stop",
            )
        if ask.max_tokens >= self._trace:
            raise self._too_long("max_tokens", f"max_tokens must be below {self._trace}")
        assert ask.conversation_id is not None
        try:
            return await asyncio.to_thread(gate.open, ask.conversation_id, ask.messages)
        except HistoryError as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error

    def _check(self, gate: TurnGate, opened: Opened, stream: Stream) -> None:
        """Refuse what the gate could not judge in the end."""
        if opened.bundle != gate.bundle.hash:
            raise ApiError(
                503,
                "the server has just changed how it judges; try again",
                code="reloading",
                retry_after=1.0,
            )
        read = stream.prompt_tokens + stream.ask.max_tokens
        if gate.bundle.chain.prompt_edges and read >= self._trace:
            told = f"the prompt and max_tokens together must be below {self._trace} tokens"
            raise self._too_long("max_tokens", f"{told}, not {read}")

    def _too_long(self, param: str, told: str) -> ApiError:
        message = f"in a conversation {told}: so much is judged as a whole"
        return ApiError(400, message, code="invalid_value", param=param)


class GatedStream(Events):
    """A response that the gate judges before any of it leaves.

    Parameters
    ----------
    stream : Stream
    opened : Opened
    feed : HeldFeed
    gate : TurnGate
    turn : Turn
        Which it answers.
    """

    def __init__(
        self, stream: Stream, opened: Opened, feed: HeldFeed, gate: TurnGate, turn: Turn
    ) -> None:
        super().__init__()
        self.ask = stream.ask
        self.prompt_tokens = stream.prompt_tokens
        self.completion_tokens = 0
        self.halt_message = gate.bundle.policy.on_halt.message
        self._stream, self._opened, self._feed = stream, opened, feed
        self._gate, self._turn = gate, turn
        self._held: list[Released] = []
        self._halted = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it has ended, whether or not somebody follows it."""
        stream.follow(self._take)

    def cancel(self) -> None:
        """End it soon; without effect once the gate judges."""
        self._stream.cancel()

    def _take(self, event: Released | Event) -> None:
        """Follow the engine's stream."""
        if isinstance(event, Released):
            self._held.append(event)
        elif event.type == "finished":
            self._judging = asyncio.ensure_future(self._judge(event))
        else:
            self._halted = self._halted or event.type == "halted"
            self._tell(_withheld(event) if event.type == "error" else event)

    async def _judge(self, finished: Event) -> None:
        try:
            await self._ask_gate(finished)
        except Exception:
            _log.exception("stream %s: its response could not be judged", self.ask.stream)
            told = "the response could not be judged, so it was withheld; try again"
            self._tell(self._event("error", message=told))

    async def _ask_gate(self, finished: Event) -> None:
        """Ask the gate, and tell what it says."""
        if finished.report is None or finished.message == "cancelled":
            self._tell(_withheld(finished))
            return
        decision = await asyncio.to_thread(self._decide, finished)
        facts: dict[str, Any] = {"risk": decision.risk, "message": decision.explanation}
        if decision.delivers:
            self._tell(self._event("verdict", verdict="CONTINUE", **facts))
            self.completion_tokens = self._stream.completion_tokens
            for held in self._held:
                self._feed.tell(self._opened, self._event("released", **held._asdict()))
                self.put(held)
            self._tell(finished)
            return
        cause = f"turn gate: {decision.cause}"
        if self._halted:
            self._tell(_withheld(finished))
            return
        self._tell(self._event("halted", verdict="HALT", cause=cause, **facts))
        withheld = {
            "verdict": "HALT",
            "cause": cause,
            "finish_reason": self._gate.bundle.policy.on_halt.finish_reason,
        }
        report = finished.report.model_copy(update=withheld)
        told = {"verdict": "HALT", "cause": cause, "message": report.finish_reason}
        self._tell(_withheld(finished).model_copy(update={**told, "report": report}))

    def _decide(self, finished: Event) -> TurnDecision:
        """Judge, and write the turn down as the client will have it; in a thread."""
        gate, turn = self._gate, self._turn
        decision = gate.judge(turn, finished.report, halted=self._halted)
        text = "".join(held.text for held in self._held)
        return gate.commit(turn, decision, text if decision.delivers else "")

    def _event(self, type: str, **facts: Any) -> Event:
        told = {"type": type, "stream": self.ask.stream, "bundle": self._opened.bundle}
        return Event.model_validate({**told, **facts})

    def _tell(self, event: Event) -> None:
        self._feed.tell(self._opened, event)
        self.put(event)
        if event.type in ("finished", "error"):
            self.ended.set_result(None)


def _withheld(end: Event) -> Event:
    """The end of a stream, as it is told where nothing has left."""
    return end.model_copy(update={"delivered": 0, "delivered_unscored": 0})
