"""``midstream chain forecast``: what a chain said along recorded streams, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.atomic import write_folder
from midstream.bundle import Bundle
from midstream.chain import Array, Chain
from midstream.learn.chains.filtering import as_served
from midstream.learn.chains.observed import observe
from midstream.measure import chain_plots as plots
from midstream.measure.bootstrap import Bootstrap, Figure, draws, ratio
from midstream.measure.halting import Truth
from midstream.measure.metrics import bins_of
from midstream.measure.outcomes import MeasureError, Outcomes
from midstream.measure.recording import Recording
from midstream.measure.recording_file import refuse_existing
from midstream.measure.rejudge import rejudge
from midstream.policy import Policy, Thresholds

_BINS = 10
_SHOWN_STREAMS = 4
_PASSAGE_RESAMPLES = 300
_TAIL = 0.025
_LEAST = 1e-6  # the kernels' risk is fp32: less is rounding


def forecast_recording(
    paths: Sequence[Path],
    bundle: Bundle,
    out: Path,
    *,
    chain: Chain | None = None,
    horizons: Sequence[int] = (1, 5, 10, 32),
    hazards: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Forecast along every recorded stream with the kernels, and compare with the labels.

    Linear in tokens, streams and horizons: the recording is judged once per horizon.

    Parameters
    ----------
    paths : sequence of path
        Recordings of one bundle.
    bundle : Bundle
        With the probes of the recordings.
    out : path
        New folder for ``forecast.json`` and plots.
    chain : Chain, optional
        In place of the bundle's; it reads the same evidence.
    horizons : sequence of int
        Ascending.
    hazards : sequence of str, optional
        Any of them is a violation; those of the bundle's probes when not given.

    Returns
    -------
    dict
        What ``forecast.json`` holds. Per horizon the ``risk`` (violated now or within h, at every
        token) and the ``forecast`` (a violation yet to come, at tokens that are not violated): how
        many came true, Brier score and calibration error with 95 % intervals by bootstrap over
        streams, and the reliability. And when streams violate first, as forecast at the prompt's
        end and as it came.

    Raises
    ------
    FileExistsError
        If there is anything at ``out``.
    RecordingError, MeasureError, BundleError
        For a recording, labels or a chain that do not fit.
    """
    refuse_existing(out)
    recording = Recording.load(*paths)
    used = chain or bundle.chain
    chosen = list(dict.fromkeys(bundle.bank.hazards)) if hazards is None else list(hazards)
    judged = {
        tokens: Outcomes.of(
            recording, rejudge(recording, bundle, policy=_policy(tokens), chain=used), chosen
        )
        for tokens in sorted({0, *horizons})
    }
    outcomes = judged[0]
    placed = np.flatnonzero(outcomes.placed)
    if not len(placed):
        raise MeasureError(
            "of no response it is known whether and where it violates, so no forecast can be "
            "compared with what came; label the tokens"
        )
    truths = [outcomes.truths[e] for e in placed]
    found: dict[str, Any] = {
        "bundle": bundle.hash,
        "recordings": [path.name for path in paths],
        "hazards": chosen,
        "streams": len(placed),
        "violating": sum(truth.violates for truth in truths),
        "left_out": len(recording) - len(placed),
        "horizons": [],
    }
    drawn: dict[str, list[plots.Reliability]] = {"risk": [], "forecast": []}
    now = [outcomes.risks[e] for e in placed]
    for tokens in horizons:
        ahead = [judged[tokens].risks[e] for e in placed]
        row: dict[str, Any] = {"horizon": tokens}
        for kind, told in (
            ("risk", served_risks(truths, ahead, tokens)),
            ("forecast", new_violations(truths, ahead, now, tokens)),
        ):
            row[kind], points = _scores(tokens, *told, len(placed))
            drawn[kind].append(points)
        found["horizons"].append(row)
    said, seen = _passages(recording, bundle, used, chosen, truths)
    found["first_passage"] = {
        "tokens": said.x.tolist(),
        "forecast": said.value.tolist(),
        "came_true": seen.value.tolist(),
        "low": None if seen.low is None else seen.low.tolist(),
        "high": None if seen.high is None else seen.high.tolist(),
    }
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    some = _examples(placed, truths)
    curves = [
        (
            f"{recording.streams[e]}"[:90],
            {tokens: judged[tokens].risks[e] for tokens in horizons},
            truth.violates_at if truth.violates else None,
        )
        for e, truth in some
    ]
    of_forecast = [row["forecast"] for row in found["horizons"]]
    briers = np.array([row["brier"] for row in of_forecast], dtype=float)
    score = plots.Band(np.array(horizons), *briers.T)
    base = np.array([row["brier_of_base_rate"] for row in of_forecast], dtype=float)
    files = {
        "forecast.json": text.encode(),
        **{
            f"reliability_{kind}.svg": plots.render(
                plots.reliability(points), (2.6 * len(points), 3.6)
            )
            for kind, points in drawn.items()
        },
        "brier.svg": plots.render(plots.brier(list(horizons), score, base), (4, 3)),
        "first_passage.svg": plots.render(plots.passage_forecast(said, seen), (8, 3.2)),
        "risk_along.svg": plots.render(plots.risk_along(curves), (8, 0.5 + 1.6 * len(curves))),
    }
    write_folder(out, files)
    return found


