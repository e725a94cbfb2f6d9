"""From text and conversations to tokens, and the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.learn.examples import Example, Message

_MARK = "thelastusermessagestandshere"


class AlignmentError(ValueError):
    """An example that cannot be fed as it is labelled; the message names it and what to do."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a text: ids, whether special, and the characters that the tokenizer names."""

    ids: NDArray[np.int32]
    special: NDArray[np.bool_]
    offsets: list[tuple[int, int]]


def tokenise(tokenizer: Any, text: str, *, special: bool) -> Piece:
    """Return the tokens of a text, with those that the tokenizer puts around it where ``special``.

    Raises
    ------
    AlignmentError
        For a tokenizer that does not tell which characters a token covers.
    """
    encodings = tokenizer([text], add_special_tokens=special, verbose=False).encodings
    if encodings is None:
        raise AlignmentError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers; "
            "use a PreTrainedTokenizerFast"
        )
    found = encodings[0]
    return Piece(
        np.array(found.ids, np.int32),
        np.array(found.special_tokens_mask, np.bool_),
        found.offsets,
    )


def characters_of(
    text: str, offsets: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Characters of the text that tokens stand for, and which of them show anything.

    Tokenizers differ in where the blank before a word goes: with the word (Metaspace), with it but
    trimmed from its offsets (byte-level BPE, which trims a token of blanks to nothing), or nowhere.
    Here a word has no blanks around it, and a token of blanks has these blanks.

    Returns
    -------
    characters : int32 [n, 2]
        First character, and the one after the last.
    seen : bool [n]
        False where a token covers nothing, or blanks without a line break.
    """
    characters = np.zeros((len(offsets), 2), np.int32)
    seen = np.zeros(len(offsets), np.bool_)
    done = 0
    for at, (start, end) in enumerate(offsets):
        if start == end > done and not text[done:end].strip():
            start = done
        done = max(done, end)
        piece = text[start:end]
        if word := piece.strip():
            start += piece.index(word[0])
            end = start + len(word)
        characters[at] = start, end
        seen[at] = bool(word) or "\n" in piece
    return characters, seen


def tokenise_prompt(example: Example, tokenizer: Any) -> tuple[Piece, int]:
    """Tokens of the conversation, and the position of the last one of the last user content.

    Raises
    ------
    AlignmentError
        For a conversation that the template refuses or changes beyond recognition.
    """
    messages = example.messages
    if tokenizer.chat_template is None:
        if len(messages) > 1 or messages[0].role != "user":
            raise AlignmentError(
                f"example {example.id!r}: {len(messages)} messages, and the tokenizer has no chat "
                "template; set tokenizer.chat_template, or give a single user message"
            )
        text, place = messages[0].content, (0, len(messages[0].content))
        piece = tokenise(tokenizer, text, special=True)
    else:
        text, place = _rendered(example, tokenizer)
        piece = tokenise(tokenizer, text, special=False)
    characters, _ = characters_of(text, piece.offsets)
    inside = (characters[:, 0] < place[1]) & (characters[:, 1] > place[0]) & ~piece.special
    where = np.flatnonzero(inside)
    return piece, int(where[-1]) if len(where) else -1


def _rendered(example: Example, tokenizer: Any) -> tuple[str, tuple[int, int]]:
    """Rendered conversation, and where in it the content of the last user message stands.

    The content may be trimmed by the template and may occur elsewhere, too. So it is not searched
    for: the template is rendered with a mark in its stead, and what surrounds the mark surrounds
    the content.
    """

    def render(messages: Sequence[Message]) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    [message.model_dump() for message in messages],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # whatever a template raises; jinja2 has no common base for it
            raise AlignmentError(
                f"example {example.id!r}: the chat template refuses the conversation: {error}"
            ) from error

    messages = list(example.messages)
    text = render(messages)
    users = [n for n, message in enumerate(messages) if message.role == "user"]
    if not users:
        return text, (0, 0)
    mark = _MARK
    while any(mark in message.content for message in messages):
        mark += "x"
    messages[users[-1]] = Message(role="user", content=mark)
    before, *after = render(messages).split(mark)
    if (
        len(after) != 1
        or not text.startswith(before)
        or not text.endswith(after[0])
        or len(before) + len(after[0]) > len(text)
    ):
        raise AlignmentError(
            f"example {example.id!r}: cannot tell where the chat template puts the last user "
            "message, because it shows it not once, or changes other text with it; mend the "
            "template"
        )
    return text, (len(before), len(text) - len(after[0]))
