"""What methods share: what they ask of their data, how they name probes, how they rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Last
from midstream.learn.examples import Level
from midstream.learn.tokens import UNKNOWN, MissingLabelsError, Tokens, TrainingDataError
from midstream.probe import Probe
from midstream.taps import Tap

_REMEDY: dict[Level, str] = {
    "token": "give examples with and without spans of it, or train on response labels",
    "response": "give responses with and without it, or train on token labels",
    "prompt": "give prompts with and without it, or train on response labels",
}


def labels_of(method: str, tokens: Tokens, hazard: str, level: Level) -> NDArray[np.int8]:
    """Labels of one hazard, with both classes there.

    Parameters
    ----------
    method : str
        Named in the error.
    tokens : Tokens
    hazard : str
    level : {"token", "response", "prompt"}

    Returns
    -------
    int8 [N] for tokens, [E] for responses and prompts
        1, 0 or `UNKNOWN`.

    Raises
    ------
    TrainingDataError
        When the hazard is not among the labels, none is known, or a class is missing.
    """
    column = tokens.column(hazard)
    table = {
        "token": tokens.labels,
        "response": tokens.response_labels,
        "prompt": tokens.prompt_labels,
    }[level]
    labels = table[:, column]
    require_classes(f"{method}: hazard {hazard!r}", labels, f"{level} labels", _REMEDY[level])
    return labels


def require_classes(who: str, labels: NDArray[np.int8], what: str, remedy: str) -> None:
    """Refuse labels of which none is known or all known are the same.

    ``who`` begins the message, ``what`` says whose labels they are, ``remedy`` what to do.
    """
    known = labels[labels != UNKNOWN]
    if not len(known):
        raise MissingLabelsError(f"{who}: none of {len(labels)} {what} is known; {remedy}")
    if (known == known[0]).all():
        raise MissingLabelsError(f"{who}: all {len(known)} known {what} are {known[0]}; {remedy}")


def require_finite(
    method: str, tokens: Tokens, tap: Tap, rows: NDArray[np.int64], hidden: Tensor
) -> None:
    """Refuse residuals that are not finite, naming the example, the position and the tap.

    Parameters
    ----------
    rows : int64 [m]
        Rows of ``tokens`` that ``hidden`` holds.
    hidden : floating [m, d]
    """
    finite = hidden.isfinite().all(dim=1)
    if bool(finite.all()):
        return
    bad = rows[~finite.numpy()]
    example = int(np.searchsorted(tokens.starts, bad[0], side="right")) - 1
    raise TrainingDataError(
        f"{method}: {len(bad)} residuals at {tap} are not finite, first in example "
        f"{tokens.ids[example]!r} at token {bad[0] - tokens.starts[example]}; leave the example "
        "out, or run the model in a wider dtype and collect again"
    )


def probe_name(hazard: str, method: str, tap: Tap | None = None) -> str:
    """Name of a probe; of a read-out over several taps the first has no tap in its name."""
    return f"{hazard} {method}" if tap is None else f"{hazard} {method} {tap}"


def joined(hazard: str, method: str, parts: Sequence[Probe]) -> tuple[Probe, ...]:
    """One read-out of probes at several taps: the logits of all are added to that of the first.

    The first keeps its evidence rule and gets the read-out's name; the others need no rule.
    """
    name = probe_name(hazard, method)
    first, *others = parts
    return replace(first, name=name), *(
        replace(part, adds_to=name, evidence=Last()) for part in others
    )


def auroc(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve.

    Raises
    ------
    ImportError
        Without scikit-learn, naming the extra to install.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("fitting needs scikit-learn: pip install 'midstream[learn]'") from error
    return float(roc_auc_score(positive, scores))
