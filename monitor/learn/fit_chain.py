"""The chain of a trained bundle, from the evidence of labelled examples."""

from __future__ import annotations

import numpy as np

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.learn.chains.counts import fit_by_counts
from midstream.learn.chains.observed import observe
from midstream.learn.compare import read_logits
from midstream.learn.methods.method import ReadOut
from midstream.learn.tokens import Source
from midstream.measure.recording import Recording, probes_hash

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
    ChainError
        When no response shows the hazard.
    """
    observed = observe(as_recording(bundle, source), bundle, [hazard])
    edges, prompt_edges = observed.edges()
    return fit_by_counts(observed.streams, edges, prompt_edges=prompt_edges)


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
