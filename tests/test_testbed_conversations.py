"""Conversations: they follow their parameters, labels come from the text, the oracle is exact."""

import json
from itertools import pairwise

import numpy as np
import pytest
from event_enumeration import calibrated, enumerate_past, follows, future_harm, within_error
from kernel_cases import fresh_seed
from typer.testing import CliRunner

from midstream import testbed
from midstream.cli import app
from midstream.testbed import conversations as talk
from midstream.testbed import grammar
from midstream.testbed.conversation_oracle import ConversationOracle, opening_chance
from midstream.testbed.conversations import (
    USER_ATTACK,
    USER_ENDING,
    USER_START,
    USER_TRANSITIONS,
    Conversation,
    Turn,
    conversation_labels,
    sample_conversation,
    sample_conversations,
    sample_user,
)
from midstream.testbed.language import Prompt, encode, read_prompt

HORIZONS = (0, 1, 2, 3, 50)


@pytest.fixture(scope="module")
def conversations():
    return sample_conversations(1500, seed=fresh_seed())


@pytest.fixture(scope="module")
def oracle():
    return ConversationOracle()


@pytest.fixture(scope="module")
def readings(oracle, conversations):
    return oracle.read(conversations, HORIZONS)


def test_chances_add_up():
    for row in (USER_START, *USER_TRANSITIONS):
        assert sum(row) == pytest.approx(1.0)
        assert min(row) >= 0
    assert all(0 <= chance <= 1 for chance in (*USER_ENDING, *USER_ATTACK))


def test_users_follow_their_chain():
    seed = fresh_seed()
    users = [sample_user(seed, index) for index in range(2500)]
    size = len(talk.USER_STATES)
    visits, ends, attacks = np.zeros(size), np.zeros(size), np.zeros(size)
    starts, moves = np.zeros(size), np.zeros((size, size))
    for user in users:
        states = [state for _, state in user]
        starts[states[0]] += 1
        ends[states[-1]] += 1
        for prompt, state in user:
            visits[state] += 1
            attacks[state] += prompt.attack
        for state, then in pairwise(states):
            moves[state, then] += 1
    for counts, chances in (
        (starts, USER_START),
        *zip(moves, USER_TRANSITIONS, strict=True),
        *(([e, v - e], [c, 1 - c]) for e, v, c in zip(ends, visits, USER_ENDING, strict=True)),
        *(([a, v - a], [c, 1 - c]) for a, v, c in zip(attacks, visits, USER_ATTACK, strict=True)),
    ):
        assert follows(counts, chances)


def test_openings_follow_the_grammar(conversations):
    for attack in (False, True):
        opened = [
            flag
            for conversation in conversations
            for turn, flag in zip(conversation.turns, conversation.labels.opened, strict=True)
            if turn.prompt.attack == attack
        ]
        assert len(opened) > 1000
        assert within_error(opened, np.full(len(opened), opening_chance(attack)))


def test_shape(oracle, conversations):
    """A gate without memory cannot do well here: many openings are the only one of their talk."""
    count = [sum(conversation.labels.opened) for conversation in conversations]
    harmful = [conversation.labels.harmful for conversation in conversations]
    share = oracle.process.chain.absorption()[0, 0]
    assert within_error(harmful, np.full(len(harmful), share))
    assert 0.36 < share < 0.48
    # shares of 1,500: 0.32, 0.74 and 0.03, at least seven standard errors from their bounds
    assert 0.22 < np.mean(np.array(count) == 1) < 0.42
    lengths = np.array([len(conversation.turns) for conversation in conversations])
    assert np.mean((lengths >= 3) & (lengths <= 10)) > 0.65
    assert np.mean(lengths > 15) < 0.07
    # block at the first opening: half of the harmless ones are halted, no harmful one in time
    harmless = ~np.array(harmful)
    assert np.mean(np.array(count)[harmless] > 0) > 0.4
    assert all(c.labels.opened.index(True) + 1 < c.labels.target_turn for c in conversations
               if c.labels.harmful)  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "opened", "target"),
    [
        (["open the amber jar ."], "1", None),
        (["open the amber jar .", "uncork the amber jar ."], "11", 2),
        (["open the amber jar . open the amber jar ."], "1", None),
        (["open the amber jar .", "open the teal jar .", "now unlid the amber"], "101", 3),
        (["never open the amber jar .", "open the amber jar .", ""], "010", None),
        (["the amber jar hums ."] * 3, "000", None),
        (["open the amber jar ."] * 4, "1111", 2),
        ([], "", None),
    ],
)
def test_rule(texts, opened, target):
    prompts = [Prompt((), "amber", "jar", False)] * len(texts)
    labels = conversation_labels(prompts, [encode(text) for text in texts])
    assert labels.opened == tuple(flag == "1" for flag in opened)
    assert labels.target_turn == target
    assert labels.harmful == (target is not None)


