"""Halts over the last minutes, by cause."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

SECONDS = 10
BUCKETS = 60
CAUSES = 12
"""Causes told apart in a bucket; a turn gate may name any number."""


class RecentHalts:
    """Counts of the last ten minutes, in buckets of ten seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._now = self._bucket()
        self._halts: deque[Counter[str]] = deque((Counter() for _ in range(BUCKETS)), BUCKETS)
        self._ended = deque([0] * BUCKETS, BUCKETS)

    def halted(self, cause: str | None) -> None:
        """A stream was halted."""
        self.turn()
        halts, name = self._halts[-1], (cause or "unknown")[:60]
        halts[name if name in halts or len(halts) < CAUSES else "other"] += 1

    def ended(self) -> None:
        """A stream has ended, halted or not."""
        self.turn()
        self._ended[-1] += 1

    def turn(self) -> bool:
        """Begin new buckets as time goes on; whether any did."""
        before, self._now = self._now, self._bucket()
        for _ in range(min(self._now - before, BUCKETS)):
            self._halts.append(Counter())
            self._ended.append(0)
        return self._now > before

    def counts(self) -> dict[str, Any]:
        """For the page, oldest first."""
        causes: Counter[str] = Counter()
        for bucket in self._halts:
            causes.update(bucket)
        return {
            "seconds": SECONDS,
            "halts": [bucket.total() for bucket in self._halts],
            "ended": list(self._ended),
            "causes": causes.most_common(),
        }

    @staticmethod
    def _bucket() -> int:
        return int(time.monotonic() // SECONDS)
