"""Running the application: uvicorn, and an end that drains."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from midstream.serve.app import Front
from midstream.serve.garbage import freeze
from midstream.serve.hosts import is_loopback
from midstream.serve.protocol import guarded
from midstream.serve.reloads import Reloads

_log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds beyond those for draining: for the engine to cut, and for clients to be told."""


_OTHER_FILES = 256  # logs, libraries, the worker's channel


class ListenError(OSError):
    """The address cannot be had."""


class Server(uvicorn.Server):
    """Serves until a signal; then takes no more, lets streams end, and cuts those left.

    A second signal cuts them at once.

    Parameters
    ----------
    app : FastAPI
        From `midstream.serve.app.create_app`.
    drain : float
        Seconds that streams have to end.
    start : callable, optional
        Brings the engine up, while ``/health`` already answers; if it fails the server ends.
    reloads : Reloads, optional
        What becomes of a SIGHUP.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain: float,
        start: Callable[[], Awaitable[None]] | None = None,
        reloads: Reloads | None = None,
    ) -> None:
        self._front: Front = app.state.front
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded(self._front.settings),
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(GRACE),
            )
        )
        self._drain = drain
        self._bring_up = start
        self._reloads = reloads
        self._leaving = False
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None
        """Why the engine did not come up."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and bring the engine up."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._leaving:
            self.drain()
            return
        if self._bring_up is not None:
            self._starting = self._loop.create_task(self._start(self._bring_up))
        if self._reloads is not None:
            self._reloads.begin()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; cut what is left at the second."""
        if not self.started:
            self._leaving = True
        elif self._ending is None:
            self._loop.call_soon_threadsafe(self.drain)
        else:
            self._loop.call_soon_threadsafe(self._front.admission.cut)
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is idle, let those who look on end, and wait for the last connections."""
        for server in self.servers:
            server.close()
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        # Nothing can come any more. The page's viewers end with this; uvicorn would wait for them.
        self._front.feed.close()
        await super().shutdown(sockets)

    def drain(self) -> None:
        """Begin to end; called in the event loop."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _start(self, bring_up: Callable[[], Awaitable[None]]) -> None:
        try:
            await bring_up()
        except Exception as failure:
            self.failure = failure
            self.drain()
        else:
            freeze()

    async def _end(self) -> None:
        front = self._front
        front.admission.draining = True
        if self._starting is not None:
            self._starting.cancel()
        _log.info("stopping; %d requests have %g s to end", front.admission.count, self._drain)
        front.feed.notice("stopping", {"drain": self._drain, "requests": front.admission.count})
        try:
            async with asyncio.timeout(self._drain + GRACE):
                await front.engine.close(self._drain)
        except TimeoutError:
            _log.error("the engine did not end %.0f s after it should have", GRACE)
        except Exception:
            _log.exception("the engine failed to end")
        front.admission.cut()
        self.should_exit = True


def allow_sockets(count: int) -> None:
    """Raise the limit of open files as far as so many sockets, and what else is open, need.

    Often it is 1024: idle clients could then keep the audit log from beginning a file, and a worker
    from being started.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        _log.warning(
            "%d files may be open, and %d connections need %d: raise the limit (ulimit -Hn), or "
            "lower max_connections in the settings", hard, count, needed,
        )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """Socket to serve on.

    Raises
    ------
    ListenError
        Where that is not possible, say because the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}"
        ) from error


def run(
    app: FastAPI,
    *,
    host: str,
    port: int,
    drain: float,
    start: Callable[[], Awaitable[None]] | None = None,
    reloads: Reloads | None = None,
) -> None:
    """Listen, and serve until a signal.

    Parameters
    ----------
    app : FastAPI
    host, port
        Where to listen; port 0 takes a free one.
    drain, start, reloads
        See `Server`.

    Raises
    ------
    ListenError
    Exception
        What ``start`` raised.
    """
    allow_sockets(app.state.front.settings.max_connections)
    try:
        sock = listen(host, port)
    except ListenError:
        app.state.front.feed.close()  # or the audit log would tell of a kill when it goes on
        raise
    server = Server(app, drain=drain, start=start, reloads=reloads)
    if app.state.front.keys.open and not is_loopback(host):
        _log.warning("no API keys: whoever reaches %s may use, and see, everything", host)
    at = f"[{host}]" if ":" in host else host
    _log.info("listening on http://%s:%d", at, sock.getsockname()[1])
    server.run([sock])
    if server.failure is not None:
        raise server.failure
