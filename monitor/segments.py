"""Segments of a response, recognised from token ids: reasoning, tool calls, and the answer.

Each segment is judged on its own, by its own thresholds: evidence and belief start afresh at its
first token, from the belief that the prompt left. So unsafe reasoning before a safe answer (a
*leak*) and a safe trace before an unsafe answer (an *escape*; Chain of Risk, arXiv 2605.05678) are
both visible. An opening marker belongs to the segment it opens, a closing one to that it closes;
where one is several ids, its last id opens the segment.

A stream that is held when its segment changes is judged on from where it was, by the thresholds of
the segment it comes into: evidence starts afresh at the next change at which it is not held. Else
the marker alone would let go tokens whose risk has never fallen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.kernels.tables import SlotTable, Verdict
from midstream.policy import ANSWER, Marker, Policy
from midstream.streams import SegmentReport

Ids = tuple[int, ...]

_HOLD = int(Verdict.HOLD)


class SegmentError(ValueError):
    """Markers that cannot be recognised with this tokenizer."""


class _State(NamedTuple):
    """A state of the automaton."""

    open: tuple[int, ...]
    """Segments that are open, the outermost first."""
    seen: Ids
    """Longest end of the text that begins a marker."""
    segment: int
    """Segment of the token just read."""


@dataclass(frozen=True)
class SegmentReader:
    """A finite automaton (Aho-Corasick over the markers, times what is open) that reads ids.

    Attributes
    ----------
    names : tuple of str
        Segments; the answer is number 0.
    step : int64 [states, classes]
        Next state. Class 0 is every token that occurs in no marker.
    segment : int64 [states]
        Segment of the token that led to the state.
    token_class : int64 [largest id in a marker + 2]
        Class of each id; the last entry stands for all ids above.
    inside : int64 [segments]
        State in which a response starts that begins inside a segment.
    opens : tuple of tuple of ids
        Opening markers of each segment.
    is_blank : callable
        Whether an id decodes to white space.
    """

    names: tuple[str, ...]
    step: NDArray[np.int64]
    segment: NDArray[np.int64]
    token_class: NDArray[np.int64]
    inside: NDArray[np.int64]
    opens: tuple[tuple[Ids, ...], ...]
    is_blank: Callable[[int], bool]

    @classmethod
    def of(cls, policy: Policy, tokenizer: Any = None) -> SegmentReader:
        """Compile the markers of a policy.

        Markers given as text must be one token each. Cost of a token that is read: one look into
        a table whose states grow with the orders in which segments can be nested, 65 with four.

        Raises
        ------
        SegmentError
            For a text that is no token of the tokenizer, and for one marker with two meanings.
        """
        names = (ANSWER, *policy.segments)
        opens: list[tuple[Ids, ...]] = [()]
        meaning = dict[Ids, tuple[int, bool]]()
        for number, (name, segment) in enumerate(policy.segments.items(), start=1):
            ids = {
                True: _all_ids(segment.opens, name, tokenizer),
                False: _all_ids(segment.closes, name, tokenizer),
            }
            opens.append(ids[True])
            for is_open, markers in ids.items():
                for marker in markers:
                    if marker in meaning:
                        raise SegmentError(
                            f"segments.{name}: the marker {list(marker)} has another meaning, too; "
                            "each must open or close one segment"
                        )
                    meaning[marker] = number, is_open

        @cache  # asked when a stream is admitted; to decode a whole vocabulary takes a second
        def is_blank(token: int) -> bool:
            return tokenizer is not None and not tokenizer.decode([token]).strip()

        return cls(names, *_compile(meaning, len(names)), tuple(opens), is_blank)

    def start(self, prompt: Sequence[int]) -> int:
        """State before the first response token.

        A response starts inside a segment when its prompt ends with an opening marker, white space
        after it left out. Markers elsewhere in the prompt count for nothing: a user can write them.
        """
        end = len(prompt)
        while end and self.is_blank(prompt[end - 1]):
            end -= 1
        for number, markers in enumerate(self.opens):
            if any(tuple(prompt[max(0, end - len(m)) : end]) == m for m in markers):
                return int(self.inside[number])
        return int(self.inside[0])

    def reads_like(self, other: SegmentReader) -> bool:
        """Whether it tells the same segments in any response."""
        return all(
            np.array_equal(mine, others)
            for mine, others in (
                (self.step, other.step),
                (self.segment, other.segment),
                (self.token_class, other.token_class),
            )
        )

    def read(self, state: int, ids: Iterable[int]) -> NDArray[np.int64]:
        """Segment of each token that is read from ``state`` on, [n]."""
        beyond = len(self.token_class) - 1
        segments = []
        for token in ids:
            state = int(self.step[state, self.token_class[min(token, beyond)]])
            segments.append(self.segment[state])
        return np.array(segments, dtype=np.int64)


def _all_ids(markers: Sequence[Marker], name: str, tokenizer: Any) -> tuple[Ids, ...]:
    return tuple(
        (_token(marker, name, tokenizer),) if isinstance(marker, str) else tuple(marker)
        for marker in markers
    )


def _token(marker: str, name: str, tokenizer: Any) -> int:
    where = f"segments.{name}: {marker!r}"
    if tokenizer is None:
        raise SegmentError(f"{where} is a text; give the tokenizer, or the marker's ids")
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != marker:
        raise SegmentError(
            f"{where} is no token of this tokenizer, it makes {ids} of it, and other ids where "
            "other text stands around it; give all ids it can have as lists, such as "
            f"[{list(ids)}], or a tokenizer in which it is a token"
        )
    return int(ids[0])


def _compile(
    meaning: dict[Ids, tuple[int, bool]], segments: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Build ``step, segment, token_class, inside`` by following every token from every state."""
    beginnings = {marker[:n] for marker in meaning for n in range(len(marker) + 1)}
    alphabet = sorted({token for marker in meaning for token in marker})
    starts = [_State((), (), 0), *(_State((n,), (), n) for n in range(1, segments))]
    number = {state: i for i, state in enumerate(starts)}
    pending, rows = list(starts), []
    for state in pending:  # grows while it is read
        row = []
        for token in [None, *alphabet]:
            after = _follow(state, token, beginnings, meaning)
            if after not in number:
                number[after] = len(number)
                pending.append(after)
            row.append(number[after])
        rows.append(row)
    token_class = np.zeros(alphabet[-1] + 2, dtype=np.int64)
    token_class[alphabet] = np.arange(1, len(alphabet) + 1)
    return (
        np.array(rows),
        np.array([state.segment for state in pending]),
        token_class,
        np.arange(segments),
    )


