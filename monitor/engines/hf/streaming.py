"""transformers: one watched stream, as an iterator of events with the text that may leave."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessor

from midstream.engines.hf.attachment import Attachment
from midstream.engines.hf.checks import (
    UnsupportedGenerationError,
    check_window,
    set_option,
    window,
)
from midstream.engines.hf.halting import HaltingProcessor
from midstream.engines.hf.prompts import Prompt, encode
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.streams import Event, Phase, Session, StreamReport
from midstream.turn_decision import Turn
from midstream.turns import TurnGate

_AHEAD = 16  # events the model may run ahead of a slow reader


class _ReaderGone(BaseException):
    """Raised inside generate when nobody reads the stream any more."""


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    monitor: Monitor,
    *,
    max_new_tokens: int = 256,
    tier: str | None = None,
    enforce: bool = True,
    gate: TurnGate | None = None,
    conversation: str | None = None,
    **generate_options: Any,
) -> Iterator[Event]:
    """Generate a response and yield its events as they happen.

    ``released`` events carry the text that may leave, in order; a halted stream ends with
    ``halted`` and ``finished``, every other with ``finished``, whose ``report`` is the stream's.
    Where plain ``generate`` would stop at ``max_new_tokens`` the last token is fed once more, so
    that it is scored like all others; only a stopping criterion leaves its last token unscored.

    The model writes in a thread of its own, at most some events ahead of the reader. Closing the
    iterator stops it and frees its slot. A model and a monitor serve one stream at a time; a second
    one is refused.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    prompt : str or list of chat messages
    monitor : Monitor
        Needs one free slot.
    max_new_tokens : int
        Fewer where the model's window ends before.
    tier : str, optional
    enforce : bool
        False only observes: the text leaves as if every verdict were CONTINUE.
    gate : TurnGate, optional
        Of the monitor's bundle. The response, or the tail that its policy names, waits until the
        gate has passed it and its ledger knows of it; a ``verdict`` event says so. A response that
        is withheld ends with ``halted``, whose message is the gate's explanation. What has left
        before, where only the tail waits, is written down as the turn that it is, also when the
        reader closes the iterator or generation fails.
    conversation : str, optional
        Its id, with a gate; the prompt is its history, as chat messages, then.
    generate_options
        Passed on to ``model.generate``: do_sample, temperature, top_p, ... More logits processors
        come before the monitor's own.

    Yields
    ------
    Event

    Raises
    ------
    UnsupportedGenerationError
        For an empty prompt, or options that cannot be watched.
    WrongModelError
        When the monitor's bundle was made for another model.
    MonitorInUseError
        When the monitor serves another stream.
    HistoryError
        With a gate, for messages that are no history.
    """
    if max_new_tokens < 1:
        raise UnsupportedGenerationError(
            f"max_new_tokens: expected at least 1, got {max_new_tokens}"
        )
    input_ids = encode(model, tokenizer, prompt)
    check_window(model, input_ids.shape[1])
    room = window(model)
    if room is not None:
        max_new_tokens = min(max_new_tokens, room - input_ids.shape[1])
    gated = _gated(gate, conversation, prompt, monitor, input_ids.shape[1], max_new_tokens)
    prior = gated.turn.token_prior if gated else None
    attachment = Attachment(
        monitor,
        model,
        tokenizer,
        tier=tier,
        enforce=enforce,
        prior=None if prior is None else prior.tolist(),
    )
    front = _Front(attachment, tokenizer, input_ids.shape[1] + max_new_tokens, gated)
    generate_options["logits_processor"] = [
        *generate_options.get("logits_processor", ()),
        front,
    ]
    # one step more than asked for, in which the last token is fed and scored
    set_option(generate_options, "max_new_tokens", max_new_tokens + 1)

    def generate() -> None:
        try:
            with attachment:
                output = model.generate(
                    input_ids, attention_mask=torch.ones_like(input_ids), **generate_options
                )
            front.finish(output if isinstance(output, Tensor) else output.sequences)
        except _ReaderGone:
            pass
        except BaseException as error:  # the reader's thread raises it
            with suppress(_ReaderGone):
                front.fail(error)

    worker = threading.Thread(target=generate, name="midstream-generate", daemon=True)
    worker.start()
    given: list[str] = []
    try:
        while (item := front.events.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            given.append(item.text or "")
            yield item
    finally:
        front.reader_gone.set()
        worker.join()
        front.abandon("".join(given))


@dataclass(frozen=True)
class _Gated:
    """The turn that a stream answers, and the gate it has to pass."""

    gate: TurnGate
    turn: Turn


def _gated(
    gate: TurnGate | None,
    conversation: str | None,
    prompt: Prompt,
    monitor: Monitor,
    prompt_tokens: int,
    max_new_tokens: int,
) -> _Gated | None:
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
    return _Gated(gate, gate.open(conversation, prompt))


class _Front(LogitsProcessor):
    """Sits where generate asks before each sample: lets tokens go, ends the stream when it must.

    Parameters
    ----------
    attachment : Attachment
    tokenizer : transformers.PreTrainedTokenizerFast
    longest : int
        Tokens, the prompt's included, at which the stream ends.
    gated : optional
    """

    def __init__(
        self, attachment: Attachment, tokenizer: Any, longest: int, gated: _Gated | None
    ) -> None:
        self.attachment = attachment  # how Attachment recognises its own processor
        self.events: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self.reader_gone = threading.Event()
        self._halting = HaltingProcessor(attachment)
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._longest = longest
        self._gated = gated
        self._released: list[int] = []
        self._shown = 0  # characters
        self._length = 0
        self._session: Session[int] | None = None
        self._told_gate = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.reader_gone.is_set():
            raise _ReaderGone
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
            # The decoder waits for the rest of a character that was cut short.
            whole = self._tokenizer.backend_tokenizer.decode(self._released)
            self._show(whole[self._shown :], None, report.risk)
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

    def _pass(self, gated: _Gated, report: StreamReport) -> bool:
        """Let the gate judge the response and write it down; False if it is withheld."""
        assert self._session is not None
        gate, enforces = gated.gate, self.attachment.enforces
        halted = self._session.phase == Phase.HALTED
        decision = gate.judge(gated.turn, report, halted=halted)
        decode = self._tokenizer.backend_tokenizer.decode
        self._told_gate = True
        if decision.delivers or not enforces:
            given = decode(self._released + self._session.hold_back.leaving)
            decision = gate.commit(gated.turn, decision, given, delivered=True)
        else:
            message = self.attachment.monitor.policy.on_halt.message
            decision = gate.commit(gated.turn, decision, message or "")
            if head := decode(self._released)[: self._shown]:
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

    def _write_head(self, gated: _Gated, report: StreamReport, given: str) -> None:
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
        raise _ReaderGone

    def _release(self, tokens: list[int], position: int | None, risk: float) -> None:
        backend = self._tokenizer.backend_tokenizer
        self._released += tokens
        pieces = [self._decoder.step(backend, token) for token in tokens]
        self._show("".join(piece for piece in pieces if piece), position, risk)

    def _show(self, text: str, position: int | None, risk: float) -> None:
        assert self._session is not None
        self._shown += len(text)
        if text:
            self.put(self._session.event("released", position=position, risk=risk, text=text))
