"""Server-sent events, read by the letter of the standard, from somebody who may not keep to it.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation, but for
two things: what is no UTF-8 is refused rather than replaced, since the text is to be passed on as
it was; and an event that the end of the stream cuts off is given out rather than dropped, since who
reads it can tell whether it is whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_EVENT = 1 << 20
"""Bytes of one event, at most, whether in one line or in many."""

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventStreamError(ValueError):
    """What came is no event stream, or has an event that is too large."""


class ServerSentEvent(NamedTuple):
    """An event: its type, empty where none was given, and its data."""

    type: str
    data: str


class EventStreamReader:
    """Takes bytes as they come, cut anywhere; gives events.

    Parameters
    ----------
    max_event : int
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._rest = bytearray()  # of a line that has not ended
        self._searched = 0  # bytes of it without a line's end
        self._after_return = False  # a line feed that comes next belongs to the line before
        self._first = True
        self._size = 0  # bytes of the event
        self._type = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        """Take more; give the events that are complete with it, also those before a fault.

        Raises
        ------
        EventStreamError
        """
        if not data:
            return
        if self._after_return and data[:1] == b"\n":
            data = data[1:]
        self._after_return = data[-1:] == b"\r"
        self._rest += data
        begin = 0
        for end in _LINE_END.finditer(self._rest, self._searched):
            event = self._line(bytes(self._rest[begin : end.start()]))
            begin = end.end()
            if event is not None:
                yield event
        del self._rest[:begin]
        self._searched = len(self._rest)
        self._check_size(len(self._rest))

    def finish(self) -> list[ServerSentEvent]:
        """Nothing more comes; return the event that was cut off, if there is one."""
        event = self._line(bytes(self._rest)) if self._rest else None
        self._rest.clear()
        self._searched = 0
        last = self._dispatch()
        return [found for found in (event, last) if found is not None]

    def _line(self, raw: bytes) -> ServerSentEvent | None:
        if self._first:
            self._first = False
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw:
            return self._dispatch()
        self._size += len(raw)
        self._check_size(0)
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            raise EventStreamError("it is not UTF-8") from None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._type = value
        return None  # comments, ids, times to retry, and fields that nobody knows

    def _dispatch(self) -> ServerSentEvent | None:
        event = ServerSentEvent(self._type, "\n".join(self._data)) if self._data else None
        self._type, self._data, self._size = "", [], 0
        return event

    def _check_size(self, waiting: int) -> None:
        if self._size + waiting > self._max_event:
            raise EventStreamError(f"an event of it has more than {self._max_event} bytes")
