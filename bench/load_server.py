"""``midstream serve`` whose worker also notes when each step ended and whose text it let go.

    python bench/load_server.py LOG [options of midstream serve]

Everything else is the command as it is installed. The log is written by the worker, after the step
was sent to the server.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from midstream.serve.channel import Channel
from midstream.serve.local import LocalEngine, serve_model
from midstream.serve.messages import Left, Plan, Step
from midstream.streams import Event

RECORD = struct.Struct("12sd")
"""End of a stream's id, and `time.monotonic` when the step was done that let some text of it go."""
LOG = "MIDSTREAM_BENCH_LOAD_LOG"


def key_of(stream: str) -> bytes:
    """The random part of a stream's id."""
    return bytes.fromhex(stream.rpartition("-")[2])


class _Noting:
    """A worker's end of the channel."""

    def __init__(self, channel: Channel, log: Any) -> None:
        self._channel, self._log = channel, log

    def __iter__(self) -> Iterator[Any]:
        return iter(self._channel)

    def close(self) -> None:
        self._channel.close()

    def send(self, message: Any) -> None:
        self._channel.send(message)
        if isinstance(message, Step):
            ended = message.ended
            self._log.write(
                b"".join(
                    RECORD.pack(key_of(left.stream), ended)
                    for told in message.told
                    if not isinstance(told, Event) and (left := Left(*told)).text
                )
            )


def noting(channel: Channel, plan: Plan) -> None:
    """What runs in the worker."""
    with open(os.environ[LOG], "ab", buffering=0) as log:  # whole also where this is killed
        serve_model(_Noting(channel, log), plan)  # type: ignore[arg-type]


def main() -> None:
    """Serve."""
    from midstream import cli

    log = Path(sys.argv.pop(1))
    log.write_bytes(b"")
    os.environ[LOG] = str(log)
    assert LocalEngine.__init__.__kwdefaults__ is not None
    LocalEngine.__init__.__kwdefaults__["main"] = noting
    sys.argv[1:1] = ["serve"]
    cli.main()


if __name__ == "__main__":
    from load_server import main as as_module  # so that the worker can import what it runs

    as_module()
