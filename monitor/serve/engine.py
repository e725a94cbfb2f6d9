"""What the service asks of an engine: a local model, or an upstream that is watched from beside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from midstream.streams import Event


@dataclass(frozen=True)
class Ask:
    """One request, checked, as an engine gets it.

    Attributes
    ----------
    stream : str
        Its id, no other's in this process.
    model : str
        The name the client gave, one of :attr:`Engine.models`.
    messages : tuple of mapping, optional
        A chat. Either this or ``prompt`` is there.
    prompt : str or tuple of int, optional
        What is to be continued, as text or ids.
    max_tokens : int
        Tokens of the response, at most.
    tier : str, optional
        The strictness the client asked for; None takes the server's.
    sampling : mapping
        ``temperature``, ``top_p`` and ``top_k``, as far as given.
    conversation : str, optional
        Named by the client.
    prior : tuple of float, optional
        Belief of the token chain to start from, after the turns before (`midstream.serve.gated`).
    client : str
        Name of the API key, empty where the server asks for none.
    body : mapping
        What the client sent, for engines that send it on.
    trace : mapping
        The headers ``traceparent`` and ``tracestate`` of the request, as far as given.
    """

    stream: str
    model: str
    messages: tuple[Mapping[str, Any], ...] | None
    prompt: str | tuple[int, ...] | None
    max_tokens: int
    tier: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    conversation: str | None = None
    prior: tuple[float, ...] | None = None
    client: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversation_id(self) -> str | None:
        """What the turn gate keeps its ledger under: no client reaches another's conversations."""
        return None if self.conversation is None else f"{self.client}:{self.conversation}"

    trace: Mapping[str, str] = field(default_factory=dict)


class Released(NamedTuple):
    """Text that may leave, and the last of its tokens: a ``released`` event, before it is one.

    To make the event takes 4 us, as long as all else that a token needs before it is written.
    """

    position: int | None
    risk: float | None
    text: str


Follower = Callable[[Released | Event], None]
"""Takes what happens to a stream. It must not raise: all other streams' tokens come behind it."""


class Events:
    """What happens to one stream, on its way to the one who follows it.

    What comes before waits here, a response at most. It is handed over rather than awaited since to
    wake a task for each of the 200 tokens of a step costs more than to write them.
    """

    def __init__(self) -> None:
        self._waiting: deque[Released | Event] = deque()
        self._follower: Follower | None = None

    def follow(self, follower: Follower) -> None:
        """Hand over what has come, and from now on what comes."""
        while self._waiting:
            follower(self._waiting.popleft())
        self._follower = follower

    def put(self, event: Released | Event) -> None:
        """Hand over, or keep."""
        if self._follower is None:
            self._waiting.append(event)
        else:
            self._follower(event)


class Stream(Protocol):
    """One response on its way.

    The last of its events is ``finished``, whose message is the finish reason, or ``error``.
    """

    ask: Ask
    prompt_tokens: int
    completion_tokens: int
    """Tokens that have left."""

    @property
    def halt_message(self) -> str | None:
        """What the policy has clients told of a halt."""

    def follow(self, follower: Follower) -> None:
        """Hand over what has come, in order, and from now on what comes; once."""

    def cancel(self) -> None:
        """Free its slot soon; it then finishes as ``cancelled``. Without effect once it ended."""


class Engine(Protocol):
    """Where responses come from. Everything is called in the event loop.

    Whoever implements it tells a `midstream.serve.feed.Feed` of every stream it opens and of every
    event, soon after it happened and whether or not somebody follows the stream.
    """

    @property
    def models(self) -> tuple[str, ...]:
        """Names under which it answers."""

    @property
    def unready(self) -> str | None:
        """Why it takes no requests now; None when it does."""

    async def submit(self, ask: Ask) -> Stream:
        """Begin a response.

        Raises
        ------
        midstream.serve.errors.ApiError
            For what cannot be served, with what to tell the client.
        """

    async def close(self, drain: float) -> None:
        """Take no more requests, let the streams end within ``drain`` seconds, cut those left."""
