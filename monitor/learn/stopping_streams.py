"""Streams to try halting on: simulated from a chain, or recorded; and the beliefs along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from midstream.chain import EMISSION_FLOOR, Array, Chain
from midstream.learn.stopping import never_violates
from midstream.measure.halting import NEVER

if TYPE_CHECKING:
    from midstream.bundle import Bundle
    from midstream.measure.recording import Recording

Ints = NDArray[np.int64]

UNSCORED = -1
"""Bin of a token without evidence."""

MAX_TOKENS = 1024
"""Longest simulated stream: a chain may have violated streams that never end."""


@dataclass(frozen=True)
class Streams:
    """E streams of N places where they are judged: the end of the prompt, then every token.

    Attributes
    ----------
    starts : int64 [E + 1]
        Stream e has the rows ``starts[e]:starts[e + 1]``, one more than it has tokens.
    bins : int64 [N]
        Bin of the prompt's evidence in the first row of a stream, then of each token's;
        ``UNSCORED`` where there is none.
    violates_at : int64 [E]
        First violating token, ``NEVER`` where there is none.
    """

    starts: Ints
    bins: Ints
    violates_at: Ints

    def __len__(self) -> int:
        """Streams."""
        return len(self.violates_at)

    @property
    def tokens(self) -> Ints:
        """Tokens of each stream, [E]."""
        return np.diff(self.starts) - 1

    @property
    def safe(self) -> NDArray[np.bool_]:
        """Streams that never violate, [E]; one that was cut off before counts as safe."""
        return np.asarray(self.violates_at == NEVER)

    @property
    def first_rows(self) -> NDArray[np.bool_]:
        """Whether a row is the end of a prompt, [N]."""
        first = np.zeros(len(self.bins), np.bool_)
        first[self.starts[:-1]] = True
        return first


def simulate(chain: Chain, streams: int, seed: int, *, max_tokens: int = MAX_TOKENS) -> Streams:
    """Let a chain write streams and their evidence; linear in tokens.

    A stream that does not end in ``max_tokens`` is cut off there.
    """
    random = np.random.default_rng(seed)
    moves, emission, prompt_emission = (
        np.array(rows).cumsum(axis=1)
        for rows in (chain.transition, chain.emission, chain.prompt_emission)
    )
    ending = np.array(chain.ending)

    def draw(sums: Array, state: Ints) -> Ints:
        mark = random.random(len(state)) * sums[state, -1]
        return np.asarray((sums[state] <= mark[:, None]).sum(axis=1))

    state = draw(np.cumsum([chain.prior], axis=1), np.zeros(streams, np.int64))
    going = np.arange(streams)
    violates_at = np.full(streams, NEVER)
    owner, bins = [going], [draw(prompt_emission, state)]
    for token in range(max_tokens):
        on = random.random(len(state)) >= ending[state]
        going, state = going[on], draw(moves, state[on])
        if not len(going):
            break
        owner.append(going)
        bins.append(draw(emission, state))
        violated = going[state == chain.states]
        violates_at[violated] = np.minimum(violates_at[violated], token)
    order = np.argsort(owners := np.concatenate(owner), kind="stable")
    starts = np.concatenate([[0], np.bincount(owners, minlength=streams).cumsum()])
    return Streams(starts, np.concatenate(bins)[order], violates_at)


def recorded(recording: Recording, bundle: Bundle) -> tuple[Streams, NDArray[np.bool_]]:
    """Bins of the bundle's chain along recorded streams, and which of them could be used.

    Streams of which nobody knows whether, or where, they violate are left out. Every token from the
    first labelled one on counts as violating. O(N P).

    Returns
    -------
    Streams
    bool [E]
        Whether each stream of the recording is among them.

    Raises
    ------
    RecordingError
        When the recording was made by other probes.
    MeasureError
        When it has no labels for what the bundle looks for, or when no stream is left.
    """
    from midstream.measure.evidence import log_hazards
    from midstream.measure.outcomes import MeasureError, Outcomes
    from midstream.measure.rejudge import rejudge

    hazards = list(dict.fromkeys(bundle.bank.hazards))
    truth = Outcomes.of(recording, rejudge(recording, bundle), hazards)
    used = truth.placed
    if not used.any():
        raise MeasureError(
            "of no stream it is known whether and where it violates; label the recording"
        )
    hazard = log_hazards(recording, bundle)
    bins = np.where(
        recording.in_response,
        np.searchsorted(bundle.chain.edges, hazard.token, side="right"),
        np.searchsorted(bundle.chain.prompt_edges, hazard.token, side="right"),
    )
    kept = hazard.scored & (truth.position >= -1) & used[truth.stream]
    starts = np.concatenate([[0], (truth.tokens[used] + 1).cumsum()])
    rows = np.full(starts[-1], UNSCORED)
    renumbered = used.cumsum() - 1
    place = starts[renumbered[truth.stream[kept]]] + truth.position[kept] + 1
    rows[place] = bins[kept]
    violates_at = np.where(truth.located, truth.violates_at, NEVER)[used]
    return Streams(starts, rows, violates_at), used


@dataclass(frozen=True)
class Stakes:
    """What is at stake in each of N rows: as it turned out, or as it must be expected.

    Attributes
    ----------
    violated : float64 [N]
        Whether the stream has violated by then, or the chance of it.
    stays : float64 [N]
        Of a stream that goes on and is violated one token later: whether it was by now.
    harmless : float64 [N]
        Whether it never violates.
    harmless_end : float64 [N]
        The same if this is its last row.
    """

    violated: Array
    stays: Array
    harmless: Array
    harmless_end: Array

    @classmethod
    def known(cls, streams: Streams) -> Stakes:
        """What is written in the labels."""
        owner = np.repeat(np.arange(len(streams)), streams.tokens + 1)
        token = np.arange(len(owner)) - streams.starts[owner] - 1
        violated = (token >= streams.violates_at[owner]).astype(np.float64)
        safe = streams.safe[owner].astype(np.float64)
        return cls(violated, violated, safe, safe)

    @classmethod
    def expected(cls, chain: Chain, streams: Streams) -> Stakes:
        """What a chain expects of streams that it has written itself.

        Costs have the same mean as by ``known``, and far less variance: a leak that happens once
        in 10,000 streams is there in each of them, by its chance.
        """
        k, p, c = chain.states, chain.absorbing, np.array(chain.ending)
        beliefs = follow(chain, streams, floor=0.0)
        violated = beliefs[:, k]
        stays, enters = violated * (1 - c[k]), beliefs[:, :k] @ p[:k, k]
        ends, ends_violated = beliefs[:, :k] @ c[:k], violated * c[k]
        return cls(
            violated=violated,
            stays=_share(stays, stays + enters),
            harmless=beliefs @ never_violates(chain),
            harmless_end=_share(ends, ends + ends_violated),
        )


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def follow(chain: Chain, streams: Streams, *, floor: float = EMISSION_FLOOR) -> Array:
    """Belief after each row, [N, K+1], filtered as in design section 4.4; O(N K^2) time.

    Parameters
    ----------
    chain : Chain
    streams : Streams
    floor : float
        Smallest P(bin | state): serving's, or 0 for streams that the chain itself has written.
    """
    emission, prompt_emission = (
        np.maximum(rows, floor) for rows in (chain.emission, chain.prompt_emission)
    )
    emission /= emission.sum(axis=1, keepdims=True)
    prompt_emission /= prompt_emission.sum(axis=1, keepdims=True)
    step = (1 - np.array(chain.ending))[:, None] * np.array(chain.transition)
    beliefs = np.empty((len(streams.bins), chain.states + 1))
    order = np.argsort(-streams.tokens, kind="stable")
    lengths = streams.tokens[order]
    for token in range(-1, int(lengths[0])):
        rows = streams.starts[order[lengths > token]] + token + 1
        if token < 0:
            before = np.broadcast_to(np.array(chain.prior), (len(rows), chain.states + 1))
            table = prompt_emission
        else:
            before = _normalised(beliefs[rows - 1] @ step, beliefs[rows - 1])
            table = emission
        seen = streams.bins[rows]
        likelihood = np.where((seen != UNSCORED)[:, None], table.T[seen], 1.0)
        beliefs[rows] = _normalised(before * likelihood, before)
    return beliefs


def _normalised(mass: Array, otherwise: Array) -> Array:
    total = mass.sum(axis=1, keepdims=True)
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), otherwise)
