"""Those who look on: every stream's events, handed to metrics, audit log, page and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.serve.engine import Ask
from midstream.streams import Event

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A stream that was taken in.

    Attributes
    ----------
    ask : Ask
    tier : str
        What it is judged by.
    bundle : str
        Hash of the bundle it is judged by to its end.
    at : float
        Seconds since the epoch, to show; intervals are taken from ``clock``.
    clock : float
        `time.monotonic` of the same moment.
    """

    ask: Ask
    tier: str
    bundle: str
    at: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it last told, and how full it is.

    Attributes
    ----------
    slots, slots_used : int
        Of the monitor.
    waiting : int
        Requests that wait for a slot.
    judged_rows : int
        Rows folded since the last time.
    judge_seconds : tuple of float
        For each step since the last time, how long the host took to judge it.
    """

    slots: int
    slots_used: int
    waiting: int
    judged_rows: int
    judge_seconds: tuple[float, ...]


class Observer:
    """Looks on. Called in the event loop, so it must not block; what it does not need it leaves."""

    def opened(self, stream: Opened) -> None:
        """A stream was taken in."""

    def event(self, stream: Opened, event: Event) -> None:
        """Something happened to it; after ``finished`` or ``error`` nothing more does."""

    def refused(self, client: str, status: int, code: str) -> None:
        """A request was refused before it became a stream."""

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Something happened to the server: ``started``, ``reloaded``, ``reload_refused``, ..."""

    def stats(self, stats: EngineStats) -> None:
        """How full the engine is; about once a second."""

    def close(self) -> None:
        """The server ends."""


class Feed(Observer):
    """Hands everything on to several observers; one that fails does not disturb the others.

    Parameters
    ----------
    observers : sequence of Observer
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)
        self.failures = 0
        """Calls that an observer did not take."""

    def add(self, observer: Observer) -> None:
        """Let one more look on, from now."""
        self._observers.append(observer)

    def opened(self, stream: Opened) -> None:
        """Hand on."""
        self._each(lambda observer: observer.opened(stream))

    def event(self, stream: Opened, event: Event) -> None:
        """Hand on."""
        self._each(lambda observer: observer.event(stream, event))

    def refused(self, client: str, status: int, code: str) -> None:
        """Hand on."""
        self._each(lambda observer: observer.refused(client, status, code))

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Hand on."""
        self._each(lambda observer: observer.notice(kind, facts))

    def stats(self, stats: EngineStats) -> None:
        """Hand on."""
        self._each(lambda observer: observer.stats(stats))

    def close(self) -> None:
        """Hand on."""
        self._each(lambda observer: observer.close())

    def _each(self, call: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                call(observer)
            except Exception:
                self.failures += 1
                _log.exception("%s failed to look on", type(observer).__name__)
