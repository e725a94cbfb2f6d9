"""Workers that hang without dying, and others that only seem to; on a clock that the test moves."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import quiet_workers
from quiet_house import HANG, LOAD, LOOK, Loop, house, until
from serving import PATIENCE, ask, events_of

from midstream import testbed
from midstream.serve import forced_worker, workers
from midstream.serve.channel import Channel
from midstream.serve.messages import Ping, Plan, Pong, Ready
from midstream.serve.workers import WorkerError


@pytest.mark.parametrize("hang", ["stopped", "sleeps"])
def test_a_worker_that_hangs_is_killed_and_another_serves(
    hang: str, caplog: pytest.LogCaptureFixture
) -> None:
    with house() as made:
        engine = made.engine

        async def check() -> Any:
            pid = made.worker.pid
            streams = [await engine.submit(ask()) for _ in range(2)]
            late = None
            if hang == "stopped":
                os.kill(pid, signal.SIGSTOP)
            else:  # it never takes this one, either
                late = asyncio.create_task(engine.submit(ask(prompt="hang")))
            await made.pass_by(HANG - LOOK)
            assert made.worker.running
            assert not made.seen.kinds().count("worker_hung")
            await made.pass_by(3 * LOOK)
            told = [await events_of(stream) for stream in streams]
            reason = engine.unready
            if late is not None:
                with pytest.raises(Exception, match="not ready"):
                    await late
            await until(lambda: engine.unready is None)
            after = await engine.submit(ask())
            after.cancel()
            return pid, told, reason, await events_of(after)

        pid, told, reason, after = made.run(check())
        for events in told:
            assert [event.type for event in events] == ["error"]
            assert (events[0].delivered, events[0].delivered_unscored) == (0, 0)
        assert reason == "the model's process hung; another is started"
        assert after[-1].message == "cancelled"
        assert not psutil.pid_exists(pid)
        assert made.seen.kinds() == ["started", "worker_hung", "worker_lost", "worker_restarted"]
        count = 2 if hang == "stopped" else 3
        facts = made.seen.notices[1][1]
        assert facts == {
            "pid": pid,
            "reason": f"nothing came from it for 120 s with {count} streams open",
        }
        assert f"process {pid} hangs, and is killed: {facts['reason']}" in caplog.text
        assert made.counted("notices", kind="worker_hung") == 1
        assert made.counted("worker_restarts") == 1


def test_a_worker_that_takes_requests_and_writes_none_hangs() -> None:
    """They are taken by a thread of their own, which goes on while the model's does not."""
    with house() as made:

        async def check() -> None:
            for _ in range(4):
                with made.loop.stands():
                    await made.engine.submit(ask())
                await made.pass_by(2 * LOOK)
            assert made.seen.kinds() == ["started"]
            await made.pass_by(2 * LOOK)
            await until(lambda: "worker_lost" in made.seen.kinds())

        made.run(check())
        assert made.seen.notices[1][1]["reason"].endswith("with 4 streams open")


