"""The chain of a trained bundle, from the evidence of labelled examples."""

from __future__ import annotations

import numpy as np

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.learn.chains.counts import ObservedStream, fit_by_counts
from midstream.learn.compare import read_logits
from midstream.learn.methods.method import ReadOut
from midstream.learn.tokens import Source, TrainingDataError
from midstream.measure.evidence import evidence_curves
from midstream.measure.recording import Recording, probes_hash

# Edges of the chain's bins: quantiles of the cumulative log-hazard at tokens that do not violate,
# the more of them the nearer to the violated ones, and of those. At most 14 states.
_CALM_QUANTILES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
_VIOLATED_QUANTILES = (0.1, 0.25, 0.5, 0.75)
_PROMPT_QUANTILES = (0.2, 0.4, 0.6, 0.8)

UNFITTED = Chain(
    transition=[[0.5, 0.5], [0.0, 1.0]],
    ending=[0.5, 0.5],
    emission=[[1.0], [1.0]],
    edges=[],
    prior=[1.0, 0.0],
    prompt_emission=[[1.0], [1.0]],
    prompt_edges=[],
)
"""The chain of a bundle whose own is still to be fitted: evidence does not depend on it."""


def fit_chain(bundle: Bundle, source: Source, hazard: str) -> Chain:
    """Fit a chain whose states are bins of the evidence that the bundle's probes leave.

    A response that is known to be bad, but not where, is dated to its largest log-hazard; one of
    which nothing is known is left out.

    Parameters
    ----------
    bundle : Bundle
        Its own chain is without effect.
    source : Source
        Examples that trained none of the probes.
    hazard : str

    Raises
    ------
    TrainingDataError
        When no response shows the hazard.
    """
    tokens = source.tokens
    recording = as_recording(bundle, source)
    evidence = evidence_curves(recording, bundle).astype(np.float64)
    center = bundle.bank.evidence_table().center.numpy()
    hazards = np.logaddexp(0.0, evidence - center)
    reads = np.array([probe.reads == "response" for probe in bundle.bank.heads])
    column = tokens.column(hazard)
    observed = []
    for stream, outcome in enumerate(tokens.response_labels[:, column]):
        rows = slice(int(recording.starts[stream]), int(recording.starts[stream + 1]))
        response = recording.in_response[rows]
        risk = hazards[rows][response][:, reads].sum(axis=1)
        if outcome < 0 or not len(risk):
            continue
        shown = recording.labels[rows][response, column] == 1
        if outcome and not shown.any():
            shown[int(risk.argmax())] = True
        prompt = hazards[rows][~response][-1:, ~reads].sum()
        observed.append(ObservedStream(risk, np.maximum.accumulate(shown), True, float(prompt)))
    if not any(stream.violated.any() for stream in observed):
        raise TrainingDataError(f"{hazard!r}: no response to choose by shows it; give more that do")
    risk = np.concatenate([stream.log_hazard for stream in observed])
    violated = np.concatenate([stream.violated for stream in observed])
    edges = np.concatenate(
        [
            np.quantile(risk[~violated], _CALM_QUANTILES),
            np.quantile(risk[violated], _VIOLATED_QUANTILES),
        ]
    )
    prompts = [stream.prompt_log_hazard for stream in observed]
    prompt_edges = np.unique(np.quantile(prompts, [] if reads.all() else _PROMPT_QUANTILES))
    return fit_by_counts(observed, np.unique(edges).tolist(), prompt_edges=prompt_edges.tolist())


def as_recording(bundle: Bundle, source: Source) -> Recording:
    """Score collected residuals with the bundle's probes, as serving would.

    Special tokens around a plain text are left out, since serving scores none.
    """
    tokens = source.tokens
    heads = [
        ReadOut("", tuple(bundle.bank.probes[column] for column in columns))
        for columns in bundle.bank.terms
    ]
    logits = read_logits(heads, source).T
    kept = ~tokens.special
    counts = np.add.reduceat(kept, tokens.starts[:-1])
    starts = np.concatenate([[0], np.cumsum(counts)])
    in_prompt = kept & ~tokens.in_response
    return Recording(
        bundle=bundle.hash,
        probes=bundle.bank.names,
        hazards=tokens.hazards,
        streams=tokens.ids,
        starts=starts,
        prompt_tokens=np.add.reduceat(in_prompt, tokens.starts[:-1]).astype(np.int32),
        ended=np.ones(len(tokens), dtype=bool),
        position=(np.arange(starts[-1]) - np.repeat(starts[:-1], counts)).astype(np.int32),
        logits=np.ascontiguousarray(logits[kept]),
        labels=tokens.labels[kept],
        response_labels=tokens.response_labels,
        characters=None,
        texts=None,
        columns={},
        probes_hash=probes_hash(bundle.bank),
    )
