"""How many requests are answered at once, and which; what a shutdown has to cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from midstream.serve.errors import ApiError
from midstream.serve.relay import Relay, shutting_down
from midstream.serve.settings import Settings

_RETRY_AFTER = 1.0


class Admission:
    """Counts requests, and knows those that are being answered.

    Parameters
    ----------
    settings : Settings
    per_client : bool
        Whether clients have names, so that each can have a limit of its own.
    """

    def __init__(self, settings: Settings, *, per_client: bool) -> None:
        self._settings = settings
        self._per_client = per_client
        self._of_client: Counter[str] = Counter()
        self._relays: set[Relay] = set()
        self.draining = False
        """Whether no more requests are taken."""

    @property
    def count(self) -> int:
        """Requests being answered."""
        return self._of_client.total()

    @contextmanager
    def take(self, client: str) -> Iterator[None]:
        """Hold a place for one request.

        Raises
        ------
        ApiError
            503 in a shutdown, 429 where all places, or the client's, are taken.
        """
        if self.draining:
            raise shutting_down()
        if self.count >= self._settings.max_streams:
            raise _full("the server answers as many requests as it may")
        if self._per_client and self._of_client[client] >= self._settings.max_streams_per_key:
            raise _full("this key has as many requests being answered as it may")
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    @contextmanager
    def follow(self, relay: Relay) -> Iterator[None]:
        """Keep a relay within reach of `cut`."""
        self._relays.add(relay)
        if self.draining:
            relay.cut(shutting_down())
        try:
            yield
        finally:
            self._relays.discard(relay)

    def cut(self) -> None:
        """End what is still being answered; every client is told."""
        for relay in tuple(self._relays):
            relay.cut(shutting_down())


def _full(message: str) -> ApiError:
    return ApiError(
        429, f"{message}; try again", code="rate_limit_exceeded", retry_after=_RETRY_AFTER
    )
