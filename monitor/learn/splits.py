"""Splits of labelled examples that share no group, no prompt and no near-duplicate."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.learn.examples import Example, conversation_of, group_of
from midstream.learn.tokens import UNKNOWN, Tokens

SIMILAR = 0.8
"""Jaccard similarity of two texts from which on they are near-duplicates."""

_SHINGLE = 5  # characters
_PERMUTATIONS = 128
_FOUND = 0.99  # chance that a pair at the threshold becomes a candidate
_ENOUGH = 16  # near-duplicates in the index; one more of their kind would only slow it down
_SHARED = 0.05  # share of the examples that makes a system message a preamble

Class = tuple[str, str, bool]
"""Level (response or prompt), hazard, and label."""


class SplitError(ValueError):
    """The examples cannot be split as asked; the message says what is missing and what to do."""


def split(
    examples: Sequence[Example],
    shares: Mapping[str, float],
    seed: int,
    *,
    similar: float = SIMILAR,
) -> dict[str, list[int]]:
    """Split examples by groups.

    Two examples stand on the same side when they are of one group, when their conversations are the
    same, or when their texts are near-duplicates: the Jaccard similarity of their sets of 5
    characters in a row, case and blanks aside, is ``similar`` or more, as estimated by 128 min-wise
    hashes (standard error 0.035 at 0.8); of what MinHash LSH finds, 99 % at the threshold. The text
    is the conversation where there is one, without a system message that more than 5 % of the
    examples share, and else the response. What is joined to one text is joined to all it is joined
    to.

    Within that the groups are dealt so that every split has its share of the examples and of both
    classes of each label of response and prompt. The largest group comes first, and each goes where
    it is needed most. The same examples and seed give the same split.

    Linear in the characters; in the texts, the cost is that of the candidates that LSH finds, few
    in text that people wrote. Dealing is linear in groups x splits x classes.

    Parameters
    ----------
    examples : sequence of Example
    shares : mapping of name to share
        Positive, 1 in all.
    seed : int
    similar : float
        In (0, 1].

    Returns
    -------
    dict of name to list of int
        Indices into ``examples``, ascending.

    Raises
    ------
    SplitError
        When there are fewer groups than splits, or a class that the data have is missing from a
        split.
    ImportError
        Without the extra ``learn``.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise SplitError(f"shares must be positive and 1 in all, not {dict(shares)}")
    if not 0 < similar <= 1:
        raise SplitError(f"similar must be above 0 and at most 1, not {similar}")
    groups = merged_groups(examples, similar)
    if len(groups) < len(shares):
        largest = max(map(len, groups), default=0)
        raise SplitError(
            f"{len(examples)} examples are {len(groups)} groups, the largest of {largest}, and "
            f"{len(shares)} splits need at least one each; give more prompts, ask for fewer "
            f"splits, or raise similar={similar} if texts were joined that are no copies"
        )
    return _dealt(_classes(examples), groups, shares, seed)


def split_tokens(
    tokens: Tokens,
    shares: Mapping[str, float],
    seed: int,
    hazards: Collection[str] | None = None,
) -> dict[str, list[int]]:
    """Split collected examples by the groups they were collected with (see `grouped`).

    Parameters, result and errors as for `split`; a class may only be missing from a split when it
    is of none of the ``hazards``, where they are given.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for at, group in enumerate(tokens.groups):
        members[group].append(at)
    known: list[set[Class]] = []
    for response, prompt in zip(tokens.response_labels, tokens.prompt_labels, strict=True):
        levels = {"response": response, "prompt": prompt}
        known.append(
            {
                (level, hazard, bool(label))
                for level, labels in levels.items()
                for hazard, label in zip(tokens.hazards, labels, strict=True)
                if label != UNKNOWN
            }
        )
    return _dealt(known, list(members.values()), shares, seed, hazards)


def grouped(examples: Sequence[Example], similar: float = SIMILAR) -> list[Example]:
    """Give all examples that must stay together one group, named after the first of them."""
    found = list(examples)
    for members in merged_groups(examples, similar):
        group = group_of(examples[members[0]])
        for at in members:
            found[at] = found[at].model_copy(update={"group": group})
    return found


def merged_groups(examples: Sequence[Example], similar: float = SIMILAR) -> list[list[int]]:
    """Indices of examples that must stay together, each list and the lists in order."""
    join = _Sets(len(examples))
    first: dict[str, int] = {}
    for at, example in enumerate(examples):
        join.union(at, first.setdefault(group_of(example), at))
    texts: dict[str, int] = {}
    for at, text in enumerate(_texts(examples)):
        if text:
            join.union(at, texts.setdefault(text, at))
    _join_near(texts, similar, join)
    members = defaultdict(list)
    for at in range(len(examples)):
        members[join.find(at)].append(at)
    return sorted(members.values())


class _Sets:
    """Disjoint sets (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, at: int) -> int:
        parent = self._parent
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    def union(self, one: int, other: int) -> None:
        self._parent[self.find(one)] = self.find(other)


