"""From collected residuals to a calibrated bundle.

The examples are split by group into three: one part trains every method at every tap, one chooses
among them, makes log-odds of the chosen logit and fits the chain, one sets the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from midstream.bank import ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.evidence import Max
from midstream.learn.calibrate import platt
from midstream.learn.compare import Compared, compare, labels_at, read_logits
from midstream.learn.fit_chain import UNFITTED, as_recording, fit_chain
from midstream.learn.guarantee import Guarantee, peak_risks
from midstream.learn.methods.method import Method, ReadOut, Task
from midstream.learn.splits import split_tokens
from midstream.learn.tiers import tiers_for_false_halts
from midstream.learn.tokens import MissingLabelsError, Source, Tokens, TrainingDataError
from midstream.measure.rejudge import rejudge
from midstream.policy import Policy, Provenance, Thresholds, TierName
from midstream.probe import Probe

Progress = Callable[[str, int, int], None]

SHARES = {"train": 0.5, "choose": 0.25, "calibrate": 0.25}
"""Of the groups of examples."""

DEFAULT_FALSE_HALTS: dict[TierName, float] = {"moderate": 0.05}

_ON_THE_SCALE_OF_LOGITS = {"last", "ema", "mean", "max"}


class Examples(Source, Protocol):
    """Residuals of examples of which some can be picked out."""

    def select(self, examples: NDArray[np.int64]) -> Source:
        """Return the source of these examples alone."""


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes
    ----------
    bundle : Bundle
    compared : list of Compared
        Every read-out, best first.
    left_out : mapping of method to reason
        Methods whose labels the data do not have.
    """

    bundle: Bundle
    compared: list[Compared]
    left_out: dict[str, str]


def train(
    data: Examples,
    task: Task,
    methods: Sequence[Method],
    fingerprint: Fingerprint,
    *,
    horizon: int = 0,
    false_halts: Mapping[TierName, float] = DEFAULT_FALSE_HALTS,
    confidence: float = 0.95,
    calibration_set: str = "responses set aside from the collection",
    notes: Mapping[str, JsonValue] = {},
    progress: Progress = lambda stage, done, total: None,
) -> Trained:
    """Train, choose, fit, calibrate.

    Time is linear in tokens, taps and methods; memory is what the methods say, and 4 bytes per
    token and read-out of the part that chooses.

    Parameters
    ----------
    data : Examples
        One response per prompt, or groups: a group stays on one side of the split.
    task : Task
    methods : sequence of Method
        Those that lack labels are named in the result.
    fingerprint : Fingerprint
        Of the model that the residuals come from.
    horizon : int
        Tokens that the policy looks ahead; 0 detects.
    false_halts : mapping of tier to rate
        Share of safe responses that a tier may halt.
    confidence : float
        With which all tiers keep their rate (`midstream.learn.tiers`).
    calibration_set : str
        What the responses are, for the provenance.

    Raises
    ------
    TrainingDataError
        When a class is missing from a split, or no method could be trained.
    GuaranteeError
        When there are too few safe responses to calibrate with; it says how many more it takes.
    """
    tokens = data.tokens
    column = tokens.column(task.hazard)
    if task.refusal is not None:
        tokens.column(task.refusal)
    spoken_of = {task.hazard, task.refusal or task.hazard}
    parts = {
        name: np.array(examples)
        for name, examples in split_tokens(tokens, SHARES, task.seed, spoken_of).items()
    }
    learn, choose, calibrate = (data.select(parts[name]) for name in SHARES)

    lengths = calibrate.tokens.response_tokens
    safe = _one_of_each_group(
        calibrate.tokens,
        (calibrate.tokens.response_labels[:, column] == 0) & (lengths > 0),
        task.seed,
    )
    longest = int(lengths[safe].max(initial=1))

    def promised(peaks: NDArray[np.float32]) -> dict[TierName, Guarantee]:
        return tiers_for_false_halts(
            dict.fromkeys(false_halts, peaks),
            ["benign"] * len(peaks),
            false_halts,
            delta=1 - confidence,
            max_tokens=longest,
            calibration_set=calibration_set,
        )

    promised(np.zeros(len(safe), np.float32))  # too few are too few whatever is trained

    read_outs, left_out = _fit_all(methods, learn, task, progress)
    progress("choose", 0, 2)
    compared = compare(read_outs, choose)
    chosen = _chosen(compared, task.hazard)
    progress("choose", 1, 2)
    logits = read_logits([best.read_out for best in chosen], choose)
    bank = ProbeBank(
        probe
        for best, values in zip(chosen, logits, strict=True)
        for probe in _as_log_odds(best, values, choose.tokens, task.hazard, detects=horizon == 0)
    )
    bundle = Bundle(
        bank=bank,
        chain=UNFITTED,
        policy=_policy({"moderate": 1.0}, horizon),
        fingerprint=fingerprint,
        notes={
            **notes,
            "hazard": task.hazard,
            "chosen": [best.row() for best in chosen],
            "examples": {name: len(examples) for name, examples in parts.items()},
            "unlabelled": {  # of these neither chain nor thresholds learn anything
                name: int((tokens.response_labels[examples, column] < 0).sum())
                for name, examples in parts.items()
            },
        },
    )
    bundle = replace(bundle, chain=fit_chain(bundle, choose, task.hazard))
    progress("choose", 2, 2)

    progress("calibrate", 0, 1)
    recording = as_recording(bundle, calibrate)
    peaks = peak_risks(recording, rejudge(recording, bundle), max_tokens=longest)[safe]
    promises = promised(peaks)
    policy = _policy(
        {tier: _rounded_up(promise.threshold) for tier, promise in promises.items()},
        horizon,
        Provenance(
            calibration_set=calibration_set,
            guarantee="; ".join(f"{t}: {promise.sentence}" for t, promise in promises.items()),
            false_halts={tier: promise.promise(horizon) for tier, promise in promises.items()},
        ),
    )
    progress("calibrate", 1, 1)
    return Trained(bundle.with_policy(policy), compared, left_out)


