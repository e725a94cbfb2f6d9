"""Residuals of labelled tokens, kept: in memory, or in a folder on disk."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.fingerprint import Fingerprint
from midstream.learn import collection
from midstream.learn.collection import CollectionError, Manifest
from midstream.learn.tokens import Chunk, Tokens, TrainingDataError
from midstream.taps import Tap

Indices = NDArray[np.int64]

CHUNK_BYTES = 1 << 26  # of fp32, over all taps


class InMemory:
    """Residuals in memory, for sets that are small.

    Parameters
    ----------
    tokens : Tokens
        N rows.
    hidden : mapping of Tap to floating Tensor [N, d]
        One or more taps, all of one width.
    chunk_bytes : int
        A chunk holds no more than this, unless one example alone does.

    Raises
    ------
    TrainingDataError
        Without taps, or where a tensor's shape does not fit to the tokens or to the other taps.
    """

    def __init__(
        self, tokens: Tokens, hidden: Mapping[Tap, Tensor], *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        if not hidden:
            raise TrainingDataError("residuals of no tap: give at least one")
        self.tokens = tokens
        self.taps = tuple(hidden)
        self.width = next(iter(hidden.values())).shape[-1]
        self.chunk_bytes = chunk_bytes
        self._hidden = dict(hidden)
        expected = (int(tokens.starts[-1]), self.width)
        for tap, values in hidden.items():
            if values.shape != expected:
                raise TrainingDataError(
                    f"residuals at {tap} have shape {list(values.shape)}, the tokens and the other "
                    f"taps ask for {list(expected)}"
                )

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        """Every example once: in order, or shuffled by ``seed``."""
        bytes_per_token = 4 * self.width * len(self.taps)
        for examples in chunked(self.tokens, self.chunk_bytes // bytes_per_token, seed):
            rows = self.tokens.rows(examples)
            yield Chunk(
                examples, rows, {tap: values[rows].float() for tap, values in self._hidden.items()}
            )

    def select(self, examples: Sequence[int] | Indices) -> Self:
        """Return the same for some of the examples, in the order given."""
        rows = self.tokens.rows(examples)
        return type(self)(
            self.tokens.select(examples),
            {tap: values[rows] for tap, values in self._hidden.items()},
            chunk_bytes=self.chunk_bytes,
        )


class Activations:
    """Residuals in a folder that `midstream.learn.collect.collect` wrote.

    Shards are mapped into memory and read as they are asked for. In order, one shard is mapped at a
    time. Shuffled, the order is drawn over the whole set, so that one that is sorted by its labels
    is mixed, too, and all shards are mapped; what was read of them the system can drop. Beside that
    a pass takes the memory of one chunk.

    Attributes
    ----------
    folder : Path
    manifest : Manifest
        What was collected, and from which model.
    tokens : Tokens
    chunk_bytes : int
        A chunk holds no more than this, unless one example alone does.
    """

    def __init__(self, folder: Path, manifest: Manifest, tokens: Tokens, chunk_bytes: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokens = tokens
        self.chunk_bytes = chunk_bytes
        self._starts = tokens.starts
        self._examples = np.arange(len(tokens))  # which of the collected ones these are
        self._verified: set[int] = set()  # shards; shared with what is selected from here

    @classmethod
    def open(cls, folder: str | Path, *, chunk_bytes: int = CHUNK_BYTES) -> Self:
        """Open a complete collection. The hash of a shard is checked before its first use, once.

        Raises
        ------
        CollectionError
            If the folder holds no collection, an incomplete one (with the command that goes on),
            one of another schema, or one whose tokens were changed.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            done = manifest.shards[-1].end if manifest.shards else 0
            raise CollectionError(
                f"the collection in {folder} is incomplete, with {done} of {manifest.examples} "
                f"examples; to go on: {manifest.command}"
            )
        _verify(folder / collection.TOKENS, manifest.tokens_sha256)
        return cls(folder, manifest, collection.read_tokens(folder), chunk_bytes)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where the residuals were read."""
        return tuple(map(Tap.parse, self.manifest.taps))

    @property
    def width(self) -> int:
        """``d``."""
        return self.manifest.width

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model that was read."""
        return self.manifest.fingerprint

    def select(self, examples: Sequence[int] | Indices) -> Self:
        """Return the same for some of the examples, in the order given; no residual is copied."""
        chosen = np.asarray(examples, dtype=np.int64)
        selected = copy.copy(self)
        selected.tokens = self.tokens.select(chosen)
        selected._examples = self._examples[chosen]
        return selected

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        """Every example once: in order, or shuffled by ``seed``.

        Raises
        ------
        CollectionError
            If a shard is missing or was changed.
        """
        ends = np.array([shard.end for shard in self.manifest.shards])
        mapped: dict[int, dict[Tap, Tensor]] = {}
        bytes_per_token = 4 * self.width * len(self.taps)
        for examples in chunked(self.tokens, self.chunk_bytes // bytes_per_token, seed):
            rows = self.tokens.rows(examples)
            hidden = {tap: torch.empty(len(rows), self.width) for tap in self.taps}
            stored = self._examples[examples]
            shards = np.searchsorted(ends, stored, side="right")
            # Examples that stand side by side in one shard are one copy.
            cuts = np.flatnonzero((np.diff(stored) != 1) | (np.diff(shards) != 0)) + 1
            to = 0
            for run in np.split(np.arange(len(stored)), cuts):
                shard = int(shards[run[0]])
                if shard not in mapped:
                    if seed is None:
                        mapped.clear()
                    mapped[shard] = self._map(shard)
                offset = self._starts[self.manifest.shards[shard].first]
                begin = self._starts[stored[run[0]]] - offset
                end = self._starts[stored[run[-1]] + 1] - offset
                for tap, values in mapped[shard].items():
                    hidden[tap][to : to + end - begin] = values[begin:end]
                to += end - begin
            yield Chunk(examples, rows, hidden)

    def _map(self, index: int) -> dict[Tap, Tensor]:
        if index not in self._verified:
            recorded = self.manifest.shards[index].sha256
            _verify(self.folder / collection.shard_name(index), recorded)
            self._verified.add(index)
        return collection.open_shard(self.folder, index)


def _verify(path: Path, recorded: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CollectionError(f"{path} is missing: collect again, into another folder") from None
    if found != recorded:
        raise CollectionError(
            f"{path} was cut short or changed: its sha256 is {found}, {collection.MANIFEST} says "
            f"{recorded}; collect again, into another folder"
        )


def chunked(tokens: Tokens, chunk_tokens: int, seed: int | None = None) -> Iterator[Indices]:
    """Every example once, in groups of at most ``chunk_tokens`` tokens or of one example."""
    order = np.arange(len(tokens))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    ends = np.cumsum(np.diff(tokens.starts)[order])
    begin = 0
    while begin < len(order):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + chunk_tokens, side="right")))
        yield order[begin:end]
        begin = end
