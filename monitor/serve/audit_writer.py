"""The audit log's queue, and the thread that writes it: nobody waits for a disk (docs/audit.md)."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from midstream.serve.audit_file import AuditFile, Sync, SyncFailedError

_log = logging.getLogger(__name__)

_BATCH = 1000  # records per write
_PATIENCE = 10.0  # seconds for the last records, at the end
_INTERVAL = 1.0  # seconds between two syncs, and between attempts after a failure


class AuditWriter:
    """Writes records in the order in which they are put, from `start` on.

    Parameters
    ----------
    folder, sync, on_failure, max_bytes, queue_bytes
        See `midstream.serve.audit.AuditLog`.

    Attributes
    ----------
    missing : int
        Records that found no room in the queue, since the start.
    failing : str, optional
        Why nothing can be written now.
    clean : bool
        Whether the last writer closed the log.
    torn : str, optional
        Name of the file that holds the end of a line which the last writer did not finish.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sync: Sync,
        on_failure: Literal["serve", "refuse"],
        max_bytes: int,
        queue_bytes: int,
    ) -> None:
        self._folder, self._sync, self._on_failure = folder, sync, on_failure
        self._limit = queue_bytes
        self._file = AuditFile(folder, sync, max_bytes)
        self.missing = 0
        self.failing: str | None = None
        self.clean, self.torn = self._file.clean, self._file.torn
        self._queue: deque[bytes | _Gap] = deque()
        self._waiting = 0  # bytes
        self._wake = threading.Condition()
        self._unsynced: bytes | None = None
        self._closing = False
        self._next_sync = 0.0
        self._thread = threading.Thread(target=self._run, name="midstream-audit", daemon=True)

    @property
    def written(self) -> int:
        """Records the operating system has."""
        return self._file.chain.seq

    @property
    def acknowledged(self) -> int:
        """Records kept as ``sync`` promises."""
        return self.written if self._sync == "never" else self._file.synced

    @property
    def waiting_bytes(self) -> int:
        """What waits to be written."""
        return self._waiting

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Queue a record; where it finds no room, count it in the gap at the queue's end."""
        self._put(kind, facts, room=self._limit)

    def close(self) -> None:
        """Write what waits, and end the log; what cannot be written then is told and lost."""
        self._put("stop", {}, room=math.inf)
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _log.error("audit log %s: its disk does not answer; what waits is lost", self._folder)

    def _put(self, kind: str, facts: Mapping[str, Any], room: float) -> None:
        body = _body(kind, facts)
        with self._wake:
            if self._waiting + len(body) <= room:
                self._queue.append(body)
                self._waiting += len(body)
            else:
                self._fail("the queue is full")
                self.missing += 1
                gap = self._queue[-1] if self._queue else None
                if not isinstance(gap, _Gap):
                    gap = _Gap(self.failing)
                    self._queue.append(gap)
                gap.count(kind)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._queue or not self._closing:
                self._wait()
                try:
                    self._write_some()
                except OSError as error:
                    self._fail(str(error))
                    if self._closing:
                        break
                    with self._wake:
                        self._wake.wait_for(lambda: self._closing, _INTERVAL)
            if self._sync != "never" and self.failing is None:
                self._file.sync()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            _log.exception("audit log %s: its thread has ended", self._folder)
        finally:
            if self._queue:
                _log.error(
                    "audit log %s: the server ends and %d records that waited are lost, beside %d "
                    "that had found no room: %s",
                    self._folder, len(self._queue), self.missing, self.failing,
                )  # fmt: skip
            self._file.close()

    def _wait(self) -> None:
        """Until there is something to write, or to sync."""
        with self._wake:
            seconds = None
            if self._sync != "never" and self._file.synced < self.written:
                seconds = max(0.0, self._next_sync - time.monotonic())
            self._wake.wait_for(lambda: self._queue or self._closing, seconds)

    def _write_some(self) -> None:
        if self._unsynced is not None:
            self._file.next_file()
            self._file.append([self._unsynced])
            self._unsynced = None
        with self._wake:
            if self._queue and isinstance(self._queue[0], _Gap):
                self._queue[0] = gap = _body("gap", vars(self._queue[0]))
                self._waiting += len(gap)
            records = takewhile(lambda one: isinstance(one, bytes), self._queue)
            batch = [one for one in islice(records, _BATCH) if isinstance(one, bytes)]
        before = self._file.taken
        try:
            self._file.append(batch)
            if self._sync == "always" or (
                self._sync == "every-second" and time.monotonic() >= self._next_sync
            ):
                self._next_sync = time.monotonic() + _INTERVAL
                self._file.sync()
        except SyncFailedError as error:
            # What a disk failed to take it may have forgotten: a second sync would claim too much.
            doubtful = {"first": self._file.synced, "last": self.written - 1, "cause": str(error)}
            self._unsynced = _body("unsynced", doubtful)
            raise
        finally:
            with self._wake:
                for _ in range(self._file.taken - before):
                    taken = self._queue.popleft()
                    assert isinstance(taken, bytes)
                    self._waiting -= len(taken)
        with self._wake:
            if self.failing is not None and self._waiting <= self._limit // 2:
                self.failing = None
                _log.warning(
                    "audit log %s is written again; %d records are missing since the start",
                    self._folder, self.missing,
                )  # fmt: skip

    def _fail(self, why: str) -> None:
        with self._wake:
            if self.failing is None:
                self.failing = why
                _log.error(
                    "audit log %s cannot be written: %s; records wait in the queue, those without "
                    "room are counted, and the server %ss", self._folder, why, self._on_failure,
                )  # fmt: skip


class _Gap:
    """Records that found no room, in the place where they belong."""

    def __init__(self, cause: str | None) -> None:
        self.missing = 0
        self.kinds: dict[str, int] = {}
        self.cause = cause

    def count(self, kind: str) -> None:
        self.missing += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def _body(kind: str, facts: Mapping[str, Any]) -> bytes:
    """JSON of a record, without its braces."""
    content = _finite({"time": time.time(), "kind": kind, **facts})
    return json.dumps(content, separators=(",", ":"), default=str).encode()[1:-1]


def _finite(value: Any) -> Any:
    """Replace what JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
