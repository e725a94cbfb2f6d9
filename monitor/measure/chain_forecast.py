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
from midstream.chain import Chain
from midstream.learn.chains.filtering import as_served
from midstream.measure import forecast_plots as plots
from midstream.measure.bootstrap import draws
from midstream.measure.chain_plots import Band, render
from midstream.measure.chain_scores import (
    cumulative_incidence,
    new_violations,
    scores,
    served_risks,
)
from midstream.measure.evidence import log_hazards
from midstream.measure.halting import Truth
from midstream.measure.outcomes import MeasureError, Outcomes
from midstream.measure.recording import Recording
from midstream.measure.recording_file import refuse_existing
from midstream.measure.rejudge import rejudge
from midstream.policy import Policy, Thresholds

_SHOWN_STREAMS = 4
_PASSAGE_RESAMPLES = 300
_TAIL = 0.025


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
            row[kind], points = scores(tokens, *told, len(placed))
            drawn[kind].append(points)
        found["horizons"].append(row)
    said, seen = _passages(recording, bundle, used, placed, truths)
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
    score = Band(np.array(horizons), *briers.T)
    base = np.array([row["brier_of_base_rate"] for row in of_forecast], dtype=float)
    files = {
        "forecast.json": text.encode(),
        **{
            f"reliability_{kind}.svg": render(plots.reliability(points), (2.6 * len(points), 3.6))
            for kind, points in drawn.items()
        },
        "brier.svg": render(plots.brier(list(horizons), score, base), (4, 3)),
        "first_passage.svg": render(plots.passage_forecast(said, seen), (8, 3.2)),
        "risk_along.svg": render(plots.risk_along(curves), (8, 0.5 + 1.6 * len(curves))),
    }
    write_folder(out, files)
    return found


def _policy(tokens: int) -> Policy:
    """A policy that looks so far ahead and halts only what is violated for certain."""
    return Policy(
        tiers={"moderate": Thresholds(horizon=tokens, halt_at=1.0)}, default_tier="moderate"
    )


def _passages(
    recording: Recording,
    bundle: Bundle,
    chain: Chain,
    placed: NDArray[np.int64],
    truths: Sequence[Truth],
) -> tuple[Band, Band]:
    """Share violated by each token: as the mean belief at the prompts' ends says, and as seen."""
    served = as_served(chain)
    hazard = log_hazards(recording, bundle).prompt[placed]
    bins = np.searchsorted(chain.prompt_edges, hazard, side="right")
    prompts = np.bincount(bins, minlength=len(chain.prompt_edges) + 1)
    beliefs = np.array(served.prior)[:, None] * np.array(served.prompt_emission)
    belief = (beliefs / beliefs.sum(axis=0)) @ (prompts / prompts.sum())
    tokens = max(truth.tokens for truth in truths)
    ahead = np.arange(tokens + 1)
    said = Band(ahead, chain.horizon_curve(tokens) @ belief)
    value, *resampled = [
        cumulative_incidence(truths, tokens, weights)
        for weights in (np.ones(len(truths)), *draws(len(truths), _PASSAGE_RESAMPLES, 0))
    ]
    low, high = np.quantile(resampled, [_TAIL, 1 - _TAIL], axis=0)
    return said, Band(ahead, value, low, high)


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
