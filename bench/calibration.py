"""How often a promise about false halts is broken: 200 calibrations on testbed streams.

    python bench/calibration.py [--streams 4000]

The testbed's model writes, the shipped bundle reads, and the peak risks of the safe responses are
the pool. Each calibration draws its set with replacement: the pool is the whole world then, the
draws are independent, and the true false-halt rate of a threshold is counted, not estimated. Broken
is learn-then-test's rate above alpha, and conformal risk control's above the bound that it states
with the same confidence (its mean over calibrations must not exceed alpha, either). `held_out` is
the same with sets from one half of the pool and the rate counted in the other, whose own sampling
error all 200 share: a sanity check, no test.

A bound that is tight is broken with probability delta, so in 200 calibrations the share falls above
delta half of the time, by 0.02 or so. A binomial test says whether by more than chance:
`p_above_delta` is the chance of at least so many broken promises if each is broken with probability
delta. `expected` is what the share tends to with more calibrations, in closed form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from midstream import testbed
from midstream.learn.collect import residuals
from midstream.learn.guarantee import (
    Guarantee,
    conformal_risk_control,
    halts_allowed,
    learn_then_test,
)
from midstream.measure.replay import replay
from midstream.monitor import Monitor
from midstream.testbed.fit import truth_of
from midstream.testbed.generate import generate_responses
from midstream.testbed.language import sample_prompt

METHODS: dict[str, Callable[..., Guarantee]] = {
    "ltt": learn_then_test,
    "crc": conformal_risk_control,
}
MAX_TOKENS = 192
CHUNK = 500  # streams whose residuals are in memory at once

Peaks = NDArray[np.float32]


def safe_peaks(streams: int, seed: int) -> Peaks:
    """Peak risk, at the default tier's horizon, of each safe response of so many."""
    model, _ = testbed.load()
    bundle = testbed.load_bundle()
    monitor = Monitor(bundle, slots=1, trace=0)
    peaks = []
    for begin in range(0, streams, CHUNK):
        prompts = [sample_prompt(seed, i) for i in range(begin, min(begin + CHUNK, streams))]
        responses = generate_responses(
            model, prompts, seed, first_index=begin, max_new_tokens=MAX_TOKENS
        )
        written = [truth_of(*pair) for pair in zip(prompts, responses, strict=True)]
        safe = [stream for stream in written if not stream.truth.violates]
        hidden = residuals(
            model, [(*stream.prompt.ids, *stream.response) for stream in safe], bundle.bank.taps
        )
        for index, stream in enumerate(safe):
            rows = {tap: hidden[tap][index] for tap in bundle.bank.taps}
            peaks.append(replay(monitor, rows, len(stream.prompt.ids)).peak)
        print(f"{begin + len(prompts)} / {streams} streams", file=sys.stderr, flush=True)
    return np.array(peaks, dtype=np.float32)


def rate_at(peaks: Peaks, threshold: float) -> float:
    return float((peaks >= np.float32(threshold)).mean())


def expected_share(truth: Peaks, *, size: int, bound: float, delta: float) -> float:
    """P(broken): a bound is broken when no more are halted than it allows at the highest threshold
    whose true rate exceeds it. The count is binomial."""
    _, counts = np.unique(truth, return_counts=True)
    rates = counts[::-1].cumsum()[::-1] / len(truth)
    too_high = rates[rates > bound]
    allowed = halts_allowed(size, bound * (1 + 1e-9), delta)  # the bound is where this is exact
    return float(binom.cdf(allowed, size, too_high.min())) if len(too_high) else 0.0


def repeated(
    draw_from: Peaks, truth: Peaks, *, size: int, times: int, alpha: float, delta: float, seed: int
) -> dict[str, Any]:
    """Calibrate so many times; per method the share of broken promises and the mean rate."""
    rng = np.random.default_rng(seed)
    rates: dict[str, list[float]] = {name: [] for name in METHODS}
    broken: dict[str, int] = dict.fromkeys(METHODS, 0)
    bound: dict[str, float] = {}
    for _ in range(times):
        chosen = rng.choice(draw_from, size=size, replace=True)
        for name, calibrate in METHODS.items():
            found = calibrate(
                chosen, alpha=alpha, delta=delta, max_tokens=MAX_TOKENS, calibration_set="pool"
            )
            rates[name].append(rate_at(truth, found.threshold))
            bound[name] = found.bound  # the same each time: it depends on size, alpha and delta
            broken[name] += rates[name][-1] > found.bound
    return {
        name: {
            "broken_share": broken[name] / times,
            "p_above_delta": binomtest(broken[name], times, delta, alternative="greater").pvalue,
            "mean_rate": float(np.mean(rates[name])),
            "bound": bound[name],
            "expected": expected_share(truth, size=size, bound=bound[name], delta=delta),
        }
        for name in METHODS
    }


def main(
    streams: Annotated[int, typer.Option(help="Responses to write.")] = 4000,
    size: Annotated[int, typer.Option(help="Safe responses of a calibration set.")] = 500,
    times: Annotated[int, typer.Option(help="Calibrations.")] = 200,
    alpha: Annotated[float, typer.Option(help="False halts per response.")] = 0.05,
    delta: Annotated[float, typer.Option(help="One minus the confidence.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The shipped bundle was fitted on seed 1.")] = 2,
) -> None:
    peaks = safe_peaks(streams, seed)
    settings = {"size": size, "times": times, "alpha": alpha, "delta": delta, "seed": seed}
    result = repeated(peaks, peaks, **settings)
    half = len(peaks) // 2
    print(
        json.dumps(
            {
                "calibration_bound_broken_share": {
                    name: figures["broken_share"] for name, figures in result.items()
                },
                "streams": streams,
                "safe": len(peaks),
                "distinct_peaks": len(np.unique(peaks)),
                **settings,
                "methods": result,
                "held_out": {
                    name: figures["broken_share"]
                    for name, figures in repeated(peaks[:half], peaks[half:], **settings).items()
                },
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
