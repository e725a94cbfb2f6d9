"""Text of calls as both readers of it compare it: the rules of levels and the action gate.

Everything here takes time linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

_BETWEEN = "\"'`,;(){}[]<>|&!?=\\"  # beside white space
_SPACED = str.maketrans(dict.fromkeys(_BETWEEN, " "))
_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[^\W\d_A-Z]+|[A-Z]+|\d+")
_WORD = re.compile(r"[^\W\d_]+")
_MOST_NAME = 256  # characters of a tool's name that are read
_LIKE_LATIN = ("CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "COPTIC")
_QUOTES = "'\"`\\"
_NO_QUOTES = str.maketrans(dict.fromkeys(_QUOTES))
_GLUED = re.compile(r"""['"`\\](?<=\w.)['"`\\]{0,99}+\w""")  # within a word
_IFS = re.compile(r"\$\{?ifs\b\}?")


def plain(text: str) -> str:
    """Return text without what only looks different.

    Compatibility forms (full-width letters) become plain ones and invisible characters go.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    if not text.replace("\n", "").isprintable():  # 3 ns a character; the search takes 30
        for character in set(text):
            if not character.isascii() and unicodedata.category(character) == "Cf":
                text = text.replace(character, "")
    return text


def fold(text: str) -> str:
    """`plain`, in lower case."""
    return plain(text).lower()


def words(folded: str) -> list[str]:
    """Split folded text; a path is followed by its last part (``/bin/rm``, ``rm``)."""
    text = _spaced(folded)
    # Dots and colons belong to words (hosts, paths) but not at their ends.
    for end in (". ", ": ", ".\n", ":\n"):
        text = text.replace(end, " ")
    found = text.split()
    if found:
        found[-1] = found[-1].rstrip(".:") or found[-1]
    if "/" not in text:
        return found
    pairs = {}
    for word in set(found):
        if "/" in word and "://" not in word and (last := word.rpartition("/")[2]):
            pairs[word] = last
    split: list[str] = []
    for word in found:
        split.append(word)
        if word in pairs:
            split.append(pairs[word])
    return split


def _spaced(text: str) -> str:
    if text.isascii():
        return text.translate(_SPACED)  # 1 ns a character, but 50 once one is not ASCII
    for character in _BETWEEN:
        text = text.replace(character, " ")
    return text


def unquoted(folded: str) -> str | None:
    r"""Return text as a shell joins it: ``r''m``, ``r\m``, ``rm${IFS}-r``; None if the same."""
    joined = folded
    if "$" in folded:
        joined = _IFS.sub(" ", folded).replace("$@", "").replace("$*", "")
    if _GLUED.search(joined):
        if joined.isascii():
            return joined.translate(_NO_QUOTES)
        for character in _QUOTES:
            joined = joined.replace(character, "")
    return None if joined == folded else joined


def lines_of(arguments: Mapping[str, Any], limit: int) -> str:
    """Render a line ``key: value`` for each leaf; stops once there are ``limit`` characters.

    Without recursion: arguments come from strangers and may be nested as deep as they like.
    """
    lines: list[str] = []
    length = 0
    todo: list[tuple[str, Any]] = list(arguments.items())[::-1]
    while todo and length < limit:
        key, value = todo.pop()
        length += 1
        inner: Iterable[tuple[str, Any]]
        if isinstance(value, Mapping):
            inner = value.items()
        elif isinstance(value, list | tuple):
            inner = ((key, each) for each in value)
        else:
            lines.append(f"{key}: {value}")
            length += len(lines[-1])
            continue
        todo.extend(list(inner)[::-1])
    return "\n".join(lines)


@lru_cache(maxsize=4096)
def words_of_name(tool: str) -> tuple[str, ...]:
    """Words of a tool's name, in lower case: ``GmailSendEmail``, ``send_email``, ``send-email``."""
    return tuple(part.lower() for part in _PART.findall(plain(tool[:_MOST_NAME])))


def is_disguised(tool: str) -> bool:
    """Whether a word of a name mixes Latin letters with some that look like them."""
    if tool.isascii():
        return False
    for word in _WORD.findall(plain(tool)):
        scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in set(word)}
        if "LATIN" in scripts and not scripts.isdisjoint(_LIKE_LATIN):
            return True
    return False
