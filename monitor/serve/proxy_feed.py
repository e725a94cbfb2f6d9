"""What is told of streams whose upstream may yet refuse them: nothing, until it has taken them."""

from __future__ import annotations

from midstream.serve.feed import Feed, Observer, Opened
from midstream.streams import Event


class TakenFeed(Feed):
    """A feed that keeps to itself what happens to a stream until its upstream has taken it.

    A request that the upstream refuses is then told once, by the front, and is no stream besides.

    Parameters
    ----------
    feed : Observer
        Told of everything else at once.
    """

    def __init__(self, feed: Observer) -> None:
        super().__init__([feed])
        self._waiting: dict[str, list[tuple[Opened, Event | None]]] = {}
        self._refused: set[str] = set()  # those that have not ended yet

    def wait(self, stream: str) -> None:
        """Keep what its engine tells of a stream that is about to begin."""
        self._waiting[stream] = []

    def taken(self, stream: str) -> None:
        """Hand on what was kept, and what follows."""
        for opened, event in self._waiting.pop(stream):
            if event is None:
                super().opened(opened)
            else:
                super().event(opened, event)

    def refuse(self, stream: str) -> None:
        """Leave all of it out, to its end."""
        kept = self._waiting.pop(stream)
        if kept and not any(event is not None and _ends(event) for _, event in kept):
            self._refused.add(stream)

    def opened(self, stream: Opened) -> None:
        """Hand on, unless it may yet be refused."""
        if (kept := self._waiting.get(stream.ask.stream)) is not None:
            kept.append((stream, None))
        else:
            super().opened(stream)

    def event(self, stream: Opened, event: Event) -> None:
        """Hand on, unless it may yet be refused, or was."""
        name = stream.ask.stream
        if (kept := self._waiting.get(name)) is not None:
            kept.append((stream, event))
        elif name not in self._refused:
            super().event(stream, event)
        elif _ends(event):
            self._refused.remove(name)


def _ends(event: Event) -> bool:
    return event.type in ("finished", "error")
