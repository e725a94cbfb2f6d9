"""Residual streams of given token sequences, read at taps: onto the disk, or into memory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.atomic import replace_file, write_folder
from midstream.fingerprint import Fingerprint
from midstream.learn import collection
from midstream.learn.activations import Activations, chunked
from midstream.learn.collection import DTYPES, CollectionError, DType, Manifest, Shard
from midstream.learn.forward import BATCH_TOKENS, ForwardPass, TokenIds
from midstream.learn.tokens import Tokens
from midstream.taps import Tap

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]

SHARD_BYTES = 1 << 27


def collect(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[TokenIds],
    tokens: Tokens,
    taps: Sequence[Tap],
    folder: str | Path,
    *,
    dtype: DType = "bf16",
    batch_tokens: int = BATCH_TOKENS,
    shard_bytes: int = SHARD_BYTES,
    command: str = "call midstream.learn.collect.collect again, with the same arguments",
    progress: Progress | None = None,
) -> Activations:
    """Feed each sequence once and write what the taps read to a folder, shard by shard.

    Call it again with the same arguments to go on after a kill, a full disk or a bad example: the
    finished shards stay, the others are made again, and the folder ends up with the same bytes as
    without the interruption. At most the two newest shards are lost. On a complete collection it
    does nothing.

    Let a token take ``b = taps * d * bytes of dtype``. Beside the model, its forward pass, the
    token ids and their labels, the memory in use is at most::

        2 * max(shard_bytes, longest * b)                      a shard is filled, one is written
        + max(batch_tokens, longest) * (b + 8 * d)             what the hooks of a batch hold

    whatever the number of sequences. The time is that of the forward passes; the disk takes
    ``tokens * b`` bytes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    tokenizer
        Made the sequences; only its fingerprint is taken.
    sequences : sequence of token ids
    tokens : Tokens
        What is known about them.
    taps : sequence of Tap
    folder : path
        New, or a collection that was begun with the same arguments.
    dtype : {"fp16", "bf16", "fp32"}
        Of the values on disk.
    batch_tokens : int
        Tokens per forward pass, padding included, unless one sequence alone has more.
    shard_bytes : int
        Size of a file, unless one sequence alone has more. Sequences are sorted by length within
        a shard: one that holds few sequences is padded more.
    command : str
        How to go on, for the error of who opens the folder before it is complete.
    progress : callable, optional
        Called as ``progress(tokens done, tokens in all)``, at first with what was there already.

    Raises
    ------
    CollectionError
        If there is nothing to collect; the sequences do not fit to the tokens; the folder holds
        something else, a collection begun with other arguments (naming both sides), or one that
        another process is at work on; the disk is full.
    TrainingDataError
        If the model cannot take a sequence or a value is not finite; names example, tap and remedy.
    """
    folder = Path(folder)
    taps = sorted(taps)
    forward = ForwardPass(model, sequences, tokens.ids, taps, batch_tokens=batch_tokens)
    bytes_per_token = len(taps) * forward.width * DTYPES[dtype].itemsize
    _check_tokens(sequences, tokens)
    encoded = collection.encode_tokens(tokens)
    manifest = Manifest(
        fingerprint=Fingerprint.of(model, tokenizer),
        weights_sha256=collection.hash_weights(model),
        taps=tuple(map(str, taps)),
        width=forward.width,
        dtype=dtype,
        hazards=tokens.hazards,
        examples=len(tokens),
        tokens=int(tokens.starts[-1]),
        data_sha256=collection.hash_data(sequences, tokens),
        tokens_sha256=hashlib.sha256(encoded).hexdigest(),
        batch_tokens=batch_tokens,
        shard_bytes=shard_bytes,
        command=command,
    )
    with _begun(folder, manifest, encoded) as found:
        plan = list(chunked(tokens, shard_bytes // bytes_per_token))[len(found.shards) :]
        done = int(tokens.starts[found.shards[-1].end]) if found.shards else 0
        _check_space(folder, (manifest.tokens - done) * bytes_per_token)
        if progress is not None:
            progress(done, manifest.tokens)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, manifest.tokens)

        _fill(folder, found, plan, forward, tokens, advance)
    return Activations.open(folder)


def _fill(
    folder: Path,
    manifest: Manifest,
    plan: Sequence[NDArray[np.int64]],
    forward: ForwardPass,
    tokens: Tokens,
    advance: Callable[[int], None],
) -> None:
    """Collect the shards of the plan. One is filled while the one before is hashed and written."""
    rows = [int(tokens.starts[part[-1] + 1] - tokens.starts[part[0]]) for part in plan]
    size = len(forward.taps) * forward.width * max(rows, default=0)
    buffers = [torch.empty(size, dtype=DTYPES[manifest.dtype]) for _ in plan[:2]]
    written: Future[Manifest] | None = None
    with ThreadPoolExecutor(max_workers=1) as writer:  # waits for a shard being written
        for index, (part, count) in enumerate(zip(plan, rows, strict=True)):
            values = buffers[index % 2][: size // max(rows) * count]
            values = values.view(len(forward.taps), count, forward.width)
            forward.read_into(values, part, advance)
            if written is not None:
                manifest = written.result()
            written = writer.submit(_write, folder, manifest, part, values, forward.taps)
    if written is not None:
        written.result()


def _write(
    folder: Path,
    manifest: Manifest,
    part: NDArray[np.int64],
    values: Tensor,
    taps: Sequence[Tap],
) -> Manifest:
    """Write the next shard, then the manifest that has it."""
    index = len(manifest.shards)
    header = collection.shard_header(taps, values.shape[1], manifest.width, manifest.dtype)
    content = values.flatten().view(torch.uint8).numpy().data
    digest = hashlib.sha256(header)
    digest.update(content)
    shard = Shard(first=int(part[0]), end=int(part[-1]) + 1, sha256=digest.hexdigest())
    manifest = manifest.model_copy(
        update={
            "shards": (*manifest.shards, shard),
            "complete": shard.end == manifest.examples,
        }
    )
    try:
        replace_file(folder / collection.shard_name(index), header, content)
        # In all a hundred bytes per shard and rewrite: nothing beside the shards.
        replace_file(folder / collection.MANIFEST, manifest.content())
    except OSError as error:
        raise CollectionError(
            f"writing {folder / collection.shard_name(index)} failed: {error.strerror}; "
            f"{shard.first} of {manifest.examples} examples are on disk and stay; make room for "
            f"{_gigabytes(len(content))} and more, then to go on: {manifest.command}"
        ) from error
    return manifest


@contextlib.contextmanager
def _begun(folder: Path, manifest: Manifest, encoded: bytes) -> Iterator[Manifest]:
    """Begin the collection or find it begun; yields how far it is, and keeps other processes out.

    Raises
    ------
    CollectionError
    """
    if not (folder / collection.MANIFEST).exists():
        try:
            write_folder(
                folder, {collection.TOKENS: encoded, collection.MANIFEST: manifest.content()}
            )
        except FileExistsError:
            raise CollectionError(
                f"{folder} exists and is no collection (it has no {collection.MANIFEST}): give a "
                "new folder"
            ) from None
        except OSError as error:
            raise CollectionError(f"no collection in {folder}: {error.strerror}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill lets it go
        except BlockingIOError:
            raise CollectionError(
                f"another process is collecting into {folder}: wait for it, or give another folder"
            ) from None
        found = Manifest.load(folder)
        differing = found.differences(manifest)
        if differing:
            raise CollectionError(
                f"{folder} holds a collection of something else: {'; '.join(differing)}. Go on "
                "with what it was begun with, or give a new folder"
            )
        yield found
    finally:
        os.close(descriptor)


def _check_tokens(sequences: Sequence[TokenIds], tokens: Tokens) -> None:
    if not tokens.starts[-1]:
        raise CollectionError("nothing to collect: the data has no tokens")
    lengths = np.diff(tokens.starts)
    for name, length, sequence in zip(tokens.ids, lengths, sequences, strict=True):
        if len(sequence) != length:
            raise CollectionError(
                f"example {name!r} has {len(sequence)} token ids but labels for {length}"
            )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CollectionError(
            f"the disk of {folder} is too full: {_gigabytes(needed)} are needed and "
            f"{_gigabytes(free)} free; make room, collect at fewer taps or use another disk"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def residuals(
    model: Any,
    sequences: Sequence[TokenIds],
    taps: Sequence[Tap],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[Tap, list[Floats]]:
    """Feed each sequence once and keep what the taps read in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    sequences : sequence of token ids
    taps : sequence of Tap
    batch_tokens : int
        Tokens per forward pass, padding included, unless one sequence alone has more.
    progress : callable, optional
        Called as ``progress(tokens done, tokens in all)``.

    Returns
    -------
    dict of Tap to list of float32 [tokens, d]
        In the order of ``sequences``.

    Raises
    ------
    TrainingDataError
        If the model cannot take a sequence or a value is not finite.
    """
    ids = [str(index) for index in range(len(sequences))]
    forward = ForwardPass(model, sequences, ids, taps, batch_tokens=batch_tokens)
    ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    out = torch.empty(len(taps), total, forward.width)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    forward.read_into(out, range(len(sequences)), advance)
    return {
        tap: np.split(values.numpy(), ends[:-1]) if len(ends) else []
        for tap, values in zip(taps, out, strict=True)
    }
