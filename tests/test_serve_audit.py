"""The audit log: what is in it, that nothing is lost without a word, that changes are seen."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audit_kill
import httpx
import pytest
from http_service import PATIENCE
from http_service import wait_for as wait_until
from kernel_cases import fresh_seed
from scripted_engine import BUNDLE, ScriptedEngine, events
from typer.testing import CliRunner

from midstream.cli import app
from midstream.ledger.ledger import conversation_key
from midstream.serve import audit_file, audit_read, audit_writer
from midstream.serve.app import create_app
from midstream.serve.audit import MOST_REFUSALS, AuditLog
from midstream.serve.audit_file import AuditError, AuditFile, files_in
from midstream.serve.audited import AuditedEngine
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import EngineStats, Feed, Opened
from midstream.streams import Event


def ask(name: str = "s1", **facts: Any) -> Ask:
    messages = ({"role": "user", "content": "What is in the urn?"},)
    facts = {"messages": messages, "prompt": None, "max_tokens": 16, "client": "ada", **facts}
    return Ask(stream=name, model="testbed", **facts)


async def play(engine: Any, *asks: Ask) -> None:
    for one in asks:
        async for _ in events(await engine.submit(one)):
            pass


def records(folder: Path) -> list[dict[str, Any]]:
    return list(audit_read.read(audit_read.files_of([folder])))


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record in records(folder)]


def verified(folder: Path, **options: Any) -> audit_read.Verdict:
    return audit_read.verify(audit_read.files_of([folder]), **options)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No log gives its last records up because the machine is busy."""
    monkeypatch.setattr(audit_writer, "_PATIENCE", PATIENCE)


@contextlib.contextmanager
def log_in(folder: Path, **options: Any) -> Iterator[AuditLog]:
    log = AuditLog(folder, **options)
    try:
        yield log
    finally:
        log.close()


# --- what is in it --------------------------------------------------------------------------------


