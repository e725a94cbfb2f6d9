"""A recording, judged by one tier of one monitor: all that figures and curves are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.measure.bootstrap import Bootstrap
from midstream.measure.halting import NEVER, forecasts
from midstream.measure.outcomes import MeasureError, Outcomes
from midstream.measure.recording import Judgement, Recording
from midstream.policy import Thresholds

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """A recording with all that is needed to measure one tier of one monitor on it."""

    recording: Recording
    judgement: Judgement
    bundle: Bundle
    tier: str
    hazards: tuple[str, ...]
    outcomes: Outcomes
    score: NDArray[np.float64]
    """Cumulative log-hazard of the newest logits of the probes that read the response, [N]."""
    flagged: Bools
    """Tokens at which one of these probes has a logit of 0 or more, [N]."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @classmethod
    def of(
        cls,
        recording: Recording,
        judgement: Judgement,
        bundle: Bundle,
        *,
        tier: str | None = None,
        bootstrap: Bootstrap | None = None,
    ) -> Measured:
        """Compare the labels of the hazards that the bundle watches with the judgement.

        ``tier`` is the one that was judged by; the policy's default when not given.

        Raises
        ------
        MeasureError
            When nothing in the recording is labelled with a hazard of the bundle.
        """
        hazards = tuple(h for h in dict.fromkeys(bundle.bank.hazards) if h in recording.hazards)
        if not hazards:
            raise MeasureError(
                f"the bundle watches {', '.join(bundle.bank.hazards)}; the recording is labelled "
                f"with {', '.join(recording.hazards) or 'nothing'}: give the labels of the data "
                "the names of the bundle's hazards"
            )
        outcomes = Outcomes.of(recording, judgement, hazards)
        logits = recording.logits[:, response_columns(recording, bundle, hazards)]
        scored = outcomes.position >= 0
        return cls(
            recording=recording,
            judgement=judgement,
            bundle=bundle,
            tier=tier or bundle.policy.default_tier,
            hazards=hazards,
            outcomes=outcomes,
            score=np.where(scored, log_hazard(logits), np.nan),
            flagged=scored & (logits >= 0).any(axis=1),
            bootstrap=bootstrap or Bootstrap(),
        )

    @property
    def thresholds(self) -> Thresholds:
        """Those of the tier."""
        return next(t for name, t in self.bundle.policy.tiers.items() if name == self.tier)

    @property
    def hold_back(self) -> int:
        """In tokens; ``NEVER`` for whole turns."""
        held = self.bundle.policy.hold_back
        return NEVER if held == "turn" else held

    def forecasts(self) -> tuple[NDArray[np.float64], Bools, NDArray[np.int64]]:
        """Every risk judged, whether it came true within the tier's horizon, and its stream."""
        o = self.outcomes
        placed = np.flatnonzero(o.placed)
        risk, came_true, stream = forecasts(
            [o.truths[e] for e in placed], [o.risks[e] for e in placed], self.thresholds.horizon
        )
        return risk, came_true, placed[stream]


def response_columns(recording: Recording, bundle: Bundle, hazards: Sequence[str]) -> list[int]:
    """Columns of the logits of the probes that read the response for one of ``hazards``."""
    return [
        recording.probes.index(probe.name)
        for probe in bundle.bank.probes
        if probe.reads == "response"
        and probe.adds_to is None
        and probe.hazard in hazards
        and probe.name in recording.probes
    ]


def log_hazard(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cumulative log-hazard of logits [N, P], ``sum(softplus(z))`` (design section 4.3), [N].

    NaN where one of them is not finite, and where there is none.
    """
    scored = np.isfinite(logits).all(axis=1) & (logits.shape[1] > 0)
    found = np.full(len(logits), np.nan)
    found[scored] = np.logaddexp(0.0, logits[scored].astype(np.float64)).sum(axis=1)
    return found
