"""Fitting a chain by counts, where the state of every token is seen (SafetyDrift, 2603.27148)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Array, Chain, ChainError
from midstream.learn.chains.symbols import SymbolStream


@dataclass(frozen=True)
class Posterior:
    """Parameters of the Dirichlets of a chain's moves [K+1, K+1] and of its endings [K+1, 2].

    The last row, V's, is no matter of chance for the moves.
    """

    moves: Array
    ends: Array


@dataclass(frozen=True)
class Counts:
    """How often each thing was seen: all that a fit by counts needs of its streams.

    Attributes
    ----------
    moves : float64 [K+1, K+1]
        From a token's state to the next one's; V is index K.
    ends : float64 [K+1]
        Streams that ended in this state.
    emission : float64 [K+1, O]
        Tokens by state and evidence bin.
    first : float64 [K+1, O']
        Streams by the state of their first token and the bin of their prompt.
    """

    moves: Array
    ends: Array
    emission: Array
    first: Array

    def __add__(self, other: Counts) -> Counts:
        """Counts of both sets of streams."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counts) -> Counts:
        """Counts without those of some of the streams."""
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def states(self) -> int:
        """K, the number of transient states."""
        return len(self.ends) - 1

    @property
    def ends_or_goes_on(self) -> Array:
        """Tokens by state that were the last one, or not, [K+1, 2]."""
        return np.stack([self.ends, self.moves.sum(axis=1)], axis=1)

    def posterior(self, prior_count: float) -> Posterior:
        """What is known of moves and endings after these counts.

        Both priors are centred on what the transient states do together. A uniform one would find
        it as likely that a calm stream jumps into a bin only violated streams are in as that it
        violates, and that a stream ends at a token of a rare state as that it goes on.
        """
        if prior_count < 0:
            raise ChainError(f"prior_count: expected 0 or more, got {prior_count}")
        moves, ends = self.moves, self.ends_or_goes_on
        together = moves[: self.states].sum(axis=0) + 1 / (self.states + 1)
        end_or_go_on = ends[: self.states].sum(axis=0) + 1 / 2
        return Posterior(
            moves + prior_count * together / together.sum(),
            ends + prior_count * end_or_go_on / end_or_go_on.sum(),
        )

    def tables(self) -> dict[str, Array]:
        """Counts of every table of a chain by its name; ``ending`` is [K+1, 2], as above.

        V's moves are left out: they are no matter of chance.
        """
        moves = self.moves.copy()
        moves[-1] = 0.0
        return {
            "transition": moves,
            "ending": self.ends_or_goes_on,
            "emission": self.emission,
            "prior": self.first.sum(axis=1)[None],
            "prompt_emission": self.first,
        }


def count(streams: Sequence[SymbolStream], states: int, *, prompt_bins: int = 1) -> Counts:
    """Count moves, ends, bins and prompts of streams whose states are their bins. O(tokens).

    Parameters
    ----------
    streams : sequence of SymbolStream
        All known to violate or not, and where: there is a ChainError for one that is not.
    states : int
        K: bins below it are the transient states; a violated token's state is V, whatever its bin.
    prompt_bins : int
    """
    moves = np.zeros((states + 1, states + 1))
    ends = np.zeros(states + 1)
    emission = np.zeros((states + 1, states))
    first = np.zeros((states + 1, prompt_bins))
    for index, stream in enumerate(streams):
        state = state_path(stream, states, index)
        if stream.prompt_bin >= prompt_bins:
            raise ChainError(
                f"stream {index}: its prompt's bin is {stream.prompt_bin}, expected one below "
                f"{prompt_bins}"
            )
        np.add.at(moves, (state[:-1], state[1:]), 1)
        ends[state[-1]] += stream.ended
        np.add.at(emission, (state, stream.bins), 1)
        first[state[0], stream.prompt_bin] += 1
    return Counts(moves, ends, emission, first)


def state_path(stream: SymbolStream, states: int, index: int) -> NDArray[np.int64]:
    """State of each token [n]: its bin, or ``states`` once the stream has violated.

    ``index`` names the stream in the ChainError that is raised where this is not known.
    """
    if (largest := int(stream.bins.max())) >= states:
        raise ChainError(f"stream {index}: has bin {largest}, expected bins below {states}")
    if stream.violated is not None:
        return np.where(stream.violated, states, stream.bins)
    if stream.violates is False:
        return stream.bins
    known = "violates, but nobody knows where" if stream.violates else "may violate or not"
    raise ChainError(
        f"stream {index}: {known}; to fit by counts say at which token, or leave it out, or fit "
        "by EM"
    )


def fit_symbols_by_counts(
    streams: Sequence[SymbolStream],
    states: int,
    *,
    edges: Sequence[float] | None = None,
    prompt_edges: Sequence[float] | None = None,
    prior_count: float = 1.0,
) -> Chain:
    """Fit a chain whose transient states are the evidence bins, at any clock.

    Counts with a Dirichlet prior of total weight ``prior_count`` per row; those of transitions and
    endings are centred on what all states do together, every other one is uniform. A transient
    state emits its own bin; V emits the bins seen at violated tokens. The state of the first token
    stands for the state before it.

    Parameters
    ----------
    streams : sequence of SymbolStream
        At least one of them violated, or there is a ChainError.
    states : int
        K; bins lie below it.
    edges : [K-1], optional
        Edges between the bins, ascending; 0.5, 1.5 ... when not given, so that a level is its bin.
    prompt_edges : [O'-1], optional
        The same for the prompts' bins; as many as the streams' bins ask for when not given.
    prior_count : float
        Pseudo-counts per row; 0 is the maximum-likelihood fit, in which a state that was never
        left stays where it is.
    """
    if edges is None:
        edges = _between(states)
    if prompt_edges is None:
        prompt_edges = _between(max((stream.prompt_bin for stream in streams), default=0) + 1)
    counts = count(streams, states, prompt_bins=len(prompt_edges) + 1)
    return chain_of(counts, edges=edges, prompt_edges=prompt_edges, prior_count=prior_count)


def chain_of(
    counts: Counts,
    *,
    edges: Sequence[float],
    prompt_edges: Sequence[float] = (),
    prior_count: float = 1.0,
) -> Chain:
    """Return the posterior mean of a chain; parameters as for :func:`fit_symbols_by_counts`."""
    if not counts.emission[-1].any():
        raise ChainError("fit_by_counts: no stream violates, so nothing can be learnt about it")
    return chain_from(posterior_means(counts, prior_count), edges, prompt_edges)


def posterior_means(counts: Counts, prior_count: float) -> dict[str, Array]:
    """Tables of a chain, named and shaped as `Counts.tables`, each row a distribution."""
    k = counts.states
    stay = np.eye(k + 1)
    posterior = counts.posterior(prior_count)
    transition = posterior_mean(posterior.moves, stay)
    transition[k] = stay[k]
    emission = posterior_mean(counts.emission + prior_count / k, 1 / k)
    emission[:k] = np.eye(k)
    first, prompts = counts.first, counts.first.shape[1]
    return {
        "transition": transition,
        "ending": posterior_mean(posterior.ends, np.array([0.0, 1.0])),
        "emission": emission,
        "prior": posterior_mean(first.sum(axis=1)[None] + prior_count / (k + 1)),
        "prompt_emission": posterior_mean(first + prior_count / prompts, 1 / prompts),
    }


def chain_from(
    tables: Mapping[str, Array], edges: Sequence[float], prompt_edges: Sequence[float]
) -> Chain:
    """Make a chain of tables as :func:`posterior_means` returns them."""
    return Chain(
        transition=tables["transition"].tolist(),
        ending=tables["ending"][:, 0].tolist(),
        emission=tables["emission"].tolist(),
        edges=list(map(float, edges)),
        prior=tables["prior"][0].tolist(),
        prompt_emission=tables["prompt_emission"].tolist(),
        prompt_edges=list(map(float, prompt_edges)),
    )


def posterior_mean(alphas: Array, otherwise: Array | float = 0.0) -> Array:
    """Mean of each row's Dirichlet, or that of ``otherwise`` where the row has no mass at all."""
    total = alphas.sum(axis=1, keepdims=True)
    return np.where(total > 0, alphas / np.where(total > 0, total, 1.0), otherwise)


def _between(bins: int) -> list[float]:
    return [o + 0.5 for o in range(bins - 1)]


@dataclass(frozen=True)
class ObservedStream:
    """One labelled stream of evidence for fitting; a ChainError where it cannot be one.

    Attributes
    ----------
    log_hazard : float [n]
        Cumulative log-hazard of the response evidence at each response token, n >= 1.
    violated : bool [n]
        Whether the stream has violated at or before this token.
    ended : bool
        False where generation was cut off: its last token says nothing about ending.
    prompt_log_hazard : float
        The same sum over the prompt probes at the last prompt token; 0 without prompt probes.
    """

    log_hazard: Array
    violated: NDArray[np.bool_]
    ended: bool
    prompt_log_hazard: float = 0.0

    def __post_init__(self) -> None:
        if len(self.log_hazard) != len(self.violated) or len(self.violated) == 0:
            raise ChainError("violated: expected one label per log_hazard, and at least one")
        if not np.isfinite(np.append(self.log_hazard, self.prompt_log_hazard)).all():
            raise ChainError("log_hazard: holds a NaN or an infinity; leave unscored tokens out")
        if (self.violated[:-1] & ~self.violated[1:]).any():
            raise ChainError("violated: a stream that has violated stays violated")

    def symbols(
        self, edges: Sequence[float], prompt_edges: Sequence[float] = (), category: str = ""
    ) -> SymbolStream:
        """Bin the evidence."""
        return SymbolStream(
            bins=np.searchsorted(edges, self.log_hazard, side="right"),
            violated=self.violated,
            violates=bool(self.violated[-1]),
            ended=self.ended,
            prompt_bin=int(np.searchsorted(prompt_edges, self.prompt_log_hazard, side="right")),
            category=category,
        )


def fit_by_counts(
    streams: Sequence[ObservedStream],
    edges: Sequence[float],
    *,
    prompt_edges: Sequence[float] = (),
    prior_count: float = 1.0,
) -> Chain:
    """Bin streams of evidence and do what :func:`fit_symbols_by_counts` says.

    Parameters
    ----------
    streams : sequence of ObservedStream
    edges, prompt_edges : ascending
        Edges between the K bins of the cumulative log-hazard, and the same for the prompt's.
    prior_count : float
    """
    return fit_symbols_by_counts(
        [stream.symbols(edges, prompt_edges) for stream in streams],
        len(edges) + 1,
        edges=edges,
        prompt_edges=prompt_edges,
        prior_count=prior_count,
    )
