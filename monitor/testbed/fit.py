"""The default bundle: probes, chain and thresholds fitted on what the testbed's model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import Chain
from midstream.evidence import Ema, Max
from midstream.learn.chains.counts import ObservedStream, fit_by_counts
from midstream.learn.collect import residuals
from midstream.learn.fit_chain import UNFITTED
from midstream.learn.methods.logistic import fit_logistic
from midstream.measure.halting import (
    NEVER,
    Truth,
    first_crossing,
    threshold_for,
)
from midstream.measure.replay import evidence_curve, replay, risk_curve
from midstream.monitor import Monitor
from midstream.policy import OnHalt, Policy, Provenance, Thresholds
from midstream.taps import Tap

from .generate import generate_responses
from .grammar import EOS_ID, HAZARD
from .language import Prompt, sample_prompt, violating_index
from .oracle import Oracle

HORIZON = 24
"""Tokens the forecast looks ahead: three to four clauses."""

ORACLE_HALT_AT = 0.5
"""Risk at which the oracle halts: a violation within the horizon is more likely than not."""

DETECT_AT = 0.5
"""Belief that the violation has happened at which detection halts: more likely than not."""

LAYER = 3
"""Decoder layer whose output the probes read, the last: all that the model knows is there."""

# The level of the combined hazard, in log-odds, above which only violated streams are.
_VIOLATED_ABOVE = 5.0

# Below it evenly spaced from 1 % to 98.5 %, where the risk moves. The number was chosen by the
# median lead on 2,700 streams that train neither probes nor chain and that the demo does not see:
# 8, 10, 12, 10 and 12 tokens with 12, 20, 24, 30 and 40 bins. Each bin is a state of the chain.
_BIN_LOG_ODDS = (*np.linspace(-4.6, 4.2, 24), _VIOLATED_ABOVE)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WrittenStream:
    """A prompt, what the model wrote, and what the rule says about it.

    Attributes
    ----------
    response : tuple of int
        Text tokens, the end-of-sequence token left out.
    """

    prompt: Prompt
    response: tuple[int, ...]
    truth: Truth


def truth_of(prompt: Prompt, response: Sequence[int]) -> WrittenStream:
    """Label a response as sampled, its end-of-sequence token still on it."""
    ended = bool(response) and response[-1] == EOS_ID
    text = tuple(response[:-1] if ended else response)
    first = violating_index(prompt.sealed, text)
    return WrittenStream(prompt, text, Truth(len(text), first if first >= 0 else NEVER, ended))


def build_bundle(
    model: Any,
    tokenizer: Any,
    *,
    streams: int = 6000,
    seed: int = 1,
    layer: int = LAYER,
    progress: Progress = lambda stage, done, total: None,
) -> Bundle:
    """Write responses with the model and fit a bundle on them.

    Half of the streams train the probes, a quarter the chain, a quarter the thresholds.

    Parameters
    ----------
    model, tokenizer
        The testbed's.
    streams : int
    seed : int
    layer : int
        Decoder layer whose output the probes read.
    progress : callable
        Called as ``progress(stage, done, total)``.
    """
    prompts = [sample_prompt(seed, index) for index in range(streams)]
    responses = generate_responses(
        model, prompts, seed, progress=lambda done, total: progress("write", done, total)
    )
    written = [
        stream
        for prompt, response in zip(prompts, responses, strict=True)
        if len((stream := truth_of(prompt, response)).response) > 0
    ]
    tap = Tap(layer, "resid_post")
    hidden = residuals(
        model,
        [(*stream.prompt.ids, *stream.response) for stream in written],
        [tap],
        progress=lambda done, total: progress("read", done, total),
    )[tap]
    half, three_quarters = len(written) // 2, len(written) * 3 // 4

    progress("fit", 0, 3)
    bank = _fit_probes(tap, written[:half], hidden[:half])
    progress("fit", 1, 3)
    bundle = Bundle(
        bank=bank,
        chain=UNFITTED,
        policy=_policy(halt_at=0.5, strict_at=0.5),
        fingerprint=Fingerprint.of(model, tokenizer),
        notes={"made for": "the testbed's model", "streams": streams, "seed": seed},
    )
    chain = _fit_chain(bundle, tap, written[half:three_quarters], hidden[half:three_quarters])
    bundle = replace(bundle, chain=chain)
    progress("fit", 2, 3)
    policy = _fit_policy(bundle, tap, written[three_quarters:], hidden[three_quarters:])
    progress("fit", 3, 3)
    return bundle.with_policy(policy)


def _fit_probes(
    tap: Tap, written: Sequence[WrittenStream], hidden: Sequence[NDArray[np.float32]]
) -> ProbeBank:
    """Three read-outs of one layer: the violation, its approach, and where the prompt leads."""
    now, soon, until, before, response = [], [], [], [], []
    for stream, rows in zip(written, hidden, strict=True):
        start = len(stream.prompt.ids)
        truth = stream.truth
        position = np.arange(truth.tokens)
        label, known = truth.within(HORIZON)
        response.append(rows[start:])
        now.append(position == truth.violates_at)
        until.append(position <= truth.violates_at)
        soon.append(label[1:])
        before.append(known[1:])
    x = np.concatenate(response)
    violating, forecast = np.concatenate(until), np.concatenate(before)
    last_of_prompt = np.stack(
        [rows[len(s.prompt.ids) - 1] for s, rows in zip(written, hidden, strict=True)]
    )
    violates = np.array([stream.truth.violates for stream in written])
    return ProbeBank(
        [
            _sharpened(
                fit_logistic(
                    "violated",
                    HAZARD,
                    tap,
                    x[violating],
                    np.concatenate(now)[violating],
                    strength=10.0,
                    evidence=Max(),  # it knows the violating token, MAX remembers it
                ),
                x[violating],
                np.concatenate(now)[violating],
            ),
            # Its logit depends on the place in the clause, too; the average is what drifts.
            fit_logistic(
                "drift",
                HAZARD,
                tap,
                x[forecast],
                np.concatenate(soon)[forecast],
                evidence=Ema(alpha=0.5),
            ),
            fit_logistic("prompt", HAZARD, tap, last_of_prompt, violates, reads="prompt"),
        ]
    )


def _sharpened(probe: Probe, rows: NDArray[np.float32], labels: NDArray[np.bool_]) -> Probe:
    """Stretch the logits of a probe whose classes part, so that its hazard is next to 0 or 1.

    All probes share one axis, the cumulative log-hazard. There the drift takes the range up to
    about 4, and whatever says that the violation has happened must lie beyond it. So the gap
    between all but one in 10,000 other tokens and all but 1 % of the violating ones is made 40
    wide, and its middle comes to where the bin of the violated streams begins.
    """
    logits = rows @ probe.weight.numpy() + probe.bias
    low, high = np.quantile(logits[~labels], 0.9999), np.quantile(logits[labels], 0.01)
    slope = 40.0 / max(high - low, 1.0)
    bias = (probe.bias - (low + high) / 2) * slope + _VIOLATED_ABOVE
    return replace(probe, weight=probe.weight * slope, bias=float(bias))


def _fit_chain(
    bundle: Bundle,
    tap: Tap,
    written: Sequence[WrittenStream],
    hidden: Sequence[NDArray[np.float32]],
) -> Chain:
    monitor = Monitor(bundle, slots=1, trace=0)
    reads = np.array([probe.reads == "response" for probe in bundle.bank.heads])
    observed = []
    for stream, rows in zip(written, hidden, strict=True):
        start = len(stream.prompt.ids)
        # softplus; every probe's center is 0
        hazards = np.logaddexp(0.0, evidence_curve(monitor, {tap: rows}, start).astype(float))
        observed.append(
            ObservedStream(
                log_hazard=hazards[start:, reads].sum(axis=1),
                violated=np.arange(stream.truth.tokens) >= stream.truth.violates_at,
                ended=stream.truth.ended,
                prompt_log_hazard=float(hazards[start - 1, ~reads].sum()),
            )
        )
    edges = np.logaddexp(0.0, np.array(_BIN_LOG_ODDS))  # Lambda = softplus(log-odds)
    prompts = np.array([stream.prompt_log_hazard for stream in observed])
    prompt_edges = np.unique(np.quantile(prompts, [0.2, 0.4, 0.6, 0.8]))
    return fit_by_counts(observed, edges.tolist(), prompt_edges=prompt_edges.tolist())


def _policy(halt_at: float, strict_at: float, provenance: Provenance | None = None) -> Policy:
    return Policy(
        tiers={
            "strict": Thresholds(horizon=HORIZON, halt_at=strict_at),
            "moderate": Thresholds(horizon=HORIZON, halt_at=halt_at),
            "loose": Thresholds(horizon=0, halt_at=DETECT_AT),
        },
        default_tier="moderate",
        loosest_tier="loose",
        on_halt=OnHalt(message="The archive withheld the rest of this answer."),
        provenance=provenance or Provenance(),
    )


def _fit_policy(
    bundle: Bundle,
    tap: Tap,
    written: Sequence[WrittenStream],
    hidden: Sequence[NDArray[np.float32]],
) -> Policy:
    """Choose thresholds on one half, and say what they do on the other."""
    monitor = Monitor(bundle, slots=1, trace=max(len(rows) for rows in hidden))
    risks = [
        risk_curve(replay(monitor, {tap: rows}, len(stream.prompt.ids)))
        for stream, rows in zip(written, hidden, strict=True)
    ]
    oracle = Oracle().read(
        [stream.prompt for stream in written], [stream.response for stream in written], (HORIZON,)
    )
    half = len(written) // 2
    truths = [stream.truth for stream in written]
    best = _false_halts(truths[:half], [reading.risk[0] for reading in oracle], ORACLE_HALT_AT)
    moderate = threshold_for(truths[:half], risks[:half], best)
    strict = threshold_for(truths[:half], risks[:half], min(1.0, 2 * best))
    kept = _false_halts(truths[half:], risks[half:], moderate)
    safe = sum(not truth.violates for truth in truths[half:])
    return _policy(
        halt_at=round(moderate, 4),
        strict_at=round(strict, 4),
        provenance=Provenance(
            calibration_set=f"{half} responses of the testbed's model",
            guarantee=(
                f"none by theorem: the moderate tier was set to the oracle's {best:.1%} of false "
                f"halts per response, and falsely halted {kept:.1%} of {safe} other safe responses"
            ),
        ),
    )


def _false_halts(
    truths: Sequence[Truth], risks: Sequence[NDArray[np.float64]], threshold: float
) -> float:
    pairs = zip(truths, risks, strict=False)
    halted = [
        first_crossing(risk, threshold) != NEVER for truth, risk in pairs if not truth.violates
    ]
    return float(np.mean(halted))
