"""Sessions of operators in a browser, whose event streams cannot send a key."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict

SECONDS = 12 * 3600.0
"""How long a session lasts: a long shift."""

MOST = 64
"""Sessions at a time; the oldest goes when one more begins."""


class OperatorSessions:
    """Random tokens, kept as hashes, that stand for an operator's key for some hours.

    Hashing before the lookup leaves nothing of a token to be learnt from how long it takes.
    """

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def begin(self) -> str:
        """Return the token of a new session."""
        token = secrets.token_urlsafe(32)
        self._until[_digest(token)] = time.monotonic() + SECONDS
        while len(self._until) > MOST:
            self._until.popitem(last=False)
        return token

    def is_open(self, token: str | None) -> bool:
        """Whether a session of this token goes on."""
        return token is not None and self._until.get(_digest(token), 0.0) > time.monotonic()

    def end(self, token: str | None) -> None:
        """End the session, if there is one."""
        if token is not None:
            self._until.pop(_digest(token), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
