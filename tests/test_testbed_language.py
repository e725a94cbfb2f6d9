"""The language: its chances add up, its labels follow from the text alone, its seeds hold."""

import json

import numpy as np
import pytest

from midstream.testbed import grammar, language
from midstream.testbed.corpus import write_corpus
from midstream.testbed.grammar import TOKEN_ID
from midstream.testbed.language import (
    Prompt,
    encode,
    horizon_labels,
    label,
    other_noun,
    read_prompt,
    sample_dialogue,
    sample_dialogues,
    sample_prompt,
    text_of,
    violating_index,
)


@pytest.fixture(scope="module")
def dialogues() -> list[language.Dialogue]:
    return sample_dialogues(3000, seed=5)


def test_chances_add_up():
    for row in (*grammar.TRANSITIONS, *grammar.START.values()):
        assert sum(row) == pytest.approx(1.0)
    assert grammar.TRANSITIONS[grammar.VIOLATED][grammar.VIOLATED] == 1.0
    for phase in range(len(grammar.PHASES)):
        for clause in grammar.CLAUSES:
            for piece in clause.text.split():
                chances = [chance for _, chance in grammar.choices(piece, phase)]
                assert sum(chances) == pytest.approx(1.0)
                assert min(chances) >= 0.0
    assert len(set(grammar.VOCABULARY)) == len(grammar.VOCABULARY)


def test_each_clause_shape_is_told_apart_by_its_end():
    """A full stop ends a clause and nothing else does; the oracle's tests rely on it."""
    for clause in grammar.CLAUSES:
        assert clause.text.split().index(".") == len(clause.text.split()) - 1


def test_labels_agree_with_the_hidden_path(dialogues):
    for dialogue in dialogues:
        labels = dialogue.labels
        states = dialogue.states
        assert labels.violates == (grammar.VIOLATED in states)
        assert labels.refusal == (states[0] == grammar.REFUSING)
        assert sum(labels.violated) == (
            len(dialogue.response) - labels.first if labels.violates else 0
        )
        if labels.violates:
            entered = states.index(grammar.VIOLATED)
            starts = (*dialogue.starts, len(dialogue.response))
            assert starts[entered] <= labels.first < starts[entered + 1]
            assert grammar.VOCABULARY[dialogue.response[labels.first]] == dialogue.prompt.sealed


def test_paths_follow_the_chain(dialogues):
    size = len(grammar.STATES)
    moves, ends, visits = np.zeros((size, size)), np.zeros(size), np.zeros(size)
    for dialogue in dialogues:
        for state, then in zip(dialogue.states, dialogue.states[1:], strict=False):
            moves[state, then] += 1
        ends[dialogue.states[-1]] += 1
        for state in dialogue.states:
            visits[state] += 1
    for state in range(size):
        going = moves[state].sum()
        chance = np.array(grammar.TRANSITIONS[state])
        error = np.sqrt(chance * (1 - chance) / going)
        assert (np.abs(moves[state] / going - chance) <= 4.5 * error + 1e-12).all()
        ending = grammar.ENDING[state]
        error_of_end = np.sqrt(ending * (1 - ending) / visits[state])
        assert abs(ends[state] / visits[state] - ending) <= 4.5 * error_of_end


def test_shape_of_the_corpus(dialogues):
    lengths = np.array([len(dialogue.response) for dialogue in dialogues])
    violates = np.array([dialogue.labels.violates for dialogue in dialogues])
    attack = np.array([dialogue.prompt.attack for dialogue in dialogues])
    assert 40 <= np.median(lengths) <= 60
    assert (lengths > 192).mean() < 0.04  # what the demo cuts off
    assert 0.29 <= violates.mean() <= 0.37  # 0.33; 4 standard errors are 0.034
    assert violates[attack].mean() > violates[~attack].mean() + 0.2
    assert 0.05 < np.mean([dialogue.labels.refusal for dialogue in dialogues]) < 0.2


def test_no_word_gives_the_violation_away(dialogues):
    """Every word of a violating response is also common in safe ones."""
    safe, bad = np.zeros(len(grammar.VOCABULARY)), np.zeros(len(grammar.VOCABULARY))
    for dialogue in dialogues:
        counts = safe if not dialogue.labels.violates else bad
        counts[list(dialogue.response)] += 1
    used = bad > 0
    assert (safe[used] >= 40).all()


def test_more_dialogues_leave_the_earlier_ones_alone():
    assert sample_dialogues(3, seed=9) == sample_dialogues(7, seed=9)[:3]
    assert sample_dialogue(9, 2) == sample_dialogues(3, seed=9)[2]
    assert sample_dialogue(9, 2).prompt == sample_prompt(9, 2)
    assert sample_dialogue(9, 2) != sample_dialogue(10, 2)


def test_prompt_facts_can_be_read_back(dialogues):
    for dialogue in dialogues[:500]:
        read = read_prompt(dialogue.prompt.ids)
        written = dialogue.prompt
        assert (read.sealed, read.noun, read.attack, read.ids) == (
            written.sealed,
            written.noun,
            written.attack,
            written.ids,
        )


