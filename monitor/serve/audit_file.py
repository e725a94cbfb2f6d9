"""Files of the audit log: a chain of records, one JSON object per line, that only grows.

Each line ends with the SHA-256 of the one before it (its 64 digits) and of its own content, so a
line that was altered, removed or put in breaks the chain. A file begins with a record that repeats
the hash of the last one in the file before, so that each can be checked by itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from midstream.atomic import replace_file, sync_folder

SCHEMA_VERSION = 1

Sync = Literal["always", "every-second", "never"]

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n\Z')
_SEAL_BYTES = len(',"sha256":""}\n') + 64


class AuditError(ValueError):
    """An audit log that cannot be used or does not hold; the message says where and why."""


class SyncFailedError(OSError):
    """The disk did not take what was written since the last sync; none of it may be relied on."""


@dataclass(frozen=True)
class Chain:
    """Where a chain of records stands.

    Attributes
    ----------
    seq : int
        Number of the next record.
    head : str
        Hash of the last one.
    """

    seq: int = 0
    head: str = "0" * 64

    def line(self, body: bytes) -> tuple[bytes, Chain]:
        """Make the next line; ``body`` is a JSON object without its braces."""
        content = b'{"schema":%d,"seq":%d,%s' % (SCHEMA_VERSION, self.seq, body)
        seal = self._seal(content)
        return b'%s,"sha256":"%s"}\n' % (content, seal.encode()), Chain(self.seq + 1, seal)

    def check(self, line: bytes) -> tuple[dict[str, Any], Chain]:
        """Read the next line.

        Raises
        ------
        AuditError
            If it is not what follows here.
        """
        record = parse(line)
        if record["seq"] != self.seq:
            raise AuditError(f"record {self.seq} was expected, this is {record['seq']}")
        if record["sha256"] != self._seal(line[:-_SEAL_BYTES]):
            raise AuditError(
                f"record {self.seq} is not what was written, or the one before it is not"
            )
        return record, Chain(self.seq + 1, record["sha256"])

    def _seal(self, content: bytes) -> str:
        return hashlib.sha256(self.head.encode() + content).hexdigest()


def parse(line: bytes) -> dict[str, Any]:
    """Read a line by itself, whatever went before.

    Raises
    ------
    AuditError
        If it is no whole record, or one of a newer version.
    """
    found = _SEAL.search(line)
    try:
        record = json.loads(line) if found else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("seq"), int):
        raise AuditError("no whole record")
    if record.get("schema") != SCHEMA_VERSION:
        raise AuditError(
            f"its schema is {record.get('schema')!r}, this program knows {SCHEMA_VERSION}: "
            "update midstream"
        )
    return record


def beginning(line: bytes) -> Chain:
    """Where the chain stood before a file, by the file's first line."""
    record = parse(line)
    previous = record.get("previous")
    if record.get("kind") != "file" or not isinstance(previous, str):
        raise AuditError("the first record of a file tells of the file before it, and is not there")
    return Chain(record["seq"], previous)


def files_in(folder: Path) -> list[Path]:
    """Files of a log, oldest first; each is named by the number of its first record."""
    return sorted(folder.glob("audit-*.jsonl"))


