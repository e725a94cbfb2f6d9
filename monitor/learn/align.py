"""From labelled characters to labelled tokens, fed as serving feeds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.learn.examples import Contrast, Example, group_of
from midstream.learn.tokenise import (
    AlignmentError,
    Piece,
    characters_of,
    tokenise,
    tokenise_prompt,
)
from midstream.learn.tokens import UNKNOWN, Tokens

_UNLIMITED = 1 << 24  # a tokenizer that knows no limit names a huge one


@dataclass(frozen=True)
class Encoded:
    """An example as T tokens, with labels of H hazards.

    Attributes
    ----------
    id, group : str
    hazards : tuple of str
    ids : int32 [T]
        What is fed.
    prompt_tokens : int
        Tokens before the response; of a plain text the special ones that open it.
    instruction_end : int
        Last token of the last user message's content (t_inst of Latent Guard), -1 where there is
        none. The last token before the response (t_post) is ``prompt_tokens - 1``.
    special : bool [T]
        Tokens that the tokenizer puts around a plain text, such as [CLS]. Serving never scores
        them.
    characters : int32 [T, 2]
        Characters of the response that each token covers, the blanks around a word left out; -1 at
        prompt and special tokens.
    labels : int8 [T, H]
        1, 0 or `UNKNOWN`.
    response_labels, prompt_labels : int8 [H]
    spans : int64 [S, 3]
        Hazard, first token, token after the last.
    contrast : Contrast, optional
    cut_tokens, cut_spans : int
        Tokens and spans of the response that lie behind the end of the window.
    """

    id: str
    group: str
    hazards: tuple[str, ...]
    ids: NDArray[np.int32]
    prompt_tokens: int
    instruction_end: int
    special: NDArray[np.bool_]
    characters: NDArray[np.int32]
    labels: NDArray[np.int8]
    response_labels: NDArray[np.int8]
    prompt_labels: NDArray[np.int8]
    spans: NDArray[np.int64]
    contrast: Contrast | None
    cut_tokens: int
    cut_spans: int


def encode(
    example: Example, tokenizer: Any, hazards: Sequence[str], *, window: int | None = None
) -> Encoded:
    """Tokenise an example and carry its labels over.

    A conversation goes through the tokenizer's chat template, up to where the model is to write,
    and the response follows. Without a template a single user message is fed as the text that it
    is, as `midstream.engines.hf.stream` feeds a string. A plain text is fed with the special tokens
    of the tokenizer, as `midstream.engines.hf.score` does.

    A token of the response has a hazard when any of its characters lies in a span of it. It is
    unknown where the response is known to show the hazard, but not at which place; and where it
    covers nothing but blanks, unless in a span. A line break is a character like others.

    Linear in the characters, and logarithmic in the tokens for each span.

    Parameters
    ----------
    example : Example
    tokenizer : transformers.PreTrainedTokenizerFast
    hazards : sequence of str
        Columns of the labels.
    window : int, optional
        Most tokens that the model takes. The tokenizer's own limit counts as well.

    Returns
    -------
    Encoded
        A response that goes on behind the end of the window is cut and counted. What was cut off
        may hold the hazard, so its label is then unknown, unless a span of it is left or the whole
        response is free of it.

    Raises
    ------
    AlignmentError
        For a span that covers no token, a prompt that fills the window, a text without tokens, and
        a conversation that the template refuses.
    """
    limit = min(window or _UNLIMITED, tokenizer.model_max_length, _UNLIMITED)
    if example.messages:
        prompt, instruction_end = tokenise_prompt(example, tokenizer)
        text = Piece(np.empty(0, np.int32), np.empty(0, np.bool_), [])
        if example.response:  # some tokenizers make a token of nothing, too
            text = tokenise(tokenizer, example.response, special=False)
        before, after = prompt.ids, np.empty(0, np.int32)
        if (need := len(before) + bool(example.response)) > limit:
            raise AlignmentError(
                f"example {example.id!r}: the prompt has {len(before)} tokens, so at least {need} "
                f"must fit into the window, which has {limit}; shorten the prompt or leave the "
                "example out"
            )
    else:
        instruction_end = -1
        text = tokenise(tokenizer, example.response, special=True)
        inner = np.flatnonzero(~text.special)
        begin, end = (inner[0], inner[-1] + 1) if len(inner) else (0, 0)
        before, after = text.ids[:begin], text.ids[end:]
        text = Piece(text.ids[begin:end], text.special[begin:end], text.offsets[begin:end])
    if example.response and not len(text.ids):
        raise AlignmentError(
            f"example {example.id!r}: the tokenizer makes no token of the response; leave it out"
        )

    room = max(0, limit - len(before) - len(after))
    count = len(text.ids)
    kept = slice(0, min(room, count))
    if not example.messages and getattr(tokenizer, "truncation_side", "right") == "left":
        kept = slice(max(0, count - room), count)
    characters, seen = characters_of(example.response, text.offsets)
    spans = _token_spans(example, characters, hazards)
    labels = _token_labels(example, spans, seen, hazards)

    left = spans.copy()
    left[:, 1:] = spans[:, 1:].clip(kept.start, kept.stop)
    left = left[left[:, 1] < left[:, 2]]
    is_cut = kept.stop - kept.start < count
    left[:, 1:] += len(before) - kept.start
    around = ((len(before), len(after)), (0, 0))
    special = np.zeros(len(before) + kept.stop - kept.start + len(after), np.bool_)
    if not example.messages:
        special[: len(before)] = special[len(special) - len(after) :] = True
    return Encoded(
        id=example.id,
        group=group_of(example),
        hazards=tuple(hazards),
        ids=np.concatenate([before, text.ids[kept], after]),
        prompt_tokens=len(before),
        instruction_end=instruction_end,
        special=special,
        characters=np.pad(characters[kept], around, constant_values=-1),
        labels=np.pad(labels[kept], around, constant_values=UNKNOWN),
        response_labels=_response_labels(example, left, hazards, is_cut=is_cut),
        prompt_labels=np.array(
            [example.prompt_labels.get(hazard, UNKNOWN) for hazard in hazards], np.int8
        ),
        spans=left,
        contrast=example.contrast,
        cut_tokens=count - (kept.stop - kept.start),
        cut_spans=len(spans) - len(left),
    )


def tabulate(encoded: Sequence[Encoded]) -> Tokens:
    """Put the tokens of examples side by side.

    Raises
    ------
    AlignmentError
        When there is none, or when their hazards differ.
    """
    if not encoded:
        raise AlignmentError("no examples; give at least one")
    hazards = encoded[0].hazards
    for other in encoded:
        if other.hazards != hazards:
            raise AlignmentError(
                f"examples {encoded[0].id!r} and {other.id!r} were encoded for different hazards, "
                f"{hazards} and {other.hazards}; encode all for the same"
            )
    starts = np.concatenate([[0], np.cumsum([len(one.ids) for one in encoded])])
    pairs: dict[str, int] = {}
    return Tokens(
        hazards=hazards,
        ids=tuple(one.id for one in encoded),
        groups=tuple(one.group for one in encoded),
        starts=starts.astype(np.int64),
        prompt_tokens=np.array([one.prompt_tokens for one in encoded], np.int32),
        instruction_end=np.array([one.instruction_end for one in encoded], np.int32),
        special=np.concatenate([one.special for one in encoded]),
        labels=np.concatenate([one.labels for one in encoded]),
        response_labels=np.stack([one.response_labels for one in encoded]),
        prompt_labels=np.stack([one.prompt_labels for one in encoded]),
        spans=np.concatenate(
            [one.spans + np.array([0, at, at]) for one, at in zip(encoded, starts, strict=False)]
        ),
        contrast=np.array(
            [
                (-1, -1, -1)
                if (c := one.contrast) is None
                else (pairs.setdefault(c.pair, len(pairs)), c.negated, c.answer)
                for one in encoded
            ],
            np.int32,
        ),
    )


def truncation(encoded: Sequence[Encoded]) -> str | None:
    """Say in one line what the window cut off; None where it cut nothing."""
    cut = [one for one in encoded if one.cut_tokens]
    if not cut:
        return None
    tokens = sum(one.cut_tokens for one in cut)
    total = sum(len(one.ids) for one in encoded) + tokens
    spans = sum(one.cut_spans for one in cut)
    return (
        f"{len(cut)} of {len(encoded)} responses go on behind the end of the window: {tokens} of "
        f"{total} tokens and {spans} labelled spans are left out (the first is {cut[0].id!r})"
    )


def _token_spans(
    example: Example, characters: NDArray[np.int32], hazards: Sequence[str]
) -> NDArray[np.int64]:
    """Hazard, first token, token after the last, of each span of the hazards asked for."""
    solid = np.flatnonzero(characters[:, 1] > characters[:, 0])
    starts, ends = characters[solid].T
    if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any():
        raise AlignmentError(
            f"example {example.id!r}: the tokenizer's offsets run backwards, so tokens cannot be "
            "labelled; use another tokenizer"
        )
    rows = []
    for span in example.spans or ():
        first = np.searchsorted(ends, span.start, side="right")
        last = np.searchsorted(starts, span.end, side="left") - 1
        if first > last:
            raise AlignmentError(
                f"example {example.id!r}: the span {span.start}:{span.end} of {span.hazard!r} "
                f"({example.response[span.start : span.end]!r}) covers no token; leave it out or "
                "mend its ends"
            )
        if span.hazard in hazards:
            rows.append((hazards.index(span.hazard), solid[first], solid[last] + 1))
    return np.array(rows, np.int64).reshape(-1, 3)


def _token_labels(
    example: Example,
    spans: NDArray[np.int64],
    seen: NDArray[np.bool_],
    hazards: Sequence[str],
) -> NDArray[np.int8]:
    labels = np.full((len(seen), len(hazards)), UNKNOWN, np.int8)
    marked = set(spans[:, 0].tolist())
    for column, hazard in enumerate(hazards):
        stated = example.labels.get(hazard)
        if column in marked or stated is False or (stated is None and example.spans is not None):
            labels[seen, column] = 0
    for column, first, end in spans:
        labels[first:end, column] = 1
    return labels


def _response_labels(
    example: Example, left: NDArray[np.int64], hazards: Sequence[str], *, is_cut: bool
) -> NDArray[np.int8]:
    """Labels of what is left of the response."""
    found = np.full(len(hazards), UNKNOWN, np.int8)
    marked = {span.hazard for span in example.spans or ()}
    for column, hazard in enumerate(hazards):
        label = example.labels.get(hazard)
        if label is None and example.spans is not None:
            label = hazard in marked
        if label is not None:
            found[column] = label
        if label and is_cut and column not in left[:, 0]:
            found[column] = UNKNOWN
    return found
