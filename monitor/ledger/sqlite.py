"""A ledger in one SQLite file: the embedded default.

What `write` returned for is on the disk (WAL, ``synchronous=FULL``: the log is synced before it
returns) and survives kill -9 and loss of power, as far as the disk keeps its word. Threads that
write at the same time share a transaction, and so a sync: the first to get the lock commits for all
who wait. Processes take turns on SQLite's own lock. Not for network file systems: the log needs
shared memory.

================  ===========================================================================
file              0.55 to 0.7 kB per turn of six states; pages of what expired are used again,
                  the file does not shrink
log beside it     4 MB; from 16 MB on emptied as soon as readers allow (60 MB seen beside four that
                  never paused), more while one reads for long
write             one sync per transaction, whoever shares it; O(log turns) each turn
read              all turns kept of the one conversation, edited and branched ones included:
                  each is checked, so that a damaged row cannot pass for one that is not there
expire            what is forgotten; 256 conversations at a time hold the lock
opening           ``integrity_check`` reads the whole file: about 3 s per GB once it is in memory
================  ===========================================================================
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from midstream.ledger.clock import StoreClock, age, expiry_age
from midstream.ledger.encoding import CorruptedTurn, decode, encode, verify
from midstream.ledger.ledger import LedgerError, TurnRecord
from midstream.ledger.sqlite_file import StoreFile, UnusableFile, create
from midstream.ledger.waiting import Turns

# One statement, and so one moment: what is there, and how much of it there must be.
_READ = """
SELECT NULL, turns FROM conversations WHERE conversation = ?1
UNION ALL SELECT key, value FROM turns WHERE conversation = ?1
"""
_ADD = "INSERT INTO turns VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_TOUCH = """
INSERT INTO conversations VALUES (?, 1, ?) ON CONFLICT DO UPDATE
SET turns = turns + 1, touched = max(touched, excluded.touched)
"""
_NEWEST = "SELECT coalesce(max(touched), 0) FROM conversations"
_OLD = "SELECT conversation FROM conversations WHERE touched < ? LIMIT 256"

_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another process holds the store: see which, or allow a longer timeout",
    sqlite3.SQLITE_FULL: "free space on the disk, or expire old conversations, which frees pages",
    sqlite3.SQLITE_READONLY: "give this user write access to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "see that the folder exists and that this user may write there",
    sqlite3.SQLITE_IOERR: "see the system's log for errors of this disk, its quota and its limits",
}
_CORRUPTED = (
    "do not trust what it holds: stop all who use it, move the file with its -wal and -shm away, "
    "and restore a backup or begin with an empty store"
)
_HARMLESS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)  # to the connection


@dataclass(eq=False)
class _Job:
    """One call of `write` and what became of it."""

    rows: list[tuple[str, str, bytes, float]]
    added: list[bool] | None = None
    failure: LedgerError | None = None

    @property
    def is_done(self) -> bool:
        return self.added is not None or self.failure is not None


class SQLiteLedger:
    """Turns in an SQLite file, which is made where there is none.

    Parameters
    ----------
    path : str or os.PathLike
    timeout : float
        Seconds to wait for another process that holds the store. A call fails within three times
        as many (two of them behind other threads that wait) and what the disk takes; `expire`
        within as many per 256 conversations. What failed to be written in time may be, later.

    Raises
    ------
    LedgerError
        If the file is of another program, of another version or corrupted, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 2.0) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}, expected seconds above 0")
        self._path = Path(os.path.abspath(path))
        self._timeout = timeout
        self._clock = StoreClock()
        self._process = os.getpid()
        self._closed = False
        self._jobs: deque[_Job] = deque()
        self._writing, self._reading = Turns(), Turns()
        self._writer = StoreFile(self._path, timeout, checks_all=True)
        self._reader = StoreFile(self._path, timeout, checks_all=False)
        with self._failures("open", self._writer):
            if not os.path.lexists(self._path):
                create(self._path)
            self._writer.connection()

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        """See `Ledger.read`."""
        self._check_usable("read")
        wanted = set(keys)
        found: dict[str, TurnRecord] = {}
        counted = expected = 0
        with self._turn(self._reading, "read"), self._failures("read", self._reader):
            _, rows = self._reader.execute(_READ, (conversation,))
            with contextlib.closing(rows):  # or an error's traceback would keep the log from ending
                for key, value in rows:
                    if key is None:
                        expected = value
                        continue
                    counted += 1
                    if key in wanted:
                        found[key] = decode(conversation, key, value)
                    else:
                        verify(conversation, key, value)
            if counted != expected:
                raise CorruptedTurn(
                    f"conversation {conversation!r} has {counted} turns, {expected} were written"
                )
        return [found.get(key) for key in keys]

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        """See `Ledger.write`; all of them are stored, or none."""
        self._check_usable("write")
        job = _Job([(r.conversation, r.key, encode(r), age(r.at)) for r in records])
        self._jobs.append(job)
        with self._turn(self._writing, "write", unless=lambda: job.is_done) as is_mine:
            if is_mine:
                self._commit_jobs()
        if job.failure is not None:
            raise LedgerError(*job.failure.args) from job.failure.__cause__
        assert job.added is not None
        return job.added

    def expire(self, before: float) -> int:
        """See `Ledger.expire`."""
        self._check_usable("expire")
        oldest_age = expiry_age(before)
        turns = 0
        while True:
            with (
                self._turn(self._writing, "expire"),
                self._failures("expire", self._writer),
                self._transaction() as on,
            ):
                old = on.execute(_OLD, (self._now(on) - oldest_age,)).fetchall()
                on.executemany("DELETE FROM conversations WHERE conversation = ?", old)
                turns += on.executemany("DELETE FROM turns WHERE conversation = ?", old).rowcount
            if not old:
                return turns

    def close(self) -> None:
        """See `Ledger.close`."""
        self._closed = True
        if os.getpid() != self._process:  # the connections are of the process that forked
            return
        for turns, file in ((self._writing, self._writer), (self._reading, self._reader)):
            turns.take()
            file.drop()
            turns.pass_on()

    def _commit_jobs(self) -> None:
        """Commit what waits in one transaction; every job then has its outcome."""
        jobs: list[_Job] = []
        try:
            with self._failures("write", self._writer), self._transaction() as on:
                jobs = self._take_jobs()  # only now: more came while another process held the store
                now = self._now(on)
                added = [[_add(on, *row, now=now) for row in job.rows] for job in jobs]
        except LedgerError as failure:
            for job in jobs or self._take_jobs():
                job.failure = failure
        except BaseException:  # Ctrl-C in the thread that commits for others
            self._jobs.extend(jobs)
            raise
        else:
            for job, outcome in zip(jobs, added, strict=True):
                job.added = outcome

    def _take_jobs(self) -> list[_Job]:
        return [self._jobs.popleft() for _ in range(len(self._jobs))]

    def _now(self, on: sqlite3.Connection) -> float:
        return self._clock.now(on.execute(_NEWEST).fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection, _ = self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._writer.empty_log()

    @contextlib.contextmanager
    def _turn(
        self, turns: Turns, operation: str, *, unless: Callable[[], bool] = lambda: False
    ) -> Iterator[bool]:
        """Wait for a turn; yield False where ``unless`` came first."""
        is_mine = turns.take(unless, 2 * self._timeout)
        if not is_mine and not unless():
            remedy = _REMEDIES[sqlite3.SQLITE_BUSY]
            raise self._error(operation, "other threads have waited for it too long", remedy)
        try:
            yield is_mine
        finally:
            if is_mine:
                turns.pass_on()

    def _check_usable(self, operation: str) -> None:
        if self._closed:
            raise self._error(operation, "it was closed", "open another")
        if os.getpid() != self._process:  # SQLite's locks do not survive a fork
            raise self._error(operation, "it was opened before a fork", "open it in each process")

    @contextlib.contextmanager
    def _failures(self, operation: str, file: StoreFile) -> Iterator[None]:
        try:
            yield
        except (CorruptedTurn, UnicodeDecodeError) as error:  # the latter names damaged tables
            raise self._error(operation, error, _CORRUPTED) from error
        except UnusableFile as error:
            raise self._error(operation, *error.args) from error
        except OSError as error:
            file.drop()
            remedy = _REMEDIES[sqlite3.SQLITE_CANTOPEN]
            raise self._error(operation, error.strerror or error, remedy) from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code not in _HARMLESS:
                file.drop()
            raise self._error(operation, error, _REMEDIES.get(code, _CORRUPTED)) from error

    def _error(self, operation: str, cause: object, remedy: str) -> LedgerError:
        return LedgerError(f"ledger {self._path}: cannot {operation}: {cause}; {remedy}")


def _add(
    on: sqlite3.Connection, conversation: str, key: str, value: bytes, aged: float, *, now: float
) -> bool:
    if on.execute(_ADD, (conversation, key, value)).rowcount == 0:
        return False
    on.execute(_TOUCH, (conversation, now - aged))
    return True
