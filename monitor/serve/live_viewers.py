"""Those who have the page open: each has a bounded queue, and one message serves all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

QUEUE = 50
"""Messages that wait for a viewer: 5 seconds of them. One who is further behind is let go."""

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, so that nothing on the way closes it."""


def message(event: str, content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return f"event: {event}\ndata: {body}\n\n".encode()


class Viewer:
    """One open event stream."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)

    def send(self, text: bytes) -> bool:
        """Queue a message; False where too many wait, and the stream ends instead."""
        if self._messages.full():
            self.close()
            return False
        self._messages.put_nowait(text)
        return True

    def close(self) -> None:
        """End it after what waits; at once where that is too much."""
        if self._messages.full():
            while not self._messages.empty():
                self._messages.get_nowait()
        self._messages.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                text = await asyncio.wait_for(self._messages.get(), KEEP_ALIVE)
            except TimeoutError:
                yield b": \n\n"
                continue
            if text is None:
                return
            yield text


class Viewers:
    """All who are told the same."""

    def __init__(self) -> None:
        self._viewers: set[Viewer] = set()

    def __len__(self) -> int:
        return len(self._viewers)

    def join(self, viewer: Viewer) -> None:
        """From now on it is told."""
        self._viewers.add(viewer)

    def leave(self, viewer: Viewer) -> None:
        """No more."""
        self._viewers.discard(viewer)

    def send(self, text: bytes) -> None:
        """Tell all; those who are too far behind are let go, and come again by themselves."""
        self._viewers = {viewer for viewer in self._viewers if viewer.send(text)}

    def close(self) -> None:
        """End all."""
        for viewer in self._viewers:
            viewer.close()
        self._viewers = set()
