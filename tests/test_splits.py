"""Nothing that is alike stands on two sides, and every side has its share of every label."""

from __future__ import annotations

import random
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from kernel_cases import fresh_seed

from midstream.learn.examples import Example, Message, Span
from midstream.learn.splits import SplitError, merged_groups, split

SHARES = {"train": 0.6, "choose": 0.2, "calibrate": 0.2}
LETTERS = "abcdefghijklmnopqrstuvwxyz    "


def text(random_: random.Random, length: int = 160) -> str:
    return "".join(random_.choices(LETTERS, k=length))


def plain(at: int, said: str, **fields: Any) -> Example:
    return Example(id=f"e{at}", response=said, **{"labels": {"h": at % 3 == 0}, **fields})


def asked(at: int, *said: str, system: str | None = None, **fields: Any) -> Example:
    messages = [Message(role="user", content=one) for one in said]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return Example(id=f"e{at}", messages=tuple(messages), **fields)


def components(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """By spreading the smallest member until nothing changes."""
    label = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            least = min(label[one], label[other])
            changed |= label[one] != least or label[other] != least
            label[one] = label[other] = least
    return sorted([i for i in range(count) if label[i] == root] for root in set(label))


def jaccard(one: str, other: str) -> float:
    def shingles(said: str) -> set[str]:
        said = " ".join(said.split()).casefold()
        return {said[i : i + 5] for i in range(max(1, len(said) - 4))}

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def changed(said: str, letters: int, random_: random.Random) -> str:
    places = random_.sample(range(len(said)), letters)
    return "".join("#" if at in places else c for at, c in enumerate(said))


def test_near_duplicates_are_found_as_by_comparing_all_pairs() -> None:
    random_ = random.Random(fresh_seed())
    texts = [text(random_, 400) for _ in range(30)]
    for said in texts[:15]:
        texts.append(changed(said, random_.choice([1, 40]), random_))
        texts.append(f"  {said.upper()} ".replace(" ", "\n "))
    pairs = [
        (i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) >= 0.8
    ]
    # One of 400 letters changes at most 5 of 396 shingles: similarity 0.97 or more, and 40 change
    # so many that it is below 0.6; of neither do 128 hashes fall on the other side of 0.8.
    assert all(not 0.67 < jaccard(texts[i], texts[j]) < 0.97 for i, j in combinations(range(60), 2))
    examples = [plain(at, said) for at, said in enumerate(texts)]
    assert merged_groups(examples) == components(len(texts), pairs)


def test_groups_prompts_and_copies_stay_together() -> None:
    random_ = random.Random(fresh_seed())
    a, b, c, d = (text(random_) for _ in range(4))
    examples = [
        asked(0, a, response="x"),
        asked(1, a, response="y"),  # the same prompt
        asked(2, a.upper(), group="mine"),  # another group, the same prompt but for case
        asked(3, c, group="mine"),
        asked(4, a, b),  # a conversation that only begins in the same way
        asked(5, d, response="the same answer"),
        asked(6, c[::-1], response="the same answer"),  # answers do not join
        plain(7, d),
        plain(8, d),
    ]
    assert merged_groups(examples) == [[0, 1, 2, 3], [4], [5, 7, 8], [6]]


def test_a_preamble_joins_nobody_and_a_rare_system_message_does() -> None:
    random_ = random.Random(fresh_seed())
    long, rare = text(random_, 3000), text(random_, 3000)
    examples = [asked(at, text(random_, 40), system=long) for at in range(40)]
    assert len(merged_groups(examples)) == 40
    examples += [asked(at, text(random_, 40), system=rare) for at in (40, 41)]
    assert merged_groups(examples)[-1] == [40, 41]
    alone = [
        Example(id=f"e{at}", messages=(Message(role="system", content=long),), response=said)
        for at, said in enumerate([text(random_), text(random_)])
    ]
    assert merged_groups(alone) == [[0], [1]]


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_examples_and_of_labels(seed: int) -> None:
    random_ = random.Random(fresh_seed())
    examples = []
    for at in range(900):
        spans = (Span(start=0, end=1, hazard="s"),) if random_.random() < 0.1 else ()
        labels = {"h": random_.random() < 0.2}
        group = f"g{random_.randrange(300)}"
        examples.append(plain(at, text(random_, 60), labels=labels, spans=spans, group=group))
    found = split(examples, SHARES, seed)
    assert list(found) == list(SHARES)
    assert sorted(at for inside in found.values() for at in inside) == list(range(900))
    sides = {examples[at].group: name for name, inside in found.items() for at in inside}
    for name, inside in found.items():
        assert inside == sorted(inside)
        assert all(sides[examples[at].group] == name for at in inside)
        counts = {
            "all": (len(inside), 900),
            "h": (sum(examples[i].labels["h"] for i in inside),
                  sum(e.labels["h"] for e in examples)),
            "s": (sum(bool(examples[i].spans) for i in inside),
                  sum(bool(e.spans) for e in examples)),
        }  # fmt: skip
        for got, total in counts.values():
            # A group holds 3 examples on average, and hardly ever 12.
            assert abs(got - SHARES[name] * total) <= 6, (name, counts)


def test_same_seed_same_split_and_another_seed_another() -> None:
    random_ = random.Random(fresh_seed())
    examples = [plain(at, text(random_)) for at in range(60)]
    assert split(examples, SHARES, 1) == split(examples, SHARES, 1)
    assert split(examples, SHARES, 1) != split(examples, SHARES, 2)


def test_a_rare_class_goes_everywhere() -> None:
    random_ = random.Random(fresh_seed())
    for seed in range(10):
        rare = set(random_.sample(range(200), 3))
        examples = [
            plain(at, text(random_), labels={"h": at in rare}, prompt_labels={"h": at % 2 == 0})
            for at in range(200)
        ]
        found = split(examples, SHARES, seed)
        assert all(len(rare & set(inside)) == 1 for inside in found.values())
        assert [len(inside) for inside in found.values()] == [120, 40, 40]


def test_a_missing_class_is_named() -> None:
    random_ = random.Random(fresh_seed())
    examples = [plain(at, text(random_), labels={"h": at < 2}) for at in range(30)]
    with pytest.raises(
        SplitError, match=r"split '\w+' .* response has 'h' true: 2 groups .* 3 spl"
    ):
        split(examples, SHARES, 0)
    examples = [plain(at, text(random_), prompt_labels={"p": at > 0}) for at in range(30)]
    with pytest.raises(SplitError, match=r"prompt has 'p' false: 1 groups have one, for 3 splits"):
        split(examples, SHARES, 0)
    one = (Span(start=0, end=1, hazard="s"),)
    examples = [plain(at, text(random_), labels={}, spans=one * (at > 0)) for at in range(30)]
    with pytest.raises(SplitError, match=r"response has 's' false: 1 groups have one"):
        split(examples, SHARES, 0)


def test_too_few_groups_and_bad_shares() -> None:
    copies = [plain(at, "the same text for all of them") for at in range(10)]
    with pytest.raises(
        SplitError, match=r"10 examples are 1 groups, the largest of 10, and 3 splits"
    ):
        split(copies, SHARES, 0)
    with pytest.raises(SplitError, match="0 examples are 0 groups"):
        split([], SHARES, 0)
    for shares in ({}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(SplitError, match="shares must be positive and 1 in all"):
            split(copies, shares, 0)
    with pytest.raises(SplitError, match="similar must be above 0"):
        split(copies, SHARES, 0, similar=0.0)


def test_without_datasketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"midstream\[learn\]"):
        split([plain(0, "a"), plain(1, "b")], {"a": 0.5, "b": 0.5}, 0)


def test_many_copies_of_one_kind_stay_cheap_and_together() -> None:
    """More near-duplicates than the index keeps of a kind."""
    random_ = random.Random(fresh_seed())
    base = text(random_, 600)
    examples = [plain(at, changed(base, 1, random_)) for at in range(80)]
    other = [plain(80 + at, text(random_)) for at in range(5)]
    assert np.sort([len(g) for g in merged_groups(examples + other)]).tolist() == [1] * 5 + [80]
