"""SIGHUP: the bundle is read again, now or as soon as it can be."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Protocol, Self

_log = logging.getLogger(__name__)

_EVERY = 0.25  # seconds, until it can be


class ReloadError(ValueError):
    """A bundle that was not taken; the one before is in force."""


class BusyError(ReloadError):
    """It could be taken later."""


class Reloadable(Protocol):
    """An engine, as far as it matters here."""

    @property
    def busy(self) -> str | None:
        """Why another bundle cannot be taken now; None when it can."""


class Reloads:
    """Listens as a context manager, in the main thread; without, a SIGHUP ends the process.

    One reload runs at a time, and one waits: it reads what is there when its turn comes, so that a
    further one would bring nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGHUP, self._hung_up)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGHUP, self._before)

    def use(self, reload: Callable[[], Awaitable[object]], engine: Reloadable) -> None:
        """Call ``reload`` when the engine can take it; its `ReloadError` was told already."""
        self._reload, self._engine = reload, engine

    def begin(self) -> None:
        """Do from now on, in this event loop, what was and is asked for."""
        self._loop = asyncio.get_running_loop()
        if self._asked:
            self._wake()

    def _hung_up(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._asked:
            if (busy := self._engine.busy) is not None:
                _log.info("SIGHUP: the bundle is read again later, as %s", busy)
            while self._engine.busy is not None:
                await asyncio.sleep(_EVERY)
            self._asked = False
            try:
                await self._reload()
            except BusyError:  # since then a worker has died, or so
                self._asked = True
            except ReloadError:
                pass
            except Exception:
                _log.exception("the bundle was not reloaded")
