"""The server's hold on one process that it started: its messages, and its end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from midstream.serve.channel import Channel, ChannelProtocol

_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE = 2.0  # seconds in which a process that was hung up on ends by itself


class WorkerError(RuntimeError):
    """A worker that could not start; says why."""


class Worker:
    """One process, and the channel to it. All of it belongs to one event loop.

    Parameters
    ----------
    main : callable
        Run in the process, with its `Channel` and ``plan``; a function of a module.
    plan
        Pickled into the process.
    received : callable
        Given each message.
    ended : callable
        Called once when the process is gone, whoever ended it, and all its messages were handed
        over; with what became of it, such as "was killed by SIGKILL".
    """

    def __init__(
        self,
        main: Callable[[Channel, Any], None],
        plan: Any,
        received: Callable[[Any], None],
        ended: Callable[[str], None],
    ) -> None:
        self._main, self._plan = main, plan
        self._ended = ended
        self._protocol = ChannelProtocol(received, self._lost)
        self._process: Any = None
        self._gone = asyncio.Event()
        self._reaping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process; it may then not be ready for long."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._process = _SPAWN.Process(
            target=_run, args=(self._main, theirs, self._plan), daemon=True, name="midstream-worker"
        )
        try:
            await asyncio.to_thread(self._process.start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        await loop.create_unix_connection(lambda: self._protocol, sock=ours)

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    def send(self, message: Any) -> None:
        """Send a message; without effect once the process is gone."""
        self._protocol.send(message)

    async def stop(self) -> None:
        """Hang up, wait for the process, and kill it where it does not end."""
        self._protocol.close()
        await self._gone.wait()

    def _lost(self) -> None:
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        await asyncio.to_thread(self._process.join, _PATIENCE)
        how = _how(self._process.exitcode)
        if self._process.exitcode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._gone.set()
        self._ended(how)


def _how(exitcode: int | None) -> str:
    if exitcode is None:
        return "hung up and did not end"
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with status {exitcode}"


def _run(main: Callable[[Channel, Any], None], sock: socket.socket, plan: Any) -> None:
    with sock:
        main(Channel(sock), plan)
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and it takes seconds to take torch apart
