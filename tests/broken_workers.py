"""What goes wrong in a worker, for the tests; run in the worker's process, in place of its main."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from midstream.serve import worker
from midstream.serve.channel import Channel


def failing(flag: str, dead: str, pause: str, channel: Channel, plan: Any) -> None:
    """The forward pass fails in the middle of a batch when the one file is there, once.

    While the second one is there, no worker starts; the third one is that of `pausing`.
    """
    if Path(dead).exists():
        os._exit(7)
    judge = worker.Batching.judge

    def broken(self: worker.Batching, scores: Any) -> Any:
        if Path(flag).exists():
            Path(flag).unlink()
            raise RuntimeError("out of memory in /home/operator/secret.py")
        return judge(self, scores)

    worker.Batching.judge = broken  # type: ignore[method-assign]
    pausing(pause, channel, plan)


def pausing(flag: str, channel: Channel, plan: Any) -> None:
    """While the file is there, nothing begins before as many requests are there as it says.

    These then begin together, and stand still when one has written three tokens.
    """
    before = worker.Batching.before_step

    def holds(self: worker.Batching) -> bool:
        with suppress(FileNotFoundError):
            together = int(Path(flag).read_text() or 1)
            with self._lock:  # what is there was handed over, too
                written = [request.response_tokens for request in self._requests.values()]
            return bool(written) and (len(written) < together or max(written) > 2)
        return False

    def waits(self: worker.Batching) -> None:
        before(self)
        while holds(self):
            time.sleep(0.005)
            before(self)  # what is cancelled meanwhile ends

    worker.Batching.before_step = waits  # type: ignore[method-assign]
    worker.main(channel, plan)


def jumping(channel: Channel, plan: Any) -> None:
    """The wall clock of the process jumps to and fro."""
    right, calls = time.time, iter(range(1 << 60))
    time.time = lambda: right() + (1e9, -1e9, 0.0)[next(calls) % 3]
    worker.main(channel, plan)
