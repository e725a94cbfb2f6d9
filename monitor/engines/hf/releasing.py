"""transformers: the logits processor that lets one stream's text go to its reader."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from midstream.engines.hf.attachment import Attachment
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.halting import HaltingProcessor
from midstream.engines.hf.prompts import Prompt
from midstream.engines.hf.requests import Text
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.streams import Event, Phase, Session, StreamReport
from midstream.turn_decision import Turn
from midstream.turns import TurnGate

_AHEAD = 16  # events the model may run ahead of a slow reader


class ReaderGone(BaseException):
    """Raised inside generate when nobody reads the stream any more."""


@dataclass(frozen=True)
class Gated:
    """The turn that a stream answers, and the gate it has to pass."""

    gate: TurnGate
    turn: Turn


def open_turn(
    gate: TurnGate | None,
    conversation: str | None,
    prompt: Prompt,
    monitor: Monitor,
    prompt_tokens: int,
    max_new_tokens: int,
) -> Gated | None:
    """Open the turn that a stream answers; None without a gate.

    Raises
    ------
    UnsupportedGenerationError
        When the gate does not fit the prompt, or the monitor.
    """
    if gate is None and conversation is None:
        return None
    if gate is None or conversation is None or isinstance(prompt, str):
        raise UnsupportedGenerationError(
            "a gated stream needs a gate, a conversation's id, and its history as chat messages"
        )
    if gate.bundle.hash != monitor.bundle.hash:
        raise UnsupportedGenerationError(
            f"the gate was made for bundle {gate.bundle.hash}, the monitor has "
            f"{monitor.bundle.hash}; build both from one bundle"
        )
    kept = monitor.slots.trace_position.shape[1]
    read, what = max_new_tokens + 1, "whole responses"
    if monitor.chain.prompt_edges:
        read, what = read + prompt_tokens, "prompts and whole responses"
    if kept < read:
        raise UnsupportedGenerationError(
            f"the gate reads {what}, here of up to {read - 1} tokens, and the monitor keeps "
            f"{kept}; build it with trace={read}"
        )
    return Gated(gate, gate.open(conversation, prompt))


class ReleasingProcessor(LogitsProcessor):
    """Called before each sample: lets tokens go to the reader, ends the stream when it must.

    Parameters
    ----------
    attachment : Attachment
    tokenizer : transformers.PreTrainedTokenizerFast
    longest : int
        Tokens, the prompt's included, at which the stream ends.
    gated : optional
    """

    def __init__(
        self, attachment: Attachment, tokenizer: Any, longest: int, gated: Gated | None
    ) -> None:
        self.attachment = attachment  # how Attachment recognises its own processor
        self.events: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self.reader_gone = threading.Event()
        self._halting = HaltingProcessor(attachment)
        self._text = Text(tokenizer)
        self._longest = longest
        self._gated = gated
        self._length = 0
        self._session: Session[int] | None = None
        self._told_gate = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge the token fed, let go what may leave; return ``scores`` [1, vocabulary]."""
        if self.reader_gone.is_set():
            raise ReaderGone
        if len(self.attachment.slots) != 1:
            raise UnsupportedGenerationError(
                "one stream is one sequence; leave num_return_sequences out, or use "
                "monitor.attach and generate"
            )
        monitor, slot = self.attachment.monitor, self.attachment.slots[0]
        self._length = input_ids.shape[1]
        position = self._length - 1
        if self._session is None:
            self._session = monitor.session(slot, self._hold_back())
            self.put(self._session.event("admitted", position=0))
        else:
            self._session.push(position, int(input_ids[0, -1]))
        scores = self._halting(input_ids, scores)
        table = monitor.slots
        verdict = Verdict(int(table.verdict[slot]))
        risk = float(table.risk[slot])
        cause = monitor.cause_name(int(table.cause[slot]))
        allowed = verdict if self.attachment.enforces else Verdict.CONTINUE
        tokens, events = self._session.judge(position, allowed, risk, cause)
        self._release(tokens, position, risk)
        for event in events:
            self.put(event)
        if self._length >= self._longest:
            everyone = torch.ones(1, dtype=torch.bool, device=scores.device)
            return self._halting.end(everyone, scores)
        return scores

    def finish(self, sequences: Tensor) -> None:
        """Let go what may still leave, and close the stream."""
        assert self._session is not None
        report = self.attachment.reports[0]
        # What a stopping criterion left unfed.
        unfed = self.attachment.responses(sequences)[0][self._length - report.prompt_tokens :]
        for position, token in enumerate(unfed, start=self._length):
            self._session.push(position, token)
        if self._gated is not None and not self._pass(self._gated, report):
            halt = self.attachment.monitor.policy.on_halt
            report = report.model_copy(update={"finish_reason": halt.finish_reason})
        self._release(self._session.finish(), None, report.risk)
        if self._session.phase != Phase.HALTED:
            self._show(self._text.rest(), None, report.risk)
        if self._length >= self._longest and report.finish_reason == "stop":
            report = report.model_copy(update={"finish_reason": "length"})
        self.put(
            self._session.event(
                "finished",
                risk=report.risk,
                verdict=report.verdict,
                cause=report.cause,
                message=report.finish_reason,
                report=report,
            )
        )
        self.put(None)

    def _hold_back(self) -> int | Literal["turn"] | None:
        if self._gated is None or not self.attachment.enforces:
            return None
        return self._gated.gate.hold_back(self.attachment.monitor.policy.hold_back)

    def _pass(self, gated: Gated, report: StreamReport) -> bool:
        """Let the gate judge the response and write it down; False if it is withheld."""
        assert self._session is not None
        gate, enforces = gated.gate, self.attachment.enforces
        halted = self._session.phase == Phase.HALTED
        decision = gate.judge(gated.turn, report, halted=halted)
        self._told_gate = True
        if decision.delivers or not enforces:
            given = self._text.whole(self._session.hold_back.leaving)
            decision = gate.commit(gated.turn, decision, given, delivered=True)
        else:
            message = self.attachment.monitor.policy.on_halt.message
            decision = gate.commit(gated.turn, decision, message or "")
            if head := self._text.shown():
                self._write_head(gated, report, head)
        facts = {"risk": decision.risk, "message": decision.explanation}
        if decision.delivers or not enforces:
            said = "CONTINUE" if decision.delivers else "HALT"
            self.put(self._session.event("verdict", verdict=said, **facts))
            return True
        for event in self._session.withhold(cause=f"turn gate: {decision.cause}", **facts):
            self.put(event)
        return False

    def abandon(self, given: str) -> None:
        """Write down what a stream gave that ended before the gate was asked."""
        if self._gated is not None and given and not self._told_gate:
            self._write_head(self._gated, self.attachment.reports[0], given)

    def _write_head(self, gated: Gated, report: StreamReport, given: str) -> None:
        """Write down the part of a response that the client has, as the turn that it is."""
        assert self._session is not None
        released = self._session.hold_back.released
        head = gated.gate.judge(gated.turn, report, tokens=released)
        gated.gate.commit(gated.turn, head, given, delivered=True)

    def fail(self, error: BaseException) -> None:
        """Tell the reader that generation failed: an event, then the exception itself."""
        if self._session is not None:
            self.put(self._session.event("error", message=f"{type(error).__name__}: {error}"))
        self.put(error)

    def put(self, item: Event | BaseException | None) -> None:
        """Queue an item for the reader; stop the generation when nobody reads any more."""
        while not self.reader_gone.is_set():
            try:
                self.events.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        raise ReaderGone

    def _release(self, tokens: list[int], position: int | None, risk: float) -> None:
        self._show(self._text.add(tokens), position, risk)

    def _show(self, text: str, position: int | None, risk: float) -> None:
        assert self._session is not None
        if text:
            self.put(self._session.event("released", position=position, risk=risk, text=text))
