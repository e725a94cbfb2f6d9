"""The life of one stream as the host sees it: phases, events, and the report it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from midstream.holdback import HoldBack
from midstream.kernels.tables import SlotTable, Verdict
from midstream.policy import ANSWER, Policy, TierName

EVENT_SCHEMA_VERSION = 3

T = TypeVar("T")


class Phase(Enum):
    """Where a stream stands (design section 4.6)."""

    PROMPT = "prompt"
    GENERATING = "generating"
    HELD = "held"
    HALTED = "halted"
    RELEASED = "released"
    """Ended, and delivered as a whole at its end (``hold_back: turn``)."""
    FINISHED = "finished"
    """Ended by itself."""


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.PROMPT: frozenset({Phase.GENERATING, Phase.HELD, Phase.HALTED, Phase.FINISHED}),
    Phase.GENERATING: frozenset({Phase.HELD, Phase.HALTED, Phase.RELEASED, Phase.FINISHED}),
    Phase.HELD: frozenset({Phase.GENERATING, Phase.HALTED, Phase.RELEASED, Phase.FINISHED}),
    Phase.HALTED: frozenset(),
    Phase.RELEASED: frozenset(),
    Phase.FINISHED: frozenset(),
}

_PHASE_OF = {
    Verdict.CONTINUE: Phase.GENERATING,
    Verdict.HOLD: Phase.HELD,
    Verdict.HALT: Phase.HALTED,
}


VerdictName = Literal["CONTINUE", "HOLD", "HALT"]
_VERDICT_NAMES: dict[int, VerdictName] = {0: "CONTINUE", 1: "HOLD", 2: "HALT"}


class PhaseError(RuntimeError):
    """A transition that the table does not allow."""


class Trace(BaseModel):
    """Token by token record of a stream, oldest first; all lists have the same length n.

    ``risk`` is None where a token was not judged: a prompt token before the last, or one without a
    score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    position: list[int]
    risk: list[float | None]
    verdict: list[VerdictName]
    scores: dict[str, list[float | None]]
    """Probe name to logits; None where one was not finite."""

    @classmethod
    def read(cls, slots: SlotTable, slot: int, names: Sequence[str]) -> Trace:
        """Copy the trace of a slot from the device; ``names`` are those of the probes."""
        position = _array(slots.trace_position[slot])
        cells = np.flatnonzero(position >= 0)  # -1 marks cells never written
        cells = cells[position[cells].argsort()]
        logits = _array(slots.trace_logits[slot])[cells]
        # Not validated: it was made here, and 1024 tokens of 8 probes would take 0.14 ms.
        return cls.model_construct(
            position=position[cells].tolist(),
            risk=_finite(_array(slots.trace_risk[slot])[cells]),
            verdict=[_VERDICT_NAMES[v] for v in _array(slots.trace_verdict[slot])[cells].tolist()],
            scores={name: _finite(logits[:, p]) for p, name in enumerate(names)},
        )


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def _finite(values: NDArray[np.float32]) -> list[float | None]:
    if np.isfinite(values).all():
        every: list[float | None] = values.tolist()
        return every
    return [value if math.isfinite(value) else None for value in values.tolist()]


class SegmentReport(BaseModel):
    """What one segment of a response came to, on its own (see `midstream.segments`).

    Attributes
    ----------
    scored, unscored : int
        Its tokens, markers included.
    peak : float
        Largest risk inside it.
    flagged : bool
        Whether that reaches the segment's own ``halt_at``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scored: int
    unscored: int
    peak: float
    flagged: bool


class StreamReport(BaseModel):
    """What is left of a stream when its slot is retired.

    Attributes
    ----------
    scored, unscored : int
        Tokens with and without a score; prompt tokens count only when some probe reads prompts. The
        last token of a stream is unscored where the engine never fed it.
    halted_at : int, optional
        Position of the token that halted the stream.
    peak : float
        Largest risk of any judged token.
    trace : Trace
        The last tokens, as many as the monitor keeps.
    segments : dict of str to SegmentReport
        Those that the response was in; empty without segments in the policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stream: str
    bundle: str
    tier: TierName
    prompt_tokens: int
    scored: int
    unscored: int
    verdict: VerdictName
    cause: str | None
    halted_at: int | None
    risk: float
    peak: float
    finish_reason: str
    trace: Trace
    segments: dict[str, SegmentReport] = {}

    @property
    def mismatch(self) -> Literal["leak", "escape"] | None:
        """What judging the answer alone, or all but the answer, would have missed.

        ``leak``: the answer is safe, and a segment beside it is not. ``escape``: the reverse
        (Chain of Risk, arXiv 2605.05678). None where they agree, or one of them is missing.
        """
        answer = self.segments.get(ANSWER)
        others = [part.flagged for name, part in self.segments.items() if name != ANSWER]
        if answer is None or not others or answer.flagged == any(others):
            return None
        return "escape" if answer.flagged else "leak"


