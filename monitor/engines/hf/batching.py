"""transformers: watch continuous batching, halt requests in the same step (design section 4.7).

The taps read the packed rows ``[1, rows]`` of a step. A logits processor, which the manager calls
after the forward pass and before it samples, labels them by the requests of the batch, folds them,
and leaves halted requests no token but the end of sequence. After the step, once the verdicts can
be read without waiting for the device, each request's reader is given what may leave.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, Self

from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import (
    GenerationOutput,
    RequestStatus,
)

from midstream.bundle import Fingerprint
from midstream.engines.hf import manager as seams
from midstream.engines.hf.checks import (
    UnsupportedGenerationError,
    check_supported,
    check_unwatched,
    end_tokens,
    window,
)
from midstream.engines.hf.packed import PackedStreams
from midstream.engines.hf.prompts import Prompt, token_ids
from midstream.engines.hf.requests import Item, Request, Response
from midstream.monitor import Monitor, NoFreeSlotError
from midstream.streams import Session
from midstream.taps import attach_taps

_log = logging.getLogger(__name__)

_ENTRIES = (
    "generate",
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


class BatchingAttachment:
    """A monitor on one transformers model that serves requests by continuous batching.

    Use it as a context manager, in which the model's generation loop runs in a thread of its own::

        with monitor.attach_batching(model, tokenizer) as m:
            responses = m.generate_batch(prompts, max_new_tokens=64)

    A server submits requests at any time and from any thread, and reads each one's events::

            request = m.submit(prompt, max_new_tokens=64, tier="strict")
            for event in request:
                ...
            request.cancel()

    As many requests as the monitor has free slots run at a time; the others wait in order. A
    request takes one step more than it has tokens, in which its last one is fed and scored.

    Parameters
    ----------
    monitor : Monitor
    model : transformers.PreTrainedModel
        Must be the model the bundle was made for.
    tokenizer : optional
        Checked against the bundle; needed for prompts that are no ids, and for events.
    tier : str, optional
        Strictness of requests that ask for none.
    enforce : bool
        False only observes: nothing is halted or held, the reports say what would have been.
    generation_config : GenerationConfig, optional
        Of all requests, on top of the model's own.
    batching : ContinuousBatchingConfig, optional
        Sizes of the cache and of the batches. CUDA graphs, compilation and asynchronous batching
        are off, and refused when asked for.

    Raises
    ------
    WrongModelError
        When the bundle was made for another model.
    UnsupportedGenerationError
        For options that cannot be watched, or another version of transformers.
    """

    def __init__(
        self,
        monitor: Monitor,
        model: Any,
        tokenizer: Any = None,
        *,
        tier: str | None = None,
        enforce: bool = True,
        generation_config: GenerationConfig | None = None,
        batching: ContinuousBatchingConfig | None = None,
    ) -> None:
        seams.check_version()
        monitor.bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
        check_supported(model)
        monitor.recognise_segments(tokenizer)
        self.monitor = monitor
        self.model = model
        self.tokenizer = tokenizer
        self.enforces = enforce
        self._tier = monitor.policy.tier_for(tier)
        self._config = seams.generation_config(model, generation_config)
        self._ends = end_tokens(self._config)
        self._streams = PackedStreams(monitor, enforce, self._ends)
        reads_prompt = any(probe.reads == "prompt" for probe in monitor.bank.probes)
        self._batching = seams.watchable(batching, model, reads_prompt=reads_prompt)
        self._attached = ExitStack()
        self._lock = threading.Lock()
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._waiting: deque[Request] = deque()  # for a slot
        self._cancelled: deque[Request] = deque()
        self._count = self._running = 0
        self._closed: str | None = "enter it with `with` first"
        self._leaving = False

    def __enter__(self) -> Self:
        check_unwatched(self.model)
        self._slots = self.monitor.free_slots
        if not self._slots:
            raise NoFreeSlotError("the monitor has 0 free slots; retire streams, or build another")
        with ExitStack() as stack:
            stack.enter_context(self.monitor.exclusive())
            stack.callback(self._restore_attention, self.model.config._attn_implementation)
            stack.enter_context(
                attach_taps(self.model, self.monitor.bank.taps, self._streams.observe)
            )
            for name in _ENTRIES:
                setattr(self.model, name, _refused)
                stack.callback(delattr, self.model, name)  # the class's own shows again
            self._manager = seams.WatchedManager(self.model, self._config, self._batching, self)
            stack.callback(self._manager.destroy)
            room = [self._manager.longest, window(self.model)]
            self._room = min(tokens for tokens in room if tokens is not None)
            self._closed, self._leaving = None, False
            self._manager.start()
            stack.callback(self._stop)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._attached.close()

    def generate_batch(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        tier: str | None = None,
    ) -> list[Response]:
        """Generate responses to all prompts, and wait for them.

        Returns
        -------
        list of Response
            One per prompt, in their order.

        Raises
        ------
        GenerationFailedError
        """
        requests = []
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt, max_new_tokens=max_new_tokens, tier=tier))
            return [request.result() for request in requests]
        finally:
            for request in requests:
                request.cancel()  # those that are left when there was an error

    def submit(
        self,
        prompt: Prompt | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        tier: str | None = None,
        prior: Sequence[float] | None = None,
        request_id: str | None = None,
        reader: Callable[[Item], None] | None = None,
        **sampling: Any,
    ) -> Request:
        """Queue a request, from any thread.

        Parameters
        ----------
        prompt : str, chat messages, or sequence of int
        max_new_tokens : int, optional
            The generation config's when not given. Fewer where the model's window or the cache ends
            before.
        tier : str, optional
        prior : sequence of float, optional
            Belief that the stream starts from, as for :meth:`midstream.monitor.Monitor.admit`.
        request_id : str, optional
            Not one of a request that runs or waits.
        reader : callable, optional
            Given what the request's iterator would read, at once and mostly in the loop's thread.
        sampling
            The request's own ``temperature``, ``top_k``, ``top_p``, where the batching config has
            ``per_request_processors``.

        Raises
        ------
        UnsupportedGenerationError
            For a prompt that is empty or too long, a request that cannot be served, or when the
            generation loop has ended.
        PolicyError
            For a tier that may not be asked for.
        """
        self._check_open()
        ids = token_ids(self.model, self.tokenizer, prompt)
        if request_id is not None and not isinstance(request_id, str):
            raise UnsupportedGenerationError(f"request_id: expected a str, got {request_id!r}")
        if len(ids) >= self._room:
            raise UnsupportedGenerationError(
                f"the prompt has {len(ids)} tokens, the model's window and the cache have room for "
                f"{self._room}; shorten it, or give the cache more blocks"
            )
        if max_new_tokens is None:
            max_new_tokens = self._config.max_new_tokens
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UnsupportedGenerationError(
                f"max_new_tokens: expected at least 1, got {max_new_tokens}"
            )
        longest = self._room - len(ids)
        if prior is not None:
            self.monitor.check_prior(prior)
        self._manager.logit_processor.check_kwargs(sampling)
        seams.check_sampling(sampling, self.model.config.get_text_config().vocab_size)
        tier = self._tier if tier is None else self.monitor.policy.tier_for(tier)
        with self._lock:
            self._check_open()
            if request_id in self._requests:
                raise UnsupportedGenerationError(
                    f"request {request_id!r} is there already; choose another"
                )
            name = self._free_name() if request_id is None else request_id
            request = Request(
                Session(name, self.monitor.policy, self.monitor.bundle.hash),
                ids,
                limit=longest if max_new_tokens is None else min(max_new_tokens, longest),
                tier=tier,
                prior=prior,
                sampling=sampling,
                tokenizer=self.tokenizer,
                cancel=self._cancel,
                reader=reader,
            )
            self._count += 1
            self._requests[name] = request
            self._waiting.append(request)
            self._hand_over()
        return request

    def before_step(self) -> None:
        """Take out what was cancelled since the last step."""
        self._streams.enter_thread()
        while self._cancelled:
            request = self._cancelled.popleft()
            if not request.ended:
                self._manager.drop(request.id)
                self._end(request, "cancelled")

    def judge(self, scores: Tensor) -> Tensor:
        """Fold the rows of this step; return the logits to sample from."""
        return self._streams.judge(self._manager.batch, self._requests, scores)

    def after_step(self) -> None:
        """Let the readers have what the verdicts of this step allow."""
        self._streams.release()

    def finished(self, output: GenerationOutput) -> None:
        """Close a request that the manager has done with."""
        request = self._requests.get(output.request_id)
        if request is None:  # dropped, and then failed with all others
            return
        if output.status == RequestStatus.FAILED:  # the loop is about to end, and all with it
            self._close(str(output.error))
            self._end(request, "error", output.error, output.generated_tokens)
        else:
            by_length = request.response_tokens >= request.limit
            self._end(request, "length" if by_length else "stop", None, output.generated_tokens)

    def stopped(self) -> None:
        """Close all that is left: the generation loop has ended."""
        fatal = self._manager.background_thread_status.fatal_error
        self._close(str(fatal))
        with self._lock:
            self._waiting.clear()
            left = list(self._requests.values())
        for request in left:
            self._end(request, "error", str(fatal))
        self._streams.leave_thread()

    def _restore_attention(self, implementation: str) -> None:
        """As it was, also where the manager failed after it had chosen one of its own."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def _free_name(self) -> str:
        """A name for a request that was given none; the lock is held."""
        candidates = (f"stream-{number}" for number in itertools.count(self._count))
        return next(name for name in candidates if name not in self._requests)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise UnsupportedGenerationError(f"no request can be taken: {self._closed}")

    def _close(self, error: str) -> None:
        with self._lock:
            if self._closed is None:
                self._closed = f"the generation loop has ended: {error}"

    def _stop(self) -> None:
        with self._lock:
            self._closed = "the attachment was left"
            self._leaving = True
        self._manager.stop(hard_stop=True)

    def _hand_over(self) -> None:
        """Give the manager as many requests as there are slots; the lock is held.

        None when the loop is ending: it would drop them, and log their ids.
        """
        while self._closed is None and self._waiting and self._running < self._slots:
            request = self._waiting.popleft()
            self._running += 1
            request.running = True
            # one step more than asked for, in which the last token is fed and scored
            self._manager.add_request(
                request.tokens,
                request.id,
                max_new_tokens=request.limit + 1,
                eos_token_id=self._ends,
                **request.sampling,
            )

    def _cancel(self, request: Request) -> None:
        with self._lock:
            if self._requests.get(request.id) is not request:  # it has ended
                return
            if request not in self._waiting:
                self._cancelled.append(request)  # before_step goes on from here
                self._manager.wake()
                return
            self._waiting.remove(request)
        self._end(request, "cancelled")

    def _end(
        self,
        request: Request,
        reason: str,
        error: str | None = None,
        sampled: Sequence[int] = (),
    ) -> None:
        """Free its slot, let go what may still leave, and close it; a second time do nothing."""
        with self._lock:
            if self._requests.get(request.id) is not request:
                return
            del self._requests[request.id]
        if reason == "error" and self._leaving:
            reason = "cancelled"
        report = None
        try:
            report = self._streams.retire(request, reason, sampled)
        except Exception as failure:  # a device that is lost; the readers must hear of it
            _log.exception("request %r: its slot could not be freed", request.id)
            reason, error = "error", error or str(failure)
        if request.running:
            with self._lock:
                self._running -= 1
                self._hand_over()
        if reason == "error":
            request.fail(error or "unknown")
        else:
            request.end(report.finish_reason if report else reason, report)


def _refused(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedGenerationError(
        "the model serves a watched generation loop; use submit or generate_batch of the "
        "attachment, or leave it first"
    )
