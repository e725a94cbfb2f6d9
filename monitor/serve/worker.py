"""The process in which the model runs: takes requests over its channel, tells what happens.

It ends when its channel does, or when the generation loop fails.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from time import perf_counter
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from midstream.bundle import Bundle
from midstream.engines.hf import load
from midstream.engines.hf.batching import BatchingAttachment
from midstream.engines.hf.checks import UnsupportedGenerationError, window
from midstream.engines.hf.prompts import token_ids
from midstream.engines.hf.requests import Item, Released, Request, Text
from midstream.monitor import Monitor
from midstream.policy import PolicyError
from midstream.serve.channel import Channel
from midstream.serve.errors import ApiError
from midstream.serve.garbage import collect, freeze
from midstream.serve.messages import (
    Accepted,
    Cancel,
    Failed,
    Look,
    PlainLeft,
    Plan,
    Ready,
    Refused,
    Step,
    Submit,
)
from midstream.serve.sampling import Sampling, shape
from midstream.streams import Event

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NICE = 5
_PAGE = 16  # tokens of a page of the cache
_ROOMY = 1 << 18  # tokens of a cache that nobody gave a size
FAILED = "the model failed while it wrote this response; try again"
"""What clients are told; the reason is for the log."""


def main(channel: Channel, plan: Plan) -> None:
    """Serve until the other end of the channel is gone."""
    run(channel, plan, build, answer)


def run(
    channel: Channel,
    plan: Plan,
    build: Callable[[Channel, Plan], AbstractContextManager[T]],
    answer: Callable[[Channel, T], None],
) -> None:
    """Build what answers, and let it; send ``Failed`` where it cannot be built."""
    # The server works for a moment at a time, and all clients wait for it: where cores are few, it
    # is not to wait for the end of this process's turn to take a step's tokens.
    os.nice(_NICE)
    # A Ctrl-C, and the terminal's end, reach all its processes: the server says when this ends.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    with ExitStack() as stack:
        try:
            serving = stack.enter_context(build(channel, plan))
        except Exception as error:
            if not isinstance(error, OSError | ValueError):
                _log.exception("the model cannot be served")
            channel.send(Failed(str(error)))
            return
        freeze()
        answer(channel, serving)


def loaded(plan: Plan) -> tuple[Bundle, Any, Any]:
    """Bundle, model and tokenizer; torch with as many threads as it is to have."""
    if plan.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(plan.threads or max(1, min(torch.get_num_threads(), cores - 1)))
    bundle: Bundle = pickle.loads(plan.bundle)
    if plan.model is None:
        from midstream import testbed

        model, tokenizer = testbed.load()
    else:
        model, tokenizer = load(plan.model)
    model.to(plan.device)
    return bundle, model, tokenizer


def cache_tokens(plan: Plan, model: Any) -> int:
    """Tokens that the cache has room for."""
    if plan.cache_tokens is not None:
        return plan.cache_tokens
    return min(plan.slots * (window(model) or _ROOMY), _ROOMY)


def build(channel: Channel, plan: Plan) -> Batching:
    """Load the model, and put the monitor on it."""
    bundle, model, tokenizer = loaded(plan)
    monitor = Monitor(bundle, slots=plan.slots, rows=plan.batch_tokens, device=plan.device)
    batching = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=-(-cache_tokens(plan, model) // _PAGE),
        max_batch_tokens=plan.batch_tokens,
        allow_block_sharing=not any(probe.reads == "prompt" for probe in bundle.bank.probes),
    )
    return Batching(channel, monitor, model, tokenizer, tier=plan.tier, batching=batching)


def answer(channel: Channel, serving: Batching) -> None:
    """Do what the messages ask for, until there are no more."""
    channel.send(serving.ready)
    for message in channel:
        match message:
            case Submit():
                if refused := serving.take(message):
                    channel.send(refused)
            case Cancel(stream):
                if request := serving.find(stream):
                    request.cancel()
            case Look(stream, on):
                if request := serving.find(stream):
                    request.closely = on


class Batching(BatchingAttachment):
    """Continuous batching whose events leave over a channel, one message per step.

    Parameters
    ----------
    channel : Channel
    monitor, model, tokenizer, tier, batching
        Of `BatchingAttachment`.
    """

    def __init__(
        self,
        channel: Channel,
        monitor: Monitor,
        model: Any,
        tokenizer: Any,
        *,
        tier: str | None,
        batching: ContinuousBatchingConfig,
    ) -> None:
        self._sampling = Sampling.of(model.generation_config)
        # Every request is sampled by what it asks for, in `judge`; the manager's own processors
        # would sort all rows of every step.
        plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        super().__init__(
            monitor, model, tokenizer, tier=tier, generation_config=plain, batching=batching
        )
        self._channel = channel
        self._told: deque[tuple[_Reader, Item]] = deque()
        self._telling = threading.Lock()
        self._streaming: dict[
            str, Request
        ] = {}  # those that the server does not know to have ended
        self._rows, self._judge_seconds = 0, 0.0

    @property
    def ready(self) -> Ready:
        """What is told of it at its start."""
        monitor = self.monitor
        return Ready(monitor.bundle.hash, monitor.policy, self._tier, monitor.free_slots)

    def take(self, asked: Submit) -> Refused | None:
        """Submit a request, or say why it cannot be served."""
        try:
            ids = self._encode(asked)
            if len(ids) >= self._room:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, this model takes {self._room - 1} at most;"
                    " shorten it",
                    code="context_length_exceeded",
                    param="prompt" if asked.messages is None else "messages",
                )
            reader = _Reader(self, asked.stream, self._sampling.with_asked(asked.sampling))
            with self._telling:  # nothing is told of it before it was accepted
                reader.request = self.submit(
                    ids,
                    max_new_tokens=asked.max_tokens,
                    tier=asked.tier,
                    prior=asked.prior,
                    request_id=asked.stream,
                    reader=reader,
                )
                self._streaming[asked.stream] = reader.request
                self._channel.send(Accepted(asked.stream, len(ids)))
            return None
        except ApiError as error:
            return Refused(asked.stream, error.status, error.message, error.code, error.param)
        except PolicyError as error:
            return Refused(asked.stream, 400, str(error), "invalid_tier", "midstream.tier")
        except ValueError as error:
            return Refused(asked.stream, 400, str(error), "invalid_value", None)
        except Exception:
            _log.exception("a request could not be taken")
            told = "the request could not be taken; the server's log says why"
            return Refused(asked.stream, 500, told, "internal_error", None)

    def find(self, stream: str) -> Request | None:
        """Return the request of a stream that has not ended."""
        return self._streaming.get(stream)

    def tell(self, reader: _Reader, item: Item) -> None:
        """Put into the next message; from any thread."""
        self._told.append((reader, item))

    def forget(self, stream: str) -> None:
        """It has ended."""
        del self._streaming[stream]

    def before_step(self) -> None:
        """Tell which streams ended with the step before."""
        super().before_step()
        self._flush(None)

    def judge(self, scores: Tensor) -> Tensor:
        """Leave what each request's sampling leaves, and judge."""
        batch = self._manager.batch.requests_in_batch
        asked = [self._reader(f).sampling for f in batch if f.has_new_token]
        shaped = shape(scores, asked)
        begun, self._rows = perf_counter(), self.monitor.observed_rows
        judged = super().judge(shaped)
        self._judge_seconds = perf_counter() - begun
        return judged

    def after_step(self) -> None:
        """Tell what may leave."""
        begun = perf_counter()
        super().after_step()
        judge_seconds = self._judge_seconds + perf_counter() - begun
        self._flush(time.monotonic(), judge_seconds)
        collect()

    def stopped(self) -> None:
        """Tell that everything has ended; hang up, where nobody asked for it."""
        super().stopped()
        self._flush(None)
        if not self._leaving:
            self._channel.send(Failed(str(self._closed)))
            self._channel.close()

    def _reader(self, future: Any) -> _Reader:
        reader = self._requests[future.state.request_id].reader
        assert isinstance(reader, _Reader)
        return reader

    def _flush(self, ended: float | None, judge_seconds: float | None = None) -> None:
        """Send what was told since the last time."""
        with self._telling:
            told: list[PlainLeft | Event] = []
            while self._told:
                reader, item = self._told.popleft()
                told += reader.told(item)
            if told or ended is not None:
                at, free = ended or time.monotonic(), self.monitor.free_slots
                rows = 0 if judge_seconds is None else self._rows
                self._channel.send(Step(at, rows, judge_seconds, free, told))

    def _encode(self, asked: Submit) -> list[int]:
        prompt: Any = asked.prompt
        if asked.messages is not None:
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise ApiError(
                    400,
                    "this model has no chat template, so it takes no messages; send a prompt to "
                    "/v1/completions",
                    code="no_chat_template",
                    param="messages",
                )
            prompt = asked.messages
        param = "prompt" if asked.messages is None else "messages"
        try:
            json.dumps(prompt, ensure_ascii=False).encode()  # as the tokenizer needs it
            return token_ids(self.model, self.tokenizer, prompt)
        except TemplateError as error:
            told = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, told[:500], code="invalid_messages", param=param) from error
        except UnsupportedGenerationError as error:
            raise ApiError(400, str(error), code="invalid_prompt", param=param) from error
        except UnicodeError as error:
            told = "the text has lone surrogates, which no tokenizer takes; send valid Unicode"
            raise ApiError(400, told, code="invalid_unicode", param=param) from error


class _Reader:
    """Takes what happens to one request, and puts it into words.

    Parameters
    ----------
    serving : Batching
    stream : str
    sampling : Sampling
    """

    def __init__(self, serving: Batching, stream: str, sampling: Sampling) -> None:
        self.sampling = sampling
        self.request: Request | None = None
        self._serving = serving
        self._stream = stream
        self._text = Text(serving.tokenizer)
        self._halted = False

    def __call__(self, item: Item) -> None:
        self._serving.tell(self, item)

    def told(self, item: Item) -> list[PlainLeft | Event]:
        """What goes to the server."""
        if item is None:
            self._serving.forget(self._stream)
            return []
        if isinstance(item, Released):
            assert self.request is not None
            unscored = self.request.session.hold_back.released_unscored
            text, count = self._text.add(item.tokens), len(item.tokens)
            return [(self._stream, count, item.position, item.risk, text, unscored)]
        if item.type == "error":
            return [item.model_copy(update={"message": FAILED})]
        if item.type == "halted":
            self._halted = True
        elif item.type == "finished" and not self._halted and (rest := self._text.rest()):
            left = (self._stream, 0, None, item.risk or 0.0, rest, item.delivered_unscored or 0)
            return [left, item]
        return [item]
