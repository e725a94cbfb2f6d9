"""Runs of an encoder on whole texts and on their beginnings, read at every layer.

An encoder reads both ways: what it makes of token ``t`` depends on the tokens behind it. To know
what it would say while a text is still being written, the text is cut behind token ``t + k`` and
run again, with the special tokens around it, as serving would. One run on the first n tokens
serves every look-ahead k at once, for token ``n - 1 - k``.

Word pieces are the longest that fit, from the left, so a text cut behind a piece has the same
pieces: the ids can be cut in place of the characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.learn.align import encode
from midstream.learn.examples import Example
from midstream.learn.forward import ForwardPass
from midstream.learn.public_sets import toxic_spans
from midstream.taps import Tap

HAZARD = "toxic span"
GROUP_TOKENS = 1 << 15  # whose residuals are held at once: 176 MB at 7 taps of 384, in bf16


@dataclass(frozen=True)
class Comment:
    """A text of n tokens, its special tokens apart.

    Attributes
    ----------
    text : str
    gold : bool [characters]
        Which characters lie in a span.
    ids : int32 [n]
    characters : int32 [n, 2]
        Characters that each token covers.
    toxic : bool [n]
        Whether any of these lies in a span.
    opening, closing : int32
        Special tokens before and behind.
    """

    text: str
    gold: NDArray[np.bool_]
    ids: NDArray[np.int32]
    characters: NDArray[np.int32]
    toxic: NDArray[np.bool_]
    opening: NDArray[np.int32]
    closing: NDArray[np.int32]

    def run(self, tokens: int) -> NDArray[np.int32]:
        """Return what is fed when the first ``tokens`` have been read."""
        return np.concatenate([self.opening, self.ids[:tokens], self.closing])


def read_comments(path: Path, tokenizer: Any, window: int) -> list[Comment]:
    """Read the data set's CSV and cut it into tokens; what is behind the window has none."""
    return [comment_of(one, tokenizer, window) for one in toxic_spans(path, hazard=HAZARD)]


def comment_of(example: Example, tokenizer: Any, window: int) -> Comment:
    encoded = encode(example, tokenizer, [HAZARD], window=window)
    inner = ~encoded.special
    before = encoded.prompt_tokens
    behind = before + int(inner.sum())
    return Comment(
        text=example.response,
        gold=toxic_characters(example),
        ids=encoded.ids[inner],
        characters=encoded.characters[inner],
        toxic=encoded.labels[inner, 0] == 1,
        opening=encoded.ids[:before],
        closing=encoded.ids[behind:],
    )


def toxic_characters(example: Example) -> NDArray[np.bool_]:
    """Which characters lie in a span."""
    inside = np.zeros(len(example.response), np.bool_)
    for span in example.spans or ():
        inside[span.start : span.end] = True
    return inside


def every_tap(encoder: Any) -> list[Tap]:
    """Return the embeddings and what each layer adds to: all the places there are."""
    layers = range(encoder.config.num_hidden_layers)
    return [Tap(0, "resid_pre"), *(Tap(layer, "resid_post") for layer in layers)]


def read_runs(
    encoder: Any, taps: Sequence[Tap], comments: Sequence[Comment], runs: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]]:
    """Run the encoder on beginnings of comments, those of like length together.

    Parameters
    ----------
    runs : int64 [R, 2]
        Comment, and how many of its tokens are read.

    Yields
    ------
    chosen : int64 [r]
        Rows of ``runs``.
    starts : int64 [r + 1]
        Run i of these owns the rows ``starts[i]:starts[i + 1]``.
    states : Tensor [rows, taps * d]
        Residuals of the tokens read, special ones left out, the taps side by side.
    """
    order = np.argsort(runs[:, 1], kind="stable")
    lengths = runs[order, 1]
    begin = 0
    while begin < len(order):
        end = begin + 1
        total = lengths[begin]
        while end < len(order) and total + lengths[end] <= GROUP_TOKENS:
            total += lengths[end]
            end += 1
        chosen = order[begin:end]
        fed = [comments[at].run(tokens) for at, tokens in runs[chosen]]
        names = [f"{tokens} tokens of comment {at}" for at, tokens in runs[chosen]]
        forward = ForwardPass(encoder, fed, names, taps)
        fed_starts = np.concatenate([[0], np.cumsum([len(ids) for ids in fed])])
        states = torch.empty(len(taps), fed_starts[-1], forward.width, dtype=encoder.dtype)
        forward.read_into(states, range(len(fed)))
        starts = np.concatenate([[0], np.cumsum(runs[chosen, 1])])
        shift = fed_starts[:-1] + [len(comments[at].opening) for at in runs[chosen, 0]]
        rows = np.arange(starts[-1]) + np.repeat(shift - starts[:-1], np.diff(starts))
        inner = states[:, torch.from_numpy(rows)]
        yield chosen, starts, inner.transpose(0, 1).flatten(1)
        begin = end


def whole(comments: Sequence[Comment]) -> NDArray[np.int64]:
    """One run on all of each comment."""
    return np.array([(at, len(comment.ids)) for at, comment in enumerate(comments)], np.int64)


def prefixes(comments: Sequence[Comment]) -> NDArray[np.int64]:
    """Runs on every beginning of each comment: 1 to n tokens."""
    return np.array(
        [(at, n) for at, c in enumerate(comments) for n in range(1, len(c.ids) + 1)], np.int64
    )


def random_cuts(comments: Sequence[Comment], cuts: int, seed: int) -> NDArray[np.int64]:
    """Up to ``cuts`` different beginnings of each comment, drawn evenly, the whole left out."""
    random = np.random.default_rng(seed)
    rows = []
    for at, comment in enumerate(comments):
        possible = len(comment.ids) - 1
        for n in random.permutation(possible)[:cuts] + 1:
            rows.append((at, n))
    return np.array(rows, np.int64)
