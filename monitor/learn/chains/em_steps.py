"""The two steps of EM for the absorbing chain: count what is expected, and maximise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from midstream.learn.chains.filtering import LARGEST_ENDING, Array, Parameters, smooth
from midstream.learn.chains.packing import PackedStreams

_NEVER_ZERO = 1e-9
"""Share of a probability that is left of it at least, however far it is extrapolated."""


@dataclass(frozen=True)
class Counts:
    """Expected counts, the sufficient statistics; shapes as `Parameters`."""

    first: Array
    moves: Array
    ends: Array
    goes_on: Array
    emitted: Array
    prompts: Array


def _count(packed: PackedStreams, belief: Array, moves: Array, shapes: Parameters) -> Counts:
    """Count in one part, from the belief [E + N, K+1] of every token and before the first."""
    streams = len(packed.index)
    first, tokens = belief[:streams], belief[streams:]
    last = tokens[packed.last]

    def of_bins(which: NDArray[np.int64], weights: Array, size: int) -> Array:
        return np.stack([np.bincount(which, column, size) for column in weights.T])

    return Counts(
        first=first.sum(axis=0),
        moves=moves,
        ends=last[packed.ended].sum(axis=0),
        goes_on=tokens.sum(axis=0) - last.sum(axis=0),
        emitted=of_bins(packed.bins, tokens, shapes.emission.shape[1]),
        prompts=of_bins(packed.prompt_bins, first, shapes.prompt_emission.shape[1]),
    )


def maximise(counts: Counts, prior_count: float, otherwise: Parameters) -> Parameters:
    """Return the parameters of the largest posterior; rows without counts are ``otherwise``'s."""
    k = len(counts.first) - 1
    ends = _rows(
        np.stack([counts.ends, counts.goes_on], axis=1),
        prior_count,
        np.stack([otherwise.ending, 1 - otherwise.ending], axis=1),
    )
    ending = np.minimum(ends[:, 0], LARGEST_ENDING)
    # Counted is who is where before a first token, so the prior is this over the chance of one.
    first = _rows(counts.first[None, :k], prior_count, otherwise.prior[None, :k])[0]
    prior = np.append(first / (1 - ending[:k]), 0.0)
    return Parameters(
        prior=prior / prior.sum(),
        transition=np.vstack(
            [_rows(counts.moves[:k], prior_count, otherwise.transition[:k]), np.eye(k + 1)[k]]
        ),
        ending=ending,
        emission=_rows(counts.emitted, prior_count, otherwise.emission),
        prompt_emission=_rows(counts.prompts, prior_count, otherwise.prompt_emission),
    )


def _rows(counts: Array, prior_count: float, otherwise: Array) -> Array:
    mass = counts + prior_count / counts.shape[1]
    total = mass.sum(axis=1, keepdims=True)
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), otherwise)


def log_prior(parameters: Parameters, prior_count: float) -> float:
    """Log density of the Dirichlet prior, up to a constant."""
    if prior_count == 0:
        return 0.0
    k = len(parameters.prior) - 1
    prior, transition, *others = _tables(parameters)
    first = prior[:, :k] * (1 - parameters.ending[:k])
    tables = (first / first.sum(), transition[:k], *others)
    return float(sum(prior_count / rows.shape[1] * np.log(rows).sum() for rows in tables))


def _tables(parameters: Parameters) -> tuple[Array, ...]:
    """Rows that each are a distribution: prior, moves, ends or goes on, bins, prompt bins."""
    ends = np.stack([parameters.ending, 1 - parameters.ending], axis=1)
    return (
        parameters.prior[None],
        parameters.transition,
        ends,
        parameters.emission,
        parameters.prompt_emission,
    )


def uniform(states: int, bins: int, prompt_bins: int) -> Parameters:
    """Return even parameters of K states; nothing has violated before its first token."""
    size = states + 1
    transition = np.full((size, size), 1 / size)
    transition[-1] = np.eye(size)[-1]
    return Parameters(
        prior=np.append(np.full(states, 1 / states), 0.0),
        transition=transition,
        ending=np.full(size, 0.5),
        emission=np.full((size, bins), 1 / bins),
        prompt_emission=np.full((size, prompt_bins), 1 / prompt_bins),
    )


def expect(parameters: Parameters, packed: Sequence[PackedStreams]) -> tuple[Counts, float]:
    """E-step: expected counts under the parameters, and the log-likelihood of all streams."""
    parts, likelihood = [], 0.0
    for part in packed:
        smoothed = smooth(parameters, part)
        parts.append(_count(part, smoothed.belief, smoothed.moves, parameters))
        likelihood += float(smoothed.log_likelihood.sum())
    return _total(parts), likelihood


def extrapolate(before: Parameters, now: Parameters, then: Parameters) -> Parameters:
    """Go where EM is heading from three of its iterates in a row, or to the last of them at least.

    SQUAREM, scheme S3 (Varadhan and Roland 2008), over the square roots of the probabilities: they
    lie on spheres, so that every point there is a chain once its rows are normalised.
    """
    points = [
        np.concatenate([np.sqrt(table).ravel() for table in _tables(parameters)])
        for parameters in (before, now, then)
    ]
    first, change = points[1] - points[0], points[2] - 2 * points[1] + points[0]
    size = float(np.linalg.norm(change))
    length = max(1.0, float(np.linalg.norm(first)) / size) if size > 0 else 1.0
    point = (points[0] + 2 * length * first + length**2 * change) ** 2
    rows = []
    for table in _tables(now):
        values, point = point[: table.size].reshape(table.shape), point[table.size :]
        values = np.maximum(values, _NEVER_ZERO * table)
        rows.append(values / values.sum(axis=1, keepdims=True))
    prior, transition, ends, emission, prompt_emission = rows
    ending = np.minimum(ends[:, 0], LARGEST_ENDING)
    return Parameters(prior[0], transition, ending, emission, prompt_emission)


def parameters_of(
    packed: Sequence[PackedStreams], assigned: Sequence[NDArray[np.int64]], shapes: Parameters
) -> Parameters:
    """Return the parameters when the state of every row of `Filtered` is known; none is 0."""
    parts = []
    for part, state in zip(packed, assigned, strict=True):
        belief = np.eye(len(shapes.prior))[state]
        moves = belief[part.before].T @ belief[len(part.index) :]
        parts.append(_count(part, belief, moves, shapes))
    return maximise(_total(parts), 1.0, shapes)


def _total(parts: Sequence[Counts]) -> Counts:
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: sum(getattr(part, name) for part in parts) for name in names})
