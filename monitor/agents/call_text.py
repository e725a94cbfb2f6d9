"""What a gate reads in a call: its words, the phrases in them, addresses, paths, secrets.

Everything here takes time linear in the text: words are split by one character class, phrases look
at a bounded number of words, and the few expressions have bounded repeats behind a literal.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

GAP = 3
"""Other words that may stand between two words of a phrase."""

_BETWEEN = "\"'`,;(){}[]<>|&!?=\\"  # beside white space
_SPACED = str.maketrans(dict.fromkeys(_BETWEEN, " "))
_NO_DIGITS = str.maketrans(dict.fromkeys((chr(c) for c in range(128) if not 48 <= c <= 57), None))
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_MOST_NAME = 256  # characters of a tool's name
_AUTHORITY = re.compile(r"[a-z0-9.\-]{1,253}(?::[0-9]{1,5})?")

_FEWEST_DIGITS, _MOST_DIGITS = 13, 19  # of a card number, ISO/IEC 7812-1
_MOST_BITS = 4096  # of a whole number

# (a literal without which there is none, what it looks like). Lower case, as folded text is.
_SECRETS = (
    ("-----begin", re.compile(r"-----begin [a-z ]{0,24}private key")),
    ("akia", re.compile(r"\bakia[0-9a-z]{16}\b")),
    ("ghp_", re.compile(r"\bghp_[0-9a-z]{30}")),
    ("github_pat_", re.compile(r"github_pat_[0-9a-z]{20}")),
    ("xox", re.compile(r"\bxox[abprs]-[0-9a-z-]{10}")),
    ("sk-", re.compile(r"\bsk-[0-9a-z_-]{20}")),
    ("eyj", re.compile(r"\beyj[0-9a-z_-]{10,512}\.eyj")),
)
_DIGITS = re.compile(r"[0-9 -]{13,}+")  # possessive: at most 12 characters are read again


class FormError(ValueError):
    """Arguments that are no JSON object, or too large; the message says what and where."""


class CallText(NamedTuple):
    """Arguments as the gate reads them.

    Attributes
    ----------
    leaves : list of str
        String values as they are.
    text : str
        Keys and values, folded, one line each.
    """

    leaves: list[str]
    text: str


def fold(text: str) -> str:
    """Lower case, without what only looks different.

    Compatibility forms (full-width letters) become plain ones and invisible characters go.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    return text.lower()


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
    split: list[str] = []
    done = 0
    for i in [i for i, word in enumerate(found) if "/" in word]:
        split += found[done : i + 1]
        done = i + 1
        last = found[i].rpartition("/")[2]
        if last and "://" not in found[i]:
            split.append(last)
    return split + found[done:]


def _spaced(text: str) -> str:
    if text.isascii():
        return text.translate(_SPACED)  # 1 ns a character, but 50 once one is not ASCII
    for character in _BETWEEN:
        text = text.replace(character, " ")
    return text


def words_of_name(tool: str) -> tuple[str, ...]:
    """Words of a tool's name: ``GmailSendEmail``, ``send_email``, ``send-email``."""
    return tuple(part.lower() for part in _PART.findall(tool[:_MOST_NAME]))


def read_arguments(arguments: object, characters: int, depth: int, values: int) -> CallText:
    """Read arguments within limits.

    Raises
    ------
    FormError
        For what is not JSON (a key that is no string, NaN, another type, a lone surrogate), and for
        what exceeds a limit.
    """
    if not isinstance(arguments, Mapping):
        raise FormError(f"arguments: expected an object, got {type(arguments).__name__}")
    reader = _Reader(characters, depth, values)
    reader.read_items(arguments, 1)
    text = "\n".join(reader.lines)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormError("arguments: a lone surrogate, which is no character") from error
    return CallText(reader.leaves, fold(text))


