"""The process in which a model reads along what an upstream writes (see `proxy`).

The model's thread takes all messages that wait, feeds what waits in one pass, and tells what
happened, until its channel ends.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from midstream.engines.hf.checks import window
from midstream.engines.hf.forced import (
    CHUNK,
    ForcedStream,
    ForcedStreams,
    PromptError,
    PromptLengthError,
)
from midstream.monitor import DEFAULT_TRACE, Monitor, NoFreeSlotError
from midstream.policy import PolicyError
from midstream.serve.channel import Channel
from midstream.serve.forced_messages import Ended, Read, Written
from midstream.serve.messages import (
    Accepted,
    Cancel,
    Look,
    Ping,
    PlainLeft,
    Plan,
    Pong,
    Ready,
    Refused,
    Step,
    Submit,
)
from midstream.serve.worker import cache_tokens, loaded, run
from midstream.streams import Event

_log = logging.getLogger(__name__)

READ_EVERY = 512
"""Characters of a stream after which the server is told that they were fed."""


def main(channel: Channel, plan: Plan) -> None:
    """Read along until the other end of the channel is gone."""
    run(channel, plan, build, answer)


def build(channel: Channel, plan: Plan) -> Reading:
    """Load the model, and put the monitor on it."""
    bundle, model, tokenizer = loaded(plan)
    room = cache_tokens(plan, model) // plan.slots
    limit = window(model)
    trace = max(CHUNK, min(room, DEFAULT_TRACE))
    rows = plan.batch_tokens
    monitor = Monitor(bundle, slots=plan.slots, rows=rows, trace=trace, device=plan.device)
    return Reading(
        channel, monitor, model, tokenizer, window=min(room, limit or room), tier=plan.tier
    )


def answer(channel: Channel, reading: Reading) -> None:
    """Do what the messages ask for, until there are no more."""
    channel.send(reading.ready)
    # One thread for both: another that listens would take the interpreter from the passes for each
    # token that comes.
    while (messages := channel.take(wait=not reading.busy)) is not None:
        for message in messages:
            reading.take(message)
        reading.tell()


class Reading(ForcedStreams):
    """Streams whose events leave over a channel, one message per step.

    Parameters
    ----------
    channel : Channel
    monitor, model, tokenizer, window
        Of `ForcedStreams`.
    tier : str, optional
        Of requests that ask for none.
    """

    def __init__(
        self,
        channel: Channel,
        monitor: Monitor,
        model: Any,
        tokenizer: Any,
        *,
        window: int,
        tier: str | None,
    ) -> None:
        super().__init__(monitor, model, tokenizer, window=window)
        self._channel = channel
        self._tier = monitor.policy.tier_for(tier)
        self._left: dict[str, int] = {}  # tokens of each open stream that have left
        self._read: dict[str, int] = {}  # characters that the server knows to be fed

    @property
    def ready(self) -> Ready:
        """What is told of it at its start."""
        monitor = self.monitor
        return Ready(monitor.bundle.hash, monitor.policy, self._tier, monitor.free_slots)

    def take(self, message: Any) -> None:
        """Do what a message asks for; what it asks of a stream that has ended is nothing."""
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Ping):
            self._channel.send(Pong())
        elif stream := self.find(message.stream):
            match message:
                case Written(_, text):
                    self._feed(stream, text)
                case Ended(_, reason, error):
                    stream.finish(reason, error)
                case Cancel():
                    self.close(stream)
                case Look(_, on):
                    stream.closely = on

    def tell(self) -> None:
        """Take a step, and tell what came of it."""
        told: list[PlainLeft | Event] = []
        for stream, events in self.step():
            for event in events:
                told.append(self._leaving(stream, event) if event.type == "released" else event)
            if stream.ended:
                del self._left[stream.id], self._read[stream.id]
        seconds = self.judge_seconds if self.rows else None
        free = self.monitor.free_slots
        if told or self.rows:
            self._channel.send(Step(time.monotonic(), self.rows, seconds, free, told))
        for name, known in self._read.items():
            open_one = self.find(name)
            if open_one is not None and open_one.read - known >= READ_EVERY:
                self._read[name] = open_one.read
                self._channel.send(Read(name, open_one.read))

    def _feed(self, stream: ForcedStream, text: str) -> None:
        try:
            stream.feed(text)
        except Exception as error:
            _log.exception("a text could not be split into tokens")
            self.fail(stream, f"the text could not be split into tokens: {type(error).__name__}")

    def _leaving(self, stream: ForcedStream, event: Event) -> PlainLeft:
        before, count = self._left[stream.id], stream.delivered
        self._left[stream.id] = count["delivered"]
        tokens, unscored = count["delivered"] - before, count["delivered_unscored"]
        return stream.id, tokens, event.position, event.risk, event.text or "", unscored

    def _submit(self, asked: Submit) -> None:
        try:
            stream = self._opened(asked)
        except Exception as error:
            self._channel.send(Refused(asked.stream, *_refusal(error, asked)))
            return
        self._left[asked.stream] = self._read[asked.stream] = 0
        self._channel.send(Accepted(asked.stream, stream.prompt_tokens))

    def _opened(self, asked: Submit) -> ForcedStream:
        prompt: Any = asked.prompt if asked.messages is None else asked.messages
        return self.open(asked.stream, prompt, tier=asked.tier or self._tier, prior=asked.prior)


def _refusal(error: Exception, asked: Submit) -> tuple[int, str, str, str | None]:
    """Status, message, code and field at fault."""
    param = "prompt" if asked.messages is None else "messages"
    match error:
        case PromptLengthError():
            return 400, str(error), "context_length_exceeded", param
        case PromptError():
            return 400, str(error)[:500], "invalid_prompt", param
        case PolicyError():
            return 400, str(error), "invalid_tier", "midstream.tier"
        case NoFreeSlotError():
            return 429, "all slots are taken; try again later", "too_many_requests", None
        case UnicodeError():
            told = "the text has lone surrogates, which no tokenizer takes; send valid Unicode"
            return 400, told, "invalid_unicode", param
    _log.error("a request could not be taken", exc_info=error)
    return 500, "the request could not be taken; the server's log says why", "internal_error", None
