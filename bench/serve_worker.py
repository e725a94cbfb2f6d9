"""What the server adds to a token: from the worker's step to the reader's hands.

    python bench/serve_worker.py [--streams 200] [--seconds 30]

So many readers in one event loop each ask again as soon as their stream has ended; the model is the
testbed's. For every piece of text: the time from the end of the step that judged it, in the worker,
to the moment at which the reader has the event; decoding, both ends of the channel, and the loop's
way to the reader are in it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from typing import Any

import numpy as np
import uvloop

from midstream import testbed
from midstream.serve import serving as parts
from midstream.serve.engine import Ask
from midstream.serve.feed import EngineStats, Feed, Observer
from midstream.serve.local import LocalEngine
from midstream.serve.messages import Step
from midstream.streams import Event

WARM_UP = 5.0  # seconds that are not counted


class _Stamped(parts.LocalStream):
    """Knows in which step each of its events came up."""

    step = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stamps: deque[float] = deque()

    def put(self, event: Event) -> None:
        self.stamps.append(_Stamped.step)
        super().put(event)


class _Stats(Observer):
    def __init__(self) -> None:
        self.told: list[EngineStats] = []

    def stats(self, stats: EngineStats) -> None:
        self.told.append(stats)


def _stamp(received: Any) -> Any:
    def noting(self: parts.Serving, message: Any) -> None:
        if isinstance(message, Step):
            _Stamped.step = message.ended
        received(self, message)

    return noting


async def measure(streams: int, seconds: float) -> dict[str, float]:
    """Run the load; return the figures."""
    stats = _Stats()
    engine = LocalEngine(Feed([stats]), slots=streams, batch_tokens=1024)
    await engine.start()
    begin = time.monotonic() + WARM_UP
    end = begin + seconds
    delays: list[float] = []

    async def read(reader: int) -> int:
        count = 0
        while time.monotonic() < end:
            prompt = testbed.sample_prompt(reader, count).messages
            ask = Ask(f"{reader}-{count}", "testbed", tuple(prompt), None, 192)
            count += 1
            stream = await engine.submit(ask)
            assert isinstance(stream, _Stamped)
            async for event in stream:
                now, step = time.monotonic(), stream.stamps.popleft()
                if event.type == "released" and begin <= now < end:
                    delays.append(now - step)
        return count

    served = sum(await asyncio.gather(*(read(reader) for reader in range(streams))))
    await engine.close(5.0)
    judged = [s for told in stats.told for s in told.judge_seconds]
    ms = np.array(delays) * 1e3
    return {
        "streams": streams,
        "requests": served,
        "tokens": len(delays),
        "tokens_per_second": len(delays) / seconds,
        "steps": len(judged),
        "judge_p50_ms": float(np.median(judged) * 1e3),
        "added_p50_ms": float(np.percentile(ms, 50)),
        "added_p99_ms": float(np.percentile(ms, 99)),
        "added_max_ms": float(ms.max()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    parts.LocalStream = _Stamped  # type: ignore[misc]
    parts.Serving._received = _stamp(parts.Serving._received)  # type: ignore[method-assign]
    print(json.dumps(uvloop.run(measure(options.streams, options.seconds))))


if __name__ == "__main__":
    main()
