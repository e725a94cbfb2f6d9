"""Filter, smoother and likelihood of many streams at once, by the words of design section 4.4.

The belief before the first token is the prior weighed by the prompt's bin. A token says that the
stream went on (``1 - c``), where it moved (``A``) and what its bin was; ``c`` of the last state
says that the stream ended. Streams without a token are never seen, so likelihoods are given that
there is a first one: they do not hold it for evidence about ``c``.

Streams go through it packed (`midstream.learn.chains.packing`). Time and memory are linear in
tokens, about 0.2 us a token in each direction with 6 states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.chain import EMISSION_FLOOR, Chain, ChainError
from midstream.learn.chains.packing import TRANSIENT, VIOLATED, PackedStreams, check_bins, pack
from midstream.learn.chains.symbols import SymbolStream

Array = NDArray[np.float64]

LARGEST_ENDING = 1 - 1e-6
"""Largest ``c``: a stream that went on has to be somewhere."""


@dataclass(frozen=True)
class Parameters:
    """A chain's numbers as arrays, states ``{0 ... K-1, V}``; the shapes are those of `Chain`."""

    prior: Array
    transition: Array
    ending: Array
    emission: Array
    prompt_emission: Array

    @classmethod
    def of(cls, chain: Chain) -> Parameters:
        """Read a chain, its rows made to sum to one."""

        def rows(values: list[list[float]]) -> Array:
            found = np.array(values, dtype=np.float64)
            return np.asarray(found / found.sum(axis=1, keepdims=True))

        return cls(
            prior=rows([chain.prior])[0],
            transition=rows(chain.transition),
            ending=np.array(chain.ending),
            emission=rows(chain.emission),
            prompt_emission=rows(chain.prompt_emission),
        )

    @property
    def onward(self) -> Array:
        """Chance to go on and be in j at the next token, [K+1, K+1]."""
        return (1 - self.ending)[:, None] * self.transition

    def evidence(self, packed: PackedStreams) -> Array:
        """P(bin of each token | state), 0 for the states that its label rules out; [N, K+1]."""
        found = self.emission.T[packed.bins]
        found[packed.label == TRANSIENT, -1] = 0
        found[packed.label == VIOLATED, :-1] = 0
        return found


def as_served(chain: Chain) -> Chain:
    """Apply the floors under which the kernels filter: no bin rules a state out."""

    def floored(rows: list[list[float]]) -> list[list[float]]:
        values = np.maximum(np.array(rows), EMISSION_FLOOR)
        return (values / values.sum(axis=1, keepdims=True)).tolist()  # type: ignore[no-any-return]

    return chain.model_copy(
        update={
            "emission": floored(chain.emission),
            "prompt_emission": floored(chain.prompt_emission),
            "ending": np.minimum(chain.ending, LARGEST_ENDING).tolist(),
        }
    )


@dataclass(frozen=True)
class Filtered:
    """Beliefs forward through packed streams.

    Attributes
    ----------
    belief : float64 [E + N, K+1]
        P(state | all so far): first before the first token of each stream, then a row per token.
    evidence : float64 [N, K+1]
        P(bin and label of the token | state).
    scale : float64 [N]
        P(stream goes on, bin and label of the token | all before).
    log_likelihood : float64 [E]
        Natural log of the chance of prompt bin, bins, labels and end, given a first token.
    """

    belief: Array
    evidence: Array
    scale: Array
    log_likelihood: Array


def forward(parameters: Parameters, packed: PackedStreams) -> Filtered:
    """Filter (Rabiner 1989, section V.A: each step scaled to sum one, so nothing underflows).

    Raises
    ------
    ChainError
        When a stream cannot happen under the chain at all.
    """
    streams, begins = len(packed.index), packed.begins
    evidence, onward = parameters.evidence(packed), parameters.onward
    ones = np.ones(len(onward))  # a product is the quickest sum of short rows
    belief = np.empty((streams + len(packed.bins), len(parameters.prior)))
    scale = np.empty(len(packed.bins))
    first = parameters.prior * parameters.prompt_emission.T[packed.prompt_bins]
    first_scale = first.sum(axis=1)
    _check_possible(first_scale, packed, 0)
    now = belief[:streams] = first / first_scale[:, None]
    for t, live in enumerate(packed.live):
        rows = slice(begins[t], begins[t + 1])
        moved = (now[:live] @ onward) * evidence[rows]
        total = moved @ ones
        _check_possible(total, packed, t + 1)
        scale[rows] = total
        now = np.divide(moved, total[:, None], out=belief[streams:][rows])
    end = _ending(parameters, packed)
    last = (belief[streams:][packed.last] * end).sum(axis=1)
    _check_possible(last, packed, -1)
    # A stream that is seen has a first token, which is no evidence then.
    some_token = np.log(parameters.prior @ (1 - parameters.ending))
    log_likelihood = np.log(first_scale) + np.log(last) - some_token
    log_likelihood += np.bincount(packed.stream, weights=np.log(scale), minlength=streams)
    return Filtered(belief, evidence, scale, log_likelihood)


