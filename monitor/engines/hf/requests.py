"""transformers: one request of continuous batching, as its client holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from tokenizers.decoders import DecodeStream

from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.policy import TierName
from midstream.streams import Event, Phase, Session, StreamReport


class GenerationFailedError(RuntimeError):
    """The engine failed while the request was with it; says why."""


@dataclass(frozen=True)
class Response:
    """What came of a request.

    Attributes
    ----------
    tokens : list of int
        Ids that may leave, in order, without the end token.
    finish_reason : str
        ``stop``, ``length``, ``cancelled``, or the policy's reason where the stream was halted.
    report : StreamReport, optional
        None where the request was cancelled before any of its tokens was fed.
    """

    tokens: list[int]
    finish_reason: str
    report: StreamReport | None


@dataclass(frozen=True)
class _Released:
    tokens: list[int]
    position: int | None
    risk: float


class Request:
    """One request: an iterator of its events, for one reader in any thread.

    The events are those of `midstream.engines.hf.stream`: ``released`` ones carry the text that may
    leave, in order; the last is ``finished``. Nothing waits for a slow reader.

    Parameters
    ----------
    session : Session
        Its front end.
    prompt : sequence of int
    limit : int
        Tokens of the response, at most.
    tier : str
    prior : sequence of float, optional
    sampling : dict
        Its own ``temperature``, ``top_k``, ``top_p``.
    tokenizer : optional
        What the events' text is decoded with.
    cancel : callable
        Called with the request by :meth:`cancel`.
    """

    def __init__(
        self,
        session: Session[int],
        prompt: Sequence[int],
        *,
        limit: int,
        tier: TierName,
        prior: Sequence[float] | None,
        sampling: dict[str, Any],
        tokenizer: Any,
        cancel: Callable[[Request], None],
    ) -> None:
        self.id = session.stream
        self.session = session
        self.prompt_tokens = len(prompt)
        self.limit = limit
        self.tier = tier
        self.prior = prior
        self.sampling = sampling
        self.tokens = list(prompt)
        """The prompt, and the tokens of the response that were fed."""
        self.slot: int | None = None
        """None until its first token is fed, and when it has ended."""
        self.running = False
        """Whether the generation loop has it."""
        self.judged = -1
        """Position up to which its tokens were judged."""
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._items: SimpleQueue[_Released | Event | None] = SimpleQueue()
        self._released: list[int] = []
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._shown = 0  # characters; a reader may stop, and read on
        self._done = threading.Event()
        self._response: Response | None = None
        self._error: GenerationFailedError | None = None

    def __iter__(self) -> Iterator[Event]:
        if self._tokenizer is None:
            raise UnsupportedGenerationError(
                "without a tokenizer there is no text to stream; pass it to attach_batching, or "
                "use result()"
            )
        backend = self._tokenizer.backend_tokenizer
        while (item := self._items.get()) is not None:
            if isinstance(item, _Released):
                pieces = [self._decoder.step(backend, token) for token in item.tokens]
                text = "".join(piece for piece in pieces if piece)
                position, risk = item.position, item.risk
            elif item.type == "finished" and self.session.phase != Phase.HALTED:
                # The decoder waits for the rest of a character that was cut short.
                text = backend.decode(self._released)[self._shown :]
                position, risk = None, item.risk or 0.0
            else:
                text = ""
            if text:
                self._shown += len(text)
                yield self.session.event("released", position=position, risk=risk, text=text)
            if isinstance(item, Event):
                yield item
        self._items.put(None)  # for whoever reads on
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End it before the next step; without effect once it has ended. From any thread."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Response:
        """Wait for the end and return what came of it.

        Raises
        ------
        TimeoutError
        GenerationFailedError
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.id!r} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response

    @property
    def ended(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._done.is_set()

    @property
    def response_tokens(self) -> int:
        """Tokens of the response that were fed."""
        return len(self.tokens) - self.prompt_tokens

    def release(self, tokens: list[int], position: int | None, risk: float) -> None:
        """Let tokens go to the reader."""
        if tokens:
            self._released += tokens
            self._items.put(_Released(tokens, position, risk))

    def tell(self, event: Event) -> None:
        """Let an event go to the reader."""
        self._items.put(event)

    def end(self, reason: str, report: StreamReport | None) -> None:
        """Close it; what may still leave was released before."""
        self._response = Response(self._released, reason, report)
        facts = {} if report is None else {"risk": report.risk, "verdict": report.verdict}
        cause = None if report is None else report.cause
        self.tell(
            self.session.event("finished", cause=cause, message=reason, report=report, **facts)
        )
        self._close()

    def fail(self, message: str) -> None:
        """Close it with an error, which its reader's thread raises."""
        self._error = GenerationFailedError(f"request {self.id!r}: {message}")
        self.tell(self.session.event("error", message=message))
        self._close()

    def _close(self) -> None:
        self._items.put(None)
        self._done.set()
