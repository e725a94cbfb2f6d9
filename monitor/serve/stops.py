"""Stop strings: a response is cut before the first that is complete, across tokens too."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes text as it comes and gives what may leave.

    An end that may yet become a stop string waits for the text after it.

    Parameters
    ----------
    stops : sequence of str
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""
        self.hit = False
        """Whether one was met; nothing leaves any more."""

    def take(self, text: str) -> str:
        """Return what may leave now that ``text`` came."""
        if not self._stops:
            return text
        if self.hit:
            return ""
        text = self._waiting + text
        found = [
            (at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0
        ]  # the first to end, so that it does not matter how the text was split
        if found:
            self.hit, self._waiting = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        leaving, self._waiting = text[: len(text) - keep], text[len(text) - keep :]
        return leaving

    def finish(self) -> str:
        """Return what waited, now that nothing follows."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
