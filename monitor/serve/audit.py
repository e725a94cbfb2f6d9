"""The audit log: what was decided about every stream, kept in files that only grow.

It looks on like every other observer, so it never holds up a stream: a thread of its own writes the
records (`midstream.serve.audit_writer`). Text is in them only where it was asked for
(docs/audit.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from midstream.ledger.ledger import conversation_key
from midstream.serve.audit_file import Sync
from midstream.serve.audit_writer import AuditWriter
from midstream.serve.feed import EngineStats, Observer, Opened
from midstream.streams import Event

MOST_REFUSALS = 256
"""Kinds of refusals that are told apart in a minute."""


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
        self._text, self._on_failure = text, on_failure
        self._given: dict[str, _Given] = {}
        self._refusals: dict[tuple[str, int, str], int] = {}  # of this minute, after the first
        self._minute = time.monotonic()
        self._writer = AuditWriter(
            Path(folder),
            sync=sync,
            on_failure=on_failure,
            max_bytes=max_bytes,
            queue_bytes=queue_bytes,
        )
        left = {"after_stop": self._writer.clean, "torn": self._writer.torn}
        self._writer.put("start", {"sync": sync, "text": text, **left})
        self._writer.start()

    @property
    def missing(self) -> int:
        """Records that found no room in the queue, since the start."""
        return self._writer.missing

    @property
    def failing(self) -> str | None:
        """Why the log cannot be written now."""
        return self._writer.failing

    @property
    def written(self) -> int:
        """Records the operating system has: they outlive this process, however it ends."""
        return self._writer.written

    @property
    def acknowledged(self) -> int:
        """Records kept as ``sync`` promises: by the disk, or with ``never`` by the system."""
        return self._writer.acknowledged

    @property
    def waiting_bytes(self) -> int:
        """What waits to be written."""
        return self._writer.waiting_bytes

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
        self._writer.put("opened", facts)

    def event(self, stream: Opened, event: Event) -> None:
        """Record what was decided, and how a stream ended."""
        if event.type == "released":
            if event.text and (given := self._given.get(event.stream)):
                given.add(event.text, self._text)
        elif event.type in ("verdict", "halted"):
            self._writer.put(event.type, _identity(stream) | _decision(event))
        elif event.type in ("finished", "error"):
            given = self._given.pop(event.stream, None) or _Given()
            facts = _identity(stream) | _decision(event) | _outcome(event)
            facts |= {
                "delivered": given.characters,
                "seconds": round(time.monotonic() - stream.clock, 6),
            }
            if self._text:
                facts["text"] = "".join(given.text)
            self._writer.put(event.type, facts)

    def refused(self, client: str, status: int, code: str) -> None:
        """Record the first of a minute by client, status and code, and count the others.

        Else whoever floods the server, with or without a key, fills the disk.
        """
        self._turn()
        refusal = (client, status, code)
        if refusal not in self._refusals and len(self._refusals) >= MOST_REFUSALS:
            refusal = (client, status, "other")  # upstreams have codes of their own
        if refusal in self._refusals:
            self._refusals[refusal] += 1
        else:
            self._refusals[refusal] = 0
            self._put_refused(refusal, 1)

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Record what happened to the server."""
        self._writer.put("notice", {"notice": kind, "facts": facts})

    def stats(self, stats: EngineStats) -> None:
        """Record what was counted of refusals, where the minute is over."""
        self._turn()

    def close(self) -> None:
        """Write what waits, and end the log; what cannot be written then is told and lost."""
        self._tell_refusals()
        self._writer.close()

    def _turn(self) -> None:
        """Begin the next minute when it is time."""
        if time.monotonic() - self._minute >= 60:
            self._minute = time.monotonic()
            self._tell_refusals()

    def _tell_refusals(self) -> None:
        for refusal, count in self._refusals.items():
            if count:
                self._put_refused(refusal, count)
        self._refusals = {}

    def _put_refused(self, refusal: tuple[str, int, str], count: int) -> None:
        client, status, code = refusal
        facts = {"client": client, "status": status, "code": code, "count": count}
        self._writer.put("refused", facts)


class _Given:
    """What a stream has delivered so far."""

    def __init__(self) -> None:
        self.characters = 0
        self.text: list[str] = []

    def add(self, text: str, is_kept: bool) -> None:
        self.characters += len(text)
        if is_kept:
            self.text.append(text)


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