class _Reader:
    """Keys and values of JSON in their order. It recurses no deeper than its limit."""

    def __init__(self, characters: int, depth: int, values: int) -> None:
        self._characters, self._depth, self._values = characters, depth, values
        self._size = self._count = 0
        self.leaves: list[str] = []
        self.lines: list[str] = []

    def read_items(self, value: Mapping[Any, Any], level: int) -> None:
        self._count_values(value, level)
        for key, item in value.items():
            if type(key) is not str:
                raise FormError(f"arguments: a key is {type(key).__name__}, expected a string")
            self._add(key)
            self._read(item, level)

    def _read(self, value: object, level: int) -> None:
        kind = type(value)  # exact types first: they are what JSON gives, and fast to tell
        if kind is str or isinstance(value, str):
            self.leaves.append(str(value))
            self._add(str(value))
        elif value is None or kind is bool:
            self.lines.append("null" if value is None else "true" if value else "false")
        elif isinstance(value, int):
            if value.bit_length() > _MOST_BITS:
                raise FormError(f"arguments: a number of more than {_MOST_BITS} bits")
            self._add(str(value))
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise FormError(f"arguments: {value} is not JSON")
            self._add(repr(value))
        elif kind is dict or isinstance(value, Mapping):
            self.read_items(value, level + 1)  # type: ignore[arg-type]
        elif isinstance(value, list | tuple):
            self._count_values(value, level + 1)
            for item in value:
                self._read(item, level + 1)
        else:
            raise FormError(f"arguments: {kind.__name__} is not JSON")

    def _add(self, line: str) -> None:
        self._size += len(line)
        if self._size > self._characters:
            raise FormError(f"arguments: more than {self._characters} characters")
        self.lines.append(line)

    def _count_values(self, value: Sized, level: int) -> None:
        if level > self._depth:
            raise FormError(f"arguments: nested more than {self._depth} deep")
        self._count += len(value)
        if self._count > self._values:
            raise FormError(f"arguments: more than {self._values} values")


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


def addresses(distinct: Iterable[str]) -> tuple[list[str], list[str]]:
    """Hosts of URLs and e-mail addresses among words, each sorted."""
    hosts, recipients = set(), set()
    for word in [word for word in distinct if "@" in word or "://" in word]:
        if "://" in word:
            hosts.add(host_of(word))
        elif "@" in word[1:-1]:
            recipients.add(word.removeprefix("mailto:"))
    return sorted(hosts), sorted(recipients)


def host_of(url: str) -> str:
    """Host of a URL or of ``host[:port][/path]``; the whole authority where it is not plain.

    Parsers disagree about what an odd authority means, so none is guessed: as it stands it will
    not be on a list.
    """
    rest = url.partition("://")[2] or url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not _AUTHORITY.fullmatch(authority):
        return authority
    return authority.partition(":")[0].removesuffix(".")


def secret_in(folded: str) -> str | None:
    """Kind of a secret in folded text: its literal, or ``card number``. None without one."""
    for literal, shape in _SECRETS:
        if literal in folded and shape.search(folded):
            return literal.strip("-_")
    if folded.isascii() and len(folded.translate(_NO_DIGITS)) < _FEWEST_DIGITS:
        return None
    for match in _DIGITS.finditer(folded):
        groups = match[0].replace("-", " ").split()
        if any(_is_card("".join(groups[i:j])) for i, j in _spans(len(groups))):
            return "card number"
    return None


def _spans(groups: int) -> Iterator[tuple[int, int]]:
    """Neighbouring groups of digits that may be one number: one alone, or up to six."""
    return ((i, j) for i in range(groups) for j in range(i + 1, min(i + 6, groups) + 1))


def _is_card(digits: str) -> bool:
    """Length and check digit, ISO/IEC 7812-1 annex B."""
    if not _FEWEST_DIGITS <= len(digits) <= _MOST_DIGITS:
        return False
    values = [int(digit) for digit in digits]
    doubled = [2 * d - 9 * (d > 4) for d in values[-2::-2]]
    return (sum(values[-1::-2]) + sum(doubled)) % 10 == 0


def json_type(value: Any) -> str:
    """Name of a value's JSON type."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, Mapping):
        return "object"
    if isinstance(value, list | tuple):
        return "array"
    names = {str: "string", int: "integer", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
