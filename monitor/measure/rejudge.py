"""Recorded logits through the kernels' own ``advance`` once more, without the model."""

from __future__ import annotations

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.measure.recording import Judgement, Recording
from midstream.policy import Policy


def rejudge(
    recording: Recording,
    bundle: Bundle,
    *,
    policy: Policy | None = None,
    chain: Chain | None = None,
    tier: str | None = None,
) -> Judgement:
    """Judge every recorded token again; with nothing changed, to the very verdicts it had."""
    raise NotImplementedError
