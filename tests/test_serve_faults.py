"""What goes wrong under the local engine: killed, failing and stuck workers, bad bundles."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import broken_workers
import psutil
import pytest
import serving
import toy
import transformers
from serving import House, answer, ask, ended, events_of, text_of

from midstream import testbed
from midstream.engines.hf import manager as seams
from midstream.policy import Thresholds
from midstream.serve.errors import ApiError
from midstream.serve.reloads import ReloadError
from midstream.serve.workers import WorkerError

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{seams.VERSION}."),
    reason=f"continuous batching is watched in transformers {seams.VERSION} only",
)


async def begun(house: House, pause: Path, count: int = 4) -> list[Any]:
    """Streams that stand still while the file is there: four have begun, the others wait."""
    pause.write_text(str(count))
    streams = [await house.engine.submit(ask(i, tier="loose")) for i in range(count)]
    for stream in streams[:4]:
        while not text_of(house.seen.streams[stream.ask.stream]):
            await asyncio.sleep(0.01)
    return streams


def pid_of(house: House) -> int:
    return int([facts["pid"] for _, facts in house.seen.notices if "pid" in facts][-1])


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def check_all_judged(house: House) -> None:
    """Whatever has left of any stream had a verdict that let it go."""
    for events in house.seen.streams.values():
        for event in events:
            if event.type == "released":
                assert event.risk is not None
        if events[-1].type == "error":
            assert events[-1].delivered_unscored == 0


def test_a_killed_worker_ends_its_streams_and_another_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The bundle was edited meanwhile: the one that was checked stays in force."""
    flag, folder = tmp_path / "pause", tmp_path / "bundle"
    shutil.copytree(testbed.BUNDLE_DIR, folder)
    main = partial(broken_workers.pausing, str(flag))
    with serving.house(main=main, bundle=folder) as house:
        engine, seen = house.engine, house.seen

        async def kill() -> Any:
            (folder / "policy.yaml").write_text("tiers: [bananas]\n")
            streams = await begun(house, flag)
            waiting = await engine.submit(ask(5))
            killed = pid_of(house)
            os.kill(killed, signal.SIGKILL)
            told = [await events_of(stream) for stream in (*streams, waiting)]
            reason = engine.unready
            with pytest.raises(ApiError) as refused:
                await engine.submit(ask(0))
            flag.unlink()
            await until(lambda: engine.unready is None)
            return told, reason, refused.value, await answer(engine, ask(1)), killed

        told, reason, refused, (_, after), killed = house.run(kill())
        assert [events[-1].type for events in told] == ["error"] * 5
        assert all(text_of(events) for events in told[:4])
        assert not text_of(told[4])
        for events in told:
            assert events[-1].delivered == 0 or text_of(events)
        assert reason == "the model's process was killed by SIGKILL; another is started"
        assert (refused.status, refused.code) == (503, "unavailable")
        assert refused.retry_after is not None
        assert "SIGKILL" not in refused.message
        assert (after[-1].type, after[-1].bundle) == ("finished", testbed.load_bundle().hash)
        assert seen.kinds() == ["started", "worker_lost", "worker_restarted"]
        assert "killed by SIGKILL" in caplog.text
        assert pid_of(house) != killed
        assert not psutil.pid_exists(killed)
        check_all_judged(house)
        assert house.settled().slots == 4


