"""The file of `midstream.ledger.sqlite`: made whole, opened only if it is ours and sound."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

_Result = TypeVar("_Result")

APPLICATION_ID = 0x6D69646C  # "midl"
SCHEMA_VERSION = 1

_SCHEMA = (
    "CREATE TABLE turns (conversation TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, "
    "PRIMARY KEY (conversation, key)) WITHOUT ROWID",
    "CREATE TABLE conversations (conversation TEXT PRIMARY KEY NOT NULL, turns INTEGER NOT NULL, "
    "touched REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX conversations_by_age ON conversations (touched)",
)
# Seconds, on average, between looks at a lock that another process holds. SQLite's own waiting
# looks ever less often, each 100 ms in the end: with 8 writers and a sync of 4 ms the 99th
# percentile of a write was 1.3 s that way, and is 0.1 to 0.2 s this way, at twice the rate or more.
_WAIT = 1e-3
# Bytes of log above which it is emptied by force. SQLite begins it anew only in a moment without
# readers; with four that read without pause it grew by 30 MB per second.
_LONG_LOG = 16 << 20
_LOG_WAIT = 100  # ms for readers to end; all writers wait as long


class UnusableFile(Exception):
    """A file that is not this version's store; the second argument says what to do."""


class StoreFile:
    """A connection to the store that opens itself again after a failure.

    Not thread-safe.

    Parameters
    ----------
    path : Path
    timeout : float
        Seconds to wait for another process.
    checks_all : bool
        Check the whole file when it is opened; for readers that check what they read it would be
        the second time.
    """

    def __init__(self, path: Path, timeout: float, *, checks_all: bool) -> None:
        self.path = path
        self._timeout = timeout
        self._checks_all = checks_all
        self._long_log = _LONG_LOG
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)

    def connection(self) -> sqlite3.Connection:
        """Return the connection; what it writes goes to the file that now has this name.

        Raises
        ------
        OSError
            If there is no such file: only `create` makes one.
        sqlite3.Error
            If it cannot be opened, or is still locked after the timeout.
        UnusableFile
            If it is of another program, of another version or corrupted.
        """
        status = os.stat(self.path)
        if self._connection is None or self._identity != (status.st_dev, status.st_ino):
            self.drop()
            if status.st_size == 0:
                raise UnusableFile(
                    "the file is empty, and a store never is",
                    "restore a backup, or remove the file to begin with an empty store",
                )
            self._connection = _open(self.path, self._timeout, checks_all=self._checks_all)
            self._identity = (status.st_dev, status.st_ino)
        return self._connection

    def execute(
        self, statement: str, parameters: tuple[str, ...] = ()
    ) -> tuple[sqlite3.Connection, sqlite3.Cursor]:
        """Execute what may have to wait for another process, for no longer than the timeout."""
        connection = self.connection()
        return connection, _waiting(
            lambda: connection.execute(statement, parameters), self._timeout
        )

    def empty_log(self) -> None:
        """Empty a log that has become long; to be called after each transaction.

        Where a reader does not end, the next attempt is made when the log is twice as long, so
        that writers are not kept waiting each time. An error is left to the next transaction:
        what was committed stays.
        """
        with contextlib.suppress(OSError, sqlite3.Error):
            size = os.stat(f"{self.path}-wal").st_size
            if size < self._long_log:
                return
            connection = self.connection()
            connection.execute(f"PRAGMA busy_timeout = {_LOG_WAIT}")
            try:
                is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                connection.execute("PRAGMA busy_timeout = 0")
            self._long_log = 2 * size if is_busy else _LONG_LOG

    def drop(self) -> None:
        """Close the connection; the next call opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def create(path: Path) -> None:
    """Make an empty store, which appears whole or not at all, readable by this user alone.

    Of several processes that do so at once one makes it; so an empty file is never a store. One
    that is killed on the way leaves at most a sibling ``.NAME.partial-*``.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(name)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA fullfsync = ON")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(name + suffix).unlink(missing_ok=True)


def _open(path: Path, timeout: float, *, checks_all: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file://{quote(str(path))}?mode=rw",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        _waiting(lambda: _check(connection, whole=checks_all), timeout)
        # Full means full on macOS, too, whose fsync does not reach the disk by itself.
        for setting in ("fullfsync = ON", "checkpoint_fullfsync = ON", "synchronous = FULL"):
            connection.execute(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


def _waiting(call: Callable[[], _Result], timeout: float) -> _Result:
    """Call again while another process holds a lock."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0, 2 * _WAIT))


def _check(connection: sqlite3.Connection, *, whole: bool) -> None:
    """Refuse what is not ours, before anything is changed in it."""
    found, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
    if found != APPLICATION_ID:
        raise UnusableFile(
            f"the file belongs to another program (application_id {found})", "give another path"
        )
    if version != SCHEMA_VERSION:
        raise UnusableFile(
            f"its schema has version {version}, this program knows {SCHEMA_VERSION}",
            "update midstream, or begin with a store of another name",
        )
    if (mode := _pragma(connection, "journal_mode")) != "wal":
        raise UnusableFile(
            f"its journal_mode is {mode}, not wal", "set it with PRAGMA journal_mode = WAL"
        )
    schema = connection.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL ORDER BY rowid")
    if tuple(statement for (statement,) in schema) != _SCHEMA:
        raise sqlite3.DatabaseError("its tables are not those that were made")
    # Compares the index of ages with the ages, too, which quick_check does not: a flipped bit there
    # would have a conversation forgotten early.
    if whole and (verdict := _pragma(connection, "integrity_check")) != "ok":
        raise sqlite3.DatabaseError(f"integrity_check found: {verdict}")


def _pragma(connection: sqlite3.Connection, name: str) -> int | str:
    value: int | str = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value
