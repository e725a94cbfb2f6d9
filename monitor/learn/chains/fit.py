"""From streams of symbols, at any clock, to a chain and a report of how far it can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np

from midstream.chain import Chain, ChainError
from midstream.learn.chains.categories import fit_categories
from midstream.learn.chains.choice import StatesChoice, choose_states
from midstream.learn.chains.counts import Posterior, chain_of, count
from midstream.learn.chains.em import fit_em
from midstream.learn.chains.filtering import as_served, log_likelihood
from midstream.learn.chains.intervals import (
    DRAWS,
    LEVEL,
    risk_intervals,
    violation_frequencies,
)
from midstream.learn.chains.order import order_test
from midstream.learn.chains.packing import known_to_violate
from midstream.learn.chains.report import Bands, CategoryReport, FitReport, category_file
from midstream.learn.chains.symbols import SymbolStream

By = Literal["counts", "em"]

HORIZONS = (*range(33), 64, 128, 256, 512, 1024)
"""Horizons at which intervals are kept."""

SHOWN_HORIZONS = (1, 5, 10, 32)
"""Horizons of tables, and of the direct frequencies."""

CANDIDATES = (1, 2, 3, 4, 5, 6)
"""Numbers of latent states that EM chooses from where nobody says how many."""

PRIOR_COUNT = 1.0
POOLED = ""
"""The category of streams without one; they teach the pooled chain alone."""

_HELD_OUT = 0.2
_CHOICE_RESTARTS = 3  # each candidate is fitted once per fold


@dataclass(frozen=True)
class Fit:
    """A fitted chain, those of its categories, and the report."""

    chain: Chain
    categories: Mapping[str, Chain]
    report: FitReport

    def files(self) -> dict[str, bytes]:
        """Content of ``chain.json``, a file per category, and ``fit.json``."""
        files = {
            "chain.json": self.chain,
            **{category_file(name): chain for name, chain in self.categories.items()},
        }
        return {name: chain.to_json().encode() for name, chain in files.items()} | {
            "fit.json": (self.report.model_dump_json(indent=1) + "\n").encode()
        }


def fit_streams(
    streams: Sequence[SymbolStream],
    *,
    edges: Sequence[float],
    prompt_edges: Sequence[float] = (),
    by: By = "counts",
    states: int | None = None,
    categories: bool = False,
    clock: str = "token",
    draws: int = DRAWS,
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit a chain and say how far it can be trusted.

    A fifth of the streams is held out once, to tell how likely chains make streams they have not
    seen; the chains that are returned are fitted to all.

    Parameters
    ----------
    streams : sequence of SymbolStream
        By counts, it is known of all where they violate.
    edges, prompt_edges : ascending
        Edges between the bins.
    by : "counts" or "em"
    states : int, optional
        Latent states of EM, chosen among `CANDIDATES` by cross-validation when not given; by counts
        the bins are the states.
    categories : bool
        Fit one chain per category of the streams as well; by counts only.
    clock : str
    draws, seed
        Of the intervals; the seed of the held-out streams and of EM, too.
    notes : mapping, optional
        For the report.

    Raises
    ------
    ChainError
        For what cannot be fitted; the message says why.
    """
    if not streams:
        raise ChainError("fit: no stream given")
    if by == "counts" and states is not None:
        raise ChainError("states: by counts the bins are the states; give it to EM")
    if by == "em" and categories:
        raise ChainError("categories: chains per category are fitted by counts")
    choice = None
    if by == "em" and states is None:
        choice = _choose_states(streams, edges, prompt_edges, seed)
        states = choice.states

    def fitted(to: Sequence[SymbolStream]) -> _Fitted:
        if by == "counts":
            return _by_counts(to, edges, prompt_edges, categories)
        return _by_em(to, edges, prompt_edges, states or 1, seed)

    whole, bins = fitted(streams), len(edges) + 1
    intervals = {
        name: Bands.of(risk_intervals(posterior, HORIZONS, draws=draws, seed=seed))
        for name, posterior in whole.posteriors.items()
    }
    seen = [stream.category for stream in streams]
    report = FitReport(
        by=by,
        clock=clock,
        streams=len(streams),
        tokens=sum(len(stream.bins) for stream in streams),
        violating=sum(map(known_to_violate, streams)),
        level=LEVEL,
        draws=draws,
        seed=seed,
        intervals=intervals.get(POOLED),
        frequencies=_frequencies(streams, bins) if by == "counts" else None,
        order_test=asdict(order_test(streams, bins)) if by == "counts" else None,
        held_out=_held_out(streams, fitted, seed),
        categories={
            name: CategoryReport(
                file=category_file(name), streams=seen.count(name), intervals=intervals[name]
            )
            for name in whole.categories
        },
        concentration={
            table: None if np.isinf(value) else value
            for table, value in whole.concentration.items()
        },
        em=whole.em and {**whole.em, "choice": choice and asdict(choice)},
        notes=dict(notes or {}),
    )
    return Fit(whole.chain, whole.categories, report)


