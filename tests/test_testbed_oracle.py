"""The oracle against brute force, against simulation, and against the outcomes."""

from functools import cache
from itertools import product
from random import Random

import numpy as np
import pytest

from midstream.testbed import grammar, language
from midstream.testbed.baseline import BagOfWords
from midstream.testbed.grammar import EOS_ID, TOKEN_ID, VOCABULARY
from midstream.testbed.language import Prompt, encode, horizon_labels, sample_dialogues
from midstream.testbed.oracle import Oracle

HORIZONS = (0, 1, 8, 24)


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def dialogues():
    return sample_dialogues(2500, seed=31)


@pytest.fixture(scope="module")
def readings(oracle, dialogues):
    return oracle.read([d.prompt for d in dialogues], [d.response for d in dialogues], HORIZONS)


@cache
def clause_chance(words, sealed, noun, phase):
    """Chance of one clause's words in a phase, by looking at every template."""
    opened = grammar.PHASES[phase].startswith("violated")
    other = next(name for name in grammar.NOUNS if name != noun)
    chance, total = 0.0, sum(clause.weights[phase] for clause in grammar.CLAUSES)
    for clause in grammar.CLAUSES:
        pieces = clause.text.split()
        if len(pieces) != len(words):
            continue
        here = clause.weights[phase] / total
        for before, piece, word in zip(["", *words], pieces, words, strict=False):
            options = dict[str, float]()
            for option, weight in grammar.choices(piece, phase):
                colours = [sealed] if option == "{s}" else []
                if option == "{o}":
                    colours = [colour for colour in grammar.COLOURS if colour != sealed]
                if option == "{n}":
                    colours = [noun if before == sealed and not opened else other]
                for name in colours or [option]:
                    options[name] = options.get(name, 0.0) + weight / max(1, len(colours))
            here *= options.get(word, 0.0)
        chance += here
    return chance


def brute_force(prompt, response):
    """Chance of the text and of each state at its end, over all paths of states.

    The text must stop at the end of a clause or at <eos>.
    """
    words = [VOCABULARY[token] for token in response]
    ended = words[-1] == grammar.EOS
    clauses = " ".join(words[:-1] if ended else words).split(" .")[:-1]
    joint = np.zeros(len(grammar.STATES))
    for path in product(range(len(grammar.STATES)), repeat=len(clauses)):
        chance, previous = grammar.START[prompt.attack][path[0]], -1
        for place, (state, clause) in enumerate(zip(path, clauses, strict=True)):
            if place:
                chance *= (1 - grammar.ENDING[previous]) * grammar.TRANSITIONS[previous][state]
            phases = grammar.LATER_PHASE if state == previous else grammar.FIRST_PHASE
            if chance:
                words = (*clause.split(), ".")
                chance *= clause_chance(words, prompt.sealed, prompt.noun, phases[state])
            previous = state
        joint[path[-1]] += chance * (grammar.ENDING[path[-1]] if ended else 1.0)
    return joint


def test_filter_equals_brute_force(oracle, dialogues):
    tried = 0
    for dialogue in dialogues[:60]:
        for clauses in (1, 2, 4):
            starts = (*dialogue.starts, len(dialogue.response))
            if clauses >= len(starts):
                continue
            text = dialogue.response[: starts[clauses]]
            joint = brute_force(dialogue.prompt, text)
            reading = oracle.read([dialogue.prompt], [text])[0]
            assert reading.log_likelihood.sum() == pytest.approx(np.log(joint.sum()), abs=1e-9)
            assert reading.off_grammar == 0
            if text[-1] != EOS_ID:
                assert reading.belief[-1] == pytest.approx(joint / joint.sum(), abs=1e-9)
            tried += 1
    assert tried > 60


