"""Which worker serves: the first, the next after one died, the next after a reload."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from midstream.bundle import Bundle, BundleError
from midstream.serve.feed import EngineStats, Feed
from midstream.serve.messages import Plan
from midstream.serve.reloads import BusyError, ReloadError
from midstream.serve.serving import Judged, Main, Serving
from midstream.serve.watchdog import USUAL, Silence, hung
from midstream.serve.workers import WorkerError

_log = logging.getLogger(__name__)

STATS_EVERY = 1.0  # seconds
BACK_OFF = 0.5  # seconds before the first restart; doubled with each that fails
LONGEST_BACK_OFF = 30.0
STEADY = 60.0  # seconds after which a worker's end has nothing to do with the one before
CUT = 2.0  # seconds for streams that are cut to say so


class Rotation:
    """One worker that takes requests, and those before it that finish their streams.

    Parameters
    ----------
    feed : Feed
        Told of everything.
    folder : path, optional
        Of the first bundle; the testbed's when not given.
    plan : dict
        Fields of `Plan`, but for the bundle.
    main : callable
        What runs in the worker.
    silence : Silence
        How long nothing may come from a worker; then it is killed.
    """

    _serve: type[Serving] = Serving

    def __init__(
        self,
        feed: Feed,
        folder: str | Path | None,
        plan: dict[str, Any],
        main: Main,
        silence: Silence = USUAL,
    ) -> None:
        self.feed = feed
        self._folder, self._plan, self._main = folder, plan, main
        self._silence = silence
        self._slots = int(plan["slots"])
        self._serving: Serving | None = None
        self._draining: set[Serving] = set()
        self._judged = Judged()
        self._changing = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None
        self._unready: str | None = "it was not started"
        self._retry_after: float | None = None
        self._bundle: Bundle | None = None
        self._closing = False
        self._failures = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stats: asyncio.Task[Any] | None = None

    @property
    def unready(self) -> str | None:
        """Why it takes no requests now; None when it does."""
        return self._unready

    @property
    def bundle(self) -> Bundle | None:
        """What new streams are judged by; None before it was started."""
        return self._bundle

    @property
    def busy(self) -> str | None:
        """Why another bundle cannot be taken now; None when it can, or never will be."""
        if self._closing:
            return None
        if self._bundle is None or self._changing.locked():
            return "the model is being loaded"
        return "streams of the last reload are still running" if self._draining else None

    async def start(self) -> None:
        """Load the bundle, start the worker and wait until it serves.

        Raises
        ------
        BundleError
        WorkerError
            When the model cannot be served.
        """
        self._unready = "the model is being loaded"
        try:
            async with self._changing:
                bundle = await asyncio.to_thread(_load, self._folder)
                serving = await self._install(bundle)
        except BaseException:
            self._unready = "the model could not be loaded"
            raise
        self._stats = asyncio.get_running_loop().create_task(self._tell_stats())
        self.feed.notice("started", {"bundle": bundle.hash, "pid": serving.worker.pid})

    async def reload(self, folder: str | Path | None) -> str:
        """Judge streams from now on by another bundle; return its hash.

        A second worker is started with it. Until that serves, and if it cannot, nothing changes;
        then new requests go there, and the first worker ends with its last stream.

        Raises
        ------
        ReloadError
            With the cause, which was also logged and told to the feed.
        """
        before = self._serving.ready.bundle if self._serving and self._serving.ready else None
        try:
            if self._closing:
                raise ReloadError("the server is shutting down")
            if self._changing.locked():
                raise BusyError("another reload or a restart is under way; try again later")
            if self._draining:
                raise BusyError("streams of the last reload are still running; try again later")
            async with self._changing:
                bundle = await asyncio.to_thread(_load, folder)
                old = self._serving
                serving = await self._install(bundle)
                if old is not None:
                    self._drain(old)
        except (ReloadError, BundleError, WorkerError, OSError) as error:
            _log.error("the bundle was not reloaded: %s", error)
            self.feed.notice("reload_refused", {"bundle": before, "reason": str(error)})
            if isinstance(error, ReloadError):
                raise
            raise ReloadError(str(error)) from error
        _log.info("reloaded: bundle %s, after %s", bundle.hash, before)
        facts = {"bundle": bundle.hash, "before": before, "pid": serving.worker.pid}
        self.feed.notice("reloaded", facts)
        return bundle.hash

    async def close(self, drain: float) -> None:
        """Take no more requests, let the streams end within ``drain`` seconds, cut those left."""
        if self._closing:
            return
        self._closing, self._unready = True, "the server is shutting down"
        # No stream is to wait for a model that is being loaded; told twice, it would not clean up.
        if self._starting is not None and not self._starting.cancelling():
            self._starting.cancel()
        async with self._changing:
            live = self._live
        try:
            if not await _all_idle(live, drain):
                for serving in live:
                    for stream in list(serving.streams.values()):
                        stream.cancel()
                if not await _all_idle(live, CUT):  # to hang up and wait would only take longer
                    for serving in live:
                        serving.worker.kill("did not end its streams in time")
            await asyncio.gather(*(serving.worker.stop() for serving in live))
        except asyncio.CancelledError:
            for serving in live:  # or the exit of this process would wait for theirs
                serving.worker.kill("was not waited for")
            raise
        tasks = [*self._tasks, *([self._stats] if self._stats else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _live(self) -> list[Serving]:
        return [*([self._serving] if self._serving else []), *self._draining]

    async def _install(self, bundle: Bundle) -> Serving:
        """Start a worker with the bundle and send new requests there; the lock is held."""
        if self._closing:  # while the bundle was read
            raise WorkerError("the server is shutting down")
        plan = Plan(bundle=pickle.dumps(bundle), **self._plan)
        serving = self._serve(plan, self._main, self.feed, self._judged, self._lost)
        self._starting = asyncio.get_running_loop().create_task(serving.start())
        self._spawn(self._watch(serving))
        try:
            await self._starting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerError("the server is shutting down") from None
        finally:
            self._starting = None
        if serving.ending:  # it was gone as soon as it had said that it serves
            raise WorkerError(serving.failure or f"the model's process {serving.ending}")
        self._bundle = bundle
        self._serving = serving
        if not self._closing:
            self._unready = self._retry_after = None
        return serving

    async def _watch(self, serving: Serving) -> None:
        """Kill a worker that hangs; what is to be done then is that of any killed one."""
        if (why := await hung(serving, self._silence)) is None:
            return
        pid = serving.worker.pid
        _log.error("the model's process %d hangs, and is killed: %s", pid, why)
        self.feed.notice("worker_hung", {"pid": pid, "reason": why})
        serving.worker.kill("hung")

    def _drain(self, serving: Serving) -> None:
        if serving.ending:  # it died while the other one was started
            return
        self._draining.add(serving)

        async def stop() -> None:
            await serving.idle.wait()
            await serving.worker.stop()

        self._spawn(stop())

    def _lost(self, serving: Serving) -> None:
        """A worker's process is gone; its streams were told."""
        self._draining.discard(serving)
        if serving is not self._serving:
            return
        self._serving = None
        if self._closing:
            return
        steady = time.monotonic() - serving.since > STEADY
        self._failures = 0 if steady else self._failures
        wait = self._failed(f"the model's process {serving.ending}", serving.failure)
        self._spawn(self._restart(wait))

    def _failed(self, ending: str, failure: str | None) -> float:
        """No worker serves: say so; return the seconds until another is started."""
        doublings = min(self._failures, 32)  # 2**1024, after a night of failures, is no float
        wait: float = min(BACK_OFF * 2**doublings, LONGEST_BACK_OFF)
        self._failures += 1
        self._unready, self._retry_after = f"{ending}; another is started", wait
        why = "" if failure is None else f": {failure}"
        _log.error("%s; another is started in %g s%s", ending, wait, why)
        facts = {"ending": ending, "failure": failure, "restart_after": wait}
        self.feed.notice("worker_lost", facts)
        return wait

    async def _restart(self, wait: float) -> None:
        assert self._bundle is not None  # it ran before
        while True:
            await asyncio.sleep(wait)
            try:
                async with self._changing:
                    if self._closing or self._serving is not None:  # a reload was quicker
                        return
                    serving = await self._install(self._bundle)
            except Exception as error:
                if self._closing:
                    return
                if not isinstance(error, WorkerError | OSError):  # no thread to be had, or a bug
                    _log.exception("the model's process could not be started")
                wait = self._failed("the model's process could not start", str(error))
                continue
            facts = {"bundle": self._bundle.hash, "pid": serving.worker.pid}
            self.feed.notice("worker_restarted", facts)
            return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_EVERY)
            live = self._live
            used = sum(self._slots - serving.free_slots for serving in live)
            streams = sum(len(serving.streams) for serving in live)
            rows, seconds = self._judged.take()
            self.feed.stats(
                EngineStats(
                    slots=self._slots * len(live),
                    slots_used=used,
                    waiting=max(0, streams - used),
                    judged_rows=rows,
                    judge_seconds=tuple(seconds),
                )
            )


def _load(folder: str | Path | None) -> Bundle:
    if folder is not None:
        return Bundle.load(folder)
    from midstream import testbed

    return testbed.load_bundle()


async def _all_idle(servings: list[Serving], seconds: float) -> bool:
    """Wait until no stream is left; False if that takes longer."""
    waits = asyncio.gather(*(serving.idle.wait() for serving in servings))
    try:
        await asyncio.wait_for(waits, seconds)
    except TimeoutError:
        return False
    return True