Told = tuple[Array, NDArray[np.bool_], NDArray[np.int64]]
"""Chances said [n], whether they came true [n], and the stream of each [n]."""


def served_risks(truths: Sequence[Truth], risks: Sequence[Array], tokens: int) -> Told:
    """Risk that is served, at every response token of which it is known what came."""
    parts = []
    for truth, risk in zip(truths, risks, strict=True):
        label, known = truth.within(tokens)
        known = (known | label) & ~np.isnan(risk)
        known[0] = False
        parts.append((risk[known], label[known]))
    return _joined(parts)


def new_violations(
    truths: Sequence[Truth], risks: Sequence[Array], now: Sequence[Array], tokens: int
) -> Told:
    """P(violated within ``tokens`` | evidence, and not violated yet), at tokens that are not.

    The risk holds the chance that the stream is violated already, ``now``, which these tokens rule
    out: what is left is (risk - now) / (1 - now).
    """
    parts = []
    for truth, risk, violated in zip(truths, risks, now, strict=True):
        label, known = truth.within(tokens)
        known &= ~np.isnan(risk)
        known[0] = False
        left = np.maximum(1 - violated[known], _LEAST)
        parts.append((np.clip((risk[known] - violated[known]) / left, 0.0, 1.0), label[known]))
    return _joined(parts)


def _joined(parts: list[tuple[Array, NDArray[np.bool_]]]) -> Told:
    risk, label = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return risk, label, np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])


def _policy(tokens: int) -> Policy:
    """A policy that looks so far ahead and halts only what is violated for certain."""
    return Policy(
        tiers={"moderate": Thresholds(horizon=tokens, halt_at=1.0)}, default_tier="moderate"
    )


def _scores(
    tokens: int,
    risk: Array,
    came_true: NDArray[np.bool_],
    stream: NDArray[np.int64],
    streams: int,
) -> tuple[dict[str, Any], plots.Reliability]:
    """Scores at one horizon; sums are taken per stream once, so that resampling is cheap."""
    if not len(risk):
        raise MeasureError(f"at horizon {tokens} it is known of no token what came")
    place = bins_of(risk, _BINS)

    def by_stream(values: Array) -> Array:
        """Sums by stream and bin, [E, bins]."""
        sums = np.bincount(stream * _BINS + place, weights=values, minlength=streams * _BINS)
        return sums.reshape(streams, _BINS).astype(np.float64)

    label = came_true.astype(np.float64)
    total = by_stream(np.ones(len(risk)))
    said, true, error = (by_stream(of) for of in (risk, label, (risk - label) ** 2))
    bootstrap = Bootstrap()

    def figure(statistic: Any, n: int = streams) -> Figure:
        return bootstrap.figure(statistic, streams, n=n)

    brier = figure(lambda counts: ratio(counts @ error.sum(axis=1), counts @ total.sum(axis=1)))
    gap = figure(
        lambda counts: ratio(np.abs(counts @ (said - true)).sum(axis=1), counts @ total.sum(axis=1))
    )
    bins = [
        bootstrap.exact_at_ends(
            figure(
                lambda counts, b=b: ratio(counts @ true[:, b], counts @ total[:, b]),
                int((total[:, b] > 0).sum()),
            )
        )
        for b in range(_BINS)
        if total[:, b].any()
    ]
    filled = total.any(axis=0)
    count = total.sum(axis=0)[filled].astype(np.int64)
    mean_risk = said.sum(axis=0)[filled] / count
    value, low, high = (
        np.array([getattr(one, name) for one in bins], dtype=float)
        for name in ("value", "low", "high")
    )
    base = float(came_true.mean())
    scores = {
        "tokens": len(risk),
        "base_rate": base,
        "mean_risk": float(risk.mean()),
        "brier": [brier.value, brier.low, brier.high],
        "brier_of_base_rate": base * (1 - base),
        "calibration_error": [gap.value, gap.low, gap.high],
        "reliability": [
            {
                "risk": float(said_here),
                "came_true": one.value,
                "low": one.low,
                "high": one.high,
                "streams": one.n,
                "tokens": int(tokens_here),
            }
            for said_here, one, tokens_here in zip(mean_risk, bins, count, strict=True)
        ],
    }
    return scores, plots.Reliability(tokens, mean_risk, value, low, high, count)


