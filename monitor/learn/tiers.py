"""Thresholds of the strictness tiers from target rates, all certified from one calibration set.

FlexGuard (arXiv 2602.23636): what counts as safe depends on the tier. Strict treats {benign} as
safe, moderate {benign, low}, loose {benign, low, moderate}; what is not safe should be halted.

Why the promises hold together. A fixed sequence of tests covers every threshold of *one* tier at
one target, but it ends with the first test that fails, so it has nothing left for a second target
or a second safe set. So the tiers share ``delta``: each of ``m`` is certified at ``delta / m``,
and by the union bound (Bonferroni) all promises hold at once with probability at least ``1 -
delta``, whatever the dependence between tiers, which here see the same responses. What it costs:
with no halt allowed, three tiers at ``delta`` = 0.05 take ``ln(0.05 / 3) / ln 0.05``, 1.37 times
the responses of one.

Then the thresholds are put in order, strict <= moderate <= loose, as a policy must have them.
A false-halt rate does not grow with the threshold, so a looser tier may be raised to the one before
it; recall does not fall when a threshold does, so a stricter tier may be lowered to the one after
it. Neither needs a new test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.policy import TIERS, TierName

from .guarantee import (
    Guarantee,
    GuaranteeError,
    as_risks,
    check_rate,
    halts_allowed,
    learn_then_test,
    responses_needed,
)

SEVERITIES = ("benign", "low", "moderate", "high", "extreme")
"""FlexGuard's, from the mildest."""

SAFE: dict[TierName, frozenset[str]] = {
    "strict": frozenset(SEVERITIES[:1]),
    "moderate": frozenset(SEVERITIES[:2]),
    "loose": frozenset(SEVERITIES[:3]),
}
"""Severities that each tier lets pass."""


@dataclass(frozen=True)
class RecallGuarantee:
    """A threshold that halts at least a share of the responses a tier does not let pass.

    Attributes
    ----------
    threshold : float
        Highest ``halt_at`` with the promise; any lower one has it, too.
    recall, delta : float
        At least ``recall`` of such responses are halted somewhere, with confidence ``1 - delta``.
        A response that was halted after its first violating token counts as halted.
    responses, missed : int
        Such responses of the calibration set, and those that the threshold does not halt.
    """

    threshold: float
    recall: float
    delta: float
    responses: int
    missed: int


def tiers_for_false_halts(
    peaks: Mapping[TierName, ArrayLike],
    severities: Sequence[str],
    targets: Mapping[TierName, float],
    *,
    delta: float,
    max_tokens: int,
    calibration_set: str,
) -> dict[TierName, Guarantee]:
    """Find the lowest threshold of each tier with at most its target rate of false halts.

    Parameters
    ----------
    peaks : mapping of tier name to [E]
        Peak risk of the same E responses at the tier's horizon (see `midstream.learn.guarantee`,
        also for what is assumed of them); ``dict.fromkeys(TIERS, peaks)`` where all look equally
        far ahead.
    severities : [E]
        Severity of each response, one of `SEVERITIES`; all benign where only that is known, with
        the unsafe ones left out.
    targets : mapping of tier name to float
        Largest share of the tier's safe responses that may be halted.
    delta : float
        One minus the confidence that *all* tiers keep their promise.

    Returns
    -------
    dict of tier name to Guarantee
        From strict to loose; the ``delta`` of each is its share of the whole.

    Raises
    ------
    GuaranteeError
        Names the tier: too few safe responses, with how many more it takes, or no threshold.
    """
    names = _tiers(peaks, targets)
    check_rate("delta", delta)
    found: dict[TierName, Guarantee] = {}
    values: dict[TierName, NDArray[np.float32]] = {}
    for name in names:
        safe = _of(severities, SAFE[name])
        values[name] = _chosen(name, peaks[name], safe)
        try:
            found[name] = learn_then_test(
                values[name],
                alpha=targets[name],
                delta=delta / len(names),
                max_tokens=max_tokens,
                calibration_set=calibration_set,
            )
        except GuaranteeError as error:
            raise GuaranteeError(f"tier {name}: {error}") from error
    for stricter, looser in pairwise(names):
        level = max(found[stricter].threshold, found[looser].threshold)
        halted = int((values[looser] >= np.float32(level)).sum())
        found[looser] = replace(found[looser], threshold=level, halted=halted)
    return found


def tiers_for_recall(
    peaks: Mapping[TierName, ArrayLike],
    severities: Sequence[str],
    targets: Mapping[TierName, float],
    *,
    delta: float,
) -> dict[TierName, RecallGuarantee]:
    """Find the highest threshold of each tier that halts its target share of what is not safe.

    Learn then Test mirrored: the hypothesis at ``t`` is "more than ``1 - recall`` of the responses
    have a peak below ``t``", and 0 is the threshold at which it is surely false. Parameters and
    errors as for `tiers_for_false_halts`, with responses that the tier does *not* let pass.
    """
    names = _tiers(peaks, targets)
    check_rate("delta", delta)
    share = delta / len(names)
    found: dict[TierName, RecallGuarantee] = {}
    values: dict[TierName, NDArray[np.float32]] = {}
    for name in names:
        unsafe = ~_of(severities, SAFE[name])
        values[name] = _chosen(name, peaks[name], unsafe)
        recall = targets[name]
        check_rate(f"targets[{name}]", recall)
        n = len(values[name])
        allowed = halts_allowed(n, 1 - recall, share)
        if allowed < 0:
            needed = responses_needed(1 - recall, share)
            raise GuaranteeError(
                f"tier {name}: {n} responses that it should halt are too few for a recall of "
                f"{recall:g}: it takes at least {needed} with none of them missed; add "
                f"{needed - n} more, or ask for less"
            )
        # Missed are those below the threshold: this very peak is still halted.
        level = np.sort(values[name])[allowed]
        found[name] = RecallGuarantee(
            float(level), recall, share, n, int((values[name] < level).sum())
        )
    for looser, stricter in pairwise(reversed(names)):
        level = np.float32(min(found[stricter].threshold, found[looser].threshold))
        missed = int((values[stricter] < level).sum())
        found[stricter] = replace(found[stricter], threshold=float(level), missed=missed)
    return found


def _tiers(
    peaks: Mapping[TierName, ArrayLike], targets: Mapping[TierName, float]
) -> list[TierName]:
    """Tiers with a target, from the strictest."""
    unknown = sorted(set(targets) - set(TIERS))
    if unknown or not targets:
        raise GuaranteeError(
            f"targets: expected some of {', '.join(TIERS)}, got {', '.join(unknown) or 'none'}"
        )
    if missing := [name for name in targets if name not in peaks]:
        raise GuaranteeError(f"peaks: none for the tiers {', '.join(missing)}")
    return [name for name in TIERS if name in targets]


def _of(severities: Sequence[str], chosen: frozenset[str]) -> NDArray[np.bool_]:
    if unknown := sorted(set(severities) - set(SEVERITIES)):
        raise GuaranteeError(
            f"severities: {', '.join(map(repr, unknown))} is not one of {', '.join(SEVERITIES)}"
        )
    return np.array([severity in chosen for severity in severities], dtype=bool)


def _chosen(name: TierName, peaks: ArrayLike, which: NDArray[np.bool_]) -> NDArray[np.float32]:
    risks = as_risks(peaks)
    if len(risks) != len(which):
        raise GuaranteeError(
            f"tier {name}: {len(risks)} peaks and {len(which)} severities; expected one of each "
            "per response"
        )
    return risks[which]
