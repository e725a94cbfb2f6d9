"""The audit log: what was decided about every stream, kept in files that only grow.

It looks on like every other observer, so it never holds up a stream: records go into a queue, and a
thread of its own writes them. Text is in them only where it was asked for (docs/audit.md).
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from midstream.ledger.ledger import conversation_key
from midstream.serve.audit_file import AuditFile, Sync, SyncFailedError
from midstream.serve.feed import Observer, Opened
from midstream.streams import Event

_log = logging.getLogger(__name__)

_BATCH = 1000  # records per write
_PATIENCE = 10.0  # seconds for the last records, at the end
_INTERVAL = 1.0  # seconds between two syncs, and between attempts after a failure


class AuditLog(Observer):
    """Writes the audit log.

    Parameters
    ----------
    folder : path
        Held by this process alone.
    text : bool
        Write prompts, and the text that was delivered, as well.
    sync : {"always", "every-second", "never"}
        When the disk is made to take what was written: after each batch, once a second, or when
        the operating system sees fit.
    on_failure : {"serve", "refuse"}
        What the server does while the log cannot be written (`midstream.serve.audited`). Records
        wait in the queue either way.
    max_bytes : int
        Size at which a new file is begun.
    queue_bytes : int
        What may wait to be written. Records that find no room are counted, by kind, and a ``gap``
        record stands in their place.

    Raises
    ------
    AuditError
        When another process writes to the folder, or what is there does not hold.
    OSError
        When it cannot be written from the start.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        text: bool = False,
        sync: Sync = "every-second",
        on_failure: Literal["serve", "refuse"] = "serve",
        max_bytes: int = 64 << 20,
        queue_bytes: int = 16 << 20,
    ) -> None:
        self.folder = Path(folder)
        self.missing = 0
        """Records that found no room in the queue, since the start."""
        self.failing: str | None = None
        """Why the log cannot be written now."""
        self._text, self._sync, self._on_failure = text, sync, on_failure
        self._limit = queue_bytes
        self._file = AuditFile(self.folder, sync, max_bytes)
        self._given: dict[str, _Given] = {}
        self._queue: deque[bytes | _Gap] = deque()
        self._waiting = 0  # bytes
        self._wake = threading.Condition()
        self._unsynced: bytes | None = None
        self._closing = False
        self._next_sync = 0.0
        self._put("start", self._started())
        self._thread = threading.Thread(target=self._run, name="midstream-audit", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Records the operating system has: they outlive this process, however it ends."""
        return self._file.chain.seq

    @property
    def acknowledged(self) -> int:
        """Records kept as ``sync`` promises: by the disk, or with ``never`` by the system."""
        return self.written if self._sync == "never" else self._file.synced

    @property
    def waiting_bytes(self) -> int:
        """What waits to be written."""
        return self._waiting

    @property
    def unready(self) -> str | None:
        """Why no request may be served now; None while the log is written, or nobody asks it."""
        if self._on_failure == "serve":
            return None
        return "the audit log cannot be written" if self.failing is not None else None

    def opened(self, stream: Opened) -> None:
        """Record that a stream was taken in."""
        ask = stream.ask
        self._given[ask.stream] = _Given()
        facts = _identity(stream) | {
            "conversation": ask.conversation_id and conversation_key(ask.conversation_id),
            "max_tokens": ask.max_tokens,
        }
        if self._text:
            facts |= {"messages": ask.messages, "prompt": ask.prompt}
        self._put("opened", facts)

    def event(self, stream: Opened, event: Event) -> None:
        """Record what was decided, and how a stream ended."""
        if event.type == "released":
            if event.text and (given := self._given.get(event.stream)):
                given.add(event.text, self._text)
        elif event.type in ("verdict", "halted"):
            self._put(event.type, _identity(stream) | _decision(event))
        elif event.type in ("finished", "error"):
            given = self._given.pop(event.stream, None) or _Given()
            facts = _identity(stream) | _decision(event) | _outcome(event)
            facts |= {
                "delivered": given.characters,
                "seconds": round(time.monotonic() - stream.clock, 6),
            }
            if self._text:
                facts["text"] = "".join(given.text)
            self._put(event.type, facts)

    def refused(self, client: str, status: int, code: str) -> None:
        """Record that a request was refused."""
        self._put("refused", {"client": client, "status": status, "code": code})

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Record what happened to the server."""
        self._put("notice", {"notice": kind, "facts": facts})

    def close(self) -> None:
        """Write what waits, and end the log; what cannot be written then is told and lost."""
        self._put("stop", {}, room=math.inf)
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _log.error("audit log %s: its disk does not answer; what waits is lost", self.folder)

    def _started(self) -> dict[str, Any]:
        return {
            "sync": self._sync,
            "text": self._text,
            "after_stop": self._file.clean,
            "torn": self._file.torn,
        }

    def _put(self, kind: str, facts: Mapping[str, Any], room: float = 1.0) -> None:
        """Queue a record; where it finds no room, count it in the gap at the queue's end."""
        if kind == "refused":
            room = 0.5  # who floods the server with nonsense does not crowd out its decisions
        body = _body(kind, facts)
        with self._wake:
            if self._waiting + len(body) <= self._limit * room:
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
            _log.exception("audit log %s: its thread has ended", self.folder)
        finally:
            if self._queue:
                _log.error(
                    "audit log %s: the server ends and %d records that waited are lost, beside %d "
                    "that had found no room: %s",
                    self.folder, len(self._queue), self.missing, self.failing,
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
                    self.folder, self.missing,
                )  # fmt: skip

    def _fail(self, why: str) -> None:
        with self._wake:
            if self.failing is None:
                self.failing = why
                _log.error(
                    "audit log %s cannot be written: %s; records wait in the queue, those without "
                    "room are counted, and the server %ss", self.folder, why, self._on_failure,
                )  # fmt: skip


class _Given:
    """What a stream has delivered so far."""

    def __init__(self) -> None:
        self.characters = 0
        self.text: list[str] = []

    def add(self, text: str, is_kept: bool) -> None:
        self.characters += len(text)
        if is_kept:
            self.text.append(text)


class _Gap:
    """Records that found no room, in the place where they belong."""

    def __init__(self, cause: str | None) -> None:
        self.missing = 0
        self.kinds: dict[str, int] = {}
        self.cause = cause

    def count(self, kind: str) -> None:
        self.missing += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def _identity(stream: Opened) -> dict[str, Any]:
    return {
        "stream": stream.ask.stream,
        "client": stream.ask.client,
        "model": stream.ask.model,
        "tier": stream.tier,
        "bundle": stream.bundle,
    }


def _decision(event: Event) -> dict[str, Any]:
    names = ("position", "verdict", "cause", "risk", "message")
    return {name: getattr(event, name) for name in names}


def _outcome(event: Event) -> dict[str, Any]:
    """What a stream came to; an ``error`` event has no report."""
    if (report := event.report) is None:
        return {"finish_reason": event.type, "message": event.message}
    return {
        "position": report.halted_at,
        "verdict": report.verdict,
        "cause": report.cause,
        "risk": report.risk,
        "message": None,
        "finish_reason": report.finish_reason,
        "peak": report.peak,
        "prompt_tokens": report.prompt_tokens,
        "scored": report.scored,
        "unscored": report.unscored,
    }


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
