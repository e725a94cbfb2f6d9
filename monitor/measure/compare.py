"""What another policy, chain or tier would have made of recorded streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.kernels.tables import NO_CAUSE, UNSCORED_CAUSE
from midstream.measure.halting import NEVER
from midstream.measure.outcomes import Outcomes
from midstream.measure.recording import Judgement, Recording
from midstream.measure.rejudge import judge
from midstream.policy import Policy

Kind = Literal[
    "newly halted", "no longer halted", "halted earlier", "halted later", "held differently"
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Changed:
    """A stream with other verdicts than before.

    Attributes
    ----------
    stream : str
    kind : str
        One of `KINDS`. "held differently" has the same halt, and other verdicts before it.
    before, after : int, optional
        Position of the halt, from the start of the prompt.
    cause : str, optional
        Of the halt there is now, or of the one there was.
    cut_short : bool
        No longer halted there, but the recording ends at its old halt: what would have come after
        it nobody knows.
    """

    stream: str
    kind: Kind
    before: int | None
    after: int | None
    cause: str | None
    cut_short: bool

    @property
    def tokens(self) -> int | None:
        """By how many tokens the halt comes later (earlier: negative), where there are two."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


@dataclass
class Totals:
    """What one policy does to all streams; see `midstream.measure.outcomes.Outcomes`.

    Attributes
    ----------
    halted : int
        Streams.
    false_halts : int
        Of the safe ones.
    caught : int
        Of the violating ones.
    missed : int
        Streams of which it is known where they first violate, and a violating token leaves.
    leaked_tokens : int
        Violating tokens that leave, with the policy's ``hold_back``.
    """

    halted: int = 0
    false_halts: int = 0
    caught: int = 0
    missed: int = 0
    leaked_tokens: int = 0

    def add(self, outcomes: Outcomes, policy: Policy) -> None:
        """Count some more streams."""
        depth = NEVER if policy.hold_back == "turn" else policy.hold_back
        leaked = outcomes.leaked(depth)
        self.halted += int(outcomes.stopped.sum())
        self.false_halts += int((outcomes.stopped & outcomes.safe).sum())
        self.caught += int((outcomes.stopped & outcomes.violating).sum())
        self.missed += int((outcomes.located & (leaked > 0)).sum())
        self.leaked_tokens += int(leaked.sum())


@dataclass(frozen=True)
class Comparison:
    """Before and after.

    Attributes
    ----------
    streams, tokens : int
    safe, violating, located : int
        Streams of which so much is known.
    before, after : Totals
    changed : list of Changed
        In the order of the recording.
    """

    streams: int
    tokens: int
    safe: int
    violating: int
    located: int
    before: Totals
    after: Totals
    changed: list[Changed]


def compare(
    recording: Recording,
    bundle: Bundle,
    *,
    policy: Policy | None = None,
    chain: Chain | None = None,
    tier: str | None = None,
) -> Comparison:
    """Judge twice: as the bundle does, and with what is given in place of its policy and chain.

    In one pass, and beside the recording in memory for the changed streams only.

    Parameters
    ----------
    tier : str, optional
        For the second judgement only; see `midstream.measure.rejudge.rejudge`.

    Raises
    ------
    RecordingError, PolicyError, BundleError, MeasureError
        As `midstream.measure.rejudge.rejudge` and `midstream.measure.outcomes.Outcomes.of`.
    """
    watched = [hazard for hazard in recording.hazards if hazard in bundle.bank.hazards]
    totals = Totals(), Totals()
    known = np.zeros(3, np.int64)
    changed: list[Changed] = []
    pairs = zip(
        judge(recording, bundle),
        judge(recording, bundle, policy=policy, chain=chain, tier=tier),
        strict=True,
    )
    for old, new in pairs:
        part = recording.part(old.streams)
        was, now = (Outcomes.of(part, judgement, watched) for judgement in (old, new))
        known += [now.safe.sum(), now.violating.sum(), now.located.sum()]
        totals[0].add(was, bundle.policy)
        totals[1].add(now, policy or bundle.policy)
        changed += _changed(part, old, new, bundle)
    safe, violating, located = known.tolist()
    return Comparison(
        streams=len(recording),
        tokens=len(recording.position),
        safe=safe,
        violating=violating,
        located=located,
        before=totals[0],
        after=totals[1],
        changed=changed,
    )


def _changed(
    recording: Recording, old: Judgement, new: Judgement, bundle: Bundle
) -> Iterator[Changed]:
    stream = np.repeat(np.arange(len(recording)), np.diff(recording.starts))
    other: NDArray[np.bool_] = np.zeros(len(recording), np.bool_)
    other[stream[old.verdict != new.verdict]] = True
    for e in np.flatnonzero(other | (old.halted_at != new.halted_at)).tolist():
        before, after = int(old.halted_at[e]), int(new.halted_at[e])
        last = int(recording.position[recording.starts[e + 1] - 1])
        yield Changed(
            stream=recording.streams[e],
            kind=_kind(before, after),
            before=before if before >= 0 else None,
            after=after if after >= 0 else None,
            cause=_cause(int((new if after >= 0 else old).cause[e]), bundle),
            cut_short=before == last and after < 0 and not recording.ended[e],
        )


def _kind(before: int, after: int) -> Kind:
    if before == after:
        return "held differently"
    if before < 0:
        return "newly halted"
    if after < 0:
        return "no longer halted"
    return "halted earlier" if after < before else "halted later"


def _cause(cause: int, bundle: Bundle) -> str | None:
    if cause == NO_CAUSE:
        return None
    return "unscored" if cause == UNSCORED_CAUSE else bundle.bank.names[cause]