def test_a_worker_that_is_slow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says something just in time, again and again, while the wall clock jumps."""
    right, calls = time.time, iter(range(1 << 60))
    monkeypatch.setattr(time, "time", lambda: right() + (1e9, -1e9, 0.0)[next(calls) % 3])
    with house() as made:

        async def check() -> None:
            stream = await made.engine.submit(ask())
            name = stream.ask.stream
            for _ in range(20):
                await made.pass_by(HANG - LOOK)
                await made.hears(lambda: made.engine.look_closely(name, True))

        made.run(check())
        assert made.seen.kinds() == ["started"]


def test_a_worker_without_streams_may_be_silent() -> None:
    with house() as made:

        async def check() -> None:
            await made.pass_by(10 * HANG)
            stream = await made.engine.submit(ask())
            stream.cancel()
            await events_of(stream)
            await made.pass_by(10 * HANG)

        made.run(check())
        assert made.seen.kinds() == ["started"]


def test_a_worker_with_nothing_to_tell_answers_when_it_is_asked() -> None:
    """As one that reads along does, while the upstream is silent."""
    with house(quiet_workers.answering) as made:

        async def check() -> None:
            await made.engine.submit(ask())
            for _ in range(20):
                await made.pass_by(LOOK)  # what it had said is noticed,
                await made.hears(lambda: made.loop.call_soon(_jump, made.loop))  # then its silence

        made.run(check())
        assert made.seen.kinds() == ["started"]


def _jump(loop: Loop) -> None:
    loop.ahead += LOOK


def test_a_server_that_stood_still_does_not_take_it_for_the_workers_silence() -> None:
    """Stopped for a day; what the worker said meanwhile is still to be read, or it stood, too."""
    with house() as made:

        async def check() -> None:
            stream = await made.engine.submit(ask())
            sock = made.worker._protocol._transport.get_extra_info("socket")
            for _ in range(5):
                await made.pass_by(HANG - LOOK)
                made.engine.look_closely(stream.ask.stream, True)
                # Nothing else runs in the loop meanwhile.
                assert select.select([sock], [], [], PATIENCE)[0]
                await made.stand_still(86400.0)
            await made.stand_still(86400.0)

        made.run(check())
        assert made.seen.kinds() == ["started"]


def test_a_worker_that_never_comes_to_serve_fails_the_start() -> None:
    """It may take longer for that than one with streams may be silent."""
    with house(quiet_workers.stuck, start=False) as made:

        async def check() -> None:
            starting = asyncio.create_task(made.engine.start())
            await until(lambda: made.engine._starting is not None)
            serving = made.engine._starting.get_coro().cr_frame.f_locals["self"]
            await until(lambda: serving.worker.running)
            await made.pass_by(LOAD - LOOK)
            assert not starting.done()
            await made.pass_by(3 * LOOK)
            with pytest.raises(WorkerError, match="the model's process hung"):
                await starting
            assert not psutil.pid_exists(serving.worker.pid)

        made.run(check())
        assert [(kind, facts["reason"]) for kind, facts in made.seen.notices] == [
            ("worker_hung", "nothing came from it for 1800 s while it loaded")
        ]


def test_a_worker_that_was_never_spawned_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no more processes")

    process = SimpleNamespace(start=refuse)
    spawn = SimpleNamespace(Process=lambda **options: process)
    monkeypatch.setattr(workers, "_SPAWN", spawn)
    with house(start=False) as made:

        async def check() -> None:
            with pytest.raises(OSError, match="no more processes"):
                await made.engine.start()
            await made.pass_by(LOOK)
            assert not made.engine._tasks

        made.run(check())


def test_a_worker_that_hangs_with_the_last_streams_of_a_reload_is_killed() -> None:
    """The one that serves new requests has nothing to do with it."""
    with house() as made:

        async def check() -> Any:
            stream = await made.engine.submit(ask())
            old = made.worker.pid
            await made.engine.reload(None)
            os.kill(old, signal.SIGSTOP)
            await made.pass_by(HANG + 2 * LOOK)
            events = await events_of(stream)
            await until(lambda: not made.engine._draining)
            assert made.engine.unready is None
            assert made.worker.pid != old
            return events

        assert [event.type for event in made.run(check())] == ["error"]
        assert made.seen.kinds() == ["started", "reloaded", "worker_hung"]


def test_a_model_that_reads_along_answers_a_ping() -> None:
    import pickle

    ours, theirs = socket.socketpair()
    plan = Plan(None, pickle.dumps(testbed.load_bundle()), 1, 64, 16, None, "cpu", 1)
    with ours, theirs:
        reading = forced_worker.build(Channel(theirs), plan)
        answering = threading.Thread(target=forced_worker.answer, args=(Channel(theirs), reading))
        answering.start()
        ours.settimeout(PATIENCE)
        channel = Channel(ours)
        told = iter(channel)
        assert isinstance(next(told), Ready)
        channel.send(Ping())
        assert next(told) == Pong()
        channel.close()
        answering.join(PATIENCE)
        assert not answering.is_alive()
