"""One stream that somebody looks at closely: who does, and how much of it they were told."""

from __future__ import annotations

from midstream.serve.live_record import Record
from midstream.serve.live_viewers import Viewer, Viewers, message


class CloseUp:
    """Tells those who look at one stream what is new.

    Parameters
    ----------
    record : Record
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.viewers = Viewers()
        self._told = (0, 0, 0, False)

    def join(self, viewer: Viewer) -> None:
        """Tell one more: everything so far, and from now on what the others are told."""
        if len(self.viewers):
            self.tell()  # so that what this one is told next follows on what it is told now
        viewer.send(message("stream", self.record.whole()))
        self.viewers.join(viewer)
        self._told = self._known

    def tell(self) -> None:
        """Tell all what they do not know yet."""
        record, known = self.record, self._known
        if known == self._told:
            return
        points, pieces, marks, ended = self._told
        if record.ended and not ended:  # now with what the monitor recorded
            told = message("stream", record.whole())
        else:
            # the last point once more: its scores may have come after its risk
            told = message("news", record.news(max(points - 1, 0), pieces, marks))
        self._told = known
        self.viewers.send(told)

    @property
    def _known(self) -> tuple[int, int, int, bool]:
        record = self.record
        return len(record.positions), len(record.pieces), len(record.marks), record.ended
