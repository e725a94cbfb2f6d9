"""One contract for all stores, against a dict; then what each store can suffer."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from kernel_cases import fresh_seed
from ledger_writers import (
    CONTEXT,
    RedisServer,
    conversation_named,
    has_redis_server,
    key_named,
    record,
    redis_server,
    write_as_nobody,
    write_with_a_quota,
)
from pydantic import ValidationError

from midstream.ledger.encoding import CorruptedTurn, decode, encode
from midstream.ledger.ledger import Ledger, LedgerError, TurnRecord, conversation_key
from midstream.ledger.memory import MemoryLedger
from midstream.ledger.open import open_ledger
from midstream.ledger.redis import RedisLedger
from midstream.ledger.sqlite import SQLiteLedger

needs_redis = pytest.mark.skipif(not has_redis_server(), reason="needs redis-server")
DAY = 86400.0
A, B = conversation_named(0), conversation_named(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def flushed(server: RedisServer) -> str:
    import redis

    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=needs_redis)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return "memory:"
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/ledger.db"
    return flushed(request.getfixturevalue("server"))


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = open_ledger(url)
    yield ledger
    ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


# --- the contract ---------------------------------------------------------------------------------


def test_what_is_written_is_read(ledger: Ledger) -> None:
    first, second = record(A, 1, belief=(1e-300, 0.1, 1 - 1e-16)), record(A, 2, log_hazard=-0.0)
    assert ledger.write([first, second]) == [True, True]
    assert ledger.read(A, [second.key, "nothing", first.key, first.key]) == [
        second,
        None,
        first,
        first,
    ]
    assert ledger.read(B, [first.key]) == [None]
    assert ledger.read(A, []) == []
    assert ledger.write([]) == []


def test_the_first_record_stays(ledger: Ledger) -> None:
    first, other = record(A, belief=(1.0,)), record(A, belief=(0.5,))
    assert ledger.write([first, other]) == [True, False]
    assert ledger.write([other, record(B), record(A, 2)]) == [False, True, True]
    assert ledger.read(A, [first.key]) == [first]


def test_the_same_key_in_two_conversations_is_two_turns(ledger: Ledger) -> None:
    here, there = record(A, belief=(1.0,)), record(B, belief=(0.0,))
    there = there.model_copy(update={"key": here.key})
    assert ledger.write([here, there]) == [True, True]
    assert ledger.read(A, [here.key]) == [here]
    assert ledger.read(B, [here.key]) == [there]


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    """Eight threads write the same turns: each is added once, and all see the same record."""
    threads, turns = 8, 40
    added: list[list[bool]] = [[] for _ in range(threads)]
    seen: list[list[TurnRecord | None]] = [[] for _ in range(threads)]
    start = threading.Barrier(threads)

    def write(index: int) -> None:
        start.wait()
        for turn in range(1, turns + 1):
            mine = record(A, turn, belief=(index / 8,))
            added[index] += ledger.write([mine])
            seen[index] += ledger.read(A, [mine.key])

    workers = [threading.Thread(target=write, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [sum(column) for column in zip(*added, strict=True)] == [1] * turns
    assert all(one == seen[0] for one in seen)
    for turn, stored in enumerate(seen[0]):
        assert stored is not None
        assert [row[turn] for row in added].index(True) == stored.belief[0] * 8


def test_closed_ledgers_say_so(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="cannot read: it was closed; open another"):
        ledger.read(A, ["key"])
    with pytest.raises(LedgerError, match="cannot write: it was closed"):
        ledger.write([record(A)])
    with pytest.raises(LedgerError, match="cannot expire: it was closed"):
        ledger.expire(0.0)


def test_an_id_of_10_mb_costs_a_hash(ledger: Ledger) -> None:
    name = conversation_key("x" * 10_000_000)
    assert len(name) == 64
    assert ledger.write([record(name)]) == [True]
    assert ledger.read(name, [key_named(name, 1)]) != [None]
    with pytest.raises(ValidationError, match="at most 64 characters"):  # the id itself, by mistake
        record("x" * 10_000_000)


class Against(RuleBasedStateMachine):
    """Any sequence of calls does to a store what it does to a dict."""

    fresh: Callable[[], str]  # gives the address of an empty store
    names = st.sampled_from([A, B, conversation_named(2)])
    turns = st.integers(1, 4)
    hours = st.integers(0, 5)

    @initialize()
    def begin(self) -> None:
        self.url = self.fresh()
        self.ledger = open_ledger(self.url)
        self.model: dict[str, dict[str, TurnRecord]] = {}
        self.newest: dict[str, int] = {}

    @rule(
        batch=st.lists(st.tuples(names, turns, st.floats(0, 1), hours), max_size=4),
        now=st.just(time.time()),
    )
    def write(self, batch: list[tuple[str, int, float, int]], now: float) -> None:
        records = [
            record(name, turn, belief=(p,), at=now - 3600 * age) for name, turn, p, age in batch
        ]
        expected = []
        for one, (name, _, _, age) in zip(records, batch, strict=True):
            known = self.model.setdefault(name, {})
            expected.append(one.key not in known)
            if expected[-1]:
                known[one.key] = one
                self.newest[name] = min(age, self.newest.get(name, age))
        assert self.ledger.write(records) == expected

    @rule(name=names, chosen=st.lists(turns, max_size=5))
    def read(self, name: str, chosen: list[int]) -> None:
        keys = [key_named(name, turn) for turn in chosen]
        known = self.model.get(name, {})
        assert self.ledger.read(name, keys) == [known.get(key) for key in keys]

    @rule(age=hours)
    def expire(self, age: int) -> None:
        old = [name for name, hours in self.newest.items() if hours > age]
        expected = sum(len(self.model.pop(name)) for name in old)
        for name in old:
            del self.newest[name]
        assert self.ledger.expire(time.time() - 3600 * age - 1800) == expected

    @rule()
    def open_again(self) -> None:
        if not isinstance(self.ledger, MemoryLedger):
            self.ledger.close()
            self.ledger = open_ledger(self.url)

    def teardown(self) -> None:
        self.ledger.close()


@pytest.mark.parametrize("store", ["memory", "sqlite", pytest.param("redis", marks=needs_redis)])
def test_any_sequence_of_calls(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fresh = itertools.count()

    def fresh_url() -> str:
        if store == "redis":
            return flushed(request.getfixturevalue("server"))
        return "memory:" if store == "memory" else f"{tmp_path}/{next(fresh)}.db"

    class Machine(Against):
        fresh = staticmethod(fresh_url)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=30, stateful_step_count=20, suppress_health_check=list(HealthCheck)
        ),
    )


# --- expiry and clocks ----------------------------------------------------------------------------


def put_clock(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """Put this machine's clock so far ahead of the right time."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let time pass, for both clocks."""
    put_clock(monkeypatch, seconds)
    since = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: since() + seconds)


