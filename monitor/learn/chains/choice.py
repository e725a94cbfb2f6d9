"""How many latent states: by the likelihood of streams that were held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from midstream.chain import Chain, ChainError
from midstream.learn.chains.em import fit_em
from midstream.learn.chains.filtering import Array, log_likelihood
from midstream.learn.chains.packing import known_to_violate
from midstream.learn.chains.symbols import SymbolStream

Fit = Callable[[Sequence[SymbolStream]], Chain]


@dataclass(frozen=True)
class StatesChoice:
    """What cross-validation says about the number of transient states.

    Attributes
    ----------
    states : int
        The smallest candidate that is within one standard error of the best.
    best : int
        The candidate of the largest held-out likelihood.
    held_out : dict of int to float
        Mean log-likelihood per held-out stream, natural log, of each candidate.
    behind : dict of int to float
        Mean of what each stream loses against ``best``.
    behind_error : dict of int to float
        Standard error of ``behind``, over streams.
    rivals : dict of str to float
        ``held_out`` of the other fits.
    """

    states: int
    best: int
    held_out: dict[int, float]
    behind: dict[int, float]
    behind_error: dict[int, float]
    rivals: dict[str, float]


def choose_states(
    streams: Sequence[SymbolStream],
    candidates: Sequence[int],
    *,
    folds: int = 5,
    seed: int = 0,
    rivals: Mapping[str, Fit] | None = None,
    **fit: Any,
) -> StatesChoice:
    """Choose by cross-validation and the rule of one standard error (Breiman et al. 1984).

    Streams are held out whole, and each fold has its share of those that violate. The standard
    error is that of the paired differences to the best: the likelihoods themselves differ far more
    from stream to stream, by their lengths, than from candidate to candidate.

    Parameters
    ----------
    streams : sequence of SymbolStream
    candidates : sequence of int
    folds : int
        At least 2.
    seed : int
    rivals : mapping of str to callable, optional
        Other fits judged on the same folds, such as one by counts; each returns a chain over the
        same bins.
    **fit
        Passed on to `fit_em`, ``bins`` among them; ``prior_count`` above 0, or a bin unseen in the
        other folds could not happen.

    Raises
    ------
    ChainError
        For no candidates, for fewer streams that violate, or that do not, than folds; and what
        `fit_em` raises.
    """
    fits: dict[Any, Fit] = {
        states: _em_fit(states, seed, fit) for states in sorted(set(candidates))
    }
    if not fits:
        raise ChainError("candidates: expected at least one number of states")
    if fit.get("prior_count", 1.0) <= 0:
        raise ChainError("prior_count: expected more than 0, or unseen bins cannot be judged")
    fits |= rivals or {}
    fold = _folds(streams, folds, np.random.default_rng(seed))
    found: dict[Any, Array] = {name: np.empty(len(streams)) for name in fits}
    for held in range(folds):
        learn = [stream for stream, f in zip(streams, fold, strict=True) if f != held]
        judge = [stream for stream, f in zip(streams, fold, strict=True) if f == held]
        for name, fitted in fits.items():
            found[name][fold == held] = log_likelihood(fitted(learn), judge)
    numbers = [name for name in fits if name not in (rivals or {})]
    best = max(numbers, key=lambda states: found[states].mean())
    lost = {states: found[best] - found[states] for states in numbers}
    behind = {states: float(lost[states].mean()) for states in numbers}
    error = {states: float(lost[states].std(ddof=1) / len(streams) ** 0.5) for states in numbers}
    return StatesChoice(
        states=min(states for states in numbers if behind[states] <= error[states]),
        best=best,
        held_out={states: float(found[states].mean()) for states in numbers},
        behind=behind,
        behind_error=error,
        rivals={name: float(found[name].mean()) for name in rivals or {}},
    )


def _em_fit(states: int, seed: int, fit: Mapping[str, Any]) -> Fit:
    return lambda streams: fit_em(streams, states, seed=seed, **fit).chain


def _folds(
    streams: Sequence[SymbolStream], folds: int, random: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Fold of each stream; those that violate are spread evenly."""
    violates = np.array([known_to_violate(stream) for stream in streams])
    if folds < 2 or violates.sum() < folds or (~violates).sum() < folds:
        raise ChainError(
            f"folds: {folds} need 2 or more, and as many streams that violate and that do not; "
            f"there are {violates.sum()} and {(~violates).sum()}: give more, or say how many states"
        )
    fold = np.empty(len(streams), dtype=np.int64)
    for group in (violates, ~violates):
        chosen = random.permutation(np.flatnonzero(group))
        fold[chosen] = np.arange(len(chosen)) % folds
    return fold
