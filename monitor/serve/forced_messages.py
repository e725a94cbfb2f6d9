"""What the proxy and the process of the watching model tell each other besides `messages`."""

from __future__ import annotations

from typing import NamedTuple


class Written(NamedTuple):
    """The upstream has written more of a stream's text."""

    stream: str
    text: str


class Ended(NamedTuple):
    """The upstream writes no more: its finish reason; or a code, and how it broke off."""

    stream: str
    reason: str
    error: str | None


class Read(NamedTuple):
    """Of a stream so many characters were fed to the model; told now and then."""

    stream: str
    characters: int
