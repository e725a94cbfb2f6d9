"""Threads that share a ledger in SQLite: in order, together, and no longer than they need."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from kernel_cases import fresh_seed
from ledger_writers import conversation_named, key_named, record

from midstream.ledger import sqlite_file
from midstream.ledger.sqlite import SQLiteLedger
from midstream.ledger.waiting import Turns

A = conversation_named(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def until(count: int, turns: Turns) -> None:
    while len(turns._waiting) < count:
        time.sleep(0.001)


def test_turns_go_to_those_who_need_them_in_order() -> None:
    turns, order, done = Turns(), list[int](), set[int]()
    assert turns.take()

    def wait(index: int) -> None:
        if turns.take(lambda: index in done):
            order.append(index)
            turns.pass_on()
        else:
            order.append(-index)

    threads = [threading.Thread(target=wait, args=(index,), daemon=True) for index in range(1, 7)]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        until(count, turns)
    assert not turns.take(timeout=0.01)
    done.update((1, 5))  # the first of them, too
    assert not turns.take(lambda: True)
    turns.pass_on()
    for thread in threads:
        thread.join(120)
    assert [index for index in order if index > 0] == [2, 3, 4, 6]
    assert sorted(order)[:2] == [-5, -1]
    assert turns.take(timeout=0)


def test_an_interrupted_thread_passes_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    turns.take()

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        turns.pass_on()  # gives the turn just when Ctrl-C is pressed
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.take()
    assert turns.take(timeout=0)


def test_no_wake_up_is_lost() -> None:
    """Threads come and go at random, some without patience: never two at once, no standstill."""
    turns, inside, most, ends = Turns(), [0], [0], threading.Barrier(9)
    seed = fresh_seed()

    def work(index: int) -> None:
        rng = random.Random(seed + index)
        for _ in range(300):
            patience = rng.choice([None, None, 0.0, 1e-4])
            if turns.take(lambda: rng.random() < 0.2, patience):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                if rng.random() < 0.1:
                    time.sleep(1e-4)
                inside[0] -= 1
                turns.pass_on()
        ends.wait(120)

    for index in range(8):
        threading.Thread(target=work, args=(index,), daemon=True).start()
    ends.wait(120)
    assert most == [1]
    assert not turns._waiting
    assert turns.take(timeout=0)


def test_threads_that_write_without_pause_share_transactions(path: Path) -> None:
    """With a plain lock two of them do, however many there are."""
    threads, each = 16, 12
    ledger = SQLiteLedger(path, timeout=20)
    commits = list[str]()

    def slow(statement: str) -> None:
        if statement == "COMMIT":
            commits.append(statement)
            time.sleep(0.02)  # as a disk's sync

    ledger._writer.connection().set_trace_callback(slow)

    def write(index: int) -> None:
        for turn in range(1, each + 1):
            assert ledger.write([record(conversation_named(index), turn)]) == [True]

    workers = [threading.Thread(target=write, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(commits) < threads * each / 4
    assert ledger.expire(time.time() + 1) == threads * each


def log_size(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


def test_the_log_stays_bounded_beside_readers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 100_000
    monkeypatch.setattr(sqlite_file, "_LONG_LOG", limit)
    monkeypatch.setattr(sqlite_file, "_LOG_WAIT", 1)
    ledger = SQLiteLedger(path)
    attempts = list[str]()
    ledger._writer.connection().set_trace_callback(
        lambda sql: attempts.append(sql) if "wal_checkpoint" in sql else None
    )
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM turns").fetchall()
    turn = 0
    while log_size(path) < 16 * limit:  # the reader does not end
        turn += 1
        assert ledger.write([record(A, turn)]) == [True]
    assert 4 <= len(attempts) <= 5, "one each time that the log has doubled"
    reader.execute("COMMIT")
    for _ in range(2 * turn):
        turn += 1
        ledger.write([record(A, turn)])
        if log_size(path) < limit:
            break
    sizes = []
    for _ in range(100):
        turn += 1
        ledger.write([record(A, turn)])
        sizes.append(log_size(path))
    assert max(sizes) < 1.5 * limit
    assert None not in ledger.read(A, [key_named(A, one) for one in range(1, turn + 1)])


def test_the_whole_file_is_checked_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again with the first read, behind which others would wait too long."""
    SQLiteLedger(path).write([record(A)])
    asked, pragma = list[str](), sqlite_file._pragma

    def counted(connection: sqlite3.Connection, name: str) -> int | str:
        asked.append(name)
        return pragma(connection, name)

    monkeypatch.setattr(sqlite_file, "_pragma", counted)
    ledger = SQLiteLedger(path)
    ledger.read(A, [key_named(A, 1)])
    ledger.write([record(A, 2)])
    assert asked.count("integrity_check") == 1


def test_a_forked_process_closes_without_waiting_for_its_parents_threads(path: Path) -> None:
    ledger = SQLiteLedger(path)
    assert ledger._writing.take()  # as by a thread that is not there after the fork
    child = os.fork()
    if child == 0:
        threading.Thread(target=lambda: (time.sleep(10), os._exit(1)), daemon=True).start()
        ledger.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ledger._writing.pass_on()
    assert ledger.write([record(A)]) == [True]
