"""What the live page shows: the last streams, kept within bounds and told to all who look."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from midstream.bundle import Bundle
from midstream.serve.feed import EngineStats, Observer, Opened
from midstream.serve.halts import RecentHalts
from midstream.serve.live_bundles import KnownBundles
from midstream.serve.live_closely import CloseUp
from midstream.serve.live_record import Record
from midstream.serve.live_viewers import Viewer, Viewers, message
from midstream.streams import Event

_log = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between two messages to the page."""

NOTICES = 20


class TooManyViewersError(RuntimeError):
    """Nobody more can look on."""


class Live(Observer):
    """Keeps the last streams for the page.

    An event costs the same however many streams and viewers there are; ten times a second one
    message goes to all viewers, and one per stream that is looked at closely to those who do.

    Parameters
    ----------
    bundle_of : callable, optional
        From a bundle's hash to the bundle, or None where it is not known any more: levels, horizon
        and hazards are then not shown.
    text : bool
        Whether the page may show text; otherwise it shows how long the tokens are, and no text is
        kept.
    look_closely : callable, optional
        Called with a stream's id and whether somebody looks at it, for engines that give
        ``scored`` events only then.
    streams, size : int
        How many streams are kept, and with how many bytes. The oldest that have ended go first.
    viewers : int
        Event streams open at once; a page has two.
    """

    def __init__(
        self,
        bundle_of: Callable[[str], Bundle | None] = lambda digest: None,
        *,
        text: bool = False,
        look_closely: Callable[[str, bool], None] | None = None,
        streams: int = 500,
        size: int = 64 << 20,
        viewers: int = 64,
    ) -> None:
        if streams < 1:
            raise ValueError(f"streams: expected at least 1, got {streams}")
        self._bundles = KnownBundles(bundle_of)
        self._text = text
        self.look_closely = look_closely  # may be set later: an engine needs the feed first
        self._most, self._most_bytes, self._most_viewers = streams, size, viewers
        self._open: OrderedDict[str, Record] = OrderedDict()
        self._ended: OrderedDict[int, Record] = OrderedDict()
        self._numbered: dict[int, Record] = {}
        self._bytes = 0
        self._number = 0
        self._new: set[int] = set()
        self._changed: dict[int, Record] = {}
        self._gone: list[int] = []
        self._halts = RecentHalts()
        self._halts_changed = False
        self._engine: dict[str, int] | None = None
        self._engine_changed = False
        self._counts = {"unscored": 0, "errors": 0, "refused": 0, "not_kept": 0}
        self._notices: deque[dict[str, Any]] = deque(maxlen=NOTICES)
        self._notices_changed = False
        self._viewers = Viewers()
        self._close_ups: dict[int, CloseUp] = {}
        self._watching = 0
        self._ticker: asyncio.Task[None] | None = None
        self._stopping = self._closed = False

    # ------------------------------------------------------------------ what is observed

    def opened(self, stream: Opened) -> None:
        """Keep it."""
        self._number += 1
        self._bundles.learn(stream.bundle)
        hold_back = self._bundles.hold_back(stream.bundle)
        record = Record(self._number, stream, keeps_text=self._text, hold_back=hold_back)
        self._open[stream.ask.stream] = self._numbered[self._number] = record
        self._bytes += record.size
        self._new.add(self._number)
        self._changed[self._number] = record
        self._keep_bounds()

    def event(self, stream: Opened, event: Event) -> None:
        """Keep what it tells."""
        if event.type != "released":
            self._count(event)
        record = self._open.get(stream.ask.stream)
        if record is None or record.opened is not stream:
            return  # it had to make room
        before = record.size
        record.take(event)
        self._bytes += record.size - before
        self._changed[record.number] = record
        if record.ended:
            del self._open[stream.ask.stream]
            self._ended[record.number] = record
        if self._bytes > self._most_bytes:
            self._keep_bounds()

    def refused(self, client: str, status: int, code: str) -> None:
        """Count it."""
        self._counts["refused"] += 1
        self._halts_changed = True

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Keep it, as words."""
        told = [
            f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float)
        ]
        notice = {"at": time.time(), "kind": kind[:60], "facts": ", ".join(told)[:300]}
        self._notices.append(notice)
        self._notices_changed = True
        # Pages see the last streams end; then they go, or the server would wait for them.
        self._stopping |= kind == "stopping"

    def stats(self, stats: EngineStats) -> None:
        """Keep how full the engine is."""
        now = {"slots": stats.slots, "used": stats.slots_used, "waiting": stats.waiting}
        self._engine_changed |= now != self._engine
        self._engine = now

    def close(self) -> None:
        """Let all viewers go: a server that drains waits for its connections."""
        self._closed = True
        self._viewers.close()
        for close_up in self._close_ups.values():
            close_up.viewers.close()
        if self._ticker is not None:
            self._ticker.cancel()

    def _count(self, event: Event) -> None:
        if event.type == "halted":
            self._halts.halted(event.cause)
        elif event.type == "error":
            self._halts.ended()
            self._counts["errors"] += 1
        elif event.type == "finished":
            self._halts.ended()
            self._counts["unscored"] += event.delivered_unscored or 0
        self._halts_changed |= event.type in ("halted", "error", "finished")

    # ------------------------------------------------------------------ who looks

    def look(self) -> Viewer:
        """Begin to show everything to somebody; call :meth:`leave` at the end.

        Raises
        ------
        TooManyViewersError
        """
        viewer = self._viewer()
        self._tell()  # so that what this one is told next follows on what it is told now
        viewer.send(message("snapshot", self._snapshot()))
        self._viewers.join(viewer)
        return viewer

    def look_at(self, number: int) -> Viewer:
        """Begin to show one stream to somebody; call :meth:`leave` at the end.

        Raises
        ------
        KeyError
            Where the stream is not kept any more.
        TooManyViewersError
        """
        record = self._numbered[number]
        viewer = self._viewer()
        close_up = self._close_ups.get(number)
        if close_up is None:
            close_up = self._close_ups[number] = CloseUp(record)
            self._look(record, True)
        close_up.join(viewer)
        return viewer

    def leave(self, viewer: Viewer, number: int | None = None) -> None:
        """Somebody looks no more, at all or at one stream."""
        self._watching -= 1
        if number is None:
            self._viewers.leave(viewer)
        elif (close_up := self._close_ups.get(number)) is not None:
            close_up.viewers.leave(viewer)
            if not len(close_up.viewers):
                del self._close_ups[number]
                self._look(close_up.record, False)
        if not self._watching and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    def _viewer(self) -> Viewer:
        if self._closed or self._watching >= self._most_viewers:
            raise TooManyViewersError
        self._watching += 1
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        return Viewer()

    def _look(self, record: Record, on: bool) -> None:
        if self.look_closely is not None and not record.ended:
            self.look_closely(record.opened.ask.stream, on)

    # ------------------------------------------------------------------ what they are told

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                self.tell()
                if self._stopping and not self._open:
                    self.close()
            except Exception:
                _log.exception("the page was not told")

    def tell(self) -> None:
        """Tell everybody what has changed; :data:`TICK` seconds after the last time."""
        self._tell()
        for close_up in tuple(self._close_ups.values()):
            close_up.tell()

    def _tell(self) -> None:
        """Tell those who look at everything."""
        rows = []
        for number, record in self._changed.items():
            rows.append(record.row() if number in self._new else record.changes())
            record.told()
        news: dict[str, Any] = {"rows": rows, "gone": self._gone}
        if self._halts.turn() or self._halts_changed:
            news["halts"], news["counts"] = self._halts.counts(), self._counts
        if self._engine_changed:
            news["engine"] = self._engine
        if self._notices_changed:
            news["notices"] = list(self._notices)
        if self._new:
            news["bundles"] = self._known_bundles()
        worth_it = rows or self._gone or len(news) > 2
        self._changed, self._new, self._gone = {}, set(), []
        self._halts_changed = self._engine_changed = self._notices_changed = False
        if worth_it and len(self._viewers):
            self._viewers.send(message("changes", news))

    def _snapshot(self) -> dict[str, Any]:
        self._halts.turn()
        return {
            "text": self._text,
            "rows": [record.row() for record in self._numbered.values()],
            "halts": self._halts.counts(),
            "counts": self._counts,
            "engine": self._engine,
            "notices": list(self._notices),
            "bundles": self._known_bundles(),
        }

    # ------------------------------------------------------------------ bounds

    def _keep_bounds(self) -> None:
        while self._numbered and (
            len(self._numbered) > self._most or self._bytes > self._most_bytes
        ):
            if self._ended:
                number, record = self._ended.popitem(last=False)
            else:
                _, record = self._open.popitem(last=False)
                number = record.number
                self._counts["not_kept"] += 1
            del self._numbered[number]
            self._bytes -= record.size
            self._changed.pop(number, None)
            if number in self._new:
                self._new.discard(number)
            elif len(self._viewers):
                self._gone.append(number)

    def _known_bundles(self) -> dict[str, dict[str, Any] | None]:
        """Those that kept streams are judged by."""
        return self._bundles.keep({record.opened.bundle for record in self._numbered.values()})