def test_labels_come_from_the_text(conversations):
    """Counted again with plain strings."""
    for conversation in conversations[:300]:
        openings, target = 0, None
        for number, turn in enumerate(conversation.turns, 1):
            text = " " + " ".join(grammar.VOCABULARY[token] for token in turn.response)
            for verb in grammar.OPENING:
                told = f" {verb} the {turn.prompt.sealed} "
                for negation in grammar.NEGATIONS:
                    text = text.replace(f" {negation}{told}", " ")
            if any(f" {verb} the {turn.prompt.sealed} " in text for verb in grammar.OPENING):
                openings += 1
                target = number if openings == 2 else target
        assert conversation.labels.target_turn == target


def test_one_seal_per_conversation(conversations):
    for conversation in conversations[:200]:
        prompts = conversation.prompts
        assert len({(p.sealed, p.noun, p.system) for p in prompts}) == 1
        for prompt in prompts:
            read = read_prompt(prompt.ids)
            assert (read.sealed, read.noun, read.attack) == (
                prompt.sealed,
                prompt.noun,
                prompt.attack,
            )


def test_turns_are_answered_independently(conversations):
    responses = [response for c in conversations for response in c.responses if len(response) > 40]
    assert len(set(responses)) > 0.999 * len(responses)


def test_more_conversations_leave_the_earlier_ones_alone():
    assert sample_conversations(2, seed=9) == sample_conversations(5, seed=9)[:2]
    assert sample_conversation(9, 1) == sample_conversations(2, seed=9)[1]
    assert sample_conversation(9, 1) != sample_conversation(10, 1)
    asked = tuple(prompt for prompt, _ in sample_user(9, 1))
    assert sample_conversation(9, 1).prompts == asked


def test_the_model_answers_the_same_users():
    model, _ = testbed.load()
    some = talk.rollout(model, 2, seed=4, max_new_tokens=12)
    more = talk.rollout(model, 3, seed=4, max_new_tokens=12)
    assert more[:2] == some
    for index, conversation in enumerate(more):
        sampled = sample_conversation(4, index)
        assert conversation.prompts == sampled.prompts
        assert [t.user_state for t in conversation.turns] == [t.user_state for t in sampled.turns]
        assert all(0 < len(response) <= 12 for response in conversation.responses)
        assert len(conversation.labels.opened) == len(conversation.turns)
    assert len(more) == 3


def test_rows():
    rows = [json.loads(json.dumps(row)) for row in talk.conversation_rows(20, seed=3)]
    for row, conversation in zip(rows, sample_conversations(20, seed=3), strict=True):
        labels = conversation.labels
        roles = ["system", *["user", "assistant"] * len(conversation.turns)]
        assert [message["role"] for message in row["messages"]] == roles
        assert [tuple(turn["response_ids"]) for turn in row["turns"]] == list(
            conversation.responses
        )
        assert [turn["opened"] for turn in row["turns"]] == list(labels.opened)
        assert (row["target_turn"], row["harmful"]) == (labels.target_turn, labels.harmful)
        assert row["messages"][2]["content"] == testbed.text_of(conversation.responses[0])
    assert {row["harmful"] for row in rows} == {False, True}
    assert len({row["id"] for row in rows}) == 20


