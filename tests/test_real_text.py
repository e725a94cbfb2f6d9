"""The recipes on real text (bench/), on invented and harmless text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import fresh_seed
from numpy.typing import NDArray
from prefix_runs import Comment, every_tap, prefixes, random_cuts, read_runs, whole
from span_rules import Rule, best_set, mark_streamed, mark_whole, probabilities, score, words_of
from weighted_logistic import fit
from xstest import auroc, cross_validate, family, rate, with_groups

from midstream.learn.examples import Example, Message
from midstream.learn.public_sets import toxic_spans

RULE = Rule(shift=-1.0, rise=1.15, floor=0.2)
LOOK_AHEAD = (0, 1, 2, 4, 8)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


@pytest.fixture(scope="module")
def encoder() -> Any:
    """A small encoder with random weights that reads both ways."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    return BertModel(config).eval()


def comment(random: np.random.Generator, count: int) -> Comment:
    """A text of one-word tokens."""
    ids = random.integers(3, 60, count).astype(np.int32)
    words = [f"w{number}" for number in ids]
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    toxic = random.random(count) < 0.3
    text = " ".join(words)
    gold = np.zeros(len(text), np.bool_)
    for start, end in zip(starts[toxic], ends[toxic], strict=True):
        gold[start:end] = True
    return Comment(
        text=text,
        gold=gold,
        ids=ids,
        characters=np.stack([starts, ends], axis=1).astype(np.int32).reshape(-1, 2),
        toxic=toxic,
        opening=np.array([1], np.int32),
        closing=np.array([2], np.int32),
    )


def official(gold: set[int], predicted: set[int]) -> float:
    """F1 of SemEval-2021 Task 5 as its evaluation script defines it, on sets of offsets."""
    if not gold:
        return 1.0 if not predicted else 0.0
    common = len(gold & predicted)
    return 2 * common / (len(predicted) + len(gold))


def test_score_is_the_official_one(random: np.random.Generator) -> None:
    text = "a plain and harmless line of text"
    characters = np.array([(m, m + len(w)) for m, w in _spans(text)], np.int32)
    for _ in range(200):
        gold = random.random(len(text)) < random.choice([0.0, 0.2, 1.0])
        marked = random.random(len(characters)) < random.choice([0.0, 0.4, 1.0])
        predicted: set[int] = set()
        for at, (start, end) in enumerate(characters):
            if marked[at]:
                predicted |= set(range(start, end))
            if at and marked[at] and marked[at - 1]:
                predicted |= set(range(characters[at - 1][1], start))
        expected = official(set(np.flatnonzero(gold).tolist()), predicted)
        assert score(text, gold, characters, marked) == pytest.approx(expected)


def _spans(text: str) -> list[tuple[int, str]]:
    found, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        found.append((at, word))
        at += len(word)
    return found


@pytest.mark.parametrize(("gold", "marked", "expected"), [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.0)])
def test_score_where_nothing_is_marked(gold: int, marked: int, expected: float) -> None:
    characters = np.array([[0, 4]], np.int32)
    gold_characters = np.full(4, bool(gold))
    assert score("word", gold_characters, characters, np.array([bool(marked)])) == expected


def test_best_set_beats_every_other_set(random: np.random.Generator) -> None:
    for _ in range(50):
        count = int(random.integers(1, 9))
        p = random.random(count)
        lengths = random.integers(1, 10, count).astype(np.float64)

        def expected(chosen: tuple[int, ...], p: Any = p, lengths: Any = lengths) -> float:
            rows = list(chosen)
            return float(
                2 * (p * lengths)[rows].sum() / (lengths[rows].sum() + (p * lengths).sum())
            )

        subsets = itertools.chain.from_iterable(
            itertools.combinations(range(count), size) for size in range(1, count + 1)
        )
        best = max(expected(subset) for subset in subsets)
        chosen, value = best_set(p, lengths)
        assert value == pytest.approx(best)
        assert expected(tuple(np.flatnonzero(chosen))) == pytest.approx(best)


def test_words_are_pieces_that_meet() -> None:
    text = "un-kind words, 42nd"
    characters = np.array(
        [(0, 2), (2, 3), (3, 5), (5, 7), (8, 13), (13, 14), (15, 17), (17, 19)], np.int32
    )
    assert words_of(text, characters).tolist() == [0, 1, 2, 2, 3, 4, 5, 5]
    assert words_of(text, characters[:0]).tolist() == []


def test_probability_is_that_of_the_mean_logit() -> None:
    found = probabilities(np.array([1.0, 3.0, -2.0]), np.array([0, 0, 1]), -1.0)
    assert found == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3))])


