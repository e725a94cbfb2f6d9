"""The file of `midstream.ledger.sqlite`: made whole, opened only if it is ours and sound."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

APPLICATION_ID = 0x6D69646C  # "midl"
SCHEMA_VERSION = 1

_SCHEMA = f"""
BEGIN;
CREATE TABLE turns (
    conversation TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (conversation, key)
) WITHOUT ROWID;
CREATE TABLE conversations (
    conversation TEXT PRIMARY KEY NOT NULL, turns INTEGER NOT NULL, touched REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX conversations_by_age ON conversations (touched);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_RETRY = 0.01  # seconds: SQLite does not wait by itself where it recovers a log


class UnusableFile(Exception):
    """A file that is not this version's store; the second argument says what to do."""


class StoreFile:
    """A connection to the store that opens itself again after a failure.

    Not thread-safe.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
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
            self._connection = _open(self.path, self._timeout)
            self._identity = (status.st_dev, status.st_ino)
        return self._connection

    def drop(self) -> None:
        """Close the connection; the next call opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def create(path: Path) -> None:
    """Make an empty store, which appears whole or not at all, readable by this user alone.

    Of several processes that do so at once one makes it; so an empty file is never a store.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(name)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA fullfsync = ON")
            connection.executescript(_SCHEMA)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(name + suffix).unlink(missing_ok=True)


def _open(path: Path, timeout: float) -> sqlite3.Connection:
    deadline = time.monotonic() + timeout
    while True:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _check(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY)
        except BaseException:
            connection.close()
            raise
        else:
            # Full means full on macOS, too, whose fsync does not reach the disk by itself.
            connection.execute("PRAGMA fullfsync = ON")
            connection.execute("PRAGMA checkpoint_fullfsync = ON")
            connection.execute("PRAGMA synchronous = FULL")
            return connection


def _check(connection: sqlite3.Connection) -> None:
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
    if (verdict := _pragma(connection, "quick_check")) != "ok":
        raise sqlite3.DatabaseError(f"quick_check found: {verdict}")


def _pragma(connection: sqlite3.Connection, name: str) -> int | str:
    value: int | str = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value
