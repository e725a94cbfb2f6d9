"""Phrases, looked for in words: any number of them in one pass, in time linear in the words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

GAP = 3
"""Other words that may stand between two words of a phrase."""


class _Element(NamedTuple):
    whole: frozenset[str]
    starts: tuple[str, ...]

    def fits(self, word: str) -> bool:
        return word in self.whole or (bool(self.starts) and word.startswith(self.starts))

    def in_any(self, found: frozenset[str]) -> bool:
        if not self.whole.isdisjoint(found):
            return True
        return bool(self.starts) and any(word.startswith(self.starts) for word in found)


class Phrases:
    """Named lists of phrases, looked for in words.

    A phrase is words in order with at most ``GAP`` other words between two of them; ``a|b`` is
    either word, ``ignor*`` any word that starts so, a lone ``*`` itself. The first word is whole.

    Parameters
    ----------
    named : mapping of name to phrases
    """

    def __init__(self, named: Mapping[str, Iterable[str]]) -> None:
        self._by_first: dict[str, list[tuple[str, str, list[_Element]]]] = {}
        for name, phrases in named.items():
            for phrase in phrases:
                elements = [_element(part) for part in phrase.split()]
                for first in elements[0].whole:
                    self._by_first.setdefault(first, []).append((name, phrase, elements[1:]))
        self._firsts = frozenset(self._by_first)

    def find(self, text: Sequence[str], distinct: frozenset[str]) -> dict[str, str]:
        """Return, by name, the first phrase found and the words that it matched.

        ``distinct`` is the set of ``text``. O(words x phrases that start with one of them).
        """
        found: dict[str, str] = {}
        begins = self._firsts & distinct
        for first in sorted(begins):
            for name, _, rest in self._by_first[first]:
                if name in found or not all(element.in_any(distinct) for element in rest):
                    continue
                matched = _match(text, first, rest)
                if matched is not None:
                    found[name] = matched
        return found


def _element(part: str) -> _Element:
    alternatives = part.split("|")
    starts = tuple(word[:-1] for word in alternatives if word.endswith("*") and word != "*")
    return _Element(frozenset(w for w in alternatives if w[:-1] not in starts), starts)


def _match(text: Sequence[str], first: str, rest: Sequence[_Element]) -> str | None:
    if not rest:
        return first
    at = -1
    while True:
        try:
            at = text.index(first, at + 1)
        except ValueError:
            return None
        ends = {at}
        for element in rest:
            ends = {
                j
                for end in ends
                for j in range(end + 1, min(end + 2 + GAP, len(text)))
                if element.fits(text[j])
            }
            if not ends:
                break
        if ends:
            return " ".join(text[at : min(ends) + 1])
