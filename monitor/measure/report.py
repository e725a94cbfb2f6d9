"""The report of an evaluation: one HTML file that needs nothing else, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from midstream.measure import drawing, evaluation, gallery, tables
from midstream.measure.bootstrap import Figure
from midstream.measure.curves import curves
from midstream.measure.limits import limits
from midstream.measure.measured import Measured
from midstream.measure.pages import render

SCHEMA_VERSION = 1

SHARE, SCORE, TOKENS = "share", "score", "tokens"

TITLES: dict[str, tuple[str, str, str]] = {
    "recall": (SHARE, "Violating responses halted", "at any token"),
    "missed_rate": (SHARE, "Violating responses missed", "a violating token left"),
    "false_halt_rate": (SHARE, "False halts", "safe responses that were halted"),
    "leaked_share": (SHARE, "Violating tokens that left", "of all labelled violating tokens"),
    "share_seen_mean": (SHARE, "Share of the response seen", "at the halt, mean, violating ones"),
    "tokens_seen_median": (TOKENS, "Tokens seen", "at the halt, median, violating responses"),
    "detection_delay_median": (TOKENS, "Detection delay", "violation to halt, median; 0 if ahead"),
    "lead_tokens_median": (TOKENS, "Lead", "halt to violation, median; 0 if late or never"),
    "recall_at_1%": (SHARE, "Recall at 1% false halts", "threshold set on these responses"),
    "recall_at_5%": (SHARE, "Recall at 5% false halts", "threshold set on these responses"),
    "recall_at_10%": (SHARE, "Recall at 10% false halts", "threshold set on these responses"),
    "in_time_at_1%": (SHARE, "In time at 1% false halts", "by the violating token at the latest"),
    "in_time_at_5%": (SHARE, "In time at 5% false halts", "by the violating token at the latest"),
    "in_time_at_10%": (SHARE, "In time at 10% false halts", "by the violating token at the latest"),
    "token_auroc_probes": (SCORE, "Token AUROC, probes", "newest logits, summed log-hazard"),
    "token_auprc_probes": (SCORE, "Token AUPRC, probes", "newest logits, summed log-hazard"),
    "token_auroc_risk": (SCORE, "Token AUROC, risk", "what the policy compares with thresholds"),
    "token_auprc_risk": (SCORE, "Token AUPRC, risk", "what the policy compares with thresholds"),
    "span_f1_tokens": (SCORE, "Span F1, tokens", "flagged: a probe's logit is 0 or more"),
    "span_f1_characters": (SCORE, "Span F1, characters", "mean per response, SemEval rule"),
    "response_f1_macro": (SCORE, "Response F1, macro", "halted or not, mean of both classes"),
    "response_f1_violating": (SCORE, "Response F1, violating", "halted or not"),
    "response_f1_safe": (SCORE, "Response F1, safe", "halted or not"),
    "calibration_error": (SCORE, "Calibration error", "ECE of the risk, 10 bins; 0 is best"),
    "brier": (SCORE, "Brier score", "of the risk; 0 is best"),
}
"""Unit, title and explanation of each figure of `midstream.measure.evaluation.headline`."""

CARDS = (
    "recall",
    "missed_rate",
    "false_halt_rate",
    "lead_tokens_median",
    "share_seen_mean",
    "token_auroc_probes",
)

Content = dict[str, Any]


def content(
    m: Measured,
    *,
    sources: Mapping[str, str],
    columns: Sequence[str] | None = None,
    look_alikes: tuple[str, str] | None = None,
) -> Content:
    """Measure everything.

    Parameters
    ----------
    m : Measured
    sources : mapping of str to str
        Where the recording comes from: names, hashes.
    columns : sequence of str, optional
        To break the figures down by; see `midstream.measure.tables.breakdown`.
    look_alikes : (column, value), optional
        Selects benign texts that look harmful.
    """
    found = evaluation.headline(m)
    return {
        "schema_version": SCHEMA_VERSION,
        "monitor": _monitor(m),
        "data": {**sources, **_data(m)},
        "headline": found,
        "probes": tables.probes(m),
        "curves": curves(m),
        "breakdown": tables.breakdown(m, columns),
        "over_refusal": tables.over_refusal(m, *look_alikes) if look_alikes else None,
        "bells": tables.bells(m),
        "worst": {
            kind: [{"stream": each.stream, **each.facts} for each in exhibits]
            for kind, exhibits in gallery.worst(m).items()
        },
        "limits": limits(m, found),
    }


def to_json(found: Content) -> str:
    """JSON of the figures; a value that is not defined is null beside its reason."""
    return json.dumps(_plain(found), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def to_html(m: Measured, found: Content) -> str:
    """One page of HTML with everything in it.

    Raises
    ------
    ImportError
        Without jinja2 or matplotlib, naming the extra.
    """
    return render(
        "evaluation.html.j2",
        found=found,
        titles=TITLES,
        cards=CARDS,
        plots=_plots(m, found),
        worst=gallery.worst(m),
        show=show,
        interval=show_interval,
        level=m.bootstrap.level,
        resamples=m.bootstrap.resamples,
    )


def _monitor(m: Measured) -> Content:
    policy, thresholds = m.bundle.policy, m.thresholds
    return {
        "bundle": m.bundle.hash,
        "model": m.bundle.fingerprint.architecture,
        "weights_sha256": m.bundle.fingerprint.weights_sha256,
        "hazards": list(m.hazards),
        "tier": m.tier,
        "horizon": thresholds.horizon,
        "halt_at": thresholds.halt_at,
        "hold_at": thresholds.hold_at,
        "hold_back": policy.hold_back,
        "on_unscored": policy.on_unscored,
        "calibration_set": policy.provenance.calibration_set,
        "guarantee": policy.provenance.guarantee,
        "midstream": m.bundle.midstream,
    }


def _data(m: Measured) -> Content:
    o = m.outcomes
    return {
        "responses": len(o),
        "violating": int(o.violating.sum()),
        "safe": int(o.safe.sum()),
        "unknown": int((o.truth < 0).sum()),
        "cut_off": int((~m.recording.ended).sum()),
        "response_tokens": int((o.position >= 0).sum()),
        "labelled_tokens": int((o.label >= 0).sum()),
        "violating_tokens": int((o.label == 1).sum()),
        "unscored_tokens": int(m.judgement.unscored.sum()),
        "scored_by": m.recording.bundle,
    }


def _plots(m: Measured, found: Content) -> dict[str, str]:
    """SVG by name; what cannot be drawn is left out, and the page says why."""
    drawn, headline = found["curves"], found["headline"]
    plots = {}
    if drawn["roc"] is not None:
        plots["ranking"] = drawing.ranking(drawn["roc"], drawn["pr"], drawn["base_rate"])
    if drawn["halts"] is not None:
        plots["operating"] = drawing.operating(
            drawn["halts"], headline["false_halt_rate"].value, headline["recall"].value
        )
    shares = [row["share"] for row in drawn["leaks"]]
    if all(s.low is not None for s in shares):
        plots["leaks"] = drawing.leaks(
            [row["hold_back"] for row in drawn["leaks"]],
            [(s.value, s.low, s.high) for s in shares],
            m.hold_back,
        )
    if drawn["reliability"]:
        plots["reliability"] = drawing.reliability(drawn["reliability"], m.thresholds.horizon)
    if drawn["timing"]:
        plots["timing"] = drawing.timing(drawn["timing"])
    if chosen := gallery.curves(m):
        plots["curves"] = drawing.risk_curves(chosen, m.thresholds.halt_at)
    return plots


def show(figure: Figure, unit: str) -> str:
    """Value as a reader wants it."""
    if figure.value is None:
        return "not defined"
    return _number(figure.value, unit)


def show_interval(figure: Figure, unit: str) -> str:
    """Bounds as a reader wants them; empty where there are none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{_number(figure.low, unit)} – {_number(figure.high, unit)}"


def _number(value: float, unit: str) -> str:
    if unit == SHARE:
        return f"{value:.1%}"
    return f"{value:.3f}" if unit == SCORE else f"{round(value, 1):g}"


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