def _texts(examples: Sequence[Example]) -> list[str]:
    """What near-duplicates are judged by, case and blanks aside."""
    systems = Counter(
        said
        for example in examples
        for said in {message.content for message in example.messages if message.role == "system"}
    )
    preamble = {said for said, times in systems.items() if times > _SHARED * len(examples)}

    def text(example: Example) -> str:
        said = [
            message.content
            for message in example.messages
            if message.role != "system" or message.content not in preamble
        ]
        return " ".join(" ".join(said if conversation_of(example) else [example.response]).split())

    return [text(example).casefold() for example in examples]


def _join_near(texts: Mapping[str, int], similar: float, join: _Sets) -> None:
    """Join the owners of texts that are near-duplicates of one another."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ImportError("splitting needs datasketch: pip install 'midstream[learn]'") from error
    rows = _rows_per_band(similar)
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=(_PERMUTATIONS // rows, rows))
    values: dict[int, NDArray[Any]] = {}
    for text, owner in texts.items():
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        sketch.update_batch(list(_shingles(text)))
        values[owner] = sketch.hashvalues
        near = 0
        if candidates := sorted(index.query(sketch)):
            alike = np.stack([values[other] for other in candidates]) == sketch.hashvalues
            for other in np.array(candidates)[alike.mean(axis=1) >= similar].tolist():
                join.union(owner, other)
                near += 1
        if near < _ENOUGH:
            index.insert(owner, sketch)


def _rows_per_band(similar: float) -> int:
    """Most rows for which bands of so many still find a pair at the threshold."""
    return max(
        rows
        for rows in range(1, _PERMUTATIONS + 1)
        if rows == 1 or 1 - (1 - similar**rows) ** (_PERMUTATIONS // rows) >= _FOUND
    )


def _shingles(text: str) -> set[bytes]:
    return {text[at : at + _SHINGLE].encode() for at in range(max(1, len(text) - _SHINGLE + 1))}


def _classes(examples: Sequence[Example]) -> list[set[Class]]:
    """Every label that is known of each example."""
    spanned = {span.hazard for example in examples for span in example.spans or ()}
    found = []
    for example in examples:
        # A hazard that has spans somewhere is not where the spans do not show it.
        shown = dict.fromkeys(spanned, False) if example.spans is not None else {}
        shown |= {span.hazard: True for span in example.spans or ()}
        shown |= example.labels
        classes: set[Class] = {("response", h, label) for h, label in shown.items()}
        classes |= {("prompt", h, label) for h, label in example.prompt_labels.items()}
        found.append(classes)
    return found


def _dealt(
    known: Sequence[set[Class]],
    groups: list[list[int]],
    shares: Mapping[str, float],
    seed: int,
    hazards: Collection[str] | None = None,
) -> dict[str, list[int]]:
    """Deal groups to splits, each to where its examples and labels are needed most."""
    classes = sorted(set().union(*known))
    column = {each: at for at, each in enumerate(classes, start=1)}
    counts = np.zeros((len(groups), 1 + len(classes)))
    for row, group in zip(counts, groups, strict=True):
        row[0] = len(group)
        for at in group:
            for each in known[at]:
                row[column[each]] += 1
    totals = counts.sum(axis=0)
    weights = counts / totals
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.argsort(-weights[order].max(axis=1), kind="stable")]
    share = np.array(list(shares.values()))
    filled = np.zeros((len(share), len(totals)))  # of each split's due, what it has
    to = np.zeros(len(groups), np.int64)
    for group in order:
        to[group] = ((1 - filled) @ weights[group]).argmax()
        filled[to[group]] += weights[group] / share[to[group]]

    names = list(shares)
    for split_, name in enumerate(names):
        for each in classes:
            needed = hazards is None or each[1] in hazards
            if needed and filled[split_, column[each]] == 0:
                raise _missing(name, each, int((counts[:, column[each]] > 0).sum()), len(shares))
        if filled[split_, 0] == 0:
            raise SplitError(f"split {name!r} is empty: {len(groups)} groups are too few for it")
    return {
        name: sorted(at for group in np.flatnonzero(to == place) for at in groups[group])
        for place, name in enumerate(names)
    }


def _missing(name: str, lacking: Class, groups: int, splits: int) -> SplitError:
    level, hazard, label = lacking
    return SplitError(
        f"split {name!r} has no example whose {level} has {hazard!r} {str(label).lower()}: "
        f"{groups} groups have one, for {splits} splits; give more of them, ask for fewer splits, "
        "or leave this label out"
    )