def is_kept(ledger: Ledger, one: TurnRecord) -> bool:
    return ledger.read(one.conversation, [one.key]) == [one]


def test_old_conversations_are_forgotten(ledger: Ledger) -> None:
    now = time.time()
    old, renewed = record(A, at=now - 2 * DAY), record(B, at=now - 2 * DAY)
    ledger.write([old, record(A, 2, at=now - 2 * DAY), renewed])
    ledger.write([record(B, 2, at=now)])
    assert ledger.expire(now - 3 * DAY) == 0
    assert ledger.expire(now - DAY) == 2
    assert not is_kept(ledger, old)
    assert is_kept(ledger, renewed)
    assert ledger.expire(now - DAY) == 0
    assert ledger.write([old]) == [True]


def test_more_conversations_expire_than_one_step_takes(ledger: Ledger) -> None:
    names = [conversation_named(index) for index in range(600)]
    ledger.write([record(name, at=time.time() - DAY * (1 + i % 2)) for i, name in enumerate(names)])
    assert ledger.expire(time.time() - 1.5 * DAY) == 300
    assert ledger.expire(time.time() + 1) == 300


def test_expiry_needs_a_time(ledger: Ledger) -> None:
    for before in ("nan", "-inf"):
        with pytest.raises(ValueError, match=f"before is {before}, expected a Unix time"):
            ledger.expire(float(before))


