"""Hidden events worked out by hand: every path of hidden states, every future, one by one."""

from functools import cache
from itertools import product

import numpy as np
from scipy.optimize import minimize_scalar


def enumerate_past(start, transition, ending, event, events):
    """Chance of these events and each last hidden state, over all paths."""
    joint = np.zeros(len(start))
    for path in product(range(len(start)), repeat=len(events)):
        chance = start[path[0]] * event[path[0]][events[0]]
        for before, now, seen in zip(path, path[1:], events[1:], strict=False):
            chance *= (1 - ending[before]) * transition[before][now] * event[now][seen]
        joint[path[-1]] += chance
    return joint


def future_harm(transition, ending, event, then):
    """``harm(state, fact, horizon)``: chance of harm by now or within so many more events.

    ``then(fact, event)`` is the fact after an event, None where it completes the harm.
    """

    @cache
    def harm(state, fact, horizon):
        if fact is None:
            return 1.0
        if horizon == 0:
            return 0.0
        return sum(
            (1 - ending[state]) * move * chance * harm(onward, then(fact, number), horizon - 1)
            for onward, move in enumerate(transition[state])
            for number, chance in enumerate(event[onward])
            if move and chance
        )

    return harm


def likely(hits, chances, draws=1):
    """Whether so many hits may come of ``draws`` draws at each of these chances.

    False where that is rarer than once in 10^12 by Chernoff's bound, the least over x of
    ``E exp(x (sum - hits))``, which holds for any chances: a run makes thousands of comparisons.
    """
    chances = np.clip(np.asarray(chances, dtype=float), 0, 1)

    def log_bound(x):
        return draws * np.log(1 - chances + chances * np.exp(x)).sum() - x * hits

    return minimize_scalar(log_bound, bounds=(-50, 50), method="bounded").fun > np.log(1e-12)


def within_error(hits, chances):
    """Whether outcomes agree with the chances that were given for them; see `likely`."""
    return likely(np.sum(hits), chances)


def follows(counts, chances):
    """Whether counts agree with the distribution they were drawn from; see `likely`."""
    total = np.sum(counts)
    return all(likely(*pair, total) for pair in zip(counts, chances, strict=True))


def calibrated(hits, chances, groups=8):
    """Check outcomes against chances in groups of like chances, as in a reliability diagram."""
    hits, chances = np.asarray(hits, dtype=float), np.asarray(chances, dtype=float)
    order = np.argsort(chances, kind="stable")
    return all(within_error(hits[rows], chances[rows]) for rows in np.array_split(order, groups))
