"""transformers: tokens of a text that is still being written.

The split of a text may change near its end when more comes: ``isl`` is two tokens until it has
become ``island``. A token is therefore given out only once it ends before the last white space, or
some characters before the end. Each character belongs to exactly one token that is given out, and
each token is given out once. Characters that the tokenizer drops, so that no token covers them, go
with the next one, which says so unless they are white space (`Piece.unread`).

Where a tokenizer joins, against this rule, across what was given out already, the rest is split on
its own: a valid split of the same text, though not the one that the whole would have had
(`GrowingText.seams` counts it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

LOOKAHEAD = 16
"""Characters behind the end of a token after which it is taken for final, without white space."""
LONGEST = 128
"""Characters that wait at most; then the text is cut where it stands."""
_CONTEXT = 32
_UNKNOWN = "\U0010fffd"  # for private use: in no vocabulary

# A blank ends what is before it. Other white space may yet be joined to it (".\n\n" is one token of
# many tokenizers), until something else follows.
_LAST_END = re.compile(r"(?<=\S)(?: \s*\S*|\s+\S+)\Z")


@dataclass(frozen=True)
class Piece:
    """A token, and the characters that have a token of their own with it.

    Attributes
    ----------
    token : int
    text : str
        Empty for all but the last token of a character that takes several.
    unread : bool
        Whether the text begins with characters, white space aside, that the token does not cover,
        nor any other: who reads the tokens has not read them.
    """

    token: int
    text: str
    unread: bool = False


class GrowingText:
    """Splits a text while it comes. The texts of all pieces, and ``rest``, are the text itself.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        As `literal` makes one.
    before : str
        What stands before the text, such as the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, before: str = "") -> None:
        self._tokenizer = tokenizer
        self._given = [before[-_CONTEXT:]]  # the last characters that have tokens
        self._tail = ""  # what has none yet
        self._gap = ""  # what will have none, since the tokenizer drops it
        self._started = False
        self.seams = 0
        """Times that the text was not split as the whole would have been."""

    @property
    def rest(self) -> str:
        """Characters after the last token given out."""
        return self._gap + self._tail

    def push(self, text: str) -> list[Piece]:
        """Take more of the text; return the tokens that are final now."""
        self._tail += text
        last = _LAST_END.search(self._tail)
        final = max(last.start() if last else 0, len(self._tail) - LOOKAHEAD)
        pieces = self._split(final) if final > 0 else []
        return pieces + self.finish() if len(self._tail) > LONGEST else pieces

    def finish(self) -> list[Piece]:
        """Return the tokens that are left; nothing more comes."""
        return self._split(len(self._tail))

    def _split(self, final: int) -> list[Piece]:
        """Give out the tokens that end at ``final`` or before."""
        ids, spans = self._encoded()
        count = sum(end <= final for _, end in spans)
        whole = final == len(self._tail)
        pieces, at = [], 0
        for index in range(count):
            # A character of several tokens goes with the last of them.
            end = spans[index][1]
            if index + 1 < len(spans):
                end = min(end, spans[index + 1][0])
            end = max(end, at)
            dropped = self._gap + self._tail[at : min(spans[index][0], end)]
            text = self._gap + self._tail[at:end]
            pieces.append(Piece(ids[index], text, unread=not blank(dropped)))
            self._gap, at = "", end
        self._keep(self._tail[:at])
        self._tail = self._tail[at:]
        if whole:
            self._gap, self._tail = self._gap + self._tail, ""
        return pieces

    def _encoded(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the tail, and the characters of it that each covers."""
        context = "".join(self._given) + self._gap[-_CONTEXT:]
        found = self._tokenizer.encode(context + self._tail, add_special_tokens=False)
        at = len(context)
        first = next((i for i, (_, end) in enumerate(found.offsets) if end > at), None)
        if first is None:
            return [], []
        if found.offsets[first][0] >= at:
            spans = [(start - at, end - at) for start, end in found.offsets[first:]]
            return found.ids[first:], spans
        self.seams += self._started
        found = self._tokenizer.encode(self._tail, add_special_tokens=False)
        return found.ids, found.offsets

    def _keep(self, text: str) -> None:
        """Remember what was given out last, from where a token begins."""
        if not text:
            return
        self._started = True
        self._given.append(text)
        while sum(map(len, self._given[1:])) >= _CONTEXT:
            self._given.pop(0)


def blank(text: str) -> bool:
    """Whether it is nothing but white space."""
    return not text or text.isspace()


def literal(tokenizer: Any) -> Tokenizer:
    """Copy a tokenizer so that the names of special tokens in a text are words like any other.

    Who writes the text does not get to open and close turns of the chat with it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast

    Raises
    ------
    ValueError
        For a tokenizer that does not tell which characters a token covers, or that has no token
        for some.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers; use a "
            "PreTrainedTokenizerFast"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    if not copy.encode(_UNKNOWN, add_special_tokens=False).ids:
        raise ValueError(
            "the tokenizer drops characters that it does not know: text of these would leave "
            "unjudged; use one with an unknown token, or with bytes to fall back on"
        )
    return copy