def _rounded_up(threshold: float) -> float:
    """Four digits, away from the peak just below it, which another backend may see an ulp higher.

    A higher threshold keeps the promise.
    """
    return min(1.0, math.ceil(threshold * 1e4) / 1e4)


def _one_of_each_group(tokens: Tokens, wanted: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Draw one of the wanted examples [E] of each group.

    The guarantee asks for independent draws, and what shares a prompt is none.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(wanted))
    first = {tokens.groups[example]: example for example in order}
    return np.array(sorted(first.values()), np.int64)


def _fit_all(
    methods: Sequence[Method], learn: Source, task: Task, progress: Progress
) -> tuple[list[ReadOut], dict[str, str]]:
    read_outs: list[ReadOut] = []
    left_out: dict[str, str] = {}
    for done, method in enumerate(methods):
        progress("train", done, len(methods))
        try:
            read_outs += method.fit(learn, task)
        except MissingLabelsError as error:
            left_out[method.name] = str(error)
    progress("train", len(methods), len(methods))
    if not read_outs:
        raise TrainingDataError("; ".join(left_out.values()) or "no method given")
    return read_outs, left_out


def _chosen(compared: Sequence[Compared], hazard: str) -> list[Compared]:
    """Pick the best that reads the response, and the best that reads the prompt if there is one.

    One launch scores all probes of a tap, so the second shares the norm of the first there.
    """
    chosen: list[Compared] = []
    for reads in ("response", "prompt"):
        norms = {probe.tap: (probe.norm, probe.eps) for c in chosen for probe in c.read_out.probes}
        for candidate in compared:
            probes = candidate.read_out.probes
            if (
                probes[0].reads == reads
                and probes[0].hazard == hazard
                and all(norms.get(p.tap, (p.norm, p.eps)) == (p.norm, p.eps) for p in probes)
            ):
                chosen.append(_of_the_prompt(candidate) if reads == "prompt" else candidate)
                break
        if not chosen:
            raise TrainingDataError(
                f"no read-out of the response could be trained for {hazard!r}, and a monitor needs "
                "one; give examples with labelled responses"
            )
    return chosen


def _of_the_prompt(best: Compared) -> Compared:
    """Name its probes apart: the same method may read the response at the same tap."""
    head, *parts = (replace(probe, name=f"{probe.name} (prompt)") for probe in best.read_out.probes)
    parts = [replace(part, adds_to=head.name) for part in parts]
    return replace(best, read_out=replace(best.read_out, probes=(head, *parts)))


def _as_log_odds(
    best: Compared, logits: NDArray[np.float32], tokens: Tokens, hazard: str, *, detects: bool
) -> list[Probe]:
    """Platt-scale a read-out, so that the hazards of several probes can be combined.

    Evidence that stays on the scale of the logits follows; one that counts or accumulates has
    levels of its own, which say what an alarm is, and is left as it was trained.
    """
    head, *parts = best.read_out.probes
    if head.evidence.rule not in _ON_THE_SCALE_OF_LOGITS:
        return [head, *parts]
    if detects and head.evidence.rule == "last" and best.level == "token":
        # What has happened stays so, and the tokens after it may look calm: the chain, which knows
        # one token at a time, must be told. Without memory a probe of token AUROC 1.000 on the
        # testbed halted 45 % of the violating responses.
        head = replace(head, evidence=Max())
    scores, labels = labels_at(logits, tokens, hazard, best.level)
    scaling = platt(scores, labels)
    return [scaling.folded_into(probe) for probe in (head, *parts)]


def _policy(
    levels: Mapping[TierName, float], horizon: int, provenance: Provenance | None = None
) -> Policy:
    names = list(levels)
    default: TierName = "moderate" if "moderate" in levels else names[0]
    return Policy(
        tiers={name: Thresholds(horizon=horizon, halt_at=level) for name, level in levels.items()},
        default_tier=default,
        loosest_tier=names[-1],
        provenance=provenance or Provenance(),
    )