class Event(BaseModel):
    """One thing that happened to a stream; one JSON object per event (design section 4.8).

    ``position`` counts tokens from the start of the prompt. ``text`` is there on ``released``
    events of engines that decode, ``report`` on ``finished`` ones. ``cause`` names the probe with
    the largest hazard, or ``unscored``; on ``error`` events, where there is one, what failed.
    ``scores``, on ``scored`` events of streams that somebody looks at closely, are the token's
    logits by probe; None where one was not finite. ``delivered`` is there on ``finished`` and
    ``error`` events of engines that count what leaves: tokens of the response, and how many of them
    had no score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = EVENT_SCHEMA_VERSION
    type: Literal["admitted", "scored", "verdict", "halted", "released", "finished", "error"]
    stream: str
    bundle: str
    position: int | None = None
    risk: float | None = None
    verdict: VerdictName | None = None
    cause: str | None = None
    text: str | None = None
    message: str | None = None
    scores: dict[str, float | None] | None = None
    delivered: int | None = None
    delivered_unscored: int | None = None
    report: StreamReport | None = None


class Session(Generic[T]):
    """The front end of one stream: tokens and verdicts in; tokens that may leave and events out.

    Parameters
    ----------
    stream : str
    policy : Policy
    bundle : str
        Hash of the bundle, repeated in every event.
    hold_back : int or "turn", optional
        In place of the policy's own.
    """

    def __init__(
        self,
        stream: str,
        policy: Policy,
        bundle: str,
        hold_back: int | Literal["turn"] | None = None,
    ) -> None:
        self.stream = stream
        self.phase = Phase.PROMPT
        depth = policy.hold_back if hold_back is None else hold_back
        self.hold_back: HoldBack[T] = HoldBack(depth, passes_unscored=policy.on_unscored == "pass")
        self.delivers_whole = depth == "turn"
        """Whether nothing leaves before the end."""
        self._bundle = bundle

    def event(self, type: str, **fields: object) -> Event:
        """Build an event of this stream."""
        return Event.model_validate(
            {"type": type, "stream": self.stream, "bundle": self._bundle, **fields}
        )

    def push(self, position: int, token: T) -> None:
        """Queue a token that was just sampled."""
        if self.phase == Phase.PROMPT:
            self._enter(Phase.GENERATING)
        self.hold_back.push(position, token)

    def judge(
        self,
        position: int,
        verdict: Verdict,
        risk: float | None,
        cause: str | None = None,
        *,
        scored: bool = True,
    ) -> tuple[list[T], list[Event]]:
        """Take the verdict after ``position`` was fed; ``scored`` says whether it had a score.

        Returns
        -------
        tokens : list
            Those that may leave now, in order.
        events : list of Event
            ``halted`` when this verdict halts the stream, ``verdict`` when it holds it or lets it
            go on.
        """
        # No tokens once the stream has ended.
        tokens = self.hold_back.judge(position, verdict, scored=scored)
        before, after = self.phase, _PHASE_OF[verdict]
        if before == Phase.HALTED or before == after:
            return tokens, []
        self._enter(after)
        facts = {"position": position, "risk": risk, "verdict": verdict.name, "cause": cause}
        if after == Phase.HALTED:
            return tokens, [self.event("halted", **facts)]
        if before == Phase.PROMPT and after == Phase.GENERATING:
            return tokens, []  # what every stream does is no event
        return tokens, [self.event("verdict", **facts)]

    def finish(self) -> list[T]:
        """End the stream; return the tokens that leave with its end."""
        tokens = self.hold_back.finish()
        if self.phase != Phase.HALTED:
            whole = self.delivers_whole and bool(tokens)
            self._enter(Phase.RELEASED if whole else Phase.FINISHED)
        return tokens

    def withhold(self, **facts: object) -> list[Event]:
        """End the stream as halted: what still waits never leaves; ``facts`` go into the event."""
        self.hold_back.withhold()
        if self.phase == Phase.HALTED:
            return []
        self._enter(Phase.HALTED)
        return [self.event("halted", verdict="HALT", **facts)]

    def _enter(self, phase: Phase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise PhaseError(
                f"stream {self.stream!r}: {self.phase.name} does not lead to {phase.name}; "
                "allowed: "
                f"{sorted(p.name for p in TRANSITIONS[self.phase]) or 'nothing, it has ended'}"
            )
        self.phase = phase


def released(report: StreamReport, response: Sequence[T], policy: Policy) -> list[T]:
    """Tokens of a response that may leave by the verdicts in its report.

    Parameters
    ----------
    response : sequence
        Its tokens from the first after the prompt, the end token left out.

    Raises
    ------
    ValueError
        When the report has no trace, so that nothing is known of its tokens.
    """
    trace = report.trace
    if not trace.position and report.scored + report.unscored:
        raise ValueError("the report has no trace: build the monitor with trace=1 or more")
    queue: HoldBack[T] = HoldBack(policy.hold_back, passes_unscored=policy.on_unscored == "pass")
    verdicts = {p: Verdict[v] for p, v in zip(trace.position, trace.verdict, strict=True)}
    start = report.prompt_tokens
    leaving: list[T] = []
    if start - 1 in verdicts:
        queue.judge(start - 1, verdicts[start - 1])
    for position, token in enumerate(response, start=start):
        queue.push(position, token)
        if position in verdicts:
            leaving += queue.judge(position, verdicts[position])
    return leaving + queue.finish()
