"""Regular expressions that people write into rules, kept to those that cannot run away.

Python's engine backtracks: ``(a+)+b`` takes exponential time on text that does not match, and text
comes from strangers. A pattern is accepted when the ways to try it at one position are few, so a
search takes time linear in the text whatever the text is.
"""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

MOST_WAYS = 10_000
"""Ways in which a pattern may be tried at one position of the text."""

LONGEST_MATCH = 2_000
"""Characters of one match."""

_parser: Any = importlib.import_module("re._parser")  # where the engine's own parser lives

_ONE_WAY = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}


def ways(pattern: str) -> float:
    """Count the ways to try a pattern at one position: sequences multiply, branches add up.

    Infinite for an unbounded repeat. A ValueError says what else cannot be accepted.
    """
    parsed = _parser.parse(pattern)
    count = _ways(parsed)
    if parsed.getwidth()[1] > LONGEST_MATCH:
        raise ValueError(f"can match more than {LONGEST_MATCH:,} characters; use shorter repeats")
    return count


def _ways(parsed: Any) -> float:
    total = 1.0
    for operation, argument in parsed:
        name = str(operation)
        if name in _ONE_WAY:
            continue
        if name == "BRANCH":
            total *= sum(_ways(branch) for branch in argument[1])
        elif name == "SUBPATTERN":
            total *= _ways(argument[3])
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = argument
            if high == _parser.MAXREPEAT:
                raise ValueError(
                    "holds an unbounded repeat (*, + or {n,}): a search may take quadratic time or "
                    "worse; give it an end, for instance {0,40}"
                )
            each = _ways(body)
            if each == 1:
                total *= high - low + 1
            else:  # two ways, 14 times over, are too many
                total *= sum(each**n for n in range(low, min(high, 14) + 1))
        else:
            raise ValueError(f"holds {name.lower()}: lookaround and references are not accepted")
        if total > MOST_WAYS:
            raise ValueError(
                f"can be tried in more than {MOST_WAYS:,} ways at one position; use fewer or "
                "shorter repeats"
            )
    return total


def _compiled(value: object) -> object:
    if isinstance(value, re.Pattern):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a regular expression, got {value!r}")
    try:
        ways(value)
        compiled = re.compile(value, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if compiled.search(""):
        raise ValueError("matches the empty text, and so everything")
    return compiled


Pattern = Annotated[re.Pattern[str], BeforeValidator(_compiled)]
"""A compiled pattern, case ignored, whose search is linear in the text."""
