"""What the server and the process of the model tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from midstream.policy import Policy, TierName
from midstream.streams import Event


@dataclass(frozen=True)
class Plan:
    """What a worker is to serve.

    Attributes
    ----------
    model : str, optional
        Folder; None is the testbed's.
    bundle : bytes
        A pickled `midstream.bundle.Bundle`: the one that was checked, whatever becomes of its
        folder.
    slots : int
    cache_tokens : int, optional
        Tokens of all running requests that the cache holds; None gives each slot the model's
        window, as long as that is `ROOMY` tokens or less.
    batch_tokens : int
        Rows of a step, at most.
    tier : str, optional
        Of requests that ask for none.
    device : str
    threads : int, optional
        Of torch on the CPU; None leaves one core to the server.
    """

    model: str | None
    bundle: bytes
    slots: int
    cache_tokens: int | None
    batch_tokens: int
    tier: str | None
    device: str
    threads: int | None


# -- to the worker --------------------------------------------------------------------------------


class Submit(NamedTuple):
    """A request."""

    stream: str
    messages: tuple[Mapping[str, Any], ...] | None
    prompt: str | tuple[int, ...] | None
    max_tokens: int
    tier: str | None
    sampling: Mapping[str, float]
    prior: tuple[float, ...] | None


class Cancel(NamedTuple):
    """End a stream."""

    stream: str


class Look(NamedTuple):
    """Tell the scores of every token of a stream, or stop doing so."""

    stream: str
    on: bool


class Ping(NamedTuple):
    """Say something, from where the model runs, if nothing else is to be told.

    The worker that writes lets it be: while it has streams, a step follows the other.
    """


# -- from the worker ------------------------------------------------------------------------------


class Ready(NamedTuple):
    """It serves. The first message, if it is not ``Failed``."""

    bundle: str
    policy: Policy
    tier: TierName
    slots: int


class Failed(NamedTuple):
    """It ends, and why."""

    reason: str


class Accepted(NamedTuple):
    """A request became a stream."""

    stream: str
    prompt_tokens: int


class Refused(NamedTuple):
    """A request cannot be served."""

    stream: str
    status: int
    message: str
    code: str
    param: str | None


class Pong(NamedTuple):
    """Answers a ``Ping``."""


class Left(NamedTuple):
    """Tokens that may leave, and the characters that are complete with them.

    ``unscored`` counts those without a score among all that have left of the stream.
    """

    stream: str
    tokens: int
    position: int | None
    risk: float | None
    text: str
    unscored: int = 0


PlainLeft = tuple[str, int, int | None, float | None, str, int]
"""What a `Left` is; as a plain tuple it is pickled in a third of the time."""


class Step(NamedTuple):
    """What has happened since the last one.

    Attributes
    ----------
    ended : float
        `time.monotonic` when the last forward pass had been sampled from and judged.
    rows : int
        Rows folded.
    judge_seconds : float, optional
        How long the host took to judge them; None where there was no forward pass.
    free_slots : int
    told : sequence of Left or Event, or plain tuples in place of Left
    """

    ended: float
    rows: int
    judge_seconds: float | None
    free_slots: int
    told: Sequence[PlainLeft | Event]
