"""Where the words of a call come from: the user, or text that tools gave back.

An argument that only the prose of an observation mentions was put there by whoever wrote that text.
Values of fields (``"id": "r7"``) are what tools are asked for, and are not held against a call.
"""

from __future__ import annotations

import re

from midstream.agents.phrases import Phrases
from midstream.agents.places import addresses
from midstream.agents.text import fold, words

# Ends of fields and lines, in JSON and in Python's way of writing it.
_FIELDS = re.compile(r"""["']\s{0,4}[,:}\]]|[{\[,:]\s{0,4}["']|\\n|\n""")
_PROSE_WORDS = 5  # a field with fewer is a value
_NAME_LENGTH = 5
_MARK = re.compile(r"[0-9@./#]")
_NUMBER = re.compile(r"\+?[0-9]{7,24}")
_LETTER = re.compile(r"[^\W\d_]")
_CONTENT_LENGTH = 4  # shorter words say little
_COMMON = frozenset(
    """
    about account action after again also amount been before call content could data date dear
    details does email false file files find first from have here hello important information into
    just keyword keywords last like list make message more name need note null only other please
    query read recent result results search send some subject text that their them then there these
    they this time title true type user using value view want were what when which will with would
    your
    """.split()  # noqa: SIM905
)


class Origins:
    """What the user said and what observations said, as words.

    Parameters
    ----------
    phrases : Phrases
        Of observations.
    requests : set of str
        Those among them that ask for something.
    most_words : int
        Words of observations kept.

    Attributes
    ----------
    raised : dict
        Signals that observations have raised, with the words that did.
    copied, requested : set of str
        Names that only prose mentions; content words of requests that stand in observations.
    forgot : bool
        True once observations had more than ``most_words`` words.

    Notes
    -----
    Reading text is linear in it and is done when it arrives, so that a decision only intersects
    sets of words.
    """

    def __init__(self, phrases: Phrases, requests: frozenset[str], most_words: int) -> None:
        self._phrases, self._requests = phrases, requests
        self._left = most_words
        self.trusted: set[str] = set()
        self.raised: dict[str, str] = {}
        self.copied: set[str] = set()
        self.requested: set[str] = set()
        self.forgot = False

    def trust(self, text: str) -> None:
        """Read what the user or the operator said; it also clears what was copied before."""
        said = set(words(fold(text)))
        said.update(addresses(said)[0])
        self.trusted |= said
        self.copied -= said
        self.requested -= said

    def observe(self, text: str) -> None:
        """Read what a tool gave back."""
        for segment in _FIELDS.split(text):
            found = words(fold(segment))
            self._left -= len(found)
            if self._left < 0:
                self.forgot = True
                return
            distinct = frozenset(found)
            raised = self._phrases.find(found, distinct)
            for name, matched in raised.items():
                self.raised.setdefault(name, matched)
            if len(found) < _PROSE_WORDS:
                continue
            unknown = distinct - self.trusted
            self.copied.update(word for word in unknown if _is_name(word))
            self.copied.update(host for host in addresses(unknown)[0] if host not in self.trusted)
            if not self._requests.isdisjoint(raised):
                self.requested.update(
                    word for word in unknown - _COMMON if len(word) >= _CONTENT_LENGTH
                )


def _is_name(word: str) -> bool:
    """Whether it can be a name, an address or a path: amy@x.io, guest7, /srv/a, +4930123456.

    A year, a date or an amount is none.
    """
    if len(word) < _NAME_LENGTH or not _MARK.search(word):
        return False
    return bool(_LETTER.search(word) or _NUMBER.fullmatch(word))
