"""What the report draws of a recording."""

from __future__ import annotations

from typing import Any

import numpy as np

from midstream.measure import metrics
from midstream.measure.evaluation import leaked_share
from midstream.measure.measured import Measured

HOLD_BACKS = range(17)


def curves(m: Measured) -> dict[str, Any]:
    """What is drawn: ROC and precision-recall by token, halts by threshold, leaks, reliability."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    o = m.outcomes
    known = (o.label >= 0) & ~np.isnan(m.score)
    labels = o.label[known] == 1
    found: dict[str, Any] = {"roc": None, "pr": None, "halts": None}
    if labels.any() and not labels.all():
        false, true, _ = roc_curve(labels, m.score[known])
        found["roc"] = metrics.thinned(false, true).tolist()
        precision, recall, _ = precision_recall_curve(labels, m.score[known])
        found["pr"] = metrics.thinned(recall[::-1], precision[::-1]).tolist()
        found["base_rate"] = float(labels.mean())
    if o.safe.any() and o.violating.any():
        placed = o.truth >= 0
        peaks = np.nan_to_num(o.peaks()[placed], neginf=-1.0)
        false, true, _ = roc_curve(o.violating[placed], peaks)
        found["halts"] = metrics.thinned(false, true).tolist()
    risk, came_true, _ = m.forecasts()
    found["reliability"] = metrics.reliability(risk, came_true)
    found["leaks"] = leaks(m)
    timed = o.located & o.stopped
    found["timing"] = (o.halt - o.violates_at)[timed].tolist()
    return found


def leaks(m: Measured) -> list[dict[str, Any]]:
    """Share of the violating tokens that would have left, by hold-back."""
    return [
        {
            "hold_back": depth,
            "tokens": int(m.outcomes.leaked(depth).sum()),
            "share": leaked_share(m, depth),
        }
        for depth in HOLD_BACKS
    ]
