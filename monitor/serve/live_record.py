"""What the page knows of one stream, and how it is told (docs/page.md)."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Iterable
from typing import Any, Literal

from midstream.serve.feed import Opened
from midstream.streams import Event, StreamReport

State = Literal["waiting", "writing", "held", "halted", "finished", "error"]

SPARK = 40
"""Risks of a row's spark line."""

_BYTES = 1200  # of a record without tokens, measured with tracemalloc
_PIECE_BYTES = 130  # a tuple, an int and what surrounds a short str


class Record:
    """One stream, as far as it has come. Every event costs the same, however long the stream is.

    Parameters
    ----------
    number : int
        Its name on the page: stream ids may hold anything.
    opened : Opened
    keeps_text : bool
        Whether text is kept; otherwise its length is.
    hold_back : int
        Tokens of the policy's hold-back: the newest token that leaves with position p is
        ``p - hold_back + 1``.
    """

    __slots__ = (
        "_hold_back",
        "_keeps_text",
        "_left",
        "cause",
        "delivered",
        "ended",
        "halted_at",
        "lasted",
        "marks",
        "number",
        "opened",
        "peak",
        "pieces",
        "positions",
        "reason",
        "report",
        "risk",
        "risks",
        "scores",
        "size",
        "spark_told",
        "state",
        "turned",
    )

    def __init__(self, number: int, opened: Opened, *, keeps_text: bool, hold_back: int) -> None:
        self.number = number
        self.opened = opened
        self.state: State = "waiting"
        self.ended = False
        self.reason: str | None = None
        self.cause: str | None = None
        self.halted_at: int | None = None
        self.risk: float | None = None
        self.peak = 0.0
        self.lasted: float | None = None
        self.report: dict[str, Any] | None = None
        self.delivered: int | None = None
        self.positions = array("i")
        self.risks = array("f")
        """NaN where a token was not judged."""
        self.scores: dict[str, array[float]] = {}
        """Per probe, one for each of ``positions``."""
        self.pieces: list[tuple[int | None, str | int]] = []
        """What has left: the position with whose judgement it did, and its text or length."""
        self.marks: list[tuple[int | None, str]] = []
        """Verdicts that changed what happens: HOLD, CONTINUE, HALT."""
        self.size = _BYTES
        self.spark_told = 0
        self.turned = False
        """Whether more than numbers have changed since viewers were told."""
        self._keeps_text = keeps_text
        self._hold_back = hold_back
        self._left: tuple[int, int] | None = None  # first and last position that have left

    def take(self, event: Event) -> None:
        """Take an event; keeps :attr:`size` up to date."""
        if event.position is not None and event.risk is not None:
            self._judged(event.position, event.risk, event.scores)
        if event.type == "released":
            if event.text:
                self._piece(event.position, event.text)
        elif event.type == "admitted":
            self.state, self.turned = "writing", True
        elif event.type in ("verdict", "halted") and event.verdict is not None:
            self._mark(event)
        elif event.type == "finished":
            self._end("halted" if self.state == "halted" else "finished", event)
            if event.report is not None:
                self._finish(event.report)
        elif event.type == "error":
            self._end("error", event)

    def row(self) -> dict[str, Any]:
        """What its row needs, whole."""
        ask = self.opened.ask
        return {
            "id": ask.stream,
            "client": ask.client,
            "model": ask.model,
            "tier": self.opened.tier,
            "bundle": self.opened.bundle,
            "at": self.opened.at,
            **self.changes(whole=True),
        }

    def changes(self, *, whole: bool = False) -> dict[str, Any]:
        """What of its row has changed, or can; ``spark`` holds the risks that were not told yet."""
        first, last = self._left or (0, -1)
        left = last - first + 1 if self.delivered is None else self.delivered
        numbers = {
            "n": self.number,
            "risk": None if self.risk is None else round(self.risk, 4),
            "peak": round(self.peak, 4),
            "left": left,
            "spark": self._spark(0 if whole else self.spark_told),
        }
        if not whole and not self.turned:
            return numbers
        return numbers | {
            "state": self.state,
            "ended": self.ended,
            "reason": self.reason,
            "cause": self.cause,
            "halted_at": self.halted_at,
        }

    def told(self) -> None:
        """All viewers have its changes."""
        self.spark_told, self.turned = len(self.risks), False

    def whole(self) -> dict[str, Any]:
        """All there is to it."""
        lasted = self.lasted
        return {
            **self.row(),
            "age": time.monotonic() - self.opened.clock if lasted is None else lasted,
            "report": self.report,
            **self.news(0, 0, 0),
        }

    def news(self, points: int, pieces: int, marks: int) -> dict[str, Any]:
        """Points, pieces and marks from the given ones on."""
        return {
            "positions": self.positions[points:].tolist(),
            "risks": _finite(self.risks[points:]),
            "scores": {name: _finite(values[points:]) for name, values in self.scores.items()},
            "pieces": self.pieces[pieces:],
            "marks": self.marks[marks:],
        }

    def _judged(self, position: int, risk: float, scores: dict[str, float | None] | None) -> None:
        self.risk = risk
        if risk > self.peak:
            self.peak = risk
        if not self.positions or position > self.positions[-1]:  # several events tell of one token
            self.positions.append(position)
            self.risks.append(risk)
            for values in self.scores.values():
                values.append(math.nan)
            self.size += 8 + 4 * len(self.scores)
        for name, score in (scores or {}).items():
            if name not in self.scores:
                self.scores[name] = array("f", [math.nan]) * len(self.positions)
                self.size += 4 * len(self.positions)
            self.scores[name][-1] = math.nan if score is None else score

    def _piece(self, position: int | None, text: str) -> None:
        self.pieces.append((position, text if self._keeps_text else len(text)))
        self.size += _PIECE_BYTES + (sys.getsizeof(text) if self._keeps_text else 0)
        if position is not None:
            last = position - self._hold_back + 1
            self._left = (last if self._left is None else self._left[0], last)

    def _mark(self, event: Event) -> None:
        assert event.verdict is not None
        self.marks.append((event.position, event.verdict))
        self.size += _PIECE_BYTES
        self.turned = True
        if event.type == "halted":
            self.state, self.cause, self.halted_at = "halted", event.cause, event.position
        else:
            self.state = "held" if event.verdict == "HOLD" else "writing"

    def _end(self, state: State, event: Event) -> None:
        self.state, self.ended, self.reason = state, True, event.message
        self.turned = True
        self.spark_told = 0  # the whole line once more, with what was not told of held tokens
        self.lasted = time.monotonic() - self.opened.clock
        self.delivered = event.delivered

    def _finish(self, report: StreamReport) -> None:
        """Put what the monitor recorded in place of what the events told of the same tokens."""
        trace = report.trace
        self.risk, self.peak = report.risk, report.peak
        self.cause = self.cause or report.cause
        self.report = report.model_dump(
            mode="json",
            include={"prompt_tokens", "scored", "unscored", "verdict", "halted_at", "segments"},
        )
        if trace.position:
            kept = next(
                (i for i, at in enumerate(self.positions) if at >= trace.position[0]),
                len(self.positions),
            )
            before = array("f", [math.nan]) * kept
            self.positions = self.positions[:kept] + array("i", trace.position)
            self.risks = self.risks[:kept] + _array(trace.risk)
            self.scores = {
                name: self.scores.get(name, before)[:kept] + _array(values)
                for name, values in trace.scores.items()
            }
        points = len(self.positions) * (8 + 4 * len(self.scores))
        texts = sum(sys.getsizeof(text) for _, text in self.pieces) if self._keeps_text else 0
        held = (len(self.pieces) + len(self.marks)) * _PIECE_BYTES
        self.size = _BYTES + points + held + texts
        if self.pieces:
            whole = self.pieces[-1][0] is None and trace.position
            last = trace.position[-1] if whole or self._left is None else self._left[1]
            self._left = (report.prompt_tokens, last)

    def _spark(self, told: int) -> list[int | None]:
        """The last risks, in thousandths."""
        risks = self.risks[max(told, len(self.risks) - SPARK) :]
        return [None if math.isnan(risk) else round(risk * 1000) for risk in risks]


def _array(values: Iterable[float | None]) -> array[float]:
    return array("f", [math.nan if value is None else value for value in values])


def _finite(values: array[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]