def test_a_record_from_the_future_is_one_of_now(ledger: Ledger) -> None:
    """It neither lives for ever nor makes others old."""
    ahead, right = record(A, at=time.time() + 1e9), record(B)
    ledger.write([ahead, right])
    assert ledger.expire(time.time() - 60) == 0
    assert is_kept(ledger, right)
    assert ledger.expire(time.time() + 1) == 2


@pytest.mark.parametrize("ahead", [-20 * 365 * DAY, 20 * 365 * DAY])
def test_the_clock_of_who_writes_or_expires_cancels_out(
    url: str, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(url)
    with monkeypatch.context() as wrong:
        put_clock(wrong, ahead)
        ledger.write([record(A), record(B, at=time.time() - DAY)])
        assert ledger.expire(time.time() - 1.5 * DAY) == 0
    assert ledger.expire(time.time() - 1.5 * DAY) == 0
    assert ledger.expire(time.time() - 0.5 * DAY) == 1
    assert is_kept(ledger, ledger.read(A, [key_named(A, 1)])[0] or record(B))
    ledger.close()


def test_sqlite_goes_on_from_its_newest_turn_when_opened_in_1970(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SQLiteLedger(path).write([record(B)])
    late = record(A, 2)
    with monkeypatch.context() as wrong:
        put_clock(wrong, -time.time())
        during = SQLiteLedger(path)
        assert during.expire(time.time() - DAY) == 0
        during.write([late.model_copy(update={"at": time.time()})])
    assert SQLiteLedger(path).expire(time.time() - DAY) == 0


def test_sqlite_opened_in_2046_lets_nothing_live_for_ever_or_go_early(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = SQLiteLedger(path)
    with monkeypatch.context() as wrong:
        put_clock(wrong, 20 * 365 * DAY)
        SQLiteLedger(path).write([record(A)])
    running.write([record(B)])  # follows, and so is not 20 years older
    assert SQLiteLedger(path).expire(time.time() - DAY) == 0
    pass_time(monkeypatch, 2 * DAY)
    assert running.expire(time.time() - DAY) == 2


# --- addresses ------------------------------------------------------------------------------------


def test_addresses_of_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    one = record(A)
    with_space = path.with_name("a file?.db")
    for address in ("ledger.db", str(path), f"sqlite://{path}", f"sqlite:///{path}"):
        ledger = open_ledger(address)
        ledger.write([one])
        assert is_kept(ledger, one)
        ledger.close()
    open_ledger(f"sqlite://{path.parent}/a%20file%3F.db").close()
    assert {item.name for item in path.parent.iterdir()} == {"ledger.db", with_space.name}


@pytest.mark.parametrize(
    "address",
    ["", "postgres://host/db", "sqlite:ledger.db", "sqlite://ledger.db", "memory:x", "c:ledger.db"],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"no ledger at .*; expected memory:, a path"):
        open_ledger(address)


def test_redis_without_its_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"pip install 'midstream\[redis\]'"):
        open_ledger("redis://localhost:6379/0")


def test_a_redis_database_is_a_number() -> None:
    with pytest.raises(ValueError, match="no database 'turns', expected a number"):
        open_ledger("redis://user:secret@localhost:1/turns")


def test_a_timeout_must_be_one(path: Path) -> None:
    with pytest.raises(ValueError, match="timeout is 0"):
        open_ledger(str(path), timeout=0)
    with pytest.raises(ValueError, match="timeout is -1"):
        open_ledger("redis://localhost:6379/0", timeout=-1)


# --- bytes ----------------------------------------------------------------------------------------


@given(
    belief=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8),
    log_hazard=st.floats(allow_nan=False, allow_infinity=False),
    at=st.floats(0, 1e12),
)
def test_encoding_is_exact(belief: list[float], log_hazard: float, at: float) -> None:
    one = record(A, belief=belief, log_hazard=log_hazard, at=at)
    back = decode(A, one.key, encode(one))
    assert repr(back) == repr(one)  # which tells -0.0 from 0.0


def test_any_damage_to_a_turn_is_found() -> None:
    one = record(A)
    value = encode(one)
    for index in range(len(value)):
        broken = bytearray(value)
        broken[index] ^= 1 << index % 8
        for damaged in (bytes(broken), value[:index]):
            with pytest.raises(CorruptedTurn, match=r"checksum|cut short"):
                decode(A, one.key, damaged)
    for name, key in ((B, one.key), (A, "other"), (A + one.key[0], one.key[1:])):
        with pytest.raises(CorruptedTurn, match="fails its checksum"):
            decode(name, key, value)
    with pytest.raises(CorruptedTurn, match="cut short"):
        decode(A, one.key, "text")


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_bounded() -> None:
    ledger = MemoryLedger(max_turns=3)
    ledger.write([record(A, 1), record(A, 2)])
    with pytest.raises(LedgerError, match="it holds 2 turns of at most 3; expire"):
        ledger.write([record(A, 2), record(A, 3), record(B, 1)])
    assert ledger.write([record(A, 2), record(A, 3), record(A, 3)]) == [False, True, False]
    assert ledger.write([record(A, 1)]) == [False]
    assert ledger.expire(time.time() + 1) == 3
    assert ledger.write([record(B, 1)]) == [True]
    with pytest.raises(ValueError, match="max_turns is 0"):
        MemoryLedger(max_turns=0)


# --- SQLite ---------------------------------------------------------------------------------------


def filled(path: Path, conversations: int = 12, turns: int = 8) -> list[TurnRecord]:
    rng = random.Random(fresh_seed())
    records = [
        record(conversation_named(index), turn, belief=(rng.random(), rng.random()))
        for index in range(conversations)
        for turn in range(1, turns + 1)
    ]
    ledger = SQLiteLedger(path)
    ledger.write(records)
    ledger.close()
    return records


def test_sqlite_promises_the_disk(path: Path) -> None:
    ledger = SQLiteLedger(path)
    connection = ledger._writer.connection()
    for name, expected in (("journal_mode", "wal"), ("synchronous", 2)):
        assert connection.execute(f"PRAGMA {name}").fetchone() == (expected,)
    assert path.stat().st_mode & 0o077 == 0


def test_writers_that_wait_share_a_transaction(path: Path) -> None:
    ledger = SQLiteLedger(path, timeout=20)
    transactions: list[str] = []
    connection = ledger._writer.connection()
    connection.set_trace_callback(lambda sql: transactions.append(sql) if sql == "COMMIT" else None)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    workers = [
        threading.Thread(target=ledger.write, args=([record(A, turn)],)) for turn in range(1, 17)
    ]
    for worker in workers:
        worker.start()
    while len(ledger._jobs) < len(workers):
        time.sleep(0.001)
    holder.execute("COMMIT")
    for worker in workers:
        worker.join()
    assert len(transactions) == 1
    assert None not in ledger.read(A, [key_named(A, turn) for turn in range(1, 17)])


def test_a_locked_store_fails_in_time_and_recovers(path: Path) -> None:
    ledger = SQLiteLedger(path, timeout=0.2)
    ledger.write([record(A)])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    failures: list[str] = []

    def write() -> None:
        try:
            ledger.write([record(B)])
        except LedgerError as error:
            failures.append(str(error))

    begin = time.monotonic()
    workers = [threading.Thread(target=write) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert time.monotonic() - begin < 30  # twice the timeout, and very slow machines
    assert len(failures) == 6
    assert f"ledger {path}: cannot write: database is locked; another process" in failures[0]
    assert is_kept(ledger, ledger.read(A, [key_named(A, 1)])[0] or record(B))  # readers go on
    with pytest.raises(LedgerError, match="cannot expire: database is locked"):
        ledger.expire(0.0)
    holder.execute("ROLLBACK")
    assert ledger.write([record(B)]) == [True]


def test_threads_do_not_wait_behind_each_other_for_ever(path: Path) -> None:
    ledger = SQLiteLedger(path, timeout=0.1)
    for turns in (ledger._reading, ledger._writing):
        turns.take()
    for operation in (
        lambda: ledger.read(A, []),
        lambda: ledger.write([record(A)]),
        lambda: ledger.expire(0.0),
    ):
        with pytest.raises(LedgerError, match="other threads have waited for it too long"):
            operation()
    for turns in (ledger._reading, ledger._writing):
        turns.pass_on()
    assert ledger.write([record(B)]) == [True]


def outcome_of_reading(path: Path, records: list[TurnRecord]) -> str:
    """Read all; what is given must be right."""
    try:
        ledger = SQLiteLedger(path)
    except LedgerError as error:
        return str(error)
    refused = "fine"
    for _, group in itertools.groupby(records, key=lambda one: one.conversation):
        turns = list(group)
        try:
            assert ledger.read(turns[0].conversation, [one.key for one in turns]) == turns
        except LedgerError as error:
            refused = str(error)
    ledger.close()
    return refused


def test_flipped_bytes_never_make_a_wrong_belief(path: Path) -> None:
    records = filled(path)
    sound = path.read_bytes()
    assert outcome_of_reading(path, records) == "fine"
    rng = random.Random(fresh_seed())
    outcomes = []
    for trial in range(150):
        damaged = bytearray(sound)
        where = rng.randrange(100) if trial % 5 == 0 else rng.randrange(len(damaged))
        size = rng.choice([1, 1, 1, 16, 4096])
        damaged[where : where + size] = rng.randbytes(len(damaged[where : where + size]))
        path.write_bytes(damaged)
        outcomes.append(outcome_of_reading(path, records))
    found = [outcome for outcome in outcomes if outcome != "fine"]
    assert len(found) > len(outcomes) / 3  # the others hit free space
    assert all(f"ledger {path}: cannot " in outcome for outcome in found)
    assert any("restore a backup" in outcome for outcome in found)


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [
        (
            b"CREATE TABLE turns",
            b"CREATE TABLE \x84urns",
        ),  # no UTF-8, and nor is SQLite's complaint
        (b"CREATE TABLE turns", b"CREATE TABLE tunrs"),
        (b"SQLite format 3", b"SQLite format 4"),
        (b"midl", b"midk"),
        (b"WITHOUT ROWID", b"             "),
    ],
)
def test_damaged_headers_are_refused(path: Path, sound: bytes, damaged: bytes) -> None:
    filled(path)
    content = path.read_bytes()
    assert sound in content
    path.write_bytes(content.replace(sound, damaged))
    with pytest.raises(LedgerError, match=f"ledger {path}: cannot open: "):
        SQLiteLedger(path)


@pytest.mark.parametrize("column", ["conversation", "key", "value"])
def test_a_damaged_row_does_not_pass_for_a_missing_one(path: Path, column: str) -> None:
    """By the names alone the turn would not be found, and its risk begin anew."""
    (one, *_) = filled(path)
    with sqlite3.connect(path) as connection:
        changed = {"conversation": "'0' || substr(conversation, 2)", "key": "'k'", "value": "x'00'"}
        connection.execute(
            f"UPDATE turns SET {column} = {changed[column]} WHERE key = ?", (one.key,)
        )
    connection.close()
    ledger = SQLiteLedger(path)
    with pytest.raises(LedgerError, match=r"cannot read: .*turn.*stop all who use it"):
        ledger.read(one.conversation, [one.key])
    other = record(B, 8)
    assert ledger.read(B, [other.key]) != [None]


def test_truncated_files_are_refused(path: Path) -> None:
    records = filled(path)
    sound = path.read_bytes()
    for size in (0, 50, 512, 4096, len(sound) // 2, len(sound) - 1, len(sound) - 4096):
        path.write_bytes(sound[:size])
        assert outcome_of_reading(path, records).startswith(f"ledger {path}: cannot ")


def test_foreign_files_are_refused_untouched(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE shopping (item TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="belongs to another program"):
        SQLiteLedger(path)
    assert path.read_bytes() == before
    path.write_text("A letter, and a long one. " * 100)
    with pytest.raises(LedgerError, match="file is not a database; do not trust"):
        SQLiteLedger(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match="unable to open database file; see that"):
        SQLiteLedger(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("PRAGMA user_version = 2", "its schema has version 2, this program knows 1; update"),
        ("PRAGMA journal_mode = DELETE", "its journal_mode is delete, not wal"),
        ("CREATE INDEX more ON turns (value)", "its tables are not those that were made"),
    ],
)
def test_changed_stores_are_refused(path: Path, change: str, expected: str) -> None:
    filled(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(change)
    connection.close()
    with pytest.raises(LedgerError, match=expected):
        SQLiteLedger(path)


def test_a_full_disk_is_said_and_expiry_makes_room(path: Path) -> None:
    ledger = SQLiteLedger(path)
    connection = ledger._writer.connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 8}")
    written = 0

    def write_on() -> None:
        nonlocal written
        while True:
            ledger.write([record(A, written + 1)])
            written += 1

    with pytest.raises(LedgerError, match="database or disk is full; free space"):
        write_on()
    keys = [key_named(A, turn) for turn in range(1, written + 2)]
    assert [one is not None for one in ledger.read(A, keys)] == [True] * written + [False]
    assert ledger.expire(time.time() + 1) == written
    assert ledger.write([record(B)]) == [True]


def test_a_quota_is_said_and_loses_nothing(path: Path) -> None:
    answers = path.with_name("answers")
    process = CONTEXT.Process(target=write_with_a_quota, args=(path, str(answers)))
    process.start()
    process.join()
    written, said = answers.read_text().split("\n")
    assert "cannot write: disk I/O error; see the system's log for errors of this disk" in said
    keys = [key_named(A, turn) for turn in range(1, int(written) + 1)]
    assert None not in SQLiteLedger(path).read(A, keys)


def test_folders_without_write_access_are_said() -> None:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as free:
        folder = Path(name)
        filled(folder / "ledger.db")
        (folder / "ledger.db").chmod(0o444)
        folder.chmod(0o555)
        Path(free).chmod(0o777)
        process = CONTEXT.Process(
            target=write_as_nobody, args=(folder / "ledger.db", f"{free}/answers")
        )
        process.start()
        process.join()
        lines = Path(f"{free}/answers").read_text().splitlines()
        folder.chmod(0o755)
    assert len(lines) == 3
    assert all("this user" in line for line in lines), lines


def test_a_file_that_is_taken_away_is_missed_and_found_again(path: Path) -> None:
    ledger = SQLiteLedger(path)
    one = record(A)
    ledger.write([one])
    SQLiteLedger(path).close()
    moved = path.rename(path.with_name("moved.db"))
    for operation in (lambda: ledger.write([record(B)]), lambda: ledger.read(A, [one.key])):
        with pytest.raises(LedgerError, match="No such file or directory; see that"):
            operation()
    assert not path.exists()
    moved.rename(path)
    assert is_kept(ledger, one)
    assert ledger.write([record(B)]) == [True]


def test_a_forked_process_opens_its_own(path: Path) -> None:
    ledger = SQLiteLedger(path)
    child = os.fork()
    if child == 0:
        try:
            ledger.read(A, [])
        except LedgerError as error:
            os._exit(0 if "opened before a fork; open it in each process" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


# --- Redis ----------------------------------------------------------------------------------------


@pytest.fixture
def in_redis(server: RedisServer) -> Iterator[RedisLedger]:
    ledger = RedisLedger(flushed(server), timeout=20)
    yield ledger
    ledger.close()


@needs_redis
def test_redis_takes_one_round_trip(in_redis: RedisLedger) -> None:
    client = in_redis._client
    in_redis.write([record(A)])
    before = client.info("stats")["total_commands_processed"]
    in_redis.write([record(A, 2), record(B, 1)])
    in_redis.read(A, [key_named(A, 1), key_named(A, 2)])
    calls = client.info("stats")["total_commands_processed"] - before
    # EVALSHA with TIME and two HEXISTS, ZADD and HSET, HMGET, and one INFO.
    assert calls == 1 + 7 + 1 + 1


@needs_redis
def test_redis_in_bad_hands(in_redis: RedisLedger) -> None:
    client = in_redis._client
    one = record(A)
    in_redis.write([one])
    (name,) = client.keys(f"*{A}")
    value = client.hget(name, one.key)
    client.hset(name, one.key, value[:-2] + b"9}")
    with pytest.raises(LedgerError, match=r"fails its checksum; do not trust this conversation"):
        in_redis.read(A, [one.key])
    client.delete(name)
    client.set(name, "text")
    for operation in (lambda: in_redis.write([one]), lambda: in_redis.read(A, [one.key])):
        with pytest.raises(LedgerError, match=r"WRONGTYPE.*give the ledger a database of its own"):
            operation()
    client.delete(name)
    ages = f"{name.decode().removesuffix(A)}ages"
    client.set(ages, "text")
    with pytest.raises(LedgerError, match=r"cannot write: .*WRONGTYPE"):
        in_redis.write([one])
    client.delete(ages)
    assert in_redis.write([one]) == [True], "a turn without an age would never expire"
    assert in_redis.expire(time.time() + 1) == 1
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(LedgerError, match="raise the server's maxmemory"):
            in_redis.write([one])
    finally:
        client.config_set("maxmemory", 0)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(LedgerError, match=r"cannot write: .*give the address of the primary"):
            in_redis.write([one])
        with pytest.raises(LedgerError, match="cannot open: it is a replica"):
            RedisLedger(f"unix://{client.connection_pool.connection_kwargs['path']}")
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert in_redis.write([one]) == [True]


@needs_redis
@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("appendonly", "no", "a restart loses turns"),
        ("appendfsync", "everysec", "appendfsync is everysec: loss of power takes turns"),
        ("maxmemory-policy", "allkeys-lru", "conversations vanish when memory is short"),
    ],
)
def test_redis_that_promises_less_is_warned_of(
    in_redis: RedisLedger, server: RedisServer, name: str, value: str, warning: str
) -> None:
    before = in_redis._client.config_get(name)[name]
    in_redis._client.config_set(name, value)
    try:
        with pytest.warns(RuntimeWarning, match=warning):
            RedisLedger(server.url).close()
    finally:
        in_redis._client.config_set(name, before)


@needs_redis
def test_redis_that_hangs_or_dies_fails_in_time_and_recovers(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        ledger = RedisLedger(server.url, timeout=1.0)  # which a busy machine keeps, too
        one = record(A)
        ledger.write([one])
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        operations = (
            lambda: ledger.write([record(B)]),
            lambda: ledger.read(A, [one.key]),
            lambda: ledger.expire(0.0),
            lambda: RedisLedger(server.url, timeout=0.2),
        )
        for operation in operations:
            begin = time.monotonic()
            with pytest.raises(LedgerError, match=r"[Tt]ime.*see that the server runs"):
                operation()
            assert time.monotonic() - begin < 30
        server.process.send_signal(signal.SIGCONT)
        assert is_kept(ledger, one)
        server.kill()
        for operation in operations:
            with pytest.raises(LedgerError, match="see that the server runs"):
                operation()
        server.start()
        assert is_kept(ledger, one)
        assert ledger.write([one, record(B, 2)]) == [False, True]
        server.kill()
        server.start("--requirepass", "secret")
        with pytest.raises(LedgerError, match="give user and password") as caught:
            RedisLedger(server.url.replace("unix://", "unix://:wrong-word@"))
        assert "wrong-word" not in str(caught.value)
