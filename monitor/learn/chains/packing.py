"""Many streams side by side, token by token, for filters that take a token of each at a time.

As recurrent networks pack them: the longest streams first, so that those which still run are always
the first rows and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.chain import ChainError
from midstream.learn.chains.symbols import SymbolStream

Indices = NDArray[np.int64]

_PART_TOKENS = 1 << 14  # filtered together: what they need stays in the cache

UNKNOWN, TRANSIENT, VIOLATED = -1, 0, 1
"""Labels of a token."""


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
    everywhere = TRANSIENT if stream.violates is False else UNKNOWN
    label = np.full(len(stream.bins), everywhere, dtype=np.int8)
    if stream.violates:
        label[-1] = VIOLATED
    return label


def known_to_violate(stream: SymbolStream) -> bool:
    """Whether the labels, of the tokens or of the stream, say that it violates."""
    return stream.violates is True or (stream.violated is not None and bool(stream.violated[-1]))


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