def _passages(
    recording: Recording,
    bundle: Bundle,
    chain: Chain,
    hazards: Sequence[str],
    truths: Sequence[Truth],
) -> tuple[plots.Band, plots.Band]:
    """Share violated by each token: as the mean belief at the prompts' ends says, and as seen."""
    served = as_served(chain)
    streams = observe(recording, bundle, hazards).symbols(chain.edges, chain.prompt_edges)
    prompts = np.bincount([s.prompt_bin for s in streams], minlength=len(chain.prompt_edges) + 1)
    beliefs = np.array(served.prior)[:, None] * np.array(served.prompt_emission)
    belief = (beliefs / beliefs.sum(axis=0)) @ (prompts / prompts.sum())
    tokens = max(truth.tokens for truth in truths)
    ahead = np.arange(tokens + 1)
    said = plots.Band(ahead, chain.horizon_curve(tokens) @ belief)
    value, *resampled = [
        cumulative_incidence(truths, tokens, weights)
        for weights in (np.ones(len(truths)), *draws(len(truths), _PASSAGE_RESAMPLES, 0))
    ]
    low, high = np.quantile(resampled, [_TAIL, 1 - _TAIL], axis=0)
    return said, plots.Band(ahead, value, low, high)


def cumulative_incidence(truths: Sequence[Truth], tokens: int, weights: Array) -> Array:
    """Share of streams violated within n tokens of the prompt's end, n = 0 ... ``tokens``.

    By Aalen and Johansen (1978): a stream that was cut off counts as long as it was seen, one that
    ended can violate no more. ``weights`` [E] say how often each stream counts.
    """
    violates = np.array([truth.violates for truth in truths])
    ends = np.array([truth.ended for truth in truths]) & ~violates
    # The end comes one step after the last token; a stream cut off is seen up to its last.
    last = np.array(
        [t.violates_at + 1 if t.violates else t.tokens + t.ended for t in truths], dtype=np.int64
    )
    steps = tokens + 2
    leaving = np.bincount(last, weights=weights, minlength=steps)[:steps]
    at_risk = leaving[::-1].cumsum()[::-1]
    violated, ended = (
        np.bincount(last[which], weights=weights[which], minlength=steps)[:steps]
        for which in (violates, ends)
    )
    share = np.divide(1.0, at_risk, out=np.zeros(steps), where=at_risk > 0)
    staying = np.cumprod(1 - (violated + ended) * share)
    before = np.concatenate([[1.0], staying[:-1]])
    return np.asarray(np.cumsum(before * violated * share)[: tokens + 1])


def _examples(placed: NDArray[np.int64], truths: Sequence[Truth]) -> list[tuple[int, Truth]]:
    """Return a few violating streams, the longest run-up first, and one that is safe."""
    pairs = list(zip(placed.tolist(), truths, strict=True))
    violating = sorted(
        (pair for pair in pairs if pair[1].violates), key=lambda pair: -pair[1].violates_at
    )
    safe = sorted(
        (pair for pair in pairs if not pair[1].violates), key=lambda pair: -pair[1].tokens
    )
    some = violating[: _SHOWN_STREAMS - 1]
    return some + safe[: _SHOWN_STREAMS - len(some)]