@dataclass(frozen=True)
class _Fitted:
    chain: Chain
    categories: Mapping[str, Chain] = field(default_factory=dict)
    posteriors: Mapping[str, Posterior] = field(default_factory=dict)  # the pooled chain's, too
    concentration: Mapping[str, float] = field(default_factory=dict)
    em: dict[str, Any] | None = None


def _by_counts(
    streams: Sequence[SymbolStream],
    edges: Sequence[float],
    prompt_edges: Sequence[float],
    categories: bool,
) -> _Fitted:
    groups: dict[str, list[SymbolStream]] = {}
    for stream in streams:
        groups.setdefault(stream.category if categories else POOLED, []).append(stream)
    counts = {
        name: count(group, len(edges) + 1, prompt_bins=len(prompt_edges) + 1)
        for name, group in groups.items()
    }
    total = reduce(add, counts.values())
    posteriors = {POOLED: total.posterior(PRIOR_COUNT)}
    if not categories:
        chain = chain_of(total, edges=edges, prompt_edges=prompt_edges, prior_count=PRIOR_COUNT)
        return _Fitted(chain, posteriors=posteriors)
    found = fit_categories(counts, edges=edges, prompt_edges=prompt_edges, prior_count=PRIOR_COUNT)
    named = {name: chain for name, chain in found.chains.items() if name != POOLED}
    return _Fitted(found.pooled, named, {**found.posteriors, **posteriors}, found.concentration)


def _by_em(
    streams: Sequence[SymbolStream],
    edges: Sequence[float],
    prompt_edges: Sequence[float],
    states: int,
    seed: int,
) -> _Fitted:
    found = fit_em(
        streams,
        states,
        bins=len(edges) + 1,
        prompt_bins=len(prompt_edges) + 1,
        edges=edges,
        prompt_edges=prompt_edges,
        seed=seed,
        prior_count=PRIOR_COUNT,
    )
    em = {
        "converged": found.converged,
        "iterations": found.iterations,
        "log_likelihoods": list(found.log_likelihoods),
        "restarts": [asdict(restart) for restart in found.restarts],
    }
    return _Fitted(found.chain, em=em)


def _choose_states(
    streams: Sequence[SymbolStream],
    edges: Sequence[float],
    prompt_edges: Sequence[float],
    seed: int,
) -> StatesChoice:
    return choose_states(
        streams,
        CANDIDATES,
        seed=seed,
        bins=len(edges) + 1,
        prompt_bins=len(prompt_edges) + 1,
        restarts=_CHOICE_RESTARTS,
        prior_count=PRIOR_COUNT,
    )


def _held_out(
    streams: Sequence[SymbolStream],
    fitted: Callable[[Sequence[SymbolStream]], _Fitted],
    seed: int,
) -> dict[str, Any]:
    """Log-likelihood per token of streams under chains fitted to the others."""
    order = np.random.default_rng(seed).permutation(len(streams))
    cut = round(_HELD_OUT * len(streams))
    held, rest = ([streams[e] for e in part] for part in (order[:cut], order[cut:]))
    if not held or not any(map(known_to_violate, rest)):
        return {"reason": "too few streams to hold some out"}
    fit = fitted(rest)
    tokens = sum(len(stream.bins) for stream in held)
    pooled = float(log_likelihood(as_served(fit.chain), held).sum())
    found = {"streams": len(held), "tokens": tokens, "pooled": pooled / tokens}
    if fit.categories:
        own = sum(
            float(
                log_likelihood(
                    as_served(fit.categories.get(stream.category, fit.chain)), [stream]
                ).sum()
            )
            for stream in held
        )
        found["by_category"] = own / tokens
    return found


def _frequencies(streams: Sequence[SymbolStream], states: int) -> dict[str, Any]:
    found = violation_frequencies(streams, states, SHOWN_HORIZONS)
    return {name: array.tolist() for name, array in asdict(found).items()}
