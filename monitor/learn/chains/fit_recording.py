"""``midstream chain fit``: from recorded streams and a bundle to a folder with a chain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from midstream.atomic import write_folder
from midstream.bundle import Bundle
from midstream.learn.chains.fit import By, Fit, fit_streams
from midstream.learn.chains.observed import observe
from midstream.measure.chain_plots import bands_of, chain_plots
from midstream.measure.recording import Recording, RecordingError
from midstream.measure.recording_file import refuse_existing
from midstream.measure.rejudge import check_probes

PLOTTED = 32
"""Tokens that the plots look ahead."""


def fit_recording(
    paths: Sequence[Path],
    bundle: Bundle,
    out: Path,
    *,
    by: By = "counts",
    states: int | None = None,
    category: str | None = None,
    response_labels: bool = False,
    hazards: Sequence[str] | None = None,
    seed: int = 0,
    draws: int = 1000,
) -> Fit:
    """Fit a chain to recordings of a bundle's probes, and write it with report and plots.

    Parameters
    ----------
    paths : sequence of path
        Recordings of one bundle.
    bundle : Bundle
        With the probes of the recordings; its chain and policy are without effect.
    out : path
        New folder for ``chain.json``, a chain per category, ``fit.json`` and plots.
    by, states, seed, draws
        As for `midstream.learn.chains.fit.fit_streams`.
    category : str, optional
        Column of the recordings; its values share a chain each.
    response_labels : bool
        Look at no label of a token: by counts a violation is dated to the response's largest
        log-hazard, by EM nobody knows where it is.
    hazards : sequence of str, optional
        Any of them is a violation; those of the bundle's probes when not given.

    Raises
    ------
    FileExistsError
        If there is anything at ``out``; before the work, not after it.
    RecordingError, MeasureError, ChainError
        For recordings, labels or columns that do not fit.
    """
    refuse_existing(out)
    recording = Recording.load(*paths)
    check_probes(recording, bundle)
    categories = None
    if category is not None:
        if category not in recording.columns:
            known = ", ".join(recording.columns) or "none"
            raise RecordingError(f"no column {category!r} in the recording; it has {known}")
        categories = recording.columns[category]
    chosen = list(dict.fromkeys(bundle.bank.hazards)) if hazards is None else list(hazards)
    observed = observe(recording, bundle, chosen, response_labels=response_labels)
    edges, prompt_edges = observed.edges()
    fit = fit_streams(
        observed.symbols(edges, prompt_edges, categories, dated=by == "counts"),
        edges=edges,
        prompt_edges=prompt_edges,
        by=by,
        states=states,
        categories=category is not None,
        seed=seed,
        draws=draws,
        notes={
            "recordings": ", ".join(path.name for path in paths),
            "bundle": bundle.hash,
            "hazards": ", ".join(chosen),
            "responses_left_out_since_their_outcome_is_not_known": len(recording)
            - len(observed.streams),
            "responses_that_violate_nobody_knows_where": int((~observed.located).sum()),
            "response_tokens_without_a_score": observed.unscored,
        },
    )
    bands = fit.report.intervals and bands_of(fit.report.intervals, PLOTTED)
    plots = chain_plots(
        fit.chain, bands=bands or None, tokens=PLOTTED, never_seen=fit.report.never_seen
    )
    write_folder(out, {**fit.files(), **plots})
    return fit
