"""The server's hold on one process that it started: its messages, and its end."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from midstream.serve.channel import Channel, ChannelProtocol

_log = logging.getLogger(__name__)
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
        self._running = False
        self._gone = asyncio.Event()
        self._killed: str | None = None
        self._reaping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process; it may then not be ready for long."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._process = _SPAWN.Process(
            target=_run, args=(self._main, theirs, self._plan), daemon=True, name="midstream-worker"
        )
        spawning = asyncio.ensure_future(asyncio.to_thread(self._process.start))
        try:
            await asyncio.shield(spawning)
            await loop.create_unix_connection(lambda: self._protocol, sock=ours)
        except BaseException:
            ours.close()
            await self._call_off(spawning)
            raise
        finally:
            theirs.close()
        self._running = True

    async def _call_off(self, spawning: asyncio.Future[None]) -> None:
        """End the process that nobody wants any more; the thread that starts it goes on anyway."""
        await asyncio.wait((spawning,))
        if spawning.exception() is None:
            self._process.kill()
            await asyncio.to_thread(self._process.join, _PATIENCE)

    @property
    def running(self) -> bool:
        """Whether it was started, and is not known to be gone."""
        return self._running and not self._gone.is_set()

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

    def kill(self, why: str) -> None:
        """Kill the process, and hang up: one that is stuck in a driver does not even die.

        ``ended`` is told ``why``, and not that it was killed.
        """
        self._killed = why
        self._process.kill()
        self._protocol.close()

    def _lost(self) -> None:
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        await asyncio.to_thread(self._process.join, _PATIENCE)
        how = self._killed or _how(self._process.exitcode)
        if self._process.exitcode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.join, _PATIENCE)
        if self._process.exitcode is None:
            _log.error("process %d does not die of SIGKILL; it is left behind", self.pid)
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