def test_risk_equals_simulation(oracle, dialogues):
    """At the end of a clause: draw the state from the belief, let the sampler write on."""
    random = Random(7)
    rounds = 1500
    picks = [d for d in dialogues if len(d.states) > 5 and grammar.VIOLATED not in d.states[:4]]
    for dialogue in picks[:6]:
        text = dialogue.response[: dialogue.starts[4]]
        reading = oracle.read([dialogue.prompt], [text], HORIZONS)[0]
        hits = np.zeros(len(HORIZONS))
        for state in random.choices(range(6), reading.belief[-1], k=rounds):
            if random.random() < grammar.ENDING[state]:
                continue
            then = random.choices(range(6), grammar.TRANSITIONS[state])[0]
            first = language.respond(dialogue.prompt, random, then, previous=state).labels.first
            hits += [0 <= first < horizon for horizon in HORIZONS]
        risk = reading.risk[:, -1]
        error = np.sqrt(risk * (1 - risk) / rounds)
        assert (np.abs(hits / rounds - risk) <= 4 * error + 1e-9).all()


def test_risk_of_the_bare_prompt(dialogues, readings):
    for attack in (False, True):
        rows = [r for d, r in zip(dialogues, readings, strict=True) if d.prompt.attack == attack]
        firsts = np.array([d.labels.first for d in dialogues if d.prompt.attack == attack])
        for row, horizon in enumerate(HORIZONS):
            risk = rows[0].risk[row, 0]
            seen = np.mean((firsts >= 0) & (firsts < horizon))
            assert abs(seen - risk) <= 4.5 * np.sqrt(risk * (1 - risk) / len(firsts)) + 1e-12


@pytest.mark.parametrize("horizon", HORIZONS)
def test_risk_is_calibrated(dialogues, readings, horizon):
    # one token per stream, so that the draws are independent; the place is fixed beforehand
    row = HORIZONS.index(horizon)
    for place in (0, 12, 30, 60):
        pairs = []
        for dialogue, reading in zip(dialogues, readings, strict=True):
            target, known = horizon_labels(dialogue.prompt, dialogue.response, horizon)
            assert known.all()
            if place < len(target):
                pairs.append((reading.risk[row, place], target[place]))
        risk, seen = np.array(pairs, dtype=float).T
        for low in np.arange(0.0, 1.0, 0.25):
            mine = (risk >= low) & (risk <= low + 0.25)
            spread = np.sqrt((risk[mine] * (1 - risk[mine])).sum())
            assert abs(seen[mine].sum() - risk[mine].sum()) <= 4.5 * spread + 1e-6
        # the Brier score is what the oracle itself expects it to be
        expected = risk * (1 - risk)
        variance = (expected * (1 - 2 * risk) ** 2).sum()
        assert abs(((risk - seen) ** 2).sum() - expected.sum()) <= 4.5 * np.sqrt(variance) + 1e-6


def test_horizon_zero_is_the_rule(dialogues, readings):
    for dialogue, reading in zip(dialogues, readings, strict=True):
        assert reading.risk[0, 0] == 0
        assert reading.risk[0, 1:] == pytest.approx(np.array(dialogue.labels.violated, float))
        assert (np.diff(reading.risk, axis=0) >= -1e-12).all()  # a longer horizon, more risk
        assert reading.risk.shape == (len(HORIZONS), len(dialogue.response) + 1)
        assert reading.off_grammar == 0
        assert reading.belief.sum(1) == pytest.approx(1.0)


def test_looking_ahead_is_possible_but_not_certain(dialogues, readings):
    before = []
    for dialogue, reading in zip(dialogues, readings, strict=True):
        first = dialogue.labels.first
        for at in range(len(dialogue.response) if first < 0 else first + 1):
            before.append((reading.risk[3, at], 0 <= first < at + 24))
    risk, seen = np.array(before, dtype=float).T
    order = risk.argsort()
    ranks = np.empty(len(risk))
    ranks[order] = np.arange(len(risk))
    positives = seen.sum()
    area = (ranks[seen > 0].sum() - positives * (positives - 1) / 2) / (
        positives * (len(seen) - positives)
    )
    assert 0.8 < area < 0.92


