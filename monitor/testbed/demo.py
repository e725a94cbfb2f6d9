"""The main job: the testbed's model writes, midstream watches, the oracle says how well.

Every stream is generated without a monitor first. The same seed then runs under the monitor, so
each halt is judged against what the stream would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.measure.halting import (
    NEVER,
    HaltingFigures,
    Truth,
    brier,
    first_crossing,
    halting_figures,
    leaked_by,
    threshold_for,
)
from midstream.measure.overhead import overhead
from midstream.measure.plots import Curve
from midstream.measure.replay import risk_curve
from midstream.monitor import Monitor
from midstream.policy import Policy, Thresholds
from midstream.streams import StreamReport

from .fit import HORIZON, ORACLE_HALT_AT, WrittenStream, truth_of
from .grammar import EOS_ID, PAD, TOKEN_ID
from .language import Prompt, sample_prompt
from .oracle import Oracle

Floats = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

BATCH = 100
MAX_NEW_TOKENS = 192
OVERHEAD_TOKENS = 128
OVERHEAD_PAIRS = 31
EMA_ALPHA = 0.5
"""Weight of the newest logit in the EMA baseline, as in the Gemini probes (arXiv 2601.11516)."""


class DisturbedError(RuntimeError):
    """A monitored run wrote other tokens than the unmonitored one: invariant 3 is broken."""


@dataclass
class DemoRun:
    """All that the demo generated.

    Attributes
    ----------
    written : list of WrittenStream
        What the model writes when nobody watches.
    observed : list of StreamReport
        The monitor's view of those, halting nothing.
    oracle : list of float64 [tokens + 1]
        The oracle's risk at the same horizon.
    halts, leaked : dict of mode to list
        Of the live runs: where each stream was halted, and how many violating tokens left.
    """

    seed: int
    written: list[WrittenStream] = field(default_factory=list)
    observed: list[StreamReport] = field(default_factory=list)
    oracle: list[Floats] = field(default_factory=list)
    halts: dict[str, list[int]] = field(default_factory=dict)
    leaked: dict[str, list[int]] = field(default_factory=dict)

    @property
    def truths(self) -> list[Truth]:
        """What each stream does when nobody halts it."""
        return [stream.truth for stream in self.written]

    @property
    def risks(self) -> list[Floats]:
        """The monitor's risk [tokens + 1] of each stream that is not halted."""
        return [
            _whole(risk_curve(report), truth)
            for report, truth in zip(self.observed, self.truths, strict=True)
        ]


MODES = {"detect": "loose", "forecast": "moderate"}
"""Mode of the demo to tier of the default bundle's policy."""


