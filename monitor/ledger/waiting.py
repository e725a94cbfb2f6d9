"""A lock that is handed over in order, and not waited for once there is nothing left to do with it.

`midstream.ledger.sqlite` has one thread commit what others wait to have written. With a plain lock
those would queue for it once more, behind the next transaction, just to see that they are done: of
64 threads two shared a transaction that way, and 50 do this way. And a plain lock goes to whoever
is quick, so that a thread which asks in a loop keeps the others out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Waiter:
    unless: Callable[[], bool]
    woken: threading.Event = field(default_factory=threading.Event)
    holds: bool = False


class Turns:
    """One thread at a time, first come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for moments, never while anybody waits
        self._waiting: deque[_Waiter] = deque()
        self._taken = False

    def take(
        self, unless: Callable[[], bool] = lambda: False, timeout: float | None = None
    ) -> bool:
        """Wait for the turn, which whoever gets it must pass on.

        Parameters
        ----------
        unless : callable
            Whether it is needed no more; looked at whenever a turn ends.
        timeout : float, optional
            Seconds.

        Returns
        -------
        bool
            Whether the turn was given: not after the timeout, nor where it is not needed.
        """
        with self._lock:
            if unless():
                return False
            if not self._taken:
                self._taken = True
                return True
            waiter = _Waiter(unless)
            self._waiting.append(waiter)
        try:
            waiter.woken.wait(timeout)
        except BaseException:  # Ctrl-C
            if self._leave(waiter):
                self.pass_on()
            raise
        return self._leave(waiter)

    def pass_on(self) -> None:
        """End the turn: wake all that need none any more, and the first that does."""
        with self._lock:
            self._taken = False
            needed: deque[_Waiter] = deque()
            for waiter in self._waiting:
                if waiter.unless():
                    waiter.woken.set()
                elif self._taken:
                    needed.append(waiter)
                else:
                    self._taken = waiter.holds = True
                    waiter.woken.set()
            self._waiting = needed

    def _leave(self, waiter: _Waiter) -> bool:
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            return waiter.holds
