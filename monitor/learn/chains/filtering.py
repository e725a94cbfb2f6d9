"""Filter, smoother and likelihood of many streams at once, by the words of design section 4.4.

The belief before the first token is the prior weighed by the prompt's bin. A token says that the
stream went on (``1 - c``), where it moved (``A``) and what its bin was; ``c`` of the last state
says that the stream ended. Streams without a token are never seen, so likelihoods are given that
there is a first one: they do not hold it for evidence about ``c``.

Streams are packed as recurrent networks pack them: token by token, the longest streams first, so
that those which still run are always the first rows and nothing is padded. Time and memory are
linear in tokens, about 0.2 us a token in each direction with 6 states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.chain import EMISSION_FLOOR, Chain, ChainError
from midstream.learn.chains.symbols import SymbolStream

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

LARGEST_ENDING = 1 - 1e-6
"""Largest ``c``: a stream that went on has to be somewhere."""

_PART_TOKENS = 1 << 18  # tokens that are filtered together, which bounds the memory

_UNKNOWN, _TRANSIENT, _VIOLATED = -1, 0, 1


@dataclass(frozen=True)
class PackedStreams:
    """E streams of N tokens, token by token: first every stream's first token, and so on.

    Attributes
    ----------
    index : int64 [E]
        Which of the streams given each is; the longest come first.
    live : int64 [T]
        How many streams have so many tokens at least; never rises.
    bins : int64 [N]
        Row ``live[:t].sum() + e`` is token t of stream e.
    label : int8 [N]
        1 for a token known as violated, 0 for one known as not, -1 otherwise.
    prompt_bins : int64 [E]
    ended : bool [E]
    """

    index: Indices
    live: Indices
    bins: Indices
    label: NDArray[np.int8]
    prompt_bins: Indices
    ended: NDArray[np.bool_]

    @property
    def begins(self) -> Indices:
        """First row of each token, and the number of rows; [T + 1]."""
        return np.concatenate([[0], np.cumsum(self.live)])

    @property
    def stream(self) -> Indices:
        """Which stream, of these, each row belongs to; [N]."""
        return np.arange(len(self.bins)) - np.repeat(self.begins[:-1], self.live)

    @property
    def last(self) -> Indices:
        """Row of the last token of each stream, [E]."""
        streams = np.arange(len(self.index))
        lengths = np.searchsorted(-self.live, -streams, side="left")
        return np.asarray(self.begins[lengths - 1] + streams, dtype=np.int64)

    @property
    def before(self) -> Indices:
        """Row of the token before each token, in an array with one row per stream in front."""
        begins = np.concatenate([[0], len(self.index) + self.begins[:-2]])
        return np.repeat(begins, self.live) + self.stream


def pack(streams: Sequence[SymbolStream]) -> list[PackedStreams]:
    """Pack streams of like length into parts that are filtered together.

    A stream that is known not to violate is labelled at every token, one that does at the last,
    since *violated* is absorbing.
    """
    lengths = np.array([len(stream.bins) for stream in streams], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    part = (np.cumsum(lengths[order]) - lengths[order]) // _PART_TOKENS
    return [_pack(streams, order[part == p]) for p in np.unique(part)]


def _pack(streams: Sequence[SymbolStream], index: Indices) -> PackedStreams:
    chosen = [streams[e] for e in index]
    lengths = np.array([len(stream.bins) for stream in chosen])
    live = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(lengths[0]), side="right")
    begins = np.concatenate([[0], np.cumsum(live)])
    token = np.concatenate([np.arange(length) for length in lengths])
    row = begins[token] + np.repeat(np.arange(len(chosen)), lengths)
    bins = np.empty(len(row), dtype=np.int64)
    label = np.empty(len(row), dtype=np.int8)
    bins[row] = np.concatenate([stream.bins for stream in chosen])
    label[row] = np.concatenate([_labels(stream) for stream in chosen])
    return PackedStreams(
        index=index,
        live=live,
        bins=bins,
        label=label,
        prompt_bins=np.array([stream.prompt_bin for stream in chosen]),
        ended=np.array([stream.ended for stream in chosen]),
    )


def _labels(stream: SymbolStream) -> NDArray[np.int8]:
    if stream.violated is not None:
        return stream.violated.astype(np.int8)
    everywhere = _TRANSIENT if stream.violates is False else _UNKNOWN
    label = np.full(len(stream.bins), everywhere, dtype=np.int8)
    if stream.violates:
        label[-1] = _VIOLATED
    return label


def known_to_violate(stream: SymbolStream) -> bool:
    """Whether the labels, of the tokens or of the stream, say that it violates."""
    return stream.violates is True or (stream.violated is not None and bool(stream.violated[-1]))


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
        found[packed.label == _TRANSIENT, -1] = 0
        found[packed.label == _VIOLATED, :-1] = 0
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
    scale : float64 [N]
        P(stream goes on, bin and label of the token | all before).
    log_likelihood : float64 [E]
        Natural log of the chance of prompt bin, bins, labels and end, given a first token.
    """

    belief: Array
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
    belief = np.empty((streams + len(packed.bins), len(parameters.prior)))
    scale = np.empty(len(packed.bins))
    first = parameters.prior * parameters.prompt_emission.T[packed.prompt_bins]
    first_scale = first.sum(axis=1)
    _check_possible(first_scale, packed, 0)
    now = belief[:streams] = first / first_scale[:, None]
    for t, live in enumerate(packed.live):
        rows = slice(begins[t], begins[t + 1])
        moved = (now[:live] @ onward) * evidence[rows]
        total = moved.sum(axis=1)
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
    return Filtered(belief, scale, log_likelihood)


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
    """Forward-backward (Baum et al. 1970), the backward pass scaled to a maximum of one."""
    filtered = forward(parameters, packed)
    streams, begins = len(packed.index), packed.begins
    evidence, back = parameters.evidence(packed), parameters.onward.T
    after = np.empty_like(filtered.belief)
    end = _ending(parameters, packed)
    after[streams:][packed.last] = end / end.max(axis=1, keepdims=True)
    for t in range(len(packed.live) - 1, -1, -1):
        rows, live = slice(begins[t], begins[t + 1]), packed.live[t]
        earlier = slice(streams + begins[t - 1], streams + begins[t - 1] + live)
        seen = (evidence[rows] * after[streams:][rows]) @ back
        after[earlier if t else slice(0, live)] = seen / seen.max(axis=1, keepdims=True)
    belief = filtered.belief * after
    total = belief.sum(axis=1, keepdims=True)
    belief /= total
    weighed = evidence * after[streams:] / (filtered.scale[:, None] * total[streams:])
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


def check_bins(streams: Sequence[SymbolStream], bins: int, prompt_bins: int) -> None:
    """Refuse streams whose bins lie outside of ``bins`` and ``prompt_bins``, and no streams."""
    if len(streams) == 0:
        raise ChainError("streams: expected at least one")
    for e, stream in enumerate(streams):
        if stream.bins.max() >= bins or stream.prompt_bin >= prompt_bins:
            raise ChainError(
                f"stream {e}: has bin {stream.bins.max()} and prompt bin {stream.prompt_bin}; "
                f"expected them below {bins} and {prompt_bins}"
            )
