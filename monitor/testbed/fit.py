"""The default bundle: probes, chain and thresholds fitted on what the testbed's model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.bank import ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import Chain, ObservedStream, fit_by_counts
from midstream.evidence import Max
from midstream.learn.collect import residuals
from midstream.learn.logistic import fit_logistic
from midstream.measure.halting import (
    NEVER,
    Truth,
    first_crossing,
    threshold_for,
)
from midstream.measure.replay import replay, risk_curve
from midstream.monitor import Monitor
from midstream.policy import OnHalt, Policy, Provenance, Thresholds
from midstream.taps import Tap

from .generate import generate_responses
from .grammar import EOS_ID
from .language import Prompt, sample_prompt, violating_index
from .oracle import Oracle

HORIZON = 24
"""Tokens the forecast looks ahead: three to four clauses."""

ORACLE_HALT_AT = 0.5
"""Risk at which the oracle halts: a violation within the horizon is more likely than not."""

DETECT_AT = 0.9
"""Belief that the violation has happened at which detection halts.

High, so that no forecasting tier can be milder; the belief is next to 0 or 1 anyway.
"""

LAYER = 3
"""Decoder layer whose output the probes read, the last: all that the model knows is there."""

HAZARD = "sealed vessel opened"

# Evenly spaced in the log-odds of the combined hazard, from 1 % to 99.9 %, where the risk moves;
# two more for the far ends, above which only violated streams are.
_BIN_LOG_ODDS = (*np.linspace(-4.6, 3.4, 17), 5.0, 7.0)

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
    chain = _fit_chain(bank, tap, written[half:three_quarters], hidden[half:three_quarters])
    progress("fit", 2, 3)
    bundle = Bundle(
        bank=bank,
        chain=chain,
        policy=_policy(halt_at=0.5, strict_at=0.5),
        fingerprint=Fingerprint.of(model, tokenizer),
        notes={"made for": "the testbed's model", "streams": streams, "seed": seed},
    )
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
            # It knows the violating token, and MAX remembers. The classes part, so a weak penalty
            # lets the logit grow until it is sure.
            fit_logistic(
                "violated",
                HAZARD,
                tap,
                x[violating],
                np.concatenate(now)[violating],
                strength=10.0,
                evidence=Max(),
            ),
            fit_logistic("drift", HAZARD, tap, x[forecast], np.concatenate(soon)[forecast]),
            fit_logistic("prompt", HAZARD, tap, last_of_prompt, violates, reads="prompt"),
        ]
    )


def _log_hazards(
    bank: ProbeBank, tap: Tap, stream: WrittenStream, rows: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float]:
    """Cumulative log-hazard at each response token, and of the prompt, as the kernels sum it."""
    logits = rows @ bank.weight(tap).numpy().T + bank.bias(tap).numpy()
    start = len(stream.prompt.ids)
    for column, probe in enumerate(bank.probes):
        if isinstance(probe.evidence, Max):
            logits[start:, column] = np.maximum.accumulate(logits[start:, column])
    hazards = np.logaddexp(0.0, logits.astype(np.float64))  # softplus
    reads = np.array([probe.reads == "response" for probe in bank.probes])
    return hazards[start:, reads].sum(axis=1), float(hazards[start - 1, ~reads].sum())


def _fit_chain(
    bank: ProbeBank,
    tap: Tap,
    written: Sequence[WrittenStream],
    hidden: Sequence[NDArray[np.float32]],
) -> Chain:
    observed = []
    for stream, rows in zip(written, hidden, strict=True):
        log_hazard, of_prompt = _log_hazards(bank, tap, stream, rows)
        violated = np.arange(stream.truth.tokens) >= stream.truth.violates_at
        observed.append(ObservedStream(log_hazard, violated, stream.truth.ended, of_prompt))
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