def _ending(parameters: Parameters, packed: PackedStreams) -> Array:
    """P(what is known of the end | last state), [E, K+1]."""
    return np.where(packed.ended[:, None], parameters.ending, 1.0)


def _check_possible(chance: Array, packed: PackedStreams, token: int) -> None:
    """Refuse a stream that cannot happen; token 0 is the prompt, -1 the end."""
    if chance.min() > 0:
        return
    e = int(chance.argmin())
    where = {0: "its prompt bin", -1: "its end"}.get(token, f"token {token}")
    raise ChainError(
        f"stream {packed.index[e]} cannot happen under the chain: {where} has likelihood 0; fit "
        "with a prior count above 0, or filter as the kernels do (as_served)"
    )


@dataclass(frozen=True)
class Smoothed:
    """Beliefs given whole streams, and what is counted from them; rows as in `Filtered`.

    Attributes
    ----------
    belief : float64 [E + N, K+1]
        P(state | the whole stream).
    moves : float64 [K+1, K+1]
        Expected moves from state to state, from before the first token on.
    log_likelihood : float64 [E]
    """

    belief: Array
    moves: Array
    log_likelihood: Array


def smooth(parameters: Parameters, packed: PackedStreams) -> Smoothed:
    """Forward-backward (Baum et al. 1970), the backward pass scaled to sum one."""
    filtered = forward(parameters, packed)
    streams, begins = len(packed.index), packed.begins
    back, ones = parameters.onward.T, np.ones(len(parameters.prior))
    after = np.empty_like(filtered.belief)
    end = _ending(parameters, packed)
    after[streams:][packed.last] = end / (end @ ones)[:, None]
    for t in range(len(packed.live) - 1, -1, -1):
        rows, live = slice(begins[t], begins[t + 1]), packed.live[t]
        earlier = slice(streams + begins[t - 1], streams + begins[t - 1] + live)
        seen = filtered.evidence[rows] * after[streams:][rows] @ back
        np.divide(seen, (seen @ ones)[:, None], out=after[earlier if t else slice(0, live)])
    belief = filtered.belief * after
    total = (belief @ ones)[:, None]
    belief /= total
    weighed = filtered.evidence * after[streams:] / (filtered.scale[:, None] * total[streams:])
    moves = parameters.onward * (filtered.belief[packed.before].T @ weighed)
    return Smoothed(belief, moves, filtered.log_likelihood)


def log_likelihood(chain: Chain, streams: Sequence[SymbolStream]) -> Array:
    """Natural log of the chance of each stream's bins, labels and end, given a first token; [E].

    Raises
    ------
    ChainError
        When a stream cannot happen under the chain, or has bins the chain does not have.
    """
    check_bins(streams, len(chain.edges) + 1, len(chain.prompt_edges) + 1)
    found = np.empty(len(streams))
    for packed in pack(streams):
        found[packed.index] = forward(Parameters.of(chain), packed).log_likelihood
    return found


def posteriors(chain: Chain, streams: Sequence[SymbolStream]) -> list[Array]:
    """P(state | the whole stream and its labels) of each stream, [n + 1, K+1]."""
    check_bins(streams, len(chain.edges) + 1, len(chain.prompt_edges) + 1)
    found: dict[int, Array] = {}
    for packed in pack(streams):
        found.update(_by_stream(packed, smooth(Parameters.of(chain), packed).belief))
    return [found[e] for e in range(len(streams))]


def forecasts(
    chain: Chain, streams: Sequence[SymbolStream], horizons: Sequence[int]
) -> list[Array]:
    """Horizon risk along streams, from their evidence alone: labels and ends are not looked at.

    Parameters
    ----------
    chain : Chain
        Give `as_served` (chain) for the very risk that a monitor shows.
    streams : sequence of SymbolStream
    horizons : sequence of int

    Returns
    -------
    list of float64 [H, n + 1]
        P(violated now or within h more tokens), before the first token and after each.
    """
    check_bins(streams, len(chain.edges) + 1, len(chain.prompt_edges) + 1)
    ahead = np.stack([chain.horizon(tokens) for tokens in horizons], axis=1)
    found: dict[int, Array] = {}
    for packed in pack([_unlabelled(stream) for stream in streams]):
        risk = forward(Parameters.of(chain), packed).belief @ ahead
        found.update(_by_stream(packed, risk))
    return [np.ascontiguousarray(found[e].T) for e in range(len(streams))]


def _unlabelled(stream: SymbolStream) -> SymbolStream:
    return SymbolStream(stream.bins, None, None, False, stream.prompt_bin)


def _by_stream(packed: PackedStreams, rows: Array) -> Iterator[tuple[int, Array]]:
    """Each stream's rows of an array [E + N, ...] with its number."""
    streams = len(packed.index)
    lengths = np.searchsorted(-packed.live, -np.arange(streams), side="left")
    begins = np.concatenate([[0], streams + packed.begins[:-1]])
    for e, (index, length) in enumerate(zip(packed.index, lengths, strict=True)):
        yield int(index), rows[begins[: length + 1] + e]