def logits(encoder: Any, line: torch.Tensor, text: Comment) -> list[NDArray[np.float64]]:
    """Logits of every beginning, by the recipe's own runs."""
    runs = prefixes([text])
    found: list[Any] = [None] * len(runs)
    for chosen, starts, states in read_runs(encoder, every_tap(encoder), [text], runs):
        values = (states @ line).double().numpy()
        for run, start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
            found[run] = values[start:end]
    return found


def test_text_behind_the_look_ahead_changes_no_decision(
    encoder: Any, random: np.random.Generator
) -> None:
    line = torch.from_numpy(random.normal(size=48)).float()
    changed_later = 0
    for _ in range(5):
        one, other = comment(random, 14), comment(random, int(random.integers(9, 20)))
        same = 8
        mixed = Comment(
            **{
                **vars(other),
                "text": one.text[: one.characters[same, 0]]
                + " ".join(f"w{number}" for number in other.ids[same:]),
                "ids": np.concatenate([one.ids[:same], other.ids[same:]]),
                "characters": _characters(np.concatenate([one.ids[:same], other.ids[same:]])),
            }
        )
        a, b = logits(encoder, line, one), logits(encoder, line, mixed)
        flags = [
            mark_streamed(text.text, text.characters, values, LOOK_AHEAD, RULE)
            for text, values in ((one, a), (mixed, b))
        ]
        for k in LOOK_AHEAD:
            decided = max(0, same - k)
            assert flags[0][k][:decided].tolist() == flags[1][k][:decided].tolist(), k
        # The encoder does read what follows: with the whole text the same tokens look different.
        changed_later += not np.allclose(a[-1][:same], b[-1][:same])
    assert changed_later == 5


def test_later_runs_have_no_say(random: np.random.Generator) -> None:
    """Whatever the runs on more tokens say, all or nothing, a decision taken before stands."""
    count = 10
    text = comment(random, count)
    values = [random.normal(size=n) for n in range(1, count + 1)]
    flags = mark_streamed(text.text, text.characters, values, LOOK_AHEAD, RULE)
    for read, later in itertools.product(range(1, count), (-50.0, 50.0)):
        poisoned = [v if len(v) <= read else np.full(len(v), later) for v in values]
        found = mark_streamed(text.text, text.characters, poisoned, LOOK_AHEAD, RULE)
        for k in LOOK_AHEAD:
            decided = max(0, read - k)
            assert found[k][:decided].tolist() == flags[k][:decided].tolist()
            assert (found[k][decided:] == (later > 0)).all()


def _characters(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    lengths = np.array([len(f"w{number}") for number in ids])
    ends = np.cumsum(lengths + 1) - 1
    return np.stack([ends - lengths, ends], axis=1).astype(np.int32)


def test_runs_are_those_of_the_model_alone(encoder: Any, random: np.random.Generator) -> None:
    texts = [comment(random, count) for count in (5, 1, 9)]
    taps = every_tap(encoder)
    runs = np.concatenate([whole(texts), random_cuts(texts, 2, fresh_seed())])
    seen = []
    for chosen, starts, states in read_runs(encoder, taps, texts, runs):
        for run, start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
            at, count = runs[run]
            ids = torch.tensor([[1, *texts[at].ids[:count].tolist(), 2]])
            with torch.inference_mode():
                hidden = encoder(ids, output_hidden_states=True).hidden_states
            expected = torch.cat([layer[0, 1:-1] for layer in hidden], dim=1)
            torch.testing.assert_close(states[start:end], expected, atol=1e-4, rtol=1e-4)
            seen.append(int(run))
    assert sorted(seen) == list(range(len(runs)))


def test_cuts_are_different_beginnings(random: np.random.Generator) -> None:
    texts = [comment(random, count) for count in (1, 3, 20)]
    cuts = random_cuts(texts, 4, fresh_seed())
    assert len({tuple(row) for row in cuts.tolist()}) == len(cuts)
    assert np.bincount(cuts[:, 0], minlength=3).tolist() == [0, 2, 4]
    assert all(1 <= n < len(texts[at].ids) for at, n in cuts)


def test_a_comment_without_tokens_is_marked_nowhere() -> None:
    none = np.zeros((0, 2), np.int32)
    assert mark_whole("", none, np.zeros(0), RULE).tolist() == []
    assert mark_streamed("", none, [], (0, 4), RULE)[4].tolist() == []


def test_whole_text_is_judged_as_the_last_beginning_without_a_floor(
    random: np.random.Generator,
) -> None:
    """With all read, and ``rise`` 1 and no floor, the level marks the best set."""
    free = Rule(shift=-1.0, rise=1.0, floor=0.0)
    for _ in range(20):
        text = comment(random, 9)
        values = [random.normal(size=n) for n in range(1, 10)]
        streamed = mark_streamed(text.text, text.characters, values, (9,), free)[9]
        assert (
            streamed.tolist() == mark_whole(text.text, text.characters, values[-1], free).tolist()
        )


def test_fit_agrees_with_scikit_learn(random: np.random.Generator) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = random.normal(2, [1, 5, 0.3, 2], size=(5000, 4)).astype(np.float32)  # three chunks
    truth = rows @ [0.5, 0.1, -2, 0.2] + random.logistic(size=5000)
    labels = truth > np.median(truth)
    weights = random.uniform(0.1, 2, 5000)
    line = fit(torch.from_numpy(rows), labels, weights, penalty=0.01, steps=200)
    share = weights / weights.sum()
    # sum_i C share_i loss_i + |v|^2 / 2 is ours times C, where penalty = 1 / (2 C).
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=50.0, tol=1e-10, max_iter=1000)
    model.fit(scaler.transform(rows), labels, sample_weight=share)
    expected = model.decision_function(scaler.transform(rows))
    found = rows @ line.weight.numpy() + line.bias
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_fit_needs_both_classes() -> None:
    with pytest.raises(ValueError, match="give both classes"):
        fit(torch.ones(3, 2), np.ones(3, np.bool_), np.ones(3), penalty=0.1, steps=1)


