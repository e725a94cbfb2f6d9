"""Signals and ends that come while something else is under way."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import quiet_workers
from http_service import Service, wait_for
from quiet_house import house, until
from serving import PATIENCE, ask, events_of

from midstream import testbed
from midstream.bundle import Bundle
from midstream.policy import Thresholds
from midstream.serve import rotation, workers
from midstream.serve.reloads import BusyError, ReloadError, Reloads
from midstream.serve.rotation import CUT
from midstream.serve.run import ListenError, Server, listen, run
from midstream.serve.workers import WorkerError

# -- SIGHUP ---------------------------------------------------------------------------------------


class Engine:
    """Takes bundles when it is told to."""

    def __init__(self, *refusals: ReloadError) -> None:
        self.busy: str | None = None
        self.reloads = 0
        self.refusals = list(refusals)
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def reload(self) -> None:
        self.reloads += 1
        await self.may_end.wait()
        if self.refusals:
            raise self.refusals.pop(0)


async def settled(reloads: Reloads) -> None:
    """What was signalled has been heard, and is done."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    while reloads._task is not None and not reloads._task.done():
        await asyncio.sleep(0.01)


@pytest.fixture
def reloads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("midstream.serve.reloads._EVERY", 0.0)
    with Reloads() as made:
        yield made
    assert signal.getsignal(signal.SIGHUP) is not made._hung_up


def test_a_hang_up_before_the_server_runs_is_not_lost(
    reloads: Reloads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "midstream")
    signal.raise_signal(signal.SIGHUP)

    async def check() -> None:
        engine = Engine()
        engine.busy = "the model is being loaded"
        reloads.use(engine.reload, engine)
        reloads.begin()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not engine.reloads
        engine.busy = None
        await settled(reloads)
        assert engine.reloads == 1

    asyncio.run(check())
    assert "SIGHUP: the bundle is read again later, as the model is being loaded" in caplog.text


def test_of_many_hang_ups_one_waits(reloads: Reloads) -> None:
    async def check() -> None:
        engine = Engine()
        reloads.use(engine.reload, engine)
        reloads.begin()
        engine.may_end.clear()
        signal.raise_signal(signal.SIGHUP)
        while not engine.reloads:
            await asyncio.sleep(0)
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        for _ in range(10):
            await asyncio.sleep(0)
        assert engine.reloads == 1
        engine.may_end.set()
        await settled(reloads)
        assert engine.reloads == 2
        signal.raise_signal(signal.SIGHUP)
        await settled(reloads)
        assert engine.reloads == 3

    asyncio.run(check())


def test_a_bundle_that_is_refused_is_not_tried_again_but_one_that_came_too_early_is(
    reloads: Reloads,
) -> None:
    async def check() -> None:
        engine = Engine(BusyError("a restart"), ReloadError("nonsense"))
        reloads.use(engine.reload, engine)
        reloads.begin()
        signal.raise_signal(signal.SIGHUP)
        await settled(reloads)
        assert engine.reloads == 2

    asyncio.run(check())


