"""Noticing that a worker hangs: its process lives, and nothing comes from it any more."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from midstream.serve.messages import Ping
from midstream.serve.serving import Serving

_LOOKS = 8  # within the shorter time, at whether something came


class Silence(NamedTuple):
    """How long nothing may come from a worker.

    Attributes
    ----------
    load_seconds : float
        Until it serves.
    hang_seconds : float
        While it has streams: longer than its longest step, and its first one. A worker without
        streams may be silent.
    """

    load_seconds: float = 1800.0
    hang_seconds: float = 120.0


USUAL = Silence()


async def hung(serving: Serving, silence: Silence) -> str | None:
    """Wait until a worker has been silent for too long, and say so; None when it has ended.

    Silence is counted in looks and not taken from a clock. Where the server itself stood still
    (stopped, or starved), many seconds are one look late, and before the next one the loop has read
    what had come meanwhile.
    """
    every = min(silence.load_seconds, silence.hang_seconds) / _LOOKS
    heard = looks = 0
    while not serving.ending:
        await asyncio.sleep(every)
        worker, loading = serving.worker, serving.ready is None
        owes = worker.running and (loading or bool(serving.streams))
        if not owes or serving.heard != heard:
            heard, looks = serving.heard, 0
            continue
        looks += 1
        if not loading:  # which one may answer that has nothing to tell, as its upstream is silent
            worker.send(Ping())
        seconds = silence.load_seconds if loading else silence.hang_seconds
        if (looks - 1) * every >= seconds:  # the first look can come right after what began it
            doing = "while it loaded" if loading else f"with {len(serving.streams)} streams open"
            return f"nothing came from it for {seconds:g} s {doing}"
    return None
