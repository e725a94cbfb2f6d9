"""What the figures of an evaluation do not say."""

from __future__ import annotations

from collections.abc import Mapping

from midstream.measure.bootstrap import Figure
from midstream.measure.measured import Measured

FEW_VIOLATING, FEW_SAFE = 30, 100
"""Below these counts the report says that its figures are rough."""


def limits(m: Measured, found: Mapping[str, Figure]) -> list[str]:
    """What a reader must keep in mind, in sentences; only what applies."""
    o, recording = m.outcomes, m.recording
    violating, safe = int(o.violating.sum()), int(o.safe.sum())
    said = []
    if violating < FEW_VIOLATING or safe < FEW_SAFE:
        said.append(
            f"There are {violating} violating and {safe} safe responses. Below {FEW_VIOLATING} and "
            f"{FEW_SAFE} the rates are rough; read the intervals, not the values."
        )
    if unknown := int((o.truth < 0).sum()):
        said.append(
            f"Of {unknown} of {len(o)} responses it is not known whether they violate; they are "
            "left out of every rate."
        )
    if unplaced := int((o.violating & ~o.located).sum()):
        said.append(
            f"Of {unplaced} violating responses it is not known where they do; they count for "
            "recall, but not for misses, delay, lead or leaks."
        )
    words = o.position >= 0
    if unlabelled := int((words & (o.label < 0)).sum()):
        said.append(
            f"{unlabelled} of {int(words.sum())} response tokens have no label and are left out of "
            "the figures by token."
        )
    if unscored := int(m.judgement.unscored.sum()):
        said.append(
            f"{unscored} tokens have no score; the policy's on_unscored is "
            f"{m.bundle.policy.on_unscored!r}."
        )
    if recording.bundle != m.bundle.hash:
        said.append(
            "The recording was made with another bundle than the one that judged it; its logits "
            "are those of the recording."
        )
    lost = sorted({h for h in m.bundle.bank.hazards if h not in m.hazards})
    if lost:
        said.append(f"No labels, so not measured: {', '.join(lost)}.")
    if found["token_auroc_risk"].value is not None:
        ahead = m.thresholds.horizon
        said.append(
            "The figures by token take the risk for a detector. It stays high after a violation, "
            + (f"and rises up to {ahead} tokens before one, " if ahead else "")
            + "on purpose; a token there that is labelled safe still counts against it."
        )
    if found["span_f1_characters"].value is not None:
        said.append(
            "The character F1 takes the characters of the labelled tokens for gold; a label that "
            "ends inside a token is widened to it."
        )
    said += [
        "Responses were read as they stand. A halt would have ended them, which changes no verdict "
        "before it.",
        "Intervals come from the choice of responses alone: not from training the probes again, "
        "nor from errors of the labels. Tables by group are not corrected for many comparisons.",
        f"Thresholds: {m.bundle.policy.provenance.guarantee} (calibration set: "
        f"{m.bundle.policy.provenance.calibration_set}). On data that was used for training or "
        "calibration every figure here flatters.",
    ]
    return said