def test_the_records_of_a_halted_stream(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        engine = ScriptedEngine(Feed([log]), halt_after=2)
        asyncio.run(play(engine, ask(conversation="talk 7")))
    found = records(tmp_path)
    assert [one["kind"] for one in found] == [
        "file", "start", "opened", "halted", "finished", "stop",
    ]  # fmt: skip
    assert [one["seq"] for one in found] == list(range(6))
    _, _, opened, halted, finished, _ = found
    identity = {
        "schema": 1, "stream": "s1", "client": "ada", "model": "testbed", "tier": "moderate",
        "bundle": BUNDLE,
    }  # fmt: skip
    for one in (opened, halted, finished):
        assert identity.items() <= one.items()
    assert opened["conversation"] == conversation_key("ada:talk 7")
    assert (halted["position"], halted["verdict"], halted["cause"]) == (6, "HALT", "sealed")
    assert halted["risk"] == pytest.approx(0.3)
    assert {
        "position": 6, "verdict": "HALT", "cause": "sealed", "finish_reason": "content_filter",
        "scored": 3, "unscored": 0, "delivered": len("The urn "), "prompt_tokens": 4,
    }.items() <= finished.items()  # fmt: skip
    assert 0 <= finished["seconds"] < 60


def test_refusals_notices_and_errors(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        feed = Feed([log])
        asyncio.run(play(ScriptedEngine(feed, error="the model's process ended"), ask()))
        feed.refused("ada", 429, "rate_limit_exceeded")
        feed.notice("reload_refused", {"cause": "policy.yaml: no", "limit": float("inf")})
    *_, error, refused, notice, _ = records(tmp_path)
    assert error["kind"] == "error"
    assert (error["message"], error["delivered"]) == ("the model's process ended", 16)
    assert {"client": "ada", "status": 429, "code": "rate_limit_exceeded"}.items() <= (
        refused.items()
    )
    assert notice["notice"] == "reload_refused"
    assert notice["facts"] == {"cause": "policy.yaml: no", "limit": None}


@pytest.mark.parametrize("text", [False, True])
def test_text_is_there_only_when_asked_for(text: bool, tmp_path: Path) -> None:
    with log_in(tmp_path, text=text) as log:
        engine = ScriptedEngine(Feed([log]), halt_after=2)
        body = {"messages": [{"role": "user", "content": "What is in the urn?"}]}
        asyncio.run(play(engine, ask(body=body), ask("s2", messages=None, prompt="An urn")))
    written = b"".join(file.read_bytes() for file in files_in(tmp_path))
    assert (b"urn" in written) == text
    if text:
        found = records(tmp_path)
        assert [one["text"] for one in found if one["kind"] == "finished"] == ["The urn "] * 2
        assert found[2]["messages"][0]["content"] == "What is in the urn?"
        assert [one["prompt"] for one in found if one["kind"] == "opened"] == [None, "An urn"]


def test_nothing_is_kept_of_streams_that_ended(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        engine = ScriptedEngine(Feed([log]))
        asyncio.run(play(engine, *(ask(str(number)) for number in range(50))))
        wait_until(lambda: not log._writer._queue)
        assert (log._given, log.waiting_bytes) == ({}, 0)
    assert verified(tmp_path).unended == ()


def test_a_clock_that_jumps_back_changes_no_order(tmp_path: Path, monkeypatch: Any) -> None:
    jumps = itertools.chain([1e9, 5e8, 2e9, -1e9], itertools.repeat(7.0))
    with log_in(tmp_path) as log, monkeypatch.context() as patch:
        clock = SimpleNamespace(time=lambda: next(jumps), monotonic=time.monotonic)
        patch.setattr(audit_writer, "time", clock)
        for number in range(4):
            log.notice("n", {"number": number})
    found = [one for one in records(tmp_path) if one["kind"] == "notice"]
    assert [one["facts"]["number"] for one in found] == [0, 1, 2, 3]
    assert [one["time"] for one in found] == [1e9, 5e8, 2e9, -1e9]
    assert verified(tmp_path).holds


def documented() -> dict[str, set[str]]:
    """Fields of each kind of record, by docs/audit.md."""
    text = (Path(__file__).parents[1] / "docs/audit.md").read_text(encoding="utf-8")
    part = text[text.index("## Records") : text.index("## What survives")]
    groups = {
        name: set(re.findall(r"`(\w+)`", told))
        for name, told in re.findall(r"^- (\w+): ((?:.+\n  )*.+)", part, re.MULTILINE)
    }
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", part, re.MULTILINE)
    always = {"schema", "seq", "time", "kind", "sha256"}
    return {
        kind: always.union(
            re.findall(r"`(\w+)`", told), *(groups[name] for name in groups if name in told)
        )
        for kind, told in rows
    }


def test_every_field_is_documented(tmp_path: Path) -> None:
    with log_in(tmp_path / "a") as log:
        feed = Feed([log])
        asyncio.run(play(ScriptedEngine(feed, halt_after=2), ask()))
        asyncio.run(play(ScriptedEngine(feed, error="no"), ask()))
        log.event(Opened(ask(), "moderate", BUNDLE), Event(type="verdict", stream="s", bundle="b"))
        log.refused("", 401, "invalid_api_key")
        log.notice("reloaded", {})
        log._writer._unsynced = b'"time":0,"kind":"unsynced","first":0,"last":0,"cause":""'
    with log_in(tmp_path / "b", queue_bytes=1):
        pass
    found: dict[str, set[str]] = {}
    for one in [*records(tmp_path / "a"), *records(tmp_path / "b")]:
        found.setdefault(one["kind"], set()).update(one)
    assert found == documented()


# --- files ----------------------------------------------------------------------------------------


def notices(log: AuditLog, begin: int, end: int) -> None:
    for number in range(begin, end):
        log.notice("n", {"number": number})


def numbers(folder: Path) -> list[int]:
    return [one["facts"]["number"] for one in records(folder) if one["kind"] == "notice"]


def test_full_files_are_followed_by_others_and_not_touched_again(tmp_path: Path) -> None:
    with log_in(tmp_path, max_bytes=2000) as log:
        notices(log, 0, 60)
    older = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files_in(tmp_path)[:-1]}
    assert len(older) > 3
    assert all(len(content) <= 2000 for content, _ in older.values())
    with log_in(tmp_path, max_bytes=2000) as log:
        notices(log, 60, 100)
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in older} == older
    assert numbers(tmp_path) == list(range(100))
    found = verified(tmp_path)
    assert found.holds
    assert (found.first, found.last) == (0, found.records - 1)
    for file in files_in(tmp_path):
        first = json.loads(file.read_bytes().splitlines()[0])
        assert file.name == f"audit-{first['seq']:012d}.jsonl"
        assert audit_read.verify([file]).holds


def test_a_record_longer_than_a_file_gets_one_for_itself(tmp_path: Path) -> None:
    with log_in(tmp_path, max_bytes=1000) as log:
        log.notice("long", {"words": "a" * 5000})
        log.notice("short", {})
    assert kinds(tmp_path) == ["file", "start", "file", "notice", "file", "notice", "stop"]
    assert verified(tmp_path).holds


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with log_in(tmp_path):
        with pytest.raises(AuditError, match="another process writes to it"):
            AuditLog(tmp_path)
        code = "import sys; from midstream.serve.audit import AuditLog; AuditLog(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True)
        assert b"another process writes to it" in other.stderr
    with log_in(tmp_path):
        pass
    assert kinds(tmp_path) == ["file", "start", "stop", "start", "stop"]


@pytest.mark.parametrize("torn", [b'{"schema":1,"seq"', b"\0" * 50, b'{"schema":1}\n', b"\r{\r"])
def test_a_torn_line_is_kept_aside_and_told(torn: bytes, tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        notices(log, 0, 3)
    (file,) = files_in(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)[:-1]  # killed before it stopped
    file.write_bytes(b"".join(lines) + torn)
    with log_in(tmp_path) as log:
        notices(log, 3, 5)
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]
    starts = [one for one in records(tmp_path) if one["kind"] == "start"]
    assert [one["after_stop"] for one in starts] == [True, False]
    assert (tmp_path / starts[1]["torn"]).read_bytes() == torn
    found = verified(tmp_path)
    assert (found.holds, found.kills) == (True, 1)


def test_a_file_whose_first_line_is_torn(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        notices(log, 0, 3)
    for name, content in (
        ("audit-000000000006.jsonl", b'{"sch'),
        ("audit-000000000007.jsonl", b""),
    ):
        (tmp_path / name).write_bytes(content)
    with log_in(tmp_path) as log:
        notices(log, 3, 5)
    assert len(files_in(tmp_path)) == 1
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]
    found = verified(tmp_path)
    assert (found.holds, found.kills) == (True, 1)


def test_a_damaged_log_is_not_written_on(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        notices(log, 0, 5)
    (file,) = files_in(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"number":2', b'"number":7'))
    with pytest.raises(AuditError, match=r"line 5: record 4 is not what was written.*another one"):
        AuditLog(tmp_path)
    file.write_bytes(content)
    AuditLog(tmp_path).close()


def test_what_is_acknowledged_was_synced(tmp_path: Path, monkeypatch: Any) -> None:
    synced = threading.Event()

    def no_sync(descriptor: int) -> None:
        synced.wait(PATIENCE)

    with log_in(tmp_path, sync="always") as log:
        wait_until(lambda: log.acknowledged == 2)  # file, start
        monkeypatch.setattr(audit_file.os, "fsync", no_sync)
        notices(log, 0, 1)
        wait_until(lambda: log.written == 3)
        assert log.acknowledged == 2
        synced.set()
        wait_until(lambda: log.acknowledged == 3)


def test_never_does_not_sync(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit_file.os, "fsync", lambda _: pytest.fail("synced"))
    with log_in(tmp_path, sync="never", max_bytes=1000) as log:
        notices(log, 0, 20)
        wait_until(lambda: not log._writer._queue)
        assert len(numbers(tmp_path)) == 20
        assert log.acknowledged == log.written
    assert log.failing is None


# --- changes are seen -----------------------------------------------------------------------------


def changed(folder: Path, change: Callable[[list[bytes]], None]) -> audit_read.Verdict:
    (file,) = files_in(folder)
    lines = file.read_bytes().splitlines(keepends=True)
    change(lines)
    file.write_bytes(b"".join(lines))
    return verified(folder)


def resealed(lines: list[bytes]) -> None:
    """Alter a record, and give it the hash that fits it."""
    (chain, *_) = (audit_file.beginning(lines[0]),)
    for line in lines[:4]:
        _, chain = chain.check(line)
    body = lines[4].replace(b'"number":2', b'"number":7')
    body = body[body.index(b'"time"') : body.rindex(b',"sha256"')]
    lines[4] = chain.line(body)[0]


CHANGES: dict[str, tuple[Callable[[list[bytes]], None], int]] = {
    "altered": (lambda lines: lines.insert(4, lines.pop(4).replace(b":2}", b":7}")), 1),
    "altered and sealed": (resealed, 1),
    "removed": (lambda lines: lines.__delitem__(4), 1),
    "put in": (lambda lines: lines.insert(4, lines[4]), 1),
    "swapped": (lambda lines: lines.insert(3, lines.pop(4)), 3),
    "no record": (lambda lines: lines.insert(4, b"hello\n"), 1),
    "the last one altered": (
        lambda lines: lines.append(lines.pop().replace(b'"kind":"stop"', b'"kind":"halt"')), 1,
    ),
    "the beginning cut off": (lambda lines: lines.__delitem__(slice(2)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_breaks_the_chain(name: str, tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        notices(log, 0, 5)
    assert verified(tmp_path).holds
    change, problems = CHANGES[name]
    found = changed(tmp_path, change)
    assert len(found.problems) == problems, found.problems
    if name == "removed":
        assert "line 5: record 4 was expected, this is 5" in found.problems[0]
    assert CliRunner().invoke(app, ["audit", "verify", str(tmp_path)]).exit_code == 1


def test_a_cut_end_is_seen_by_who_kept_the_head(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        notices(log, 0, 5)
    head = verified(tmp_path).head
    assert verified(tmp_path, contains=head).holds
    assert changed(tmp_path, lambda lines: lines.__delitem__(slice(5, None))).holds
    (problem,) = verified(tmp_path, contains=head).problems
    assert "the log was cut" in problem


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with log_in(tmp_path, max_bytes=1000) as log:
        notices(log, 0, 20)
    first, second, third, *_ = files_in(tmp_path)
    first.unlink()  # who keeps a log for so long may remove its oldest files
    found = verified(tmp_path)
    assert found.holds
    assert found.first == int(second.stem[-12:])
    begin, end = (int(file.stem[-12:]) for file in (third, files_in(tmp_path)[2]))
    third.unlink()
    (problem,) = verified(tmp_path).problems
    assert f"records {begin} to {end - 1} are missing" in problem


# --- disks that are full, slow or broken ----------------------------------------------------------


def check_gap(folder: Path, log_missing: int, sent: int) -> dict[str, Any]:
    """Of the notices 0 to sent - 1 those are there that no gap record speaks of."""
    found = verified(folder)
    assert found.holds, found.problems
    assert found.missing == log_missing
    there = numbers(folder)
    assert there == sorted(set(there))
    assert len(there) + found.missing == sent
    gaps = [one for one in records(folder) if one["kind"] == "gap"]
    assert all(one["kinds"] == {"notice": one["missing"]} for one in gaps)
    at = 0  # a gap stands where its records would
    for one in records(folder):
        if one["kind"] == "gap":
            at += one["missing"]
        elif one["kind"] == "notice":
            assert one["facts"]["number"] == at
            at += 1
    return gaps[0] if gaps else {}


FILL = """
import logging, resource, sys, time
from midstream.serve import audit
from midstream.serve.audit import AuditLog
audit._PATIENCE = 120.0
logging.basicConfig(format="%(levelname)s %(message)s")
log = AuditLog(sys.argv[1], sync=sys.argv[2], queue_bytes=20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for number in range(1000):
    log.notice("n", {"number": number})
    while log.waiting_bytes and not log.failing:  # it is the file that is full, not the queue
        time.sleep(0.0001)
before = log.missing
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
while log.failing:
    time.sleep(0.01)
for number in range(1000, 1010):
    log.notice("n", {"number": number})
log.close()
print(before, log.missing)
"""


@pytest.mark.parametrize("sync", ["always", "never"])
def test_a_file_that_may_grow_no_more(sync: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path), sync]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before == after > 0
    gap = check_gap(tmp_path, after, 1010)
    assert "File too large" in gap["cause"]
    told = done.stderr.splitlines()
    assert [line.split()[0] for line in told] == ["ERROR", "WARNING"]
    assert "File too large" in told[0]
    assert f"{after} records are missing" in told[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "midstream", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("on_failure", ["serve", "refuse"])
@pytest.mark.parametrize("max_bytes", [20_000, 64 << 20])
def test_a_full_disk(
    on_failure: Any, max_bytes: int, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves or refuses, as it is told; with room again it goes on, and says what is missing."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(80_000))
    options = {"on_failure": on_failure, "max_bytes": max_bytes, "queue_bytes": 30_000}
    with log_in(small_disk / "log", **options) as log:
        engine = AuditedEngine(ScriptedEngine(Feed([log])), log)
        asyncio.run(play(engine, ask()))
        assert engine.unready is None
        sent = 0
        while log.missing < 10:
            notices(log, sent, sent + 1)
            sent += 1
            # It is the disk that is full, not the queue.
            wait_until(lambda: log.failing is not None or not log.waiting_bytes)
        assert "No space left on device" in (log.failing or "")
        if on_failure == "serve":
            assert engine.unready is None
            asyncio.run(play(engine, ask("s2")))  # served, and what finds no room is counted
        else:
            assert engine.unready == "the audit log cannot be written"
            with pytest.raises(ApiError, match="cannot record its decisions") as refusal:
                asyncio.run(play(engine, ask("s2")))
            assert (refusal.value.status, refusal.value.code) == (503, "audit_unavailable")
        ballast.unlink()
        wait_until(lambda: log.failing is None)
        asyncio.run(play(engine, ask("s3")))
    found = verified(small_disk / "log")
    assert found.holds, found.problems
    assert found.missing == log.missing
    served_unseen = sum(
        one["kinds"].get("opened", 0) for one in records(small_disk / "log") if one["kind"] == "gap"
    )
    opened = [one["stream"] for one in records(small_disk / "log") if one["kind"] == "opened"]
    assert len(opened) + served_unseen == 3 - (on_failure == "refuse")
    there = numbers(small_disk / "log")
    gaps = [one for one in records(small_disk / "log") if one["kind"] == "gap"]
    assert len(there) + sum(one["kinds"].get("notice", 0) for one in gaps) == sent
    levels = [one.levelno for one in caplog.records if one.name == "midstream.serve.audit_writer"]
    assert levels == [logging.ERROR, logging.WARNING]


def test_a_server_that_refuses_says_so_over_http(tmp_path: Path, monkeypatch: Any) -> None:
    write, is_full = os.write, threading.Event()

    def full(descriptor: int, data: bytes) -> int:
        if is_full.is_set():
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    async def statuses(app: Any) -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://midstream") as client:
            asked = await client.post("/v1/completions", json={"model": "testbed", "prompt": "a"})
            if asked.status_code != 200:
                assert asked.json()["error"]["code"] == "not_ready"
                assert int(asked.headers["Retry-After"]) > 0
                assert str(tmp_path) not in asked.text
            return [asked.status_code, (await client.get("/ready")).status_code]

    monkeypatch.setattr(audit_file.os, "write", full)
    with log_in(tmp_path, on_failure="refuse") as log:
        feed = Feed([log])
        app = create_app(AuditedEngine(ScriptedEngine(feed), log), feed)
        assert asyncio.run(statuses(app)) == [200, 200]
        is_full.set()
        log.notice("n", {})
        wait_until(lambda: log.failing is not None)
        assert asyncio.run(statuses(app)) == [503, 503]
        is_full.clear()
        wait_until(lambda: log.failing is None)
        assert asyncio.run(statuses(app)) == [200, 200]
    assert verified(tmp_path).missing == 0
    assert [one["status"] for one in records(tmp_path) if one["kind"] == "refused"] == [503]


def test_the_queue_of_a_slow_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """Whoever floods the server with refusals does not crowd out decisions, nor fill the disk."""
    may_write = threading.Event()
    write = os.write

    def slow(descriptor: int, data: bytes) -> int:
        may_write.wait(PATIENCE)
        return write(descriptor, data)

    with log_in(tmp_path, queue_bytes=20_000) as log:
        wait_until(lambda: not log._writer._queue)
        monkeypatch.setattr(audit_file.os, "write", slow)
        with monkeypatch.context() as patch:
            patch.setattr("midstream.serve.audit.time.monotonic", lambda: log._minute)
            for _ in range(1000):
                log.refused("", 401, "invalid_api_key")
        asyncio.run(play(ScriptedEngine(Feed([log]), halt_after=2), ask()))
        notices(log, 0, 1000)
        assert log.waiting_bytes <= 20_000
        assert log.missing > 700
        may_write.set()
        wait_until(lambda: not log._writer._queue)
    assert verified(tmp_path).missing == log.missing
    assert kinds(tmp_path)[2:6] == ["refused", "opened", "halted", "finished"]
    assert kinds(tmp_path)[-2:] == ["refused", "stop"]
    # a shorter record may find room where a longer one did not, and part the gap
    gaps = [one["kinds"] for one in records(tmp_path) if one["kind"] == "gap"]
    assert gaps == [{"notice": gap["notice"]} for gap in gaps]
    assert sum(gap["notice"] for gap in gaps) == log.missing


def test_refusals_are_counted_by_the_minute(tmp_path: Path, monkeypatch: Any) -> None:
    now = 1000.0
    monkeypatch.setattr("midstream.serve.audit.time.monotonic", lambda: now)
    with log_in(tmp_path) as log:
        for _ in range(10_000):
            log.refused("", 401, "invalid_api_key")
        log.refused("ada", 429, "too_many_requests")
        now += 59
        log.stats(EngineStats(8, 0, 0, 0, ()))
        log.refused("", 401, "invalid_api_key")
        now += 1
        log.stats(EngineStats(8, 0, 0, 0, ()))  # the minute is over, and nobody asks any more
        log.refused("", 401, "invalid_api_key")
        log.refused("", 401, "invalid_api_key")
    refused = [one for one in records(tmp_path) if one["kind"] == "refused"]
    assert [(one["client"], one["status"], one["code"], one["count"]) for one in refused] == [
        ("", 401, "invalid_api_key", 1),
        ("ada", 429, "too_many_requests", 1),
        ("", 401, "invalid_api_key", 10_000),
        ("", 401, "invalid_api_key", 1),
        ("", 401, "invalid_api_key", 1),  # what was counted is written at the end, too
    ]


def test_refusals_of_any_kind_are_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("midstream.serve.audit.time.monotonic", lambda: 1000.0)
    with log_in(tmp_path) as log:
        for number in range(5000):
            log.refused("", 400, f"code {number}")
    refused = [one for one in records(tmp_path) if one["kind"] == "refused"]
    assert len(refused) == MOST_REFUSALS + 2
    assert sum(one["count"] for one in refused) == 5000
    assert refused[-1]["code"] == "other"


def test_what_a_sync_did_not_take_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    """A second sync that succeeds says nothing of what the first one failed to take."""
    sync, failures = os.fsync, iter([OSError(5, "Input/output error")])

    def sometimes(descriptor: int) -> None:
        if error := next(failures, None):
            raise error
        sync(descriptor)

    with log_in(tmp_path, sync="always") as log:
        wait_until(lambda: log.acknowledged == 2)
        monkeypatch.setattr(audit_file.os, "fsync", sometimes)
        notices(log, 0, 1)
        wait_until(lambda: log.acknowledged == 5)
        notices(log, 1, 2)
    assert kinds(tmp_path) == ["file", "start", "notice", "file", "unsynced", "notice", "stop"]
    unsynced = records(tmp_path)[4]
    assert (unsynced["first"], unsynced["last"]) == (2, 2)
    assert "Input/output error" in unsynced["cause"]
    found = verified(tmp_path)
    assert (found.holds, found.unsynced) == (True, 1)


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    log = AuditLog(tmp_path)
    wait_until(lambda: not log._writer._queue)
    monkeypatch.setattr(audit_file.os, "write", full)
    notices(log, 0, 3)
    log.close()
    assert "4 records that waited are lost" in caplog.text
    monkeypatch.undo()
    AuditLog(tmp_path).close()
    assert verified(tmp_path).kills == 1


@pytest.mark.parametrize("taken", range(0, 330, 7))
def test_of_a_line_that_was_not_written_whole_nothing_stays(
    taken: int, tmp_path: Path, monkeypatch: Any
) -> None:
    write, room = os.write, [taken]

    def little(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    file = AuditFile(tmp_path, "never", 1 << 20)
    bodies = [b'"kind":"n","number":%d' % number for number in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "write", little)
        with contextlib.suppress(OSError):
            file.append(bodies)
    assert verified(tmp_path).torn_bytes == 0
    file.append(bodies[file.taken :])
    file.close()
    assert [one["number"] for one in records(tmp_path)[1:]] == [0, 1, 2, 3]
    assert verified(tmp_path).holds


# --- killed ---------------------------------------------------------------------------------------


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    """The short form of bench/audit_kill.py."""
    for sync in ("always", "every-second", "never"):
        found = audit_kill.measured(tmp_path / sync, sync, rounds=3, seed=fresh_seed(), longest=0.2)
        assert found["lost"] == 0
        assert found["lost_of_written"] == 0


# --- the command ----------------------------------------------------------------------------------


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["audit", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_show_and_verify(tmp_path: Path) -> None:
    with log_in(tmp_path, text=True) as log:
        pieces = ("The ", "[red]\x1b[31m", "is ")
        engine = ScriptedEngine(Feed([log]), pieces=pieces, halt_after=2)
        asyncio.run(play(engine, ask("s1"), ask("s2", client="eve")))
    everything = output("show", str(tmp_path))
    assert "[red]" in everything
    assert "\x1b" not in everything
    for name in ("start", "opened", "halted", "sealed", "content_filter", "ada", "eve"):
        assert name in everything
    halts = [
        json.loads(line)
        for line in output("show", str(tmp_path), "--halts", "--json").split("\n")[:-1]
    ]
    assert [(one["kind"], one["stream"]) for one in halts] == [("halted", "s1"), ("halted", "s2")]
    (file,) = files_in(tmp_path)
    of_one = output("show", str(file), "--stream", "s2", "--json").split("\n")[:-1]
    assert [json.loads(line)["kind"] for line in of_one] == ["opened", "halted", "finished"]
    assert "The chain holds" in output("verify", str(tmp_path))
    assert json.loads(output("verify", str(tmp_path), "--json"))["records"] == 9


def test_follow_goes_on_into_new_files(tmp_path: Path) -> None:
    with log_in(tmp_path, max_bytes=2000) as log:
        notices(log, 0, 30)
        seen: list[int] = []
        for one in audit_read.follow(tmp_path, idle=lambda: time.sleep(0.001)):
            if one["kind"] == "notice":
                seen.append(one["facts"]["number"])
                if seen[-1] in (29, 59):
                    notices(log, seen[-1] + 1, seen[-1] + 31)
            if len(seen) == 90:
                break
    assert seen == list(range(90))


def test_follow_by_command(tmp_path: Path) -> None:
    with log_in(tmp_path) as log:
        command = [sys.executable, "-c", "from midstream.cli import main; main()", "audit"]
        command += ["show", "--follow", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown:
            assert shown.stdout is not None
            assert "start" in shown.stdout.readline() + shown.stdout.readline()
            log.refused("eve", 401, "invalid_api_key")
            line = shown.stdout.readline()
            shown.send_signal(signal.SIGINT)
    assert "refused" in line
    assert "code invalid_api_key" in line


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    for arguments, told in (
        (["show", str(tmp_path)], "no audit log here"),
        (["verify", str(tmp_path / "gone.jsonl")], "No such file"),
        (["show", "--follow", str(tmp_path / "a"), str(tmp_path / "b")], "the folder of one"),
    ):
        result = CliRunner().invoke(app, ["audit", *arguments])
        assert result.exit_code != 0
        assert told in f"{result.output} {result.exception}"
    newer = tmp_path / "audit-000000000000.jsonl"
    line = audit_file.Chain().line(b'"kind":"file","previous":"x"')[0]
    newer.write_bytes(line.replace(b'"schema":1', b'"schema":2'))
    with pytest.raises(AuditError, match="update midstream"):
        records(tmp_path)