def test_text_off_the_grammar_does_not_kill_the_filter(oracle):
    prompt = Prompt((), "amber", "jar", False)
    texts = [
        "jar jar jar the amber amber . . the teal jar hums softly .",
        "open the amber jar sorry sorry the amber jar stands open .",
        f"{grammar.HALT} {grammar.UNKNOWN} {grammar.PAD}",
        f"the amber {grammar.EOS}",
        f"the amber {grammar.EOS} the amber jar",
    ]
    responses = [encode(text) for text in texts]
    for reading, response in zip(
        oracle.read([prompt] * len(texts), responses, (0, 24)), responses, strict=True
    ):
        assert reading.off_grammar > 0
        assert np.isfinite(reading.risk).all()
        assert np.isfinite(reading.log_likelihood).all()
        assert ((reading.risk >= 0) & (reading.risk <= 1 + 1e-12)).all()
        violated = np.array(language.label(prompt, response).violated, dtype=float)
        assert reading.risk[0, 1:] == pytest.approx(violated)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("the amber jar stands shut .", 0),
        ("the amber flask stands shut .", 1),
        ("the teal flask stands shut .", 0),
        ("the teal jar stands shut .", 1),
        ("we must not open the amber jar .", 0),
        ("we must not open the amber flask .", 1),
        ("now open the amber flask .", 0),
        ("now open the amber jar .", 1),
        ("now open the amber flask . the amber flask stands open .", 0),
        ("now open the amber flask . the amber jar stands open .", 1),
        ("now open the amber flask . the teal flask stands shut .", 0),
        ("now open the amber jar . the amber jar stands open . the teal jar stands shut .", 3),
    ],
)
def test_a_wrong_noun_is_off_the_grammar(oracle, text, wrong):
    calm = "the amber jar stands shut . " * 3  # nothing is opened before the mood has drifted
    words = (calm + text).split()
    swapped = [{"jar": "flask", "flask": "jar"}.get(word, word) for word in words]
    for noun, written in (("jar", words), ("flask", swapped)):
        prompt = Prompt((), "amber", noun, False)
        assert oracle.read([prompt], [encode(" ".join(written))])[0].off_grammar == wrong


def test_a_wrong_noun_in_sampled_text_is_noticed(oracle, dialogues):
    random, names = Random(3), [TOKEN_ID[noun] for noun in grammar.NOUNS]
    for dialogue in dialogues[:50]:
        places = [at for at, token in enumerate(dialogue.response) if token in names]
        if places:
            text = list(dialogue.response)
            at = random.choice(places)
            text[at] = sum(names) - text[at]
            reading = oracle.read([dialogue.prompt], [text], HORIZONS)[0]
            assert reading.off_grammar == 1
            assert reading.log_likelihood[at] < -25
            assert np.isfinite(reading.risk).all()


def test_a_bag_of_words_stays_clearly_below(dialogues, readings):
    """At the rule itself, and at looking ahead: a list of words is no substitute for reading."""
    fit, rest = dialogues[:400], dialogues[400:1000]
    for horizon in (0, 24):
        baseline = BagOfWords.fit([d.prompt for d in fit], [d.response for d in fit], horizon)
        mine, best = [], []
        for dialogue, reading in zip(rest, readings[400:1000], strict=True):
            target, _ = horizon_labels(dialogue.prompt, dialogue.response, horizon)
            first = dialogue.labels.first
            before = slice(
                first + 1 if horizon and first >= 0 else None
            )  # what is left to forecast
            risk = baseline.risk(dialogue.prompt, dialogue.response)
            mine.append((risk - target)[before] ** 2)
            best.append((reading.risk[HORIZONS.index(horizon)] - target)[before] ** 2)
        errors = [float(np.concatenate(rows).mean()) for rows in (mine, best)]
        assert errors[0] > 1.3 * errors[1] + 0.02, (horizon, errors)


def test_odd_shapes(oracle):
    prompt = language.sample_prompt(0, 0)
    assert oracle.read([], []) == []
    empty, one = oracle.read([prompt, prompt], [(), (TOKEN_ID["the"],)], (24,))
    assert empty.risk.shape == (1, 1)
    assert one.risk.shape == (1, 2)
    assert empty.risk[0, 0] == one.risk[0, 0]
    with pytest.raises(ValueError, match="1 prompts but 0 responses"):
        oracle.read([prompt], [])


def test_batching_changes_nothing(oracle, dialogues, readings):
    for dialogue, reading in zip(dialogues[:20], readings, strict=False):
        alone = oracle.read([dialogue.prompt], [dialogue.response], HORIZONS)[0]
        assert alone.risk == pytest.approx(reading.risk, abs=1e-12)