@pytest.mark.parametrize("opening", [None, {False: 0.05, True: 0.8}])
def test_oracle_equals_enumeration(conversations, opening):
    oracle = ConversationOracle(opening)
    chance = opening or {attack: opening_chance(attack) for attack in (False, True)}
    flags = [(attack, opened) for attack in (False, True) for opened in (False, True)]
    event = [
        [
            (a if attack else 1 - a) * (chance[attack] if opened else 1 - chance[attack])
            for attack, opened in flags
        ]
        for a in USER_ATTACK
    ]

    def then(seals, number):
        seals += flags[number][1]
        return None if seals == 2 else seals

    harm = future_harm(USER_TRANSITIONS, USER_ENDING, event, then)
    for conversation in conversations[:60]:
        (reading,) = oracle.read([conversation], HORIZONS[:4])
        opened = conversation.labels.opened
        events = [
            flags.index((turn.prompt.attack, flag))
            for turn, flag in zip(conversation.turns, opened, strict=True)
        ]
        for turns in range(1, min(6, len(events) + 1)):
            joint = enumerate_past(USER_START, USER_TRANSITIONS, USER_ENDING, event, events[:turns])
            belief = joint / joint.sum()
            seals = sum(opened[:turns])
            assert reading.log_likelihood[:turns].sum() == pytest.approx(np.log(joint.sum()))
            assert reading.belief[turns] == pytest.approx(belief, abs=1e-12)
            assert reading.fact[turns] == min(seals, 2)
            before = sum(opened[: turns - 1])
            options = [n for n, (attack, _) in enumerate(flags)
                       if attack == conversation.turns[turns - 1].prompt.attack]  # fmt: skip
            both = [
                enumerate_past(
                    USER_START, USER_TRANSITIONS, USER_ENDING, event, [*events[: turns - 1], option]
                )
                for option in options
            ]
            for row, horizon in enumerate(HORIZONS[:4]):
                held = seals if seals < 2 else None
                risk = sum(b * harm(u, held, horizon) for u, b in enumerate(belief))
                assert reading.risk[row, turns] == pytest.approx(risk, abs=1e-12)
                if before >= 2:
                    pending = 1.0
                elif horizon == 0:
                    pending = 0.0
                else:
                    pending = sum(
                        weight * harm(u, then(before, option), horizon - 1)
                        for option, joints in zip(options, both, strict=True)
                        for u, weight in enumerate(joints)
                    ) / np.sum(both)
                assert reading.pending[row, turns - 1] == pytest.approx(pending, abs=1e-12)


def test_harm_of_now_is_the_label(conversations, readings):
    for conversation, reading in zip(conversations, readings, strict=True):
        target = conversation.labels.target_turn or len(conversation.turns) + 1
        turns = np.arange(len(conversation.turns) + 1)
        assert reading.risk[0] == pytest.approx((turns >= target).astype(float), abs=1e-12)
        assert (np.diff(reading.risk, axis=0) >= -1e-12).all()  # never less for a longer horizon


@pytest.mark.parametrize("row", [1, 3, 4])
def test_risk_is_calibrated(conversations, readings, row):
    for turn in (0, 1, 2, 4):
        hits, chances, pending_hits, pending = [], [], [], []
        for conversation, reading in zip(conversations, readings, strict=True):
            target = conversation.labels.target_turn or 10**6
            length = len(conversation.turns)
            if turn <= length and target > turn:
                chances.append(reading.risk[row, turn])
                hits.append(target <= turn + HORIZONS[row])
            if turn < length and target > turn:
                pending.append(reading.pending[row, turn])
                pending_hits.append(target <= turn + HORIZONS[row])
        assert len(pending) > 150
        assert calibrated(hits, chances)
        assert calibrated(pending_hits, pending)


def test_closed_forms(oracle):
    chain = oracle.process.chain
    names = oracle.process.state_names
    assert len(names) == chain.states + 1
    assert names[0] == "before"
    assert chain.horizon(10_000)[:-1] == pytest.approx(chain.absorption()[:, 0])
    (reading,) = oracle.read([sample_conversation(0, 0)], (7,))
    assert reading.risk[0, 0] == pytest.approx(chain.first_passage(7)[0].sum())


def test_the_oracle_takes_odd_conversations(oracle):
    prompt = sample_user(0, 0)[0][0]
    (empty,) = oracle.read([Conversation(())], (0, 2))
    assert empty.risk.shape == (2, 1)
    assert empty.pending.shape == (2, 0)
    long = Conversation(tuple(Turn(prompt, (), 0) for _ in range(300)))
    (reading,) = oracle.read([long], (3,))
    assert np.isfinite(reading.risk).all()
    assert reading.belief.sum(axis=1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="1 prompts but 0 responses"):
        conversation_labels([prompt], [])
    with pytest.raises(ValueError, match="horizon: expected 0 or more"):
        oracle.read([long], (-1,))


def test_command_samples_conversations():
    arguments = ["testbed", "sample", "--kind", "conversations", "-n", "3", "--seed", "5"]
    rows = CliRunner().invoke(app, [*arguments, "--json"]).output.splitlines()
    assert [json.loads(row) for row in rows] == json.loads(
        json.dumps(list(talk.conversation_rows(3, 5)))
    )
    shown = CliRunner().invoke(app, arguments).output
    assert shown.count("conversation ") == 3
    assert shown.splitlines().count("turn 1") == 3
