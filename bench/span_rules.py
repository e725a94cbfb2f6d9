"""From scores of tokens to the characters that are marked: the decision rules.

Marking every word above one threshold is not what the official score asks for: it is F1 per
comment, so a faint word should be marked where nothing else stands out and left where something
does. With probabilities p and lengths l of the words, independent of each other, the expected F1 of
a set S is about ``2 sum_S p l / (sum_S l + sum p l)``, and the best set is some number of the
likeliest words (Lewis 1995, SIGIR; Ye et al. 2012, ICML). A word is in it when its p is above half
the best value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midstream.measure.metrics import character_f1, covered

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def words_of(text: str, characters: NDArray[np.int32]) -> NDArray[np.int64]:
    """Number of the word that each token belongs to, [n].

    Tokens are of one word when nothing lies between them and letters or digits meet.
    """
    starts, ends = characters.T
    new = [
        not (start == end and text[start].isalnum() and text[end - 1].isalnum())
        for start, end in zip(starts[1:], ends[:-1], strict=True)
    ]
    return np.concatenate([[0], np.cumsum(new)])[: len(characters)].astype(np.int64)


def probabilities(logits: Floats, words: NDArray[np.int64], shift: float) -> Floats:
    """Probability of each word: sigmoid of the mean logit of its tokens, shifted."""
    means = np.bincount(words, logits) / np.bincount(words)
    return 1 / (1 + np.exp(-(means + shift)))


def best_set(probability: Floats, lengths: Floats) -> tuple[Bools, float]:
    """Words whose expected F1 is the best, and that value; O(n log n).

    Ties go to the smaller set. At least one word is chosen.
    """
    order = np.argsort(-probability, kind="stable")
    mass = (probability * lengths)[order]
    expected = 2 * np.cumsum(mass) / (np.cumsum(lengths[order]) + mass.sum())
    last = int(expected.argmax())
    chosen = np.zeros(len(probability), np.bool_)
    chosen[order[: last + 1]] = True
    return chosen, float(expected[last])


@dataclass(frozen=True)
class Rule:
    """Numbers of the decisions, chosen on a split of the training comments.

    Attributes
    ----------
    shift : float
        Added to the mean logit of a word: the read-out weighs rows, so its logits are no log-odds.
    rise, floor : float
        While the text is still being written a word is marked above
        ``max(floor, rise * F / 2)``, F being the best expected F1 so far. Without the floor the
        first word of every comment would be marked.
    """

    shift: float
    rise: float
    floor: float


def mark_whole(text: str, characters: NDArray[np.int32], logits: Floats, rule: Rule) -> Bools:
    """Tokens to mark once the whole text is known, bool [n]: the best set of words."""
    if not len(logits):
        return np.zeros(0, np.bool_)
    words = words_of(text, characters)
    probability = probabilities(logits, words, rule.shift)
    return best_set(probability, _lengths(characters, words))[0][words]


def mark_streamed(
    text: str,
    characters: NDArray[np.int32],
    logits: Sequence[Floats],
    look_ahead: Sequence[int],
    rule: Rule,
) -> dict[int, Bools]:
    """Tokens to mark while the text is being read, bool [n] for each look-ahead.

    Token t is decided for good when token ``t + k`` has been read, or the text has ended: from the
    run on the tokens so far, the pieces of t's word so far, and the best expected F1 so far.
    O(n) best sets, each over the words so far.

    Parameters
    ----------
    text : str
    characters : int32 [n, 2]
    logits : sequence of n float arrays
        ``logits[m - 1]`` [m] are of the run on the first m tokens.
    look_ahead : sequence of int
    rule : Rule
    """
    count = len(characters)
    words = words_of(text, characters)
    so_far: list[Floats] = []  # probability of each token's word over the level, by tokens read
    for read in range(1, count + 1):
        known = words[:read]
        probability = probabilities(logits[read - 1], known, rule.shift)
        _, expected = best_set(probability, _lengths(characters[:read], known))
        so_far.append(probability[known] - max(rule.floor, rule.rise * expected / 2))
    return {
        k: np.array([so_far[min(t + k, count - 1)][t] > 0 for t in range(count)], np.bool_)
        for k in look_ahead
    }


def score(text: str, gold: Bools, characters: NDArray[np.int32], marked: Bools) -> float:
    """Official F1 of one text; the gap between two marked neighbours counts as marked."""
    return character_f1(gold, covered(len(text), characters, marked))


def _lengths(characters: NDArray[np.int32], words: NDArray[np.int64]) -> Floats:
    """Characters of each word, at least one."""
    first = np.searchsorted(words, np.arange(words[-1] + 1))
    last = np.searchsorted(words, np.arange(words[-1] + 1), side="right") - 1
    return np.maximum(characters[last, 1] - characters[first, 0], 1).astype(np.float64)
