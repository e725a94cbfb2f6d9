"""Which tokens may leave: the queue between sampling and the client (design section 1, step 4)."""

from __future__ import annotations

from collections import deque
from typing import Generic, Literal, TypeVar

from midstream.kernels.tables import Verdict

T = TypeVar("T")


class HoldBack(Generic[T]):
    """Holds sampled tokens until their own residual was judged, and the judgement lets them go.

    A token sampled at step t is fed, and so scored, at step t + 1. With a depth of 1 it leaves with
    its own judgement; with depth n only when the n - 1 tokens after it were judged, too; with
    ``"turn"`` when the stream ends. HOLD keeps everything that still waits; after HALT, and after
    the end, nothing leaves any more.

    Parameters
    ----------
    depth : int or "turn"
        ``hold_back`` of the policy, at least 1.
    passes_unscored : bool
        Whether tokens that were never judged leave at the end (``on_unscored: pass``).
    """

    def __init__(self, depth: int | Literal["turn"], *, passes_unscored: bool = False) -> None:
        if depth != "turn" and depth < 1:
            raise ValueError(f"depth {depth} would let tokens leave unjudged; 1 is the least")
        self._depth = depth
        self._passes_unscored = passes_unscored
        self._waiting: deque[tuple[int, T]] = deque()
        self._newest = -1  # position, pushed or judged
        self._judged = -1
        self._scored: set[int] = set()  # of those that wait
        self._verdict = Verdict.CONTINUE
        self._ended = False  # halted or finished
        self.released = 0
        """Tokens that have left."""
        self.released_unscored = 0
        """Of these, those without a score: the policy let them pass."""
        self.withheld = 0
        """Tokens that will never leave."""

    def push(self, position: int, token: T) -> None:
        """Queue a sampled token; when the stream has ended it is withheld at once.

        Raises
        ------
        ValueError
            When ``position`` does not ascend: the token would overtake another, or leave by a
            judgement that came before it.
        """
        if position <= self._newest:
            raise ValueError(f"position {position} does not follow {self._newest}: push in order")
        self._newest = position
        if self._ended:
            self.withheld += 1
        else:
            self._waiting.append((position, token))

    def judge(self, position: int, verdict: Verdict, *, scored: bool = True) -> list[T]:
        """Take the verdict after ``position`` was fed; return the tokens that leave now.

        Parameters
        ----------
        position : int
        verdict : Verdict
        scored : bool
            False where the verdict is only what the policy says of a token without a score.

        Raises
        ------
        ValueError
            When ``position`` was judged before: a verdict is final.
        """
        if position <= self._judged:
            raise ValueError(f"position {position} was judged already (up to {self._judged})")
        self._judged = position
        self._newest = max(self._newest, position)
        if self._ended:
            return []
        self._verdict = verdict
        if scored:
            self._scored.add(position)
        if verdict == Verdict.HALT:
            return self._end()
        if verdict == Verdict.HOLD or self._depth == "turn":
            return []
        return self._release(position - self._depth + 1)

    def finish(self) -> list[T]:
        """End the stream: what was judged and allowed leaves, the rest is withheld."""
        leaving = self._release(self._last_allowed)
        return leaving + self._end()

    @property
    def leaving(self) -> list[T]:
        """Tokens that would leave if the stream ended now."""
        return [token for position, token in self._waiting if position <= self._last_allowed]

    def withhold(self) -> None:
        """End the stream, and let nothing leave any more."""
        self._end()

    @property
    def _last_allowed(self) -> int:
        if self._verdict != Verdict.CONTINUE:
            return -1
        return self._newest if self._passes_unscored else self._judged

    def _release(self, last: int) -> list[T]:
        leaving = []
        while self._waiting and self._waiting[0][0] <= last:
            position, token = self._waiting.popleft()
            leaving.append(token)
            self.released_unscored += position not in self._scored
            self._scored.discard(position)
        self.released += len(leaving)
        return leaving

    def _end(self) -> list[T]:
        self.withheld += len(self._waiting)
        self._waiting.clear()
        self._ended = True
        return []