def run(
    model: Any,
    tokenizer: Any,
    monitor: Monitor,
    *,
    streams: int,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> DemoRun:
    """Generate ``streams`` responses unmonitored, observed, and under each mode.

    Raises
    ------
    DisturbedError
        When a watched stream differs from the unwatched one before its halt.
    """
    result = DemoRun(seed)
    for mode in MODES:
        result.halts[mode], result.leaked[mode] = [], []
    for begin, prompts in _batches(streams, seed):
        end = begin + len(prompts)
        inputs = left_padded(prompts)
        batch_seed = seed * 1_000_003 + begin

        def generate(seed: int = batch_seed, inputs: Any = inputs, **options: Any) -> Any:
            torch.manual_seed(seed)
            return model.generate(
                **inputs, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS, **options
            )

        plain = generate()
        width = inputs["input_ids"].shape[1]
        written = [
            truth_of(prompt, _until_end(row[width:].tolist()))
            for prompt, row in zip(prompts, plain, strict=True)
        ]
        result.written += written
        progress("unmonitored", end, streams)
        with monitor.attach(model, tokenizer, enforce=False) as watching:
            observed = generate()
        if not torch.equal(observed, plain):
            raise DisturbedError("observing changed what the model wrote")
        result.observed += watching.reports
        progress("observed", end, streams)
        for mode, tier in MODES.items():
            with monitor.attach(model, tokenizer, tier=tier) as watching:
                sequences = generate(logits_processor=[watching.halting()])
            _keep(result, mode, watching.reports, watching.released(sequences), written)
            progress(mode, end, streams)
    readings = Oracle().read(
        [stream.prompt for stream in result.written],
        [stream.response for stream in result.written],
        (HORIZON,),
    )
    result.oracle = [reading.risk[0] for reading in readings]
    return result


def _batches(streams: int, seed: int) -> Iterator[tuple[int, list[Prompt]]]:
    for begin in range(0, streams, BATCH):
        end = min(begin + BATCH, streams)
        yield begin, [sample_prompt(seed, index) for index in range(begin, end)]


def left_padded(prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Input ids and attention mask [B, T] for ``generate``."""
    longest = max(len(prompt.ids) for prompt in prompts)
    pad = TOKEN_ID[PAD]
    ids = [[pad] * (longest - len(p.ids)) + list(p.ids) for p in prompts]
    mask = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS_ID) + 1] if EOS_ID in tokens else tokens


def _keep(
    result: DemoRun,
    mode: str,
    reports: Sequence[StreamReport],
    released: Sequence[torch.Tensor],
    written: Sequence[WrittenStream],
) -> None:
    for report, out, stream in zip(reports, released, written, strict=True):
        if tuple(out.tolist()) != stream.response[: len(out)]:
            raise DisturbedError(f"{mode}: {report.stream} wrote other tokens than unmonitored")
        halted = report.halted_at
        result.halts[mode].append(NEVER if halted is None else halted - report.prompt_tokens)
        result.leaked[mode].append(max(0, len(out) - stream.truth.violates_at))


def figures(result: DemoRun, *, backend: str, overhead: dict[str, float]) -> dict[str, Any]:
    """Put the figures of a run into one JSON object; rates are fractions.

    The forecasts are compared at the oracle's own false-halt rate: each method's threshold is the
    one that reaches it on these very streams. ``shipped`` is what the bundle's own threshold did
    live.
    """
    truths = result.truths
    risks = result.risks
    single, smooth = [], []
    for report, truth in zip(result.observed, truths, strict=True):
        hazards = baseline_hazards(report)
        single.append(_whole(hazards["threshold"], truth))
        smooth.append(_whole(hazards["ema"], truth))
    detect = halting_figures(truths, result.halts["detect"], result.leaked["detect"])
    shipped = halting_figures(truths, result.halts["forecast"], result.leaked["forecast"])
    certain = [(np.arange(-1, t.tokens) >= t.violates_at).astype(float) for t in truths]
    oracle = _at_threshold(truths, result.oracle, ORACLE_HALT_AT)
    rate = oracle.false_halt_rate

    def forecast(curves: Sequence[Floats], probabilities: Sequence[Floats]) -> dict[str, float]:
        matched = _at_threshold(truths, curves, threshold_for(truths, curves, rate))
        return _forecast(matched, brier(truths, probabilities, HORIZON))

    def baseline(hazards: Sequence[Floats]) -> dict[str, Any]:
        # 1 - exp(-Lambda) is the combined hazard R of the design, section 4.3
        level = threshold_for(truths, hazards, detect.false_halt_rate)
        return {
            "detect": _detect(_at_threshold(truths, hazards, level)),
            "forecast": forecast(hazards, [-np.expm1(-curve) for curve in hazards]),
        }

    return {
        "streams": len(truths),
        "seed": result.seed,
        "backend": backend,
        "violating_unmonitored": sum(truth.violates for truth in truths),
        "modes": {
            "detect": _detect(detect),
            "forecast": {**forecast(risks, risks), "shipped": asdict(shipped)},
        },
        "oracle": {
            "detect": _detect(_at_threshold(truths, certain, 0.5)),
            "forecast": _forecast(oracle, brier(truths, result.oracle, HORIZON)),
        },
        "baselines": {"threshold": baseline(single), "ema": baseline(smooth)},
        "overhead": overhead,
    }


def baseline_hazards(report: StreamReport) -> dict[str, Floats]:
    """Cumulative log-hazard [tokens + 1] without a chain: of the logits, and of their EMA."""
    response = np.array(report.trace.position) >= report.prompt_tokens
    names = [name for name in report.trace.scores if name != "prompt"]
    logits = np.array([report.trace.scores[name] for name in names], dtype=float)[:, response].T
    smooth = logits.copy()
    for row in range(1, len(smooth)):
        smooth[row] = EMA_ALPHA * logits[row] + (1 - EMA_ALPHA) * smooth[row - 1]
    return {
        name: np.concatenate([[0.0], np.logaddexp(0.0, values).sum(axis=1)])
        for name, values in (("threshold", logits), ("ema", smooth))
    }


def _whole(curve: Floats, truth: Truth) -> Floats:
    """Add a NaN for the last token of a stream cut off by its length, which was never fed."""
    return np.pad(curve, (0, truth.tokens + 1 - len(curve)), constant_values=np.nan)


def _at_threshold(
    truths: Sequence[Truth], curves: Sequence[Floats], threshold: float
) -> HaltingFigures:
    halts = [first_crossing(curve, threshold) for curve in curves]
    return halting_figures(truths, halts, list(map(leaked_by, truths, halts)))


def _detect(figures: HaltingFigures) -> dict[str, Any]:
    keys = ("leaked_tokens", "missed_rate", "false_halt_rate", "median_tokens_seen")
    return {key: getattr(figures, key) for key in keys}


def _forecast(figures: HaltingFigures, error: float) -> dict[str, float]:
    return {
        "false_halt_rate": figures.false_halt_rate,
        "lead_tokens_median": figures.lead_tokens_median,
        "brier": error,
    }


def examples(result: DemoRun, threshold: float) -> list[Curve]:
    """Pick a stream that was halted ahead of its violation, a released one, and a missed one.

    Of each kind the clearest: the longest lead; the highest peak that stayed below the threshold;
    a violation that the forecast did not see coming, which only detection catches. A kind that did
    not occur is left out.
    """
    halts = result.halts["forecast"]
    violating = [i for i, truth in enumerate(result.truths) if truth.violates]
    risks = result.risks
    peaks = [np.nanmax(risk) for risk in risks]
    ahead = [i for i in violating if halts[i] < result.truths[i].violates_at]
    spared = [i for i in range(len(halts)) if halts[i] == NEVER and i not in set(violating)]
    missed = [i for i in violating if halts[i] >= result.truths[i].violates_at]
    chosen = {
        "halted": max(ahead, key=lambda i: result.truths[i].violates_at - halts[i], default=None),
        "released": max(spared, key=lambda i: peaks[i], default=None),
        "missed by the forecast": min(
            missed, key=lambda i: result.truths[i].violates_at, default=None
        ),
    }
    return [
        Curve(
            title=f"{kind} (stream {index})",
            risk=risks[index],
            oracle=result.oracle[index],
            threshold=threshold,
            halted_at=None if halts[index] == NEVER else halts[index],
            violates_at=truth.violates_at if (truth := result.truths[index]).violates else None,
        )
        for kind, index in chosen.items()
        if index is not None
    ]


def overheads(
    model: Any, bundle: Bundle, *, progress: Progress = lambda stage, done, total: None
) -> dict[str, float]:
    """Ratio of the time per token with and without the monitor, at batch 1 and 8."""
    # Greedy text past its natural end may violate; a threshold of 1 lets both runs write it all.
    never = Thresholds(horizon=HORIZON, halt_at=1.0)
    policy = Policy(tiers={"moderate": never}, default_tier="moderate")
    monitor = Monitor(bundle.with_policy(policy), slots=8)
    ratios = {}
    for done, batch in enumerate((1, 8)):
        inputs = left_padded([sample_prompt(0, index) for index in range(batch)])
        progress("overhead", done, 2)
        ratios[f"batch_{batch}"] = overhead(
            model, monitor, inputs, new_tokens=OVERHEAD_TOKENS, pairs=OVERHEAD_PAIRS
        )
    progress("overhead", 2, 2)
    return ratios