def test_an_exception_in_a_batch_ends_its_streams_and_another_worker_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two that are started in its place die, too."""
    monkeypatch.setattr("midstream.serve.rotation.BACK_OFF", 0.05)
    flag, dead, pause = tmp_path / "fail", tmp_path / "dead", tmp_path / "pause"
    main = partial(broken_workers.failing, str(flag), str(dead), str(pause))
    with serving.house(main=main) as house:
        engine, seen = house.engine, house.seen

        async def fail() -> Any:
            streams = await begun(house, pause, 6)
            dead.touch()
            flag.touch()
            pause.unlink()
            told = [await events_of(stream) for stream in streams]
            await until(lambda: engine.unready is not None)
            reason = engine.unready
            await until(lambda: seen.kinds().count("worker_lost") == 3)
            dead.unlink()
            await until(lambda: engine.unready is None)
            return told, reason, await asyncio.gather(*(answer(engine, ask(i)) for i in range(8)))

        told, reason, after = house.run(fail())
        broken = [events for events in told if events[-1].type == "error"]
        assert broken
        for events in told:
            assert [ended([event]) for event in events].count(True) == 1
        for events in broken:
            assert events[-1].message == "the model failed while it wrote this response; try again"
        assert reason == "the model's process failed; another is started"
        assert "out of memory" in caplog.text  # the operator is told
        assert "secret" not in str([told, reason])
        lost = [facts for kind, facts in seen.notices if kind == "worker_lost"]
        assert [facts["restart_after"] for facts in lost] == [0.05, 0.1, 0.2]
        assert lost[1]["ending"] == "the model's process could not start"
        assert "ended with status 7" in lost[1]["failure"]
        assert all(events[-1].type == "finished" for _, events in after)
        check_all_judged(house)
        assert house.settled().slots == 4


def test_a_model_that_cannot_be_served_fails_the_start(tmp_path: Path) -> None:
    house = House(model=tmp_path, bundle=testbed.BUNDLE_DIR)
    with pytest.raises(WorkerError, match=r"no model at .*give a folder with config\.json"):
        house.run(house.engine.start())
    assert house.engine.unready is not None
    house.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strict bundle, one for another model, and two that were changed on disk."""
    folder = tmp_path_factory.mktemp("bundles")
    ours = testbed.load_bundle()
    tiers = {name: Thresholds(horizon=24, halt_at=0.0) for name in ours.policy.tiers}
    ours.with_policy(ours.policy.model_copy(update={"tiers": tiers})).save(folder / "halts_all")
    toy.bundle().save(folder / "of_the_toy")
    for name, text in (("nonsense", "tiers: [bananas]\n"), ("truncated", "")):
        shutil.copytree(testbed.BUNDLE_DIR, folder / name)
        (folder / name / "policy.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def reloaded(bundles: Path) -> Iterator[House]:
    """A house whose streams pause while the file ``pause`` is beside the bundles."""
    with serving.house(main=partial(broken_workers.pausing, str(bundles / "pause"))) as made:
        yield made


def test_streams_finish_under_the_bundle_that_they_began_with(
    reloaded: House, bundles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "midstream")
    house, flag = reloaded, bundles / "pause"
    engine, seen = house.engine, house.seen

    async def swap() -> Any:
        streams = await begun(house, flag)
        flag.write_text("1")  # they stand still, and one on another worker need not wait for more
        waiting = await engine.submit(ask(5, tier="loose"))
        before = pid_of(house)
        reloading = asyncio.create_task(engine.reload(bundles / "halts_all"))
        await asyncio.sleep(0)
        with pytest.raises(ReloadError, match="another reload"):
            await engine.reload(bundles / "halts_all")
        assert engine.unready is None  # the first one serves on
        new = await reloading
        first = await answer(engine, ask(0, tier="loose"))
        with pytest.raises(ReloadError, match="still running"):
            await engine.reload(bundles / "halts_all")
        flag.unlink()
        told = [await events_of(stream) for stream in (*streams, waiting)]
        await until(lambda: not psutil.pid_exists(before))
        return new, first, told

    new, (stream, first), told = house.run(swap())
    old = testbed.load_bundle().hash
    assert new != old
    assert engine.bundle is not None
    assert engine.bundle.hash == new
    assert {event.bundle for event in first} == {new}
    assert first[-1].message == "content_filter"
    assert stream.completion_tokens == 0
    for events in told:
        assert {event.bundle for event in events} == {old}
        assert events[-1].message in ("stop", "length", "content_filter")
        assert text_of(events)
    assert {opened.bundle for opened in seen.openings.values()} == {old, new}
    assert seen.kinds() == ["started", "reload_refused", "reloaded", "reload_refused"]
    assert caplog.text.count(f"bundle {new}, after {old}") == 1
    check_all_judged(house)
    assert house.settled().slots == 4


def test_a_bad_bundle_is_refused_and_the_old_one_stays(
    reloaded: House, bundles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = reloaded
    engine, served_by = house.engine, pid_of(house)
    processes = set(psutil.Process().children())
    assert engine.bundle is not None
    old = engine.bundle.hash
    for name, cause in [
        ("nonsense", "policy.yaml was cut short or changed"),
        ("truncated", "policy.yaml was cut short or changed"),
        ("missing", "no bundle at"),
        ("of_the_toy", "wrong model"),
    ]:
        caplog.clear()
        house.seen.notices.clear()
        with pytest.raises(ReloadError, match=cause):
            house.run(engine.reload(bundles / name))
        records = [r for r in caplog.records if r.name.startswith("midstream")]
        assert len(records) == 1
        assert cause in records[0].getMessage()
        ((kind, facts),) = house.seen.notices
        assert (kind, facts["bundle"]) == ("reload_refused", old)
        assert cause in facts["reason"]
        assert engine.unready is None
        _, events = house.run(answer(engine, ask(3)))
        assert (events[-1].type, events[-1].bundle) == ("finished", old)
    assert psutil.pid_exists(served_by)
    assert set(psutil.Process().children()) <= processes
    assert house.settled().slots == 4


def helpers() -> set[int]:
    """Processes that multiprocessing keeps beside the workers."""
    return {
        child.pid
        for child in psutil.Process().children()
        if "resource_tracker" in " ".join(child.cmdline())
    }


def test_closing_lets_streams_end_and_takes_no_more() -> None:
    others = set(psutil.Process().children())
    house = House(main=broken_workers.jumping)  # its clock has nothing to do with any of this

    async def close() -> Any:
        await house.engine.start()
        streams = [await house.engine.submit(ask(i)) for i in range(6)]
        closing = asyncio.create_task(house.engine.close(serving.PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await house.engine.submit(ask(7))
        told = [await events_of(stream) for stream in streams]
        await closing
        return told, refused.value

    told, refused = house.run(close())
    assert {events[-1].type for events in told} == {"finished"}
    assert "cancelled" not in {events[-1].message for events in told}
    assert refused.status == 503
    assert house.engine.unready == "the server is shutting down"
    assert not psutil.pid_exists(pid_of(house))
    assert {p.pid for p in psutil.Process().children()} <= {p.pid for p in others} | helpers()
    house.close()  # again: without effect


def test_closing_cuts_what_does_not_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midstream.serve.rotation.CUT", serving.PATIENCE)
    flag = tmp_path / "pause"
    house = House(main=partial(broken_workers.pausing, str(flag)))

    async def close() -> Any:
        await house.engine.start()
        streams = await begun(house, flag)
        waiting = await house.engine.submit(ask(5))
        await house.engine.close(0.2)
        return [await events_of(stream) for stream in (*streams, waiting)]

    for events in house.run(close()):
        assert (events[-1].type, events[-1].message) == ("finished", "cancelled")
    check_all_judged(house)
    house.close()


def test_a_worker_that_hangs_is_cut_off_when_the_engine_closes() -> None:
    house = House()

    async def close() -> Any:
        await house.engine.start()
        stream = await house.engine.submit(ask(1))
        os.kill(pid_of(house), signal.SIGSTOP)
        await house.engine.close(0.2)
        return await events_of(stream)

    events = house.run(close())
    assert events[-1].type in ("error", "finished")
    assert not psutil.pid_exists(pid_of(house))
    house.close()