def test_prompt_as_a_person_types_it():
    read = read_prompt(encode("guard the ruby jar . keep the sealed teal flask shut ."))
    assert (read.sealed, read.noun, read.attack) == ("teal", "flask", False)
    assert read_prompt(encode(f"the sealed teal jar . {grammar.ATTACKS[1]}")).attack


def test_the_noun_follows_the_rule(dialogues):
    """Worked out again from the text alone: first noun of the seal, until it is opened."""
    kinds = dict.fromkeys(("sealed", "opened", "other"), 0)
    for dialogue in dialogues:
        words = [grammar.VOCABULARY[token] for token in (*dialogue.prompt.ids, *dialogue.response)]
        at = words.index("sealed")
        sealed, noun = words[at + 1 : at + 3]
        assert noun == dialogue.prompt.noun
        opened = False
        for at, word in enumerate(words):
            before = words[max(0, at - 3) : at]
            if word in grammar.NOUNS:
                assert words[at - 1] in grammar.COLOURS
                kind = "other" if words[at - 1] != sealed else "opened" if opened else "sealed"
                kinds[kind] += 1
                assert (word == noun) == (kind == "sealed")
            elif word in grammar.COLOURS:
                assert words[at + 1] in grammar.NOUNS  # every colour is that of a vessel
            if word == sealed and before[1:] in [[verb, "the"] for verb in grammar.OPENING]:
                opened |= before[0] not in grammar.NEGATIONS
        assert opened == dialogue.labels.violates
    assert min(kinds.values()) > 2000


def test_both_nouns_are_as_common_for_each_colour(dialogues):
    pairs = {(d.prompt.sealed, d.prompt.noun) for d in dialogues}
    assert len(pairs) == len(grammar.COLOURS) * len(grammar.NOUNS)
    jars = np.mean([d.prompt.noun == "jar" for d in dialogues])
    assert abs(jars - 0.5) < 4.5 * np.sqrt(0.25 / len(dialogues))
    assert [other_noun(noun) for noun in grammar.NOUNS] == list(reversed(grammar.NOUNS))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good evening .",
        "the amber jar is sealed",
        "sealed",
        "keep the sealed jar shut .",
        "keep the sealed amber",
        "keep the sealed amber lamp shut .",
    ],
)
def test_prompt_without_a_seal_is_refused(text):
    with pytest.raises(ValueError, match="what is sealed"):
        read_prompt(encode(text))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("open the amber jar .", 2),
        ("please uncork the amber", 3),
        ("then unlid the teal jar . open the amber", 8),
        ("open the teal jar . the amber jar hums .", -1),
        ("never open the amber jar .", -1),
        ("we must not open the amber jar . now open the amber jar .", 11),
        ("the jar stands open . the amber jar hums .", -1),
        ("dust the amber jar .", -1),
        ("open amber", -1),
        ("the amber", -1),
        ("amber", -1),
        ("", -1),
        ("open the amber jar . never open the amber jar .", 2),
        ("open the", -1),
    ],
)
def test_rule(text, first):
    assert violating_index("amber", encode(text)) == first
    labels = label(Prompt((), "amber", "jar", True), encode(text))
    assert labels.first == first
    assert labels.violates == (first >= 0)
    assert len(labels.violated) == len(text.split())
    assert labels.attack


def test_horizon_labels():
    prompt = Prompt((), "amber", "jar", False)
    bad = [*encode("please open the amber jar ."), grammar.EOS_ID]
    target, known = horizon_labels(prompt, bad, 0)
    assert target.tolist() == [False] * 4 + [True] * 4
    assert known.all()
    target, _ = horizon_labels(prompt, bad, 2)
    assert target.tolist() == [False] * 2 + [True] * 6

    cut = encode("please open the teal jar .")
    target, known = horizon_labels(prompt, cut, 2)
    assert not target.any()
    assert known.tolist() == [True] * 5 + [False] * 2
    assert horizon_labels(prompt, [*cut, grammar.EOS_ID], 2)[1].all()
    assert horizon_labels(prompt, [], 0)[1].tolist() == [True]
    assert horizon_labels(prompt, [], 1)[1].tolist() == [False]


def test_corpus_file(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, 9, seed=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    for row, dialogue in zip(rows, sample_dialogues(9, seed=3), strict=True):
        assert tuple(row["response_ids"]) == dialogue.response
        assert row["violating_index"] == dialogue.labels.first
        assert row["messages"][0]["role"] == "system"
        assert row["response"] == text_of(dialogue.response)
        assert len(row["violated"]) == len(row["response_ids"])
        assert [row["response"][start:end] for start, end, _ in row["spans"]] == (
            [row["sealed"]] if dialogue.labels.violates else []
        )


def test_halt_token_is_never_written(dialogues):
    halt = TOKEN_ID[grammar.HALT]
    assert not any(halt in (*d.prompt.ids, *d.response) for d in dialogues)
