"""Keys, tokens and card numbers by their form."""

from __future__ import annotations

import re

_NO_DIGITS = str.maketrans(dict.fromkeys((chr(c) for c in range(128) if not 48 <= c <= 57), None))
_FEWEST_DIGITS, _MOST_DIGITS = 13, 19  # of a card number, ISO/IEC 7812-1

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


def secret_in(folded: str) -> str | None:
    """Kind of a secret in folded text: its literal, or ``card number``. None without one."""
    for literal, shape in _SECRETS:
        if literal in folded and shape.search(folded):
            return literal.strip("-_")
    if _count_digits(folded) < _FEWEST_DIGITS:
        return None
    if any(_holds_card(match[0]) for match in _DIGITS.finditer(folded)):
        return "card number"
    return None


def _count_digits(text: str) -> int:
    if text.isascii():
        return len(text.translate(_NO_DIGITS))
    return sum(map(text.count, "0123456789"))


def _holds_card(run: str) -> bool:
    """Whether neighbouring groups of digits are a card number, at most five of them.

    Groups have four digits or more, the last one three: lists of small numbers are no cards.
    """
    groups = run.replace("-", " ").split()
    for i, first in enumerate(groups):
        if len(first) < 4 or not (first[0] in "3456" or "2221" <= first[:4] <= "2720"):
            continue  # no card for payments begins so
        digits = ""
        for group in groups[i : i + 5]:
            digits += group
            if len(group) < 3 or len(digits) > _MOST_DIGITS:
                break
            if _is_card(digits):
                return True
    return False


def _is_card(digits: str) -> bool:
    """Length and check digit, ISO/IEC 7812-1 annex B."""
    if not _FEWEST_DIGITS <= len(digits) <= _MOST_DIGITS:
        return False
    values = [int(digit) for digit in digits]
    doubled = [2 * d - 9 * (d > 4) for d in values[-2::-2]]
    return (sum(values[-1::-2]) + sum(doubled)) % 10 == 0