def test_what_nobody_thought_of_is_logged_and_ends_no_later_reload(
    reloads: Reloads, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        engine = Engine(RuntimeError("can't start new thread"))  # type: ignore[arg-type]
        reloads.use(engine.reload, engine)
        reloads.begin()
        for count in (1, 2):
            signal.raise_signal(signal.SIGHUP)
            await settled(reloads)
            assert engine.reloads == count

    asyncio.run(check())
    assert caplog.text.count("the bundle was not reloaded\n") == 1


def test_a_reload_waits_for_the_streams_of_the_last_one(
    reloads: Reloads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "midstream")
    with house() as made:
        engine = made.engine

        async def check() -> None:
            assert engine.busy is None
            reloads.use(lambda: engine.reload(None), engine)
            reloads.begin()
            stream = await engine.submit(ask())
            signal.raise_signal(signal.SIGHUP)
            await until(lambda: "reloaded" in made.seen.kinds())
            assert engine.busy == "streams of the last reload are still running"
            signal.raise_signal(signal.SIGHUP)
            await until(lambda: "later, as streams of the last reload" in caplog.text)
            assert made.seen.kinds() == ["started", "reloaded"]
            stream.cancel()
            await events_of(stream)
            await settled(reloads)

        made.run(check())
        assert made.seen.kinds() == ["started", "reloaded", "reloaded"]
        assert caplog.text.count("reloaded: bundle") == 2


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import quiet_workers
from midstream.cli import main
from midstream.serve.proxy import ProxyEngine
ProxyEngine.__init__.__kwdefaults__["main"] = quiet_workers.answering
if __name__ == "__main__":
    main()
"""


def test_the_proxy_reads_its_bundle_again_at_a_hang_up(tmp_path: Path) -> None:
    """The command as it is, but for what runs in the worker."""
    folder, script, log = tmp_path / "bundle", tmp_path / "command.py", tmp_path / "log"
    shutil.copytree(testbed.BUNDLE_DIR, folder)
    script.write_text(SCRIPT)
    ours = Bundle.load(folder)
    options = ["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "theirs"]
    command = [sys.executable, script, str(Path(__file__).parent), "proxy", *options]
    with log.open("w") as writing:
        child = subprocess.Popen([*command, "--bundle", folder, "--port", "0"], stderr=writing)

    def told() -> str:
        assert child.poll() is None, log.read_text()
        return log.read_text()

    def get(path: str) -> str:
        told()
        return httpx.get(url + path, timeout=PATIENCE).text

    try:
        wait_for(lambda: "listening on http" in told())
        url = told().split("listening on ")[1].split()[0]
        wait_for(lambda: '"ready"' in get("/ready"))
        tiers = {name: Thresholds(horizon=24, halt_at=0.0) for name in ours.policy.tiers}
        strict = ours.with_policy(ours.policy.model_copy(update={"tiers": tiers}))
        shutil.rmtree(folder)
        strict.save(folder)
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: 'reloads_total{model_name="theirs",outcome="done"} 1.0' in get("/metrics"))
        assert f'bundle="{strict.hash}"' in get("/metrics")
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 0
    finally:
        child.kill()
        child.wait()
    assert f"reloaded: bundle {strict.hash}, after {ours.hash}" in log.read_text()


def test_a_worker_lives_on_after_a_hang_up() -> None:
    """As when a terminal is closed, which tells all of its processes."""
    with house(quiet_workers.hung_up) as made:
        assert made.seen.kinds() == ["started"]


# -- the end --------------------------------------------------------------------------------------


def test_a_signal_before_the_server_has_started_ends_it_as_any_other() -> None:
    service, started = Service(), []

    async def start() -> None:
        started.append(True)

    server = Server(service.app, drain=5.0, start=start)
    server.handle_exit(signal.SIGTERM, None)
    server.run([listen("127.0.0.1", 0)])  # returns, and the process is not left to the signal
    assert service.watching.notices == ["stopping"]
    assert not started


def test_a_server_that_cannot_listen_closes_its_log() -> None:
    """Else the next one to write there would take it for killed."""
    service, closed = Service(), []
    service.app.state.front.feed.close = lambda: closed.append(True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenError, match="cannot listen"):
            run(service.app, host="127.0.0.1", port=taken.getsockname()[1], drain=0.0)
    assert closed == [True]


class Spawning:
    """Makes processes whose start takes as long as it is let."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.made: list[Any] = []

    def Process(self, **options: Any) -> Any:
        process = self._context.Process(**options)
        self.made.append(process)

        class Slow:
            def start(_: Any) -> None:
                self.began.set()
                assert self.may_go_on.wait(PATIENCE)
                process.start()

            def __getattr__(_, name: str) -> Any:
                return getattr(process, name)

        return Slow()


def test_an_end_while_a_worker_is_being_spawned_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawning = Spawning(workers._SPAWN)
    monkeypatch.setattr(workers, "_SPAWN", spawning)
    with house(start=False) as made:

        async def check() -> None:
            starting = asyncio.create_task(made.engine.start())
            await until(spawning.began.is_set)
            starting.cancel()  # as the server does
            closing = asyncio.create_task(made.engine.close(0.0))
            for _ in range(10):
                await asyncio.sleep(0)
            spawning.may_go_on.set()
            await closing
            with pytest.raises(asyncio.CancelledError):
                await starting

        made.run(check())
        (process,) = spawning.made
        assert process.exitcode == -signal.SIGKILL


def test_a_model_that_is_being_loaded_is_killed_and_not_only_hung_up_on() -> None:
    """Who is told twice to end does no more than that, and waits for it at the exit."""
    with house(quiet_workers.stuck, start=False) as made:

        async def check() -> int | None:
            starting = asyncio.create_task(made.engine.start())
            await until(lambda: made.engine._starting is not None)
            worker = made.engine._starting.get_coro().cr_frame.f_locals["self"].worker
            await until(lambda: worker.running)
            starting.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            worker._process.join(PATIENCE)  # and nothing else can be done in this loop
            with pytest.raises(asyncio.CancelledError):
                await starting
            return worker._process.exitcode

        assert made.run(check()) == -signal.SIGKILL


def test_an_end_while_a_bundle_is_read_for_a_reload_starts_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, may_go_on, load = threading.Event(), threading.Event(), rotation._load
    with house() as made:

        def slow(folder: Any) -> Bundle:
            reading.set()
            assert may_go_on.wait(PATIENCE)
            return load(folder)

        monkeypatch.setattr(rotation, "_load", slow)

        async def check() -> None:
            reloading = asyncio.create_task(made.engine.reload(None))
            await until(reading.is_set)
            monkeypatch.setattr(made.engine, "_serve", None)  # a worker could not even be made
            closing = asyncio.create_task(made.engine.close(0.0))
            await asyncio.sleep(0)
            may_go_on.set()
            await closing
            with pytest.raises(ReloadError, match="shutting down") as refused:
                await reloading
            assert isinstance(refused.value.__cause__, WorkerError)

        made.run(check())


def test_a_worker_that_does_not_end_its_streams_is_not_waited_for_twice() -> None:
    """Its clients have gone; it is as slow to hear of it as one on a loaded machine."""
    with house() as made:

        async def check() -> Any:
            serving = made.engine._serving
            streams = [await made.engine.submit(ask()) for _ in range(28)]
            os.kill(made.worker.pid, signal.SIGSTOP)
            for stream in streams:
                stream.cancel()
            closing = asyncio.create_task(made.engine.close(0.0))
            await made.stand_still(0.0)
            await made.stand_still(CUT)
            await closing
            return serving, [await events_of(stream) for stream in streams]

        serving, told = made.run(check())
        assert serving.ending == "did not end its streams in time"
        assert {events[-1].type for events in told} == {"error"}
        assert not psutil.pid_exists(serving.worker.pid)


def test_nobody_who_gives_up_on_the_end_leaves_a_worker_behind() -> None:
    """The exit of this process would wait for the other's."""
    with house() as made:

        async def check() -> None:
            serving = made.engine._serving
            await made.engine.submit(ask())
            os.kill(made.worker.pid, signal.SIGSTOP)
            closing = asyncio.create_task(made.engine.close(1e9))
            await asyncio.sleep(0.01)
            closing.cancel()
            await until(lambda: serving.ending)
            assert serving.ending == "was not waited for"
            with pytest.raises(asyncio.CancelledError):
                await closing

        made.run(check())


# -- starting again -------------------------------------------------------------------------------


def test_a_worker_is_started_again_after_whatever_kept_it_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rotation, "BACK_OFF", 0.0)
    with house() as made:
        install, failures = made.engine._install, [RuntimeError("can't start new thread")]

        async def failing(bundle: Bundle) -> Any:
            if failures:
                raise failures.pop()
            return await install(bundle)

        async def check() -> None:
            monkeypatch.setattr(made.engine, "_install", failing)
            os.kill(made.worker.pid, signal.SIGKILL)
            await until(lambda: "worker_restarted" in made.seen.kinds())

        made.run(check())
        assert made.seen.kinds() == ["started", "worker_lost", "worker_lost", "worker_restarted"]
        assert "can't start new thread" in caplog.text


def test_however_often_it_fails_it_is_tried_again() -> None:
    """2 to the power of the failures would be no float after a night."""
    with house(start=False) as made:
        waits = [made.engine._failed("it could not start", None) for _ in range(2000)]
    assert waits[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert set(waits[8:]) == {30.0}