def _follow(
    state: _State,
    token: int | None,
    beginnings: set[Ids],
    meaning: dict[Ids, tuple[int, bool]],
) -> _State:
    now_open = state.open
    inside = now_open[-1] if now_open else 0
    if token is None:
        return _State(now_open, (), inside)
    text = (*state.seen, token)
    ends = [text[at:] for at in range(len(text) + 1)]  # the longest first
    seen = next(end for end in ends if end in beginnings)
    segment, opens = next((meaning[end] for end in ends if end in meaning), (0, False))
    if opens and segment not in now_open:
        return _State((*now_open, segment), seen, segment)
    if not opens and segment in now_open:
        return _State(now_open[: now_open.index(segment)], seen, segment)
    return _State(now_open, seen, inside)


class SegmentTable:
    """Where every watched stream is, on the device; beside the slot table.

    All that changes is written in place, so that a captured graph sees it. Memory per slot:
    ``4 (K + 1) + 12 (segments) + 28`` bytes.

    Parameters
    ----------
    policy : Policy
        With at least one segment.
    slots : SlotTable
        Whose streams are followed.
    """

    def __init__(self, policy: Policy, slots: SlotTable) -> None:
        self.names = (ANSWER, *policy.segments)
        self._tiers = len(policy.tiers)
        self._halt_at = [
            [np.float32(tiers[name].halt_at) for name in policy.tiers]
            for tiers in policy.thresholds_by_segment()
        ]
        self._slots = slots
        self._begin = torch.zeros_like(slots.belief)
        count, device = len(slots.position), slots.device
        self._segment = torch.zeros(count, dtype=torch.int64, device=device)
        self._state = torch.zeros_like(self._segment)
        self._prompt_peak = torch.zeros(count, device=device)
        self._peak = torch.zeros(count, len(self.names), device=device)
        # Scored and unscored tokens of each segment, and the slot's counts when it was entered.
        self._counts = torch.zeros(count, len(self.names), 2, dtype=torch.int32, device=device)
        self._counted = torch.zeros(count, 2, dtype=torch.int32, device=device)
        self.reader: SegmentReader | None = None

    def recognise(self, reader: SegmentReader) -> None:
        """Take the automaton that :meth:`follow` reads tokens with."""
        before, self.reader = self.reader, reader
        if before is not None and before.reads_like(reader):
            return  # a captured graph reads from where the tables are
        device = self._slots.device
        self._step = torch.from_numpy(reader.step).to(device)
        self._segment_of = torch.from_numpy(reader.segment).to(device)
        self._token_class = torch.from_numpy(reader.token_class).to(device)

    def admit(self, slot: int, prompt: Sequence[int]) -> None:
        """Forget the stream that had the slot; a response to ``prompt`` is about to start."""
        for state in (self._segment, self._prompt_peak, self._peak, self._counts, self._counted):
            state[slot] = 0
        self._state[slot] = self.reader.start(prompt) if self.reader else 0
        self._begin[slot] = self._slots.belief[slot]

    def read(self, prompt: Sequence[int], response: Sequence[int]) -> NDArray[np.int64]:
        """Segment of each token of a given response, [n].

        Raises
        ------
        SegmentError
            Before :meth:`recognise`.
        """
        if self.reader is None:
            raise SegmentError(
                "the policy has segments; call monitor.recognise_segments(tokenizer) first"
            )
        return self.reader.read(self.reader.start(prompt), response)

    def follow(self, slot: Tensor, token: Tensor) -> None:
        """Take the response token that each stream is fed next, before it is judged.

        Parameters
        ----------
        slot : int32 [n]
            Each once; -1 for padding.
        token : int64 [n]
        """
        slots = len(self._segment)
        fed = token.new_full((slots + 1,), -1)
        fed[torch.where(slot < 0, slots, slot).long()] = token  # padding lands behind the last slot
        fed = fed[:slots]
        classes = self._token_class[fed.clamp(0, len(self._token_class) - 1)]
        live = fed >= 0
        self._state.copy_(torch.where(live, self._step[self._state, classes], self._state))
        self._enter(live, self._segment_of[self._state])

    def enter(self, slot: int, segment: int) -> None:
        """Let one stream be in a segment from its next token on."""
        live = torch.zeros_like(self._segment, dtype=torch.bool)
        live[slot] = True
        self._enter(live, torch.full_like(self._segment, segment))

    def _enter(self, live: Tensor, segment: Tensor) -> None:
        slots = self._slots
        first = live & (slots.position == slots.start)  # what is there now is the prompt's
        changed = live & (segment != self._segment)
        if slots.device.type == "cpu" and not bool((first | changed).any()):
            return  # as in most steps: 50 us instead of 150; a GPU would have to be waited for
        counts = torch.stack([slots.scored, slots.unscored], dim=1)
        self._begin.copy_(torch.where(first[:, None], slots.belief, self._begin))
        self._counted.copy_(torch.where(first[:, None], counts, self._counted))
        self._prompt_peak.copy_(torch.where(first, slots.peak, self._prompt_peak))
        slots.peak.masked_fill_(first, 0.0)  # or it would pass for the answer's
        left = torch.nn.functional.one_hot(self._segment, len(self.names)).bool() & changed[:, None]
        best = torch.maximum(self._peak, slots.peak[:, None])
        self._peak.copy_(torch.where(left, best, self._peak))
        self._counts.add_(torch.where(left[..., None], (counts - self._counted)[:, None], 0))
        self._counted.copy_(torch.where(changed[:, None], counts, self._counted))
        slots.peak.masked_fill_(changed, 0.0)
        # While a stream is held it goes on: or a marker would let go what calm tokens have not.
        afresh = (changed & (slots.verdict != _HOLD))[:, None]
        slots.belief.copy_(torch.where(afresh, self._begin, slots.belief))
        slots.evidence.masked_fill_(afresh, 0.0)
        slots.folds.masked_fill_(afresh, 0)
        self._segment.copy_(torch.where(changed, segment, self._segment))
        row = self._segment * self._tiers + slots.policy % self._tiers
        slots.policy.copy_(torch.where(live, row.to(torch.int32), slots.policy))

    def report(self, slot: int) -> tuple[float, dict[str, SegmentReport]]:
        """Largest risk of a stream, and what each segment that it was in came to."""
        slots = self._slots
        peak = float(slots.peak[slot])
        if slots.position[slot] <= slots.start[slot]:
            return peak, {}
        tier = int(slots.policy[slot]) % self._tiers
        last = int(self._segment[slot])
        peaks, counts = self._peak[slot].tolist(), self._counts[slot].tolist()
        peaks[last] = max(peaks[last], peak)
        since = zip((slots.scored[slot], slots.unscored[slot]), self._counted[slot], strict=True)
        counts[last] = [
            before + int(now) - int(then)
            for before, (now, then) in zip(counts[last], since, strict=True)
        ]
        reports = {
            name: SegmentReport(
                scored=scored,
                unscored=unscored,
                peak=peaks[number],
                flagged=bool(np.float32(peaks[number]) >= self._halt_at[number][tier]),
            )
            for number, (name, (scored, unscored)) in enumerate(
                zip(self.names, counts, strict=True)
            )
            if scored + unscored
        }
        return max(float(self._prompt_peak[slot]), *peaks), reports