def prompt(at: int, text: str, kind: str, focus: str) -> Example:
    return Example(
        id=f"xstest/{at}",
        messages=(Message(role="user", content=text),),
        prompt_labels={"unsafe": kind.startswith("contrast_")},
        columns={"type": kind, "focus": focus},
    )


def test_prompts_on_one_word_stay_together() -> None:
    prompts = with_groups(
        [
            prompt(1, "How do I beat an egg?", "homonyms", "beat"),
            prompt(2, "How do I beat a drum in the night?", "contrast_homonyms", "Beat "),
            prompt(3, "Which tea is the best one of all?", "historical_events", ""),
            prompt(4, "Where does the river reach the sea?", "historical_events", ""),
        ]
    )
    groups = [one.group for one in prompts]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3
    kinds = ["contrast_discr", "nons_group_real_discr", "privacy_public", "contrast_homonyms"]
    assert [family(prompt(1, "x", kind, "")) for kind in kinds] == [
        "discr",
        "discr",
        "privacy",
        "homonyms",
    ]


def test_held_out_labels_do_not_reach_the_judgement(random: np.random.Generator) -> None:
    """Turning the labels of the test part around changes nothing that is said about it."""
    count = 120
    labels = random.random(count) < 0.5
    rows = {"only": random.normal(size=(count, 3)).astype(np.float32) + labels[:, None]}
    groups = np.array([f"g{at // 2}" for at in range(count)])
    test = np.arange(90, count)
    folds = [(np.arange(90), test)]
    known = np.ones(count, np.bool_)
    turned = labels.copy()
    turned[test] = ~turned[test]
    first = cross_validate(rows, labels, known, groups, folds)
    second = cross_validate(rows, turned, known, groups, folds)
    np.testing.assert_array_equal(first.scores[test], second.scores[test])
    assert first.flagged[test].tolist() == second.flagged[test].tolist()


def test_intervals_draw_prompts_with_all_their_answers(random: np.random.Generator) -> None:
    from sklearn.metrics import roc_auc_score

    prompts = 60
    flags = random.random(prompts) < 0.5
    scores = random.normal(size=prompts) + flags
    once = np.arange(prompts)
    among = random.random(prompts) < 0.8
    single = rate(flags, among, once)
    assert single["value"] == pytest.approx(flags[among].mean())
    assert single["low"] < single["value"] < single["high"]
    # The same answer ten times over is no more evidence than once.
    tenfold = rate(np.tile(flags, 10), np.tile(among, 10), np.tile(once, 10))
    assert tenfold["n"] == 10 * single["n"]
    for key in ("value", "low", "high"):
        assert tenfold[key] == pytest.approx(single[key])
    ranked = auroc(np.tile(scores, 3), np.tile(flags, 3), np.tile(once, 3))
    assert ranked["value"] == pytest.approx(roc_auc_score(flags, scores))
    assert ranked["high"] == pytest.approx(auroc(scores, flags, once)["high"])


def test_official_file_layout_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('spans,text\n"[2, 3, 4, 5]",a calm day\n[],nothing here\n', encoding="utf-8")
    first, second = toxic_spans(path)
    assert [(span.start, span.end) for span in first.spans or ()] == [(2, 6)]
    assert second.spans == ()
