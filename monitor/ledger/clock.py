"""Ages instead of times: what keeps expiry right where clocks are wrong.

Where the clock of whoever writes or expires is ahead or behind, that cancels out of ``now - at``.
The store's clock, against which ages are laid, never goes back: see `StoreClock`.
"""

from __future__ import annotations

import math
import time


def age(at: float) -> float:
    """Seconds since ``at`` by this machine's clock; 0 if it lies ahead.

    Then the clock was put back in between, or the record is from a machine that is ahead.
    """
    return max(0.0, time.time() - at)


def expiry_age(before: float) -> float:
    """Age at which conversations are to be forgotten; below 0 all of them are.

    Raises
    ------
    ValueError
        For a time that is none.
    """
    if math.isnan(before):
        raise ValueError("before is nan, expected a Unix time in seconds")
    return time.time() - before


class StoreClock:
    """Unix time of a store that outlives processes.

    It starts at the machine's time or at the newest time in the store, whichever is later, and goes
    on by the monotonic clock (which stands still while a laptop sleeps: turns live longer then). So

    - a machine's clock put back or forward changes nothing for a process that runs;
    - a process started while the clock is behind (1970 after a power cut) goes on from the newest
      turn, where plain times would make its turns old at once;
    - a process started while the clock is ahead takes the store's clock with it. All processes
      follow, and ages of what is written from then on are right again; nothing lives for ever.
      Only what lay idle at that moment is older than it should be, as after a real pause.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self, newest: float) -> float:
        """Return the time, given the newest in the store."""
        self._offset = max(self._offset, newest - time.monotonic())
        return time.monotonic() + self._offset
