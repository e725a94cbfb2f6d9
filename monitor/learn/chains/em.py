"""Expectation-maximisation for the absorbing chain, its transient states latent (Baum-Welch).

Maximum a posteriori with a Dirichlet prior on every row (Dempster, Laird and Rubin 1977), so that
nothing becomes 0/0. Labels say what they say: of every token whether it is violated, of a stream
whether it ever is, or nothing; the states are summed over what is left open. No stream has violated
before its first token, so the prior of V is 0; and streams without a token are never seen, so the
likelihood is that given a first token (`midstream.learn.chains.filtering`).

An iteration costs a pass forward and one back, linear in tokens and quadratic in states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from midstream.chain import Chain, ChainError
from midstream.learn.chains.em_steps import (
    expect,
    extrapolate,
    log_prior,
    maximise,
    parameters_of,
    uniform,
)
from midstream.learn.chains.filtering import Parameters
from midstream.learn.chains.packing import PackedStreams, check_bins, known_to_violate, pack
from midstream.learn.chains.starts import assign_states
from midstream.learn.chains.symbols import SymbolStream

_ROUNDING = 1e-9  # relative decrease of the log posterior that fp64 sums may make
_SHORT_RUN = 30
_RUN_ON = 4  # the best after a short run alone missed the best of all by 8 nats once in 25 fits


class LikelihoodDecreasedError(ArithmeticError):
    """An iteration made the log posterior smaller, which EM cannot do: an error in the code."""


@dataclass(frozen=True)
class Restart:
    """One start's run.

    Attributes
    ----------
    start : str
        How the first states were assigned: by ``quantiles``, ``k-means`` or ``random`` values.
    log_posterior, log_likelihood : float
        Natural logs at the end of the run.
    iterations : int
    converged : bool
        False for a start that was given up after a short run, too.
    """

    start: str
    log_posterior: float
    log_likelihood: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class EmFit:
    """A chain fitted by EM.

    Attributes
    ----------
    chain : Chain
        Its transient states in order of their risk, calm first.
    log_likelihoods : tuple of float
        Of all streams at each iteration of the best run; natural log.
    log_posteriors : tuple of float
        The same plus the log of the Dirichlet prior: what never falls. Equal to the former where
        ``prior_count`` is 0.
    restarts : tuple of Restart
        In the order they were made.
    converged : bool
    iterations : int
        Of the best run.
    """

    chain: Chain
    log_likelihoods: tuple[float, ...]
    log_posteriors: tuple[float, ...]
    restarts: tuple[Restart, ...]
    converged: bool
    iterations: int


def fit_em(
    streams: Sequence[SymbolStream],
    states: int,
    *,
    bins: int,
    prompt_bins: int = 1,
    edges: Sequence[float] = (),
    prompt_edges: Sequence[float] = (),
    seed: int = 0,
    restarts: int = 8,
    prior_count: float = 1.0,
    max_iterations: int = 2000,
    tolerance: float = 1e-5,
) -> EmFit:
    """Fit a chain with latent transient states.

    The starts are those of `midstream.learn.chains.starts`. All run for 30 iterations, and the
    best four until they have converged (short-run EM, Biernacki, Celeux and Govaert 2003): until an
    iteration of EM gains less than ``tolerance``. Where EM is so slow that it keeps 99.9 % of the
    distance, 1e-5 nats leave 0.005 to be gained, and the parameters 0.1 standard errors from the
    maximum.

    Parameters
    ----------
    streams : sequence of SymbolStream
        One at least known to violate.
    states : int
        K, the number of transient states.
    bins, prompt_bins : int
        How many evidence bins there are, and how many of the prompt's.
    edges, prompt_edges : ascending, optional
        Between the bins, as the chain keeps them. Without them the bins are symbols, and the edges
        stand between their numbers: 0.5, 1.5 ...
    seed : int
    restarts : int
    prior_count : float
        Pseudo-counts per row, spread evenly; 0 is maximum likelihood, in which a row that nothing
        is counted in stays as it started.
    max_iterations : int
        Of each run; the fit says whether it has converged.
    tolerance : float
        Natural log units of the log posterior, of all streams together.

    Raises
    ------
    ChainError
        For arguments or streams nothing can be fitted with; the message says which.
    """
    edges = list(edges) or [o + 0.5 for o in range(bins - 1)]
    prompt_edges = list(prompt_edges) or [o + 0.5 for o in range(prompt_bins - 1)]
    _check(streams, states, bins, prompt_bins, restarts, prior_count, tolerance)
    _check_edges("edges", edges, bins)
    _check_edges("prompt_edges", prompt_edges, prompt_bins)
    packed = pack(streams)
    violates = np.array([known_to_violate(stream) for stream in streams])
    random = np.random.default_rng(seed)
    shapes = uniform(states, bins, prompt_bins)
    runs = []
    for number in range(restarts):
        start, assigned = assign_states(packed, violates, states, bins, number, random)
        run = _Run(start, parameters_of(packed, assigned, shapes), packed, prior_count)
        run.go(min(_SHORT_RUN, max_iterations), tolerance)
        runs.append(run)
    runs_on = sorted(runs, key=lambda run: run.log_posteriors[-1])[-_RUN_ON:]
    for run in runs_on:
        run.go(max_iterations, tolerance)
    best = max(runs_on, key=lambda run: run.log_posteriors[-1])
    chain = _chain(
        best.now.parameters,
        edges,
        prompt_edges,
        horizon=max(1, round(sum(len(stream.bins) for stream in streams) / len(streams))),
    )
    return EmFit(
        chain=chain,
        log_likelihoods=tuple(best.log_likelihoods),
        log_posteriors=tuple(best.log_posteriors),
        restarts=tuple(run.result() for run in runs),
        converged=best.converged,
        iterations=len(best.log_posteriors),
    )


def _check(
    streams: Sequence[SymbolStream],
    states: int,
    bins: int,
    prompt_bins: int,
    restarts: int,
    prior_count: float,
    tolerance: float,
) -> None:
    for name, value in (
        ("states", states), ("bins", bins), ("prompt_bins", prompt_bins), ("restarts", restarts),
    ):  # fmt: skip
        if value < 1:
            raise ChainError(f"{name}: expected 1 or more, got {value}")
    if not prior_count >= 0:
        raise ChainError(f"prior_count: expected 0 or more, got {prior_count}")
    if not tolerance > 0:
        raise ChainError(f"tolerance: expected more than 0, got {tolerance}")
    check_bins(streams, bins, prompt_bins)
    if not any(known_to_violate(stream) for stream in streams):
        raise ChainError("fit_em: no stream violates, so nothing can be learnt about it")


def _check_edges(name: str, edges: Sequence[float], bins: int) -> None:
    if len(edges) != bins - 1 or not (np.diff(edges) > 0).all():
        raise ChainError(f"{name}: expected {bins - 1} ascending, got {len(edges)}")


class _Step(NamedTuple):
    """An E-step at ``parameters``, and the M-step that follows from it."""

    parameters: Parameters
    following: Parameters
    log_likelihood: float
    log_posterior: float


class _Run:
    """EM from one start, which can be left and taken up again.

    Two iterations show where EM leads; the next one is tried as far on (`extrapolate`), which took
    106 iterations where EM alone had not converged after 1,500 (10,000 streams of the testbed's
    clauses). Where the log posterior is smaller there, EM goes on instead, so that it never falls.
    """

    def __init__(
        self, start: str, parameters: Parameters, packed: Sequence[PackedStreams], prior: float
    ) -> None:
        self.start, self.packed, self.prior_count = start, packed, prior
        self.log_likelihoods: list[float] = []
        self.log_posteriors: list[float] = []
        self.converged = False
        self.now = self._goes_to(self._step(parameters))

    def go(self, iterations: int, tolerance: float) -> None:
        """Iterate until converged, or until there were so many iterations in all."""
        while not self.converged and len(self.log_posteriors) < iterations:
            before, self.now = self.now, self._goes_to(self._step(self.now.following))
            self.converged = self.now.log_posterior - before.log_posterior < tolerance
            if not self.converged:
                further = self._step(
                    extrapolate(before.parameters, self.now.parameters, self.now.following)
                )
                if further.log_posterior >= self.now.log_posterior:
                    self.now = self._goes_to(further)

    def result(self) -> Restart:
        return Restart(
            self.start,
            self.log_posteriors[-1],
            self.log_likelihoods[-1],
            len(self.log_posteriors),
            self.converged,
        )

    def _step(self, parameters: Parameters) -> _Step:
        counts, likelihood = expect(parameters, self.packed)
        following = maximise(counts, self.prior_count, parameters)
        return _Step(
            parameters, following, likelihood, likelihood + log_prior(parameters, self.prior_count)
        )

    def _goes_to(self, step: _Step) -> _Step:
        if self.log_posteriors:
            before = self.log_posteriors[-1]
            if step.log_posterior < before - _ROUNDING * abs(before):
                raise LikelihoodDecreasedError(
                    f"log posterior fell from {before} to {step.log_posterior} in iteration "
                    f"{len(self.log_posteriors)}"
                )
        self.log_likelihoods.append(step.log_likelihood)
        self.log_posteriors.append(step.log_posterior)
        return step


def _chain(
    parameters: Parameters, edges: list[float], prompt_edges: list[float], horizon: int
) -> Chain:
    """Put the transient states in order of their risk within the horizon, calm first."""
    chain = Chain(
        transition=parameters.transition.tolist(),
        ending=parameters.ending.tolist(),
        emission=parameters.emission.tolist(),
        edges=edges,
        prior=parameters.prior.tolist(),
        prompt_emission=parameters.prompt_emission.tolist(),
        prompt_edges=prompt_edges,
    )
    order = [*np.argsort(chain.horizon(horizon)[:-1], kind="stable"), chain.states]
    return chain.model_copy(
        update={
            "transition": parameters.transition[np.ix_(order, order)].tolist(),
            "ending": parameters.ending[order].tolist(),
            "emission": parameters.emission[order].tolist(),
            "prior": parameters.prior[order].tolist(),
            "prompt_emission": parameters.prompt_emission[order].tolist(),
        }
    )
