"""transformers: one request of continuous batching, as its client holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

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


class Released(NamedTuple):
    """Tokens that may leave."""

    tokens: list[int]
    position: int | None
    risk: float


Item = Released | Event | None
"""What a reader is given: tokens that may leave, events, and None at the end."""


class Text:
    """The text of tokens as they come, in whole characters.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._step = partial(DecodeStream(skip_special_tokens=True).step, self._backend)
        self._tokens: list[int] = []
        self._shown = 0  # characters

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is complete with these tokens."""
        self._tokens += tokens
        text = "".join(piece for piece in map(self._step, tokens) if piece)
        self._shown += len(text)
        return text

    def rest(self) -> str:
        """Return what was waiting for the rest of a character, at the end."""
        return self.whole()[self._shown :]

    def shown(self) -> str:
        """Return what `add` has returned so far."""
        return self.whole()[: self._shown]

    def whole(self, more: Sequence[int] = ()) -> str:
        """Return the text of all tokens so far and of ``more``."""
        return str(self._backend.decode([*self._tokens, *more]))


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
    reader : callable, optional
        Given each item at once, in the thread in which it came up; there is nothing to iterate
        then.
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
        reader: Callable[[Item], None] | None = None,
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
        self.closely = False
        """Whether its reader is told of every token's scores."""
        self.reader = reader
        self.unscored = 0
        """Of these, those without a score."""
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._put = self._items.put if reader is None else reader
        self._released: list[int] = []
        self._written: Text | None = None  # kept, as a reader may stop and read on
        self._done = threading.Event()
        self._response: Response | None = None
        self._error: GenerationFailedError | None = None

    def __iter__(self) -> Iterator[Event]:
        if self._tokenizer is None:
            raise UnsupportedGenerationError(
                "without a tokenizer there is no text to stream; pass it to attach_batching, or "
                "use result()"
            )
        if self._written is None:
            self._written = Text(self._tokenizer)
        while (item := self._items.get()) is not None:
            text, position, risk = "", None, 0.0
            if isinstance(item, Released):
                text, position, risk = self._written.add(item.tokens), item.position, item.risk
            elif item.type == "finished" and self.session.phase != Phase.HALTED:
                text, risk = self._written.rest(), item.risk or 0.0
            if text:
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
            self._put(Released(tokens, position, risk))

    def tell(self, event: Event) -> None:
        """Let an event go to the reader."""
        self._put(event)

    def end(self, reason: str, report: StreamReport | None) -> None:
        """Close it; what may still leave was released before."""
        self._response = Response(self._released, reason, report)
        facts = {} if report is None else {"risk": report.risk, "verdict": report.verdict}
        cause = None if report is None else report.cause
        self.tell(
            self.session.event(
                "finished", cause=cause, message=reason, report=report, **facts, **self._delivered()
            )
        )
        self._close()

    def fail(self, message: str) -> None:
        """Close it with an error, which its reader's thread raises."""
        self._error = GenerationFailedError(f"request {self.id!r}: {message}")
        self.tell(self.session.event("error", message=message, **self._delivered()))
        self._close()

    def _delivered(self) -> dict[str, int]:
        queue = self.session.hold_back
        return {"delivered": queue.released, "delivered_unscored": queue.released_unscored}

    def _close(self) -> None:
        self._put(None)
        self._done.set()
