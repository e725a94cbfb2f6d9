"""Logistic regression on the residual stream: the plainest probe there is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from midstream.evidence import Evidence, Last
from midstream.probe import Probe
from midstream.taps import Tap


def fit_logistic(
    name: str,
    hazard: str,
    tap: Tap,
    hidden: NDArray[np.float32],
    labels: NDArray[np.bool_],
    *,
    reads: Literal["response", "prompt"] = "response",
    evidence: Evidence | None = None,
    strength: float = 1.0,
    balanced: bool = False,
) -> Probe:
    """Fit one probe with scikit-learn; the standardisation is folded into its weights.

    Parameters
    ----------
    name, hazard : str
    tap : Tap
        Where ``hidden`` was read.
    hidden : float32 [N, d]
    labels : bool [N]
    reads : {"response", "prompt"}
    evidence : Evidence, optional
        Smoothing rule, the newest logit when not given.
    strength : float
        Inverse of the L2 penalty (scikit-learn's ``C``).
    balanced : bool
        Weigh both classes alike. The logits are then no log-odds of the training set.

    Raises
    ------
    ImportError
        Without scikit-learn, naming the extra to install.
    ValueError
        When the labels are all the same.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("fitting needs scikit-learn: pip install 'midstream[learn]'") from error
    if labels.all() or not labels.any():
        raise ValueError(f"probe {name!r}: all {len(labels)} labels are {bool(labels.all())}")
    scaler = StandardScaler().fit(hidden)
    model = LogisticRegression(
        C=strength, max_iter=1000, class_weight="balanced" if balanced else None
    )
    model.fit(scaler.transform(hidden), labels)
    return Probe.folded(
        name=name,
        hazard=hazard,
        tap=tap,
        weight=model.coef_[0],
        bias=float(model.intercept_[0]),
        mean=scaler.mean_,
        scale=scaler.scale_,
        evidence=evidence or Last(),
        reads=reads,
    )
