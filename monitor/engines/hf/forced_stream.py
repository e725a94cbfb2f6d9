"""transformers: one text that is judged while somebody else writes it (see `forced`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from midstream.engines.hf.growing_text import GrowingText, Piece
from midstream.streams import Session


class ForcedStream:
    """One text, judged while it is written. `ForcedStreams.open` makes them.

    Attributes
    ----------
    session : Session
    slot : int
        Of the monitor and of the cache.
    prompt_tokens : int
    pending : deque of Piece
        Tokens that wait to be fed.
    fed : int
        Tokens that were.
    """

    def __init__(
        self, session: Session[str], slot: int, prompt: Sequence[int], text: GrowingText
    ) -> None:
        self.session = session
        self.slot = slot
        self.prompt_tokens = len(prompt)
        self.pending = deque(Piece(token, "") for token in prompt)
        self.fed = 0
        self.text = text
        self.reason: str | None = None
        """Finish reason that came with the text's end; None while more may come."""
        self.error: str | None = None
        """Why the text broke off, where it did."""
        self.ended = False
        self.passed = 0
        """Tokens that left without having been fed, because the policy says so."""
        self.closely = False
        """Whether to tell every token's scores."""
        self._received = 0

    @property
    def id(self) -> str:
        """Its label."""
        return self.session.stream

    def feed(self, text: str | Sequence[int]) -> None:
        """Take more: text, or ids that stand for no text. Without effect once it has ended."""
        if self.ended or self.reason is not None:
            return
        if isinstance(text, str):
            self._received += len(text)
            self.pending += self.text.push(text)
        else:
            self.pending += [Piece(token, "") for token in text]

    def finish(self, reason: str, error: str | None = None) -> None:
        """Say that no more text comes, and with what finish reason; or why it broke off.

        What has come is judged, and leaves if it may, in either case. Where it broke off the reason
        is a code, which the ``error`` event has as its cause.
        """
        if not self.ended and self.reason is None:
            self.reason, self.error = reason, error
            self.pending += self.text.finish()

    @property
    def read(self) -> int:
        """Characters that do not wait to be fed, but for some of the last word."""
        return self._received - sum(len(piece.text) for piece in self.pending)

    @property
    def delivered(self) -> dict[str, int]:
        """Tokens that have left, and how many of them without a score."""
        queue = self.session.hold_back
        passed = 0 if self.session.delivers_whole else self.passed  # past the queue
        return {
            "delivered": queue.released + passed,
            "delivered_unscored": queue.released_unscored + passed,
        }

    @property
    def waits(self) -> bool:
        """Whether a step would do something for it."""
        return not self.ended and (bool(self.pending) or self.reason is not None)
