"""Where EM starts: a state assigned to every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midstream.learn.chains.filtering import Array
from midstream.learn.chains.packing import Indices, PackedStreams

_SMOOTHING = 0.5  # weight of the new token in the average that quantiles and k-means group
_K_MEANS_STEPS = 20


def assign_states(
    packed: Sequence[PackedStreams],
    violates: NDArray[np.bool_],
    states: int,
    bins: int,
    number: int,
    random: np.random.Generator,
) -> tuple[str, list[Indices]]:
    """Assign a state to every row of `midstream.learn.chains.filtering.Filtered`.

    Every bin has a value, a token the exponential average of its stream's so far, and tokens of
    like values share a state. Start 0 groups them by quantiles and start 1 by k-means, and the
    value of a bin is the share of its tokens that are in violating streams; all others group random
    values by quantiles. A token is in V from the one on that is known to be, or, in a stream that
    violates nobody knows where, from its largest value on.

    Parameters
    ----------
    packed : sequence of PackedStreams
    violates : bool [streams]
    states, bins : int
        K and O.
    number : int
        Of the start.
    random : numpy.random.Generator

    Returns
    -------
    name : str
    states : list of int64 [E + N]
        One array per part. The state before a first token is that of the token, or any if that
        is V.
    """
    value, weight = _risk_of_bins(packed, violates, bins), _SMOOTHING
    if number > 1:
        value, weight = random.random(bins), random.uniform(0.2, 1.0)
    averages = [_averages(part, value, weight) for part in packed]
    cuts = np.quantile(np.concatenate(averages), np.arange(1, states) / states)
    if number == 1:
        cuts = _k_means(np.concatenate(averages), cuts)
    assigned = []
    for part, average in zip(packed, averages, strict=True):
        state = np.searchsorted(cuts, average, side="right")
        state[_dated(part, value, violates[part.index])] = states
        first = state[: len(part.index)]
        anywhere = random.integers(states, size=len(first))
        assigned.append(np.concatenate([np.where(first < states, first, anywhere), state]))
    return ("quantiles", "k-means", "random")[min(number, 2)], assigned


def _risk_of_bins(packed: Sequence[PackedStreams], violates: NDArray[np.bool_], bins: int) -> Array:
    """Share of each bin's tokens that are in violating streams, tokens known as violated aside."""
    counts = np.ones((2, bins))
    for part in packed:
        stream = part.stream
        counted = part.label != 1
        for outcome in (0, 1):
            chosen = part.bins[counted & (violates[part.index[stream]] == outcome)]
            counts[outcome] += np.bincount(chosen, minlength=bins)
    return np.asarray(counts[1] / counts.sum(axis=0))


def _averages(part: PackedStreams, value: Array, weight: float) -> Array:
    average = value[part.bins]
    begins = part.begins
    for t in range(1, len(part.live)):
        before = average[begins[t - 1] : begins[t - 1] + part.live[t]]
        rows = slice(begins[t], begins[t + 1])
        average[rows] = weight * average[rows] + (1 - weight) * before
    return np.asarray(average)


def _k_means(values: Array, cuts: Array) -> Array:
    """Cuts between the centres of k-means in one dimension (Lloyd 1982), from given cuts on."""
    for _ in range(_K_MEANS_STEPS):
        group = np.searchsorted(cuts, values, side="right")
        size = np.bincount(group, minlength=len(cuts) + 1)
        total = np.bincount(group, weights=values, minlength=len(cuts) + 1)
        center = np.sort(total[size > 0] / size[size > 0])
        middle = (center[1:] + center[:-1]) / 2
        cuts = np.concatenate([middle, np.full(len(cuts) - len(middle), np.inf)])
    return cuts


def _dated(part: PackedStreams, value: Array, violates: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the stream has violated at or before each token, by its labels or by a guess."""
    known, stream = part.label == 1, part.stream
    token = np.repeat(np.arange(len(part.live)), part.live)
    score = np.where(part.label == 0, -np.inf, value[part.bins])
    highest = np.full(len(part.index), -np.inf)
    np.maximum.at(highest, stream, score)
    begins = np.full(len(part.index), len(part.live))
    candidates = np.flatnonzero((score == highest[stream]) & violates[stream] & (part.label != 0))
    np.minimum.at(begins, stream[candidates], token[candidates])
    return np.asarray(known | (token >= begins[stream]))
