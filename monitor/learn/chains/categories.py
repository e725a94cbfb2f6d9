"""A chain per category, shrunk towards the pooled one as far as the categories are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from midstream.chain import Array, Chain, ChainError
from midstream.learn.chains.counts import Counts, Posterior, chain_from, chain_of, posterior_means

_CONCENTRATIONS = np.logspace(-2, 6, 33)
"""Tried first: below there is no shrinkage to speak of, above nothing else."""


@dataclass(frozen=True)
class CategoryChains:
    """Chains of several categories and the one of all together.

    Attributes
    ----------
    pooled : Chain
    chains : dict of str to Chain
    posteriors : dict of str to Posterior
        Of the same categories, for credible intervals.
    concentration : dict of str to float
        Weight of the pooled row by table of the chain, in counts; infinite where nothing tells the
        categories apart.
    """

    pooled: Chain
    chains: Mapping[str, Chain]
    posteriors: Mapping[str, Posterior]
    concentration: Mapping[str, float]

    def of(self, category: str) -> Chain:
        """Chain of a category; the pooled one where there is no data of it."""
        return self.chains.get(category, self.pooled)


def fit_categories(
    counts: Mapping[str, Counts],
    *,
    edges: Sequence[float],
    prompt_edges: Sequence[float] = (),
    prior_count: float = 1.0,
) -> CategoryChains:
    """Fit one chain per category, with a Dirichlet prior centred on the pooled chain's rows.

    The prior's concentration is the one under which the categories are most probable: the
    Dirichlet-multinomial evidence (Minka 2000, "Estimating a Dirichlet distribution") of each
    category's counts given the rows of all *other* categories, so that no category testifies for
    itself. One concentration per table: categories may differ in where they start and still move
    alike. O(C K^2) per try, some sixty tries per table.

    Parameters
    ----------
    counts : mapping of category to Counts
        See `midstream.learn.chains.counts.count`.
    edges, prompt_edges
        As for `midstream.learn.chains.counts.chain_of`.
    prior_count : float
        Of the pooled chain; more than 0, so that it rules nothing out.

    Raises
    ------
    ChainError
        Without a category, without a prior, and when no stream of any category violates.
    ImportError
        Without scipy.
    """
    if not counts:
        raise ChainError("fit_categories: no category given")
    if prior_count <= 0:
        raise ChainError(f"prior_count: expected more than 0 to compare rows, got {prior_count}")
    total = reduce(add, counts.values())
    chain = chain_of(total, edges=edges, prompt_edges=prompt_edges, prior_count=prior_count)
    pooled = posterior_means(total, prior_count)
    ours = {name: part.tables() for name, part in counts.items()}
    others = {name: posterior_means(total - part, prior_count) for name, part in counts.items()}
    concentration = {
        table: best_concentration(
            np.concatenate([ours[name][table] for name in counts]),
            np.concatenate([others[name][table] for name in counts]),
        )
        if len(counts) > 1
        else np.inf
        for table in pooled
    }
    chains = {
        name: chain_from(
            {
                table: shrunk(ours[name][table], pooled[table], concentration[table])
                for table in pooled
            },
            edges,
            prompt_edges,
        )
        for name in counts
    }
    pooled_posterior = total.posterior(prior_count)
    posteriors = {
        name: Posterior(
            *(
                whole
                if np.isinf(weight := concentration[table])
                else ours[name][table] + weight * pooled[table]
                for table, whole in (
                    ("transition", pooled_posterior.moves),
                    ("ending", pooled_posterior.ends),
                )
            )
        )
        for name in counts
    }
    return CategoryChains(chain, chains, posteriors, concentration)


def shrunk(counts: Array, center: Array, concentration: float) -> Array:
    """Posterior mean of each row under a Dirichlet of this concentration around ``center`` [R, M].

    The center itself where the concentration is infinite, or 0 in a row without counts; the counts'
    shares where it is 0.
    """
    total = counts.sum(axis=1, keepdims=True) + concentration
    if np.isinf(concentration):
        return center
    mass = counts + concentration * center
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), center)


def log_evidence(counts: Array, center: Array, concentration: float) -> float:
    """Log-probability of rows of counts [R, M] under Dirichlet-multinomials around ``center``.

    Without the multinomial coefficients, which do not depend on the concentration.
    """
    from scipy.special import gammaln

    total = counts.sum(axis=1)
    alpha = np.where(center > 0, concentration * center, 1.0)
    if (counts[center <= 0] > 0).any():
        return -np.inf
    rows = gammaln(concentration) - gammaln(concentration + total)
    return float(rows.sum() + (gammaln(alpha + counts) - gammaln(alpha)).sum())


def best_concentration(counts: Array, center: Array) -> float:
    """Concentration of the largest :func:`log_evidence`; infinite where more is never worse."""
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError("shrinkage needs scipy: pip install 'midstream[learn]'") from error
    seen = counts.sum(axis=1) > 0
    counts, center = counts[seen], center[seen]
    found = [log_evidence(counts, center, tried) for tried in _CONCENTRATIONS]
    # A tie is rounding where the counts say nothing, one bin or one count a row.
    best = int(np.flatnonzero(np.array(found) >= max(found) - 1e-6)[-1])
    if best == len(found) - 1:
        return np.inf
    around = np.log(_CONCENTRATIONS[[max(best - 1, 0), best + 1]])
    refined = minimize_scalar(
        lambda log: -log_evidence(counts, center, np.exp(log)), bounds=tuple(around)
    )
    return float(np.exp(refined.x))
