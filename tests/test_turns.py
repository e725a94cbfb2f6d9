"""The turn gate: belief algebra, histories, ledgers that fail, replicas that interleave."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pytest
import toy
import turn_cases
from kernel_cases import fresh_seed
from plain_filter import PlainStream, random_chain
from turn_cases import (
    COMPLETE,
    JUST_OPENED,
    LOOSENED,
    OPENS,
    QUIET,
    CountingLedger,
    DownLedger,
    asks,
    two_seals,
)

from midstream.bundle import Bundle, BundleError, CorruptBundleError
from midstream.chain import Chain, ChainError
from midstream.ledger.ledger import LedgerError, conversation_key
from midstream.ledger.memory import MemoryLedger
from midstream.policy import OnHalt, Policy, PolicyError, Thresholds
from midstream.turn_decision import COUNTED, TurnDecision
from midstream.turn_history import History, HistoryError
from midstream.turn_model import TurnModel
from midstream.turns import TurnGate


def random_model(seed: int, states: int = 3, bins: int = 4) -> TurnModel:
    chain = random_chain(seed, states, bins).model_dump()
    chain |= {"prompt_edges": [], "prompt_emission": [[1.0]] * (states + 1)}
    return TurnModel(chain=Chain(**chain))


def logit_of(log_hazard: float) -> float:
    return math.log(math.expm1(log_hazard))


# --- the algebra ----------------------------------------------------------------------------------


def test_belief_and_risk_are_those_of_the_plain_filter() -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    for case in range(20):
        states, horizon = int(random.integers(1, 6)), int(random.integers(0, 6))
        model = random_model(seed + case, states)
        plain = PlainStream(model.chain, Thresholds(horizon=horizon, halt_at=1.0), "pass")
        belief = model.start
        for hazard in random.uniform(0.01, 4.5, 12):
            if random.random() < 0.3:
                plain.move()
                belief = model.move(belief)
            else:
                plain.token(logit_of(hazard))
                belief = model.read(belief, hazard).delivered
            np.testing.assert_allclose(belief, plain.belief, rtol=0, atol=1e-12)
            assert model.risk(belief, horizon) == pytest.approx(plain.risk, abs=1e-12)


def test_a_withheld_candidate_returns_what_it_completed_to_where_it_came_from() -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    for case in range(20):
        model = random_model(seed + case, int(random.integers(1, 6)))
        size, bins = model.chain.states + 1, len(model.chain.edges) + 1
        belief, o = random.dirichlet(np.ones(size)), int(random.integers(bins))
        emission = [max(row[o], 1e-4) / sum(max(p, 1e-4) for p in row)
                    for row in model.chain.emission]  # fmt: skip
        after = [0.0] * size
        for i, j in itertools.product(range(size), repeat=2):
            goes_on = 1 - model.chain.ending[i]
            mass = belief[i] * goes_on * model.chain.transition[i][j] * emission[j]
            completes = j == size - 1 and i != j
            after[i if completes else j] += mass
        found = model.read(belief, o + 0.5)
        np.testing.assert_allclose(found.withheld, np.array(after) / sum(after), atol=1e-12)
        assert found.withheld.sum() == pytest.approx(1.0, abs=1e-12)
        assert found.withheld[-1] <= found.delivered[-1]


def test_a_withheld_second_opening_leaves_one_seal_loose() -> None:
    model = two_seals()
    first = model.read(model.start, OPENS).delivered
    assert first.argmax() == JUST_OPENED
    second = model.read(first, OPENS)
    assert second.delivered.argmax() == COMPLETE
    assert second.withheld.argmax() == JUST_OPENED
    assert model.risk(second.withheld, 0) < 0.01
    assert model.risk(model.read(second.withheld, OPENS).delivered, 0) > 0.5
    quiet = model.read(first, QUIET).delivered
    assert quiet.argmax() == LOOSENED
    assert model.risk(model.read(quiet, OPENS).delivered, 0) > 0.5


def test_order_of_evidence_matters_where_the_chain_moves_and_scale_never_does() -> None:
    model = random_model(fresh_seed())
    belief = model.start
    np.testing.assert_allclose(
        model.read(belief * 7.0, 1.5).delivered, model.read(belief, 1.5).delivered, atol=1e-14
    )


@pytest.mark.parametrize("hazard", [-0.1, math.nan, -math.inf, math.inf])
def test_a_log_hazard_is_no_negative_number(hazard: float) -> None:
    model = two_seals()
    with pytest.raises(ChainError, match="expected a number, 0 or more"):
        model.read(model.start, hazard)


# --- histories ------------------------------------------------------------------------------------


def test_keys_are_those_of_the_same_words_however_they_are_written() -> None:
    plain = asks("hello", "hi", "more")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "x"},
        {"role": "assistant", "content": " hi\n"},
        {"role": "user", "content": "more"},
    ]
    assert History.of(plain) == History.of(parts)


def test_an_edit_changes_the_keys_from_there_on() -> None:
    before = History.of(asks("a", "b", "c", "d", "e", "f", "g")).keys
    after = History.of(asks("a", "b", "c", "D", "e", "f", "g")).keys
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_roles_are_part_of_a_turn_and_instructions_are_not() -> None:
    plain = asks("a", "b", "c")
    for role in ("system", "developer"):
        today = {"role": role, "content": "Today is Monday."}
        assert History.of([today, plain[0], today, *plain[1:], today]) == History.of(plain)
    twice = [plain[0], plain[0], *plain[1:]]
    assert History.of(twice).keys != History.of(plain).keys
    as_tool = [{**plain[0], "role": "tool"}, *plain[1:]]
    assert History.of(as_tool).keys != History.of(plain).keys


def test_a_tool_call_is_a_response_of_its_own() -> None:
    call = {"id": "1", "function": {"name": "open", "arguments": '{"what": "door"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    history = History.of(messages)
    assert len(history.keys) == 1
    assert history.asked == (("tool", "done"),)
    messages[1]["tool_calls"] = [{**call, "id": "2"}]
    assert History.of(messages).keys == history.keys
    messages[1]["tool_calls"] = [{"function": {"name": "shut", "arguments": "{}"}}]
    assert History.of(messages).keys != history.keys


def test_every_form_of_an_answer_has_a_key_of_its_own() -> None:
    custom = {"id": "1", "type": "custom", "custom": {"name": "open", "input": "door"}}
    forms: list[dict[str, Any]] = [
        {"content": ""},
        {"content": "open"},
        {"content": [{"type": "text", "text": "shut"}]},
        {"content": [{"type": "image_url", "image_url": {"url": "a"}}]},
        {"content": None, "refusal": "I will not."},
        {"content": None, "function_call": {"name": "open", "arguments": "{}"}},
        {"content": None, "tool_calls": [custom]},
        {"content": None, "tool_calls": [{**custom, "custom": {"name": "open", "input": "jar"}}]},
    ]
    keys = [History.of([{"role": "assistant", **form}]).keys for form in forms]
    assert len(set(keys)) == len(forms)
    again = {"role": "assistant", "content": None, "tool_calls": [{**custom, "id": "2"}]}
    assert History.of([again]).keys == keys[-2]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "no role"},
        "hello",
        {"role": 3},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "hello"}},
        {"role": "assistant", "tool_calls": {"name": "open"}},
        {"role": "assistant", "tool_calls": ["open"]},
        {"role": "assistant", "tool_calls": [{"function": None}]},
    ],
)
def test_what_is_no_history(message: Any) -> None:
    with pytest.raises(HistoryError, match=r"messages\[1\]"):
        History.of([{"role": "user", "content": None}, message])


# --- a conversation -------------------------------------------------------------------------------


class Client:
    """Holds the history as a chat client does, and sends all of it each time."""

    def __init__(self, *gates: TurnGate, conversation: str = "c") -> None:
        self.gates, self.conversation = gates, conversation
        self.said: list[str] = []
        self.beliefs: list[tuple[float, ...]] = []

    def turn(self, hazard: float | None, *, gate: int = 0, answer: str = "") -> TurnDecision:
        ask, answer = f"ask {len(self.said)}", answer or f"answer {len(self.said)} {hazard}"
        chosen = self.gates[gate]
        turn = chosen.open(self.conversation, asks(*self.said, ask))
        decision = chosen.judge(turn, hazard)
        given = answer if decision.delivers else "withheld"
        decision = chosen.commit(turn, decision, given)
        given = given if decision.delivers else "withheld"
        self.said += [ask, given]
        self.beliefs.append(decision.if_delivered if decision.delivers else decision.if_withheld)
        return decision


def test_the_second_opening_is_blocked_and_the_first_is_not() -> None:
    client = Client(TurnGate(turn_cases.bundle(), MemoryLedger()))
    verdicts = [client.turn(h).verdict for h in (QUIET, OPENS, QUIET, OPENS, QUIET, OPENS)]
    assert verdicts == ["DELIVER", "DELIVER", "DELIVER", "BLOCK", "DELIVER", "BLOCK"]


def test_the_gate_filters_as_the_model_does() -> None:
    seed = fresh_seed()
    model = random_model(seed)
    client = Client(TurnGate(turn_cases.bundle(model, block_at=0.3), MemoryLedger()))
    belief = model.start
    for hazard in np.random.default_rng(seed).uniform(0, 4, 15).tolist():
        decision = client.turn(hazard)
        after = model.read(belief, hazard)
        assert decision.delivers == (model.risk(after.delivered, 0) < 0.3)
        belief = after.delivered if decision.delivers else after.withheld
        np.testing.assert_allclose(client.beliefs[-1], belief, atol=1e-12)
        assert (decision.unseen, decision.gap, decision.store_error) == (0, 0, None)


def test_a_turn_takes_one_read_and_one_write() -> None:
    ledger = CountingLedger()
    client = Client(TurnGate(turn_cases.bundle(), ledger))
    for n in range(1, 6):
        client.turn(QUIET)
        assert (ledger.reads, ledger.writes) == (n, n)


def test_the_same_history_again_is_the_same_turn() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    client = Client(gate)
    for hazard in (QUIET, OPENS):
        client.turn(hazard)
    messages = asks(*client.said, "next")
    turns = [gate.open("c", messages) for _ in range(3)]
    decisions = [gate.judge(turn, OPENS) for turn in turns]
    assert decisions[0] == decisions[1] == decisions[2]
    for turn, decision in zip(turns, decisions, strict=True):
        assert gate.commit(turn, decision, "withheld") == decision
    after = gate.open("c", [*messages, *asks("", "withheld", "on")[1:]])
    np.testing.assert_allclose(after.belief, decisions[0].if_withheld)


def test_a_retry_is_judged_from_the_same_belief() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    client = Client(gate)
    client.turn(OPENS)
    messages = asks(*client.said, "again")
    blocked = gate.open("c", messages)
    assert not gate.commit(blocked, gate.judge(blocked, OPENS), "withheld").delivers
    retried = gate.open("c", messages)
    np.testing.assert_array_equal(retried.belief, blocked.belief)
    assert gate.commit(retried, gate.judge(retried, QUIET), "a story").delivers
    # the history goes on from the answer that was given
    went_on = gate.open("c", asks(*client.said, "again", "a story", "and?"))
    assert (went_on.unseen, int(went_on.belief.argmax())) == (0, LOOSENED)


def test_branches_share_their_past_and_nothing_else() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    one = Client(gate)
    one.turn(QUIET)
    other = Client(gate)
    other.said = list(one.said)
    one.turn(OPENS, answer="open it")
    other.turn(QUIET, answer="leave it")
    assert other.turn(OPENS).delivers
    assert not one.turn(OPENS).delivers


def test_conversations_are_kept_apart() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    one, other = Client(gate, conversation="one"), Client(gate, conversation="other")
    one.turn(OPENS, answer="x")
    other.said = list(one.said)
    assert gate.open("other", asks(*other.said, "?")).unseen == 1


def test_an_edited_turn_is_counted_and_passed_without_evidence() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    client = Client(gate)
    for hazard in (QUIET, OPENS, QUIET, QUIET):
        client.turn(hazard)
    client.said[5] = "edited"  # the third answer
    turn = gate.open("c", asks(*client.said, "?"))
    assert (turn.number, turn.unseen, turn.gap) == (5, 2, 2)
    model = gate.model
    expected = model.move(np.array(client.beliefs[1]), 2)
    np.testing.assert_allclose(turn.belief, expected, atol=1e-15)
    decision = gate.judge(turn, QUIET)
    assert decision.delivers
    assert "2 earlier turns unknown" in decision.explanation
    # once it is written down, the gap is behind it and the unknown turns are still told
    gate.commit(turn, decision, "fine")
    later = gate.open("c", asks(*client.said, "?", "fine", "??"))
    assert (later.unseen, later.gap) == (2, 0)
    np.testing.assert_allclose(later.belief, decision.if_delivered)


def test_unseen_turns_block_where_the_policy_says_so() -> None:
    gate = TurnGate(turn_cases.bundle(on_unseen="block"), MemoryLedger())
    history = asks("a", "b", "c")
    turn = gate.open("c", history)
    decision = gate.commit(turn, gate.judge(turn, QUIET), "withheld")
    assert (decision.verdict, decision.cause, decision.unseen) == ("BLOCK", "unseen", 1)
    later = gate.open("c", [*history, *asks("", "withheld", "again")[1:]])
    assert gate.judge(later, QUIET).cause == "unseen"  # not forgotten by having been blocked once
    fresh = gate.open("d", asks("a"))
    assert gate.judge(fresh, QUIET).delivers


def test_records_of_another_bundle_are_unseen() -> None:
    ledger = MemoryLedger()
    client = Client(TurnGate(turn_cases.bundle(), ledger))
    client.turn(OPENS)
    harder = {"emission": [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]}
    other = TurnGate(turn_cases.bundle(two_seals(chain=harder)), ledger)
    turn = other.open("c", asks(*client.said, "?"))
    assert (turn.unseen, turn.gap) == (1, 1)
    np.testing.assert_allclose(turn.belief, other.model.move(other.model.start))


def test_another_threshold_or_date_forgets_no_conversation() -> None:
    ledger, bundle = MemoryLedger(), turn_cases.bundle()
    client = Client(TurnGate(bundle, ledger))
    client.turn(OPENS)
    stricter = turn_cases.bundle(block_at=0.6, halt_at=0.9, on_halt=OnHalt(message="No."))
    for later in (stricter, replace(bundle, created=date(2031, 1, 1), notes={"by": "me"})):
        assert later.hash != bundle.hash
        turn = TurnGate(later, ledger).open("c", asks(*client.said, "?"))
        assert turn.unseen == 0
        assert tuple(turn.belief) == client.beliefs[0]


def test_responses_that_were_withheld_are_counted_though_the_client_leaves_them_out() -> None:
    ledger, bundle = MemoryLedger(), turn_cases.bundle()
    gates = TurnGate(bundle, ledger), TurnGate(bundle, ledger)
    client = Client(*gates)
    client.turn(OPENS)
    for n in range(COUNTED + 2):  # worded anew each time, and on another replica
        gate = gates[n % 2]
        turn = gate.open("c", asks(*client.said, f"again {n}"))
        assert turn.withheld == min(n, COUNTED)
        decision = gate.commit(turn, gate.judge(turn, OPENS), "withheld")
        assert decision.cause == "risk"
        assert gate.commit(turn, decision, "withheld") == decision  # counts once
        told = f"withheld here before: {n}" if n < COUNTED else "before: 16 or more"
        assert decision.explanation.endswith(told) == (n > 0)
    turn = gates[0].open("c", asks(*client.said, "well"))
    assert gates[0].commit(turn, gates[0].judge(turn, QUIET), "fine").withheld == COUNTED
    assert gates[0].open("c", asks(*client.said, "well", "fine", "?")).withheld == 0
    assert gates[0].open("d", asks(*client.said, "well")).withheld == 0


def test_replicas_that_interleave_decide_as_one_gate_does() -> None:
    random = np.random.default_rng(fresh_seed())
    ledger, bundle = MemoryLedger(), turn_cases.bundle()
    alone = [Client(TurnGate(bundle, MemoryLedger()), conversation=str(n)) for n in range(6)]
    pair = TurnGate(bundle, ledger), TurnGate(bundle, ledger)
    shared = [Client(*pair, conversation=str(n)) for n in range(6)]
    for _ in range(60):
        n, hazard = int(random.integers(6)), float(random.choice([QUIET, OPENS]))
        first = alone[n].turn(hazard)
        assert shared[n].turn(hazard, gate=int(random.integers(2))) == first
        assert shared[n].said == alone[n].said


def test_two_replicas_that_answer_the_same_turn_write_the_same() -> None:
    ledger, bundle = CountingLedger(), turn_cases.bundle()
    gates = TurnGate(bundle, ledger), TurnGate(bundle, ledger)
    messages = asks("open up")
    turns = [gate.open("c", messages) for gate in gates]
    decisions = [gate.judge(turn, OPENS) for gate, turn in zip(gates, turns, strict=True)]
    for gate, turn, decision in zip(gates, turns, decisions, strict=True):
        gate.commit(turn, decision, "same words")
    key = History.of([*messages, {"role": "assistant", "content": "same words"}]).parent
    record = ledger.read(conversation_key("c"), [key])[0]
    assert record is not None
    assert record.belief == decisions[0].if_delivered == decisions[1].if_delivered


# --- a store that fails, ids, clocks --------------------------------------------------------------


def test_a_store_that_is_down_withholds_and_says_so() -> None:
    gate = TurnGate(turn_cases.bundle(), DownLedger())
    turn = gate.open("c", asks("a", "b", "c"))
    decision = gate.commit(turn, gate.judge(turn, QUIET), "text")
    assert (decision.verdict, decision.cause) == ("BLOCK", "store")
    assert "nobody answers" in (decision.store_error or "")
    assert "the ledger is down" in decision.explanation


def test_a_turn_that_cannot_be_written_down_is_withheld() -> None:
    gate = TurnGate(turn_cases.bundle(), DownLedger(reads=False))
    turn = gate.open("c", asks("a"))
    judged = gate.judge(turn, QUIET)
    assert judged.delivers
    assert gate.commit(turn, judged, "text").cause == "store"


def test_a_policy_that_is_open_goes_on_and_says_so() -> None:
    gate = TurnGate(turn_cases.bundle(on_store_down="open", on_unseen="block"), DownLedger())
    turn = gate.open("c", asks("a", "b", "c"))
    assert turn.gap == 1
    decision = gate.commit(turn, gate.judge(turn, QUIET), "text")
    assert (decision.verdict, decision.cause) == ("DELIVER", "none")
    assert "the ledger is down" in decision.explanation
    loose = gate.open("c", asks("a", "b", "c"))
    assert gate.judge(loose, OPENS).risk < 0.5  # what it could not see it cannot add up


@pytest.mark.parametrize("belief", [(1.0,), (0.5, 0.5, 0.5, 0.5), (2.0, -1.0, 0.0, 0.0), ()])
def test_a_corrupted_record_is_no_belief(belief: tuple[float, ...]) -> None:
    ledger = MemoryLedger()
    gate = TurnGate(turn_cases.bundle(), ledger)
    turn = gate.open("c", asks("a"))
    spoilt = gate.judge(turn, QUIET).model_copy(update={"if_delivered": belief})
    gate.commit(turn, spoilt, "b")
    later = gate.open("c", asks("a", "b", "c"))
    assert "corrupted" in (later.store_error or "")
    assert gate.judge(later, QUIET).cause == "store"


@pytest.mark.parametrize("name", ["x" * 10_000_000, "\ud800", "", "a\x00b"])
def test_any_id_will_do_and_is_never_stored(name: str) -> None:
    ledger = MemoryLedger()
    client = Client(TurnGate(turn_cases.bundle(), ledger), conversation=name)
    client.turn(OPENS)
    assert not client.turn(OPENS).delivers
    keys = History.of(asks(*client.said, "?")).keys
    records = ledger.read(conversation_key(name), keys)
    assert all(record is not None and len(record.conversation) == 64 for record in records)


def test_clocks_do_not_enter_the_belief(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(at: list[float]) -> list[tuple[float, ...]]:
        clock = itertools.cycle(at)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: next(clock))
            client = Client(TurnGate(turn_cases.bundle(), MemoryLedger()))
            for hazard in (QUIET, OPENS, QUIET, OPENS):
                client.turn(hazard)
        return client.beliefs

    assert run([1e9]) == run([2e9, 1e9, 3e9, 5e8])


def test_old_conversations_are_expired_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    expired: list[float] = []

    class Ledger(MemoryLedger):
        def expire(self, before: float) -> int:
            expired.append(before)
            return super().expire(before)

    now = time.monotonic()
    gate = TurnGate(turn_cases.bundle(expiry=100.0), Ledger())
    client = Client(gate)
    client.turn(QUIET)
    assert expired == []
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    client.turn(QUIET)
    client.turn(QUIET)
    assert len(expired) == 1
    assert expired[0] == pytest.approx(time.time() - 100, abs=5)


def test_an_expiry_that_fails_withholds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ledger(MemoryLedger):
        def expire(self, before: float) -> int:
            raise LedgerError("ledger fake: cannot expire: nobody answers")

    now = time.monotonic()
    gate = TurnGate(turn_cases.bundle(), Ledger())
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    turn = gate.open("c", asks("a"))
    decision = gate.commit(turn, gate.judge(turn, QUIET), "b")
    assert decision.delivers
    assert "cannot expire" in decision.explanation
    assert gate.open("c", asks("a", "b", "c")).unseen == 0


def test_a_turn_without_evidence_is_withheld_unless_unscored_tokens_pass() -> None:
    gate = TurnGate(turn_cases.bundle(), MemoryLedger())
    decision = gate.judge(gate.open("c", asks("a")), None)
    assert (decision.verdict, decision.cause, decision.log_hazard) == ("BLOCK", "unscored", None)
    np.testing.assert_allclose(decision.if_delivered, gate.model.move(gate.model.start))
    passes = gate.bundle.with_policy(gate.bundle.policy.model_copy(update={"on_unscored": "pass"}))
    lenient = TurnGate(passes, MemoryLedger())
    assert lenient.judge(lenient.open("c", asks("a")), None).delivers


def test_looking_ahead_blocks_earlier() -> None:
    near = TurnGate(turn_cases.bundle(), MemoryLedger())
    far = TurnGate(turn_cases.bundle(horizon=4), MemoryLedger())
    risks = [gate.judge(gate.open("c", asks("a")), OPENS).risk for gate in (near, far)]
    assert risks[0] < 0.01
    assert risks[1] > 0.5


# --- bundles and policies -------------------------------------------------------------------------


def test_a_bundle_keeps_its_turn_model(tmp_path: Any) -> None:
    carry = [[0.9, 0.1]] * 4
    made = turn_cases.bundle(two_seals(carry=carry), hold=5)
    made.save(tmp_path / "b")
    loaded = Bundle.load(tmp_path / "b")
    assert loaded.turns == made.turns
    assert loaded.policy.turns == made.policy.turns
    assert loaded.hash == made.hash
    assert made.with_turns(two_seals()).hash != made.hash
    (tmp_path / "b" / "turns.json").write_text("{}")
    with pytest.raises(CorruptBundleError, match=r"turns\.json was cut short or changed"):
        Bundle.load(tmp_path / "b")


def test_a_bundle_without_turns_has_no_such_file_and_no_gate(tmp_path: Any) -> None:
    toy.bundle().save(tmp_path / "b")
    assert not (tmp_path / "b" / "turns.json").exists()
    assert Bundle.load(tmp_path / "b").turns is None
    with pytest.raises(PolicyError, match=r"has no turn model .*gate fit"):
        TurnGate(toy.bundle(), MemoryLedger())
    with pytest.raises(PolicyError, match="has no policy section turns"):
        TurnGate(toy.bundle().with_turns(two_seals()), MemoryLedger())


def test_a_turn_model_must_fit() -> None:
    with pytest.raises(BundleError, match=r"turns\.carry: rows over 3 token states"):
        turn_cases.bundle(two_seals(carry=[[0.5, 0.25, 0.25]] * 4))
    with pytest.raises(ValueError, match="must be a distribution"):
        two_seals(carry=[[0.5, 0.6]] * 4)
    with pytest.raises(ValueError, match="expected 4 rows"):
        two_seals(carry=[[0.5, 0.5]])
    with pytest.raises(ValueError, match="no prompt evidence"):
        two_seals(chain={"prompt_edges": [1.0], "prompt_emission": [[0.5, 0.5]] * 4})
    with pytest.raises(ChainError, match=r"turns\.json: chain"):
        TurnModel.from_json('{"chain": {}}')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("block_at: 1.5", "turns.block_at"),
        ("block_at: off", "turns.block_at"),
        ("horizon: -1", "turns.horizon"),
        ("hold: 0", "turns.hold"),
        ("hold: some", "turns.hold"),
        ("on_store_down: maybe", "turns.on_store_down"),
        ("on_unseen: skip", "turns.on_unseen"),
        ("expiry: 0", "turns.expiry"),
        ("blok_at: 1", "turns.blok_at"),
    ],
)
def test_every_error_of_the_policy_names_its_key(line: str, said: str) -> None:
    text = toy.policy().to_yaml() + "turns:\n  block_at: 0.5\n"
    assert Policy.from_yaml(text).turns is not None
    lines = text.replace("  block_at: 0.5\n", "") if line.startswith("block_at") else text
    with pytest.raises(PolicyError, match=said):
        Policy.from_yaml(f"{lines}  {line}\n")