class AuditFile:
    """The growing end of a log; held by one process at a time.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    sync : {"always", "every-second", "never"}
        With ``never`` files are not synced when they are full, either.
    max_bytes : int
        Size from which a new file is begun; only a longer record makes a file longer.

    Attributes
    ----------
    chain : Chain
        After the last record that the operating system has taken.
    taken : int
        Records it has taken from `append`, in this process.
    synced : int
        Records that `sync` has had the disk take, the older ones included.
    clean : bool
        Whether the last writer closed the log.
    torn : str, optional
        Name of the file that holds the end of a line which the last writer did not finish.

    Raises
    ------
    AuditError
        When another process writes to the folder, or what is there is not a log that holds.
    OSError
        When the disk refuses.
    """

    def __init__(self, folder: Path, sync: Sync, max_bytes: int) -> None:
        self._folder, self._sync, self._max_bytes = folder, sync, max_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        self.clean = True
        self.torn: str | None = None
        self._size = 0
        self._begun = -1  # number of the file's first record
        self._has_torn_end = False
        self._file: int | None = None
        try:
            self._take_lock()
            self.chain = self._recover()
            if self._file is None:
                self.next_file()
        except BaseException:
            self.close()
            raise
        self.synced = self.taken = 0

    def append(self, bodies: Sequence[bytes]) -> None:
        """Hand records to the operating system, in order; ``taken`` tells how many it has.

        Raises
        ------
        OSError
            When it took only some of them. Of the next one nothing stays in the file.
        SyncFailedError
            When a full file could not be synced.
        """
        lines: list[tuple[bytes, Chain]] = []
        chain, size = self.chain, self._size
        for body in bodies:
            line, after = chain.line(body)
            if size + len(line) > self._max_bytes and chain.seq > self._begun + 1:
                self._write(lines)
                if self._sync != "never":
                    self.sync()
                self.next_file()
                lines, size = [], self._size
                line, after = self.chain.line(body)
            lines.append((line, after))
            chain, size = after, size + len(line)
        self._write(lines)

    def sync(self) -> None:
        """Have the disk take what was written."""
        assert self._file is not None
        try:
            os.fsync(self._file)
        except OSError as error:
            raise SyncFailedError(error.errno, error.strerror) from error
        self.synced = self.chain.seq

    def next_file(self) -> None:
        """Begin a file; those before it are not touched again."""
        chain = self.chain
        path = self._folder / f"audit-{chain.seq:012d}.jsonl"
        told = f'"time":{time.time()},"kind":"file","previous":"{chain.head}"'
        line, after = chain.line(told.encode())
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._sync != "never":
                sync_folder(self._folder)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        if self._file is not None:
            os.close(self._file)
        self._file, self._size, self._begun = file, len(line), chain.seq
        self.chain, self._has_torn_end = after, False

    def close(self) -> None:
        """Let another process have the folder."""
        for file in (self._file, self._lock):
            if file is not None:
                os.close(file)
        self._file = None

    def _write(self, lines: Sequence[tuple[bytes, Chain]]) -> None:
        assert self._file is not None
        if self._has_torn_end:
            os.ftruncate(self._file, self._size)
            self._has_torn_end = False
        data = memoryview(b"".join(line for line, _ in lines))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        finally:
            for line, after in lines:
                if done < len(line):
                    break
                done -= len(line)
                self._size += len(line)
                self.chain = after
                self.taken += 1
            if done:
                self._has_torn_end = True
                os.ftruncate(self._file, self._size)
                self._has_torn_end = False

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AuditError(
                f"audit log {self._folder}: another process writes to it; give each server a "
                "folder of its own"
            ) from error

    def _recover(self) -> Chain:
        """Find the end of the log, and open its last file for more."""
        files = files_in(self._folder)
        while files:
            path = files.pop()
            content = path.read_bytes()
            chain, end, last = _whole_lines(path, content)
            if end < len(content):
                self._keep_aside(path, content[end:], chain)
            if last is None:  # its writer was killed before its first record was whole
                self.clean = False
                path.unlink()
                continue
            self.clean = self.clean and end == len(content) and last["kind"] == "stop"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._file, end)
            if self._sync != "never":
                os.fsync(self._file)
            self._size, self._begun = end, int(path.stem.partition("-")[2])
            return chain
        return Chain()

    def _keep_aside(self, path: Path, tail: bytes, chain: Chain) -> None:
        name = f"{path.stem}.torn-{chain.seq:012d}"
        replace_file(self._folder / name, tail)
        self.torn = name


def _whole_lines(path: Path, content: bytes) -> tuple[Chain, int, dict[str, Any] | None]:
    """Check a file; return its chain, the length of what is whole, and its last record.

    The last line may be torn. One before it that does not hold is no writer's doing.
    """
    chain, end, last = Chain(), 0, None
    for number, line in enumerate(io.BytesIO(content), start=1):
        try:
            if number == 1:
                chain = beginning(line)
            last, chain = chain.check(line)
        except AuditError as error:
            if end + len(line) == len(content):
                break
            raise AuditError(
                f"{path}, line {number}: {error}; the log was altered or the disk is damaged. "
                "Keep the folder as it is, and begin a log in another one"
            ) from error
        end += len(line)
    return chain, end, last
