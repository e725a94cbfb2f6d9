"""``midstream gate``: reading, scoring, fitting and replaying conversations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import fresh_seed
from typer.testing import CliRunner

from midstream import testbed
from midstream.bundle import Bundle
from midstream.chain import ChainError
from midstream.cli import app
from midstream.engines.hf.scoring import GivenTokens, feed
from midstream.learn.guarantee import GuaranteeError
from midstream.learn.turn_fit import LabelledTurns, _until_target, carry_of, edges_of, fit_turns
from midstream.learn.turn_gate_fit import fit_gate
from midstream.measure.conversations import Conversation, ConversationError, read_conversations
from midstream.measure.turn_replay import BASELINES, Scored, baseline_scores
from midstream.measure.turn_scoring import turn_hazards
from midstream.monitor import Monitor
from midstream.testbed.conversations import conversation_rows
from midstream.turn_evidence import TurnEvidence

from turn_cases import OPENS, QUIET, two_seals  # isort: skip

ASKED = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- files ----------------------------------------------------------------------------------------


def test_rows_of_every_layout(tmp_path: Path) -> None:
    mtid = [{"turn_id": n, **m} for n, m in enumerate([ASKED, SAID] * 2)]
    found = read_conversations(
        written(
            tmp_path / "c.jsonl",
            {"id": "x", "messages": [ASKED, SAID] * 3, "target_turn": 3, "harmful": True},
            {"conversation": mtid, "target_turn": 2, "meta_intent": "left aside"},
            {"messages": [ASKED, SAID], "target_turn": None},
            {"messages": [ASKED, SAID] * 2, "violated": [False, True]},
            {"messages": [ASKED, SAID], "harmful": True},
            {"messages": [ASKED, SAID, ASKED]},
        )
    )
    assert [(one.id, one.harmful, one.target) for one in found] == [
        ("x", True, 3),
        ("line 2", True, 2),
        ("line 3", False, None),
        ("line 4", True, 2),
        ("line 5", True, None),
        ("line 6", None, None),
    ]
    assert found[1].responses == [1, 3]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASKED]}, "none is the assistant's"),
        ({"messages": [SAID], "target_turn": 2}, "expected 1 to 1"),
        ({"messages": [SAID], "target_turn": True}, "expected 1 to 1"),
        ({"messages": [SAID], "violated": []}, "expected 1 labels"),
        ({"messages": [SAID], "violated": [True], "target_turn": None}, "begins at 1"),
        ({"messages": [SAID], "target_turn": 1, "harmful": False}, "false, but target_turn is 1"),
        ({"messages": [SAID], "harmful": "yes"}, "true or false"),
        ({"messages": ["b"]}, "line 1: expected messages"),
        ({"text": "b"}, "line 1: expected messages"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "line 1: content: expected a list"),
        ([1], "expected an object"),
    ],
)
def test_every_bad_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ConversationError, match=said) as caught:
        read_conversations(written(tmp_path / "c.jsonl", row))
    assert "line 1" in str(caught.value)


def test_ids_are_unique_and_files_not_empty(tmp_path: Path) -> None:
    row = {"id": 1, "messages": [SAID]}
    with pytest.raises(ConversationError, match="the id '1' was there before"):
        read_conversations(written(tmp_path / "c.jsonl", row, row))
    with pytest.raises(ConversationError, match="holds no conversation"):
        read_conversations(written(tmp_path / "d.jsonl"))


def test_traces_of_agents_are_conversations(tmp_path: Path) -> None:
    steps = [
        {"role": "user", "content": "polish the jar"},
        {"role": "agent", "thought": "polish", "action": "Polish{}"},
        {"role": "environment", "content": "done"},
        {"role": "agent", "thought": None, "action": "Finish{}"},
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"id": 3, "profile": "keeper", "label": 1, "contents": [steps]}]))
    (one,) = read_conversations(path)
    assert (one.id, one.harmful, one.target, one.responses) == ("r_judge/3", True, None, [2, 4])
    assert [message["role"] for message in one.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    path.write_text(json.dumps([{"id": 3, "label": 2}]))
    with pytest.raises(ConversationError, match="trace 1"):
        read_conversations(path)


# --- fitting --------------------------------------------------------------------------------------


def worlds(seed: int, count: int) -> list[LabelledTurns]:
    """Conversations of `two_seals`, with noise on what each turn shows."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        opened = random.random(int(random.integers(2, 9))) < 0.3
        at = np.flatnonzero(opened)
        turns = len(opened)
        shown = np.where(opened, random.normal(6, 1.5, turns), random.exponential(0.1, turns))
        target = int(at[1]) + 1 if len(at) > 1 else None
        found.append(LabelledTurns(np.abs(shown).tolist(), target is not None, target))
    return found


def test_a_fitted_chain_remembers_the_first_opening() -> None:
    model = fit_turns(worlds(1, 150), states=3, seed=1).model  # a fit, good in most draws
    quiet, opens = 0.05, 6.0
    for turns, harmful in (
        ([opens], False),
        ([quiet, opens, quiet, quiet], False),
        ([opens, opens], True),
        ([quiet, opens, quiet, quiet, opens], True),
    ):
        belief = model.start
        for hazard in turns:
            belief = model.read(belief, hazard).delivered
        assert (model.risk(belief, 0) > 0.5) == harmful


def test_edges_stand_where_both_bins_have_turns() -> None:
    random = np.random.default_rng(fresh_seed())
    for _ in range(20):
        hazards = np.concatenate([random.exponential(0.001, 400), random.normal(8, 1, 100)])
        hazards = np.abs(hazards)
        edges = edges_of(hazards)
        counts = np.bincount(np.searchsorted(edges, hazards, side="right"))
        assert len(counts) == len(edges) + 1
        assert counts.min() >= 10
        assert np.log(2) in edges  # between what is seen and what is not
    assert edges_of(np.zeros(5)) == []


def test_what_is_carried_over_moves_the_odds_of_the_outcome_and_nothing_else() -> None:
    bundle = testbed.load_bundle()
    model = two_seals()
    hazards = [[QUIET, OPENS, QUIET], [QUIET, QUIET], [OPENS, QUIET]]
    carry = carry_of(model, hazards, bundle.chain)
    np.testing.assert_allclose(carry.sum(axis=1), 1.0, atol=1e-12)
    weight, violates = np.zeros(4), np.zeros(4)
    for turns in hazards:
        belief = model.start
        for hazard in turns:
            weight += belief
            violates += belief * (1 - np.exp(-hazard))
            belief = model.read(belief, hazard).delivered
    # the joint of start and outcome by long runs of the token chain, its columns rescaled
    chain = bundle.chain
    far = chain.horizon(10_000)
    for i, chance in enumerate(violates / weight):
        joint = np.array([[p * a, p * (1 - a)] for p, a in zip(chain.prior, far, strict=True)])
        joint *= np.array([chance, 1 - chance]) / joint.sum(axis=0)
        np.testing.assert_allclose(carry[i], joint.sum(axis=1), atol=1e-6)
    assert bundle.with_turns(two_seals(carry=carry.tolist())).turns is not None


def test_what_cannot_be_fitted() -> None:
    harmless = [LabelledTurns([0.1, 0.2], False, None)] * 5
    with pytest.raises(ChainError, match="no stream violates"):
        fit_turns(harmless, states=2)
    with pytest.raises(ChainError, match="none has a turn with evidence"):
        fit_turns([LabelledTurns([None], True, None)], states=2)


def test_a_target_without_evidence_does_not_pass_to_the_turn_before() -> None:
    seen = LabelledTurns([0.1, None], True, 2)
    assert _until_target(seen) == LabelledTurns([0.1], True, None)
    assert _until_target(LabelledTurns([None, 0.1, 5.0, 0.2], True, 3)) == LabelledTurns(
        [0.1, 5.0], True, 3
    )


def test_a_threshold_stands_in_the_middle_of_the_best() -> None:
    talks = [
        Conversation(str(n), (SAID,) * 3, harmful, 2 if harmful else None)
        for n, harmful in enumerate([True, False])
    ]
    scored = Scored.of([np.array([0.1, 0.9, 0.2]), np.array([0.3, 0.2])], talks)
    assert scored.best() == pytest.approx(0.6)
    assert scored.blocked(0.6) == [2, None]
    assert scored.merit(0.6) == 1.0
    assert scored.blocked(0.05) == [1, 1]
    assert scored.blocked(0.95) == [None, None]


def test_baselines_by_hand() -> None:
    model = two_seals()
    found = baseline_scores(model, [[OPENS, None, OPENS]], 0)
    assert set(found) == set(BASELINES)
    assert found["per_turn"][0].tolist() == [9.0, 0.0, 9.0]
    assert found["summed"][0].tolist() == [9.0, 9.0, 18.0]
    assert found["turn_number"][0].tolist() == [1, 2, 3]
    moved = model.move(model.start, 2)
    expected = model.risk(model.read(moved, OPENS).delivered, 0)
    assert found["last_turn"][0][2] == pytest.approx(expected)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "talks.jsonl", *conversation_rows(70, 11))


@pytest.fixture(scope="module")
def fitted(talks: Path) -> tuple[Path, dict[str, Any]]:
    out = talks.parent / "bundle"
    result = invoke("fit", "--data", talks, "--out", out, "--states", 3, "--batch-size", 64)
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["gate", *map(str, arguments), "--json"])


def test_the_evidence_is_the_one_that_serving_finds(talks: Path) -> None:
    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    rows = [json.loads(line) for line in talks.read_text().splitlines()][:2]
    found = turn_hazards(model, tokenizer, read_conversations(talks)[:2], bundle, context="turn")
    monitor, evidence = Monitor(bundle, slots=1, trace=512), TurnEvidence(bundle)
    for row, hazards in zip(rows, found, strict=True):
        for turn, hazard in zip(row["turns"], hazards, strict=True):
            ids = [*turn["prompt_ids"], *turn["response_ids"][:-1]]
            given = GivenTokens("s", ids, [True] * len(ids), len(turn["prompt_ids"]))
            (report,) = feed(model, [given], monitor)
            assert evidence.log_hazard(report) == pytest.approx(hazard, rel=1e-3, abs=1e-6)


def test_fit_and_replay_on_the_testbed(talks: Path, fitted: Any) -> None:
    bundle, told = fitted
    assert (told["model_reads"], told["states"]) == ("turn", 3)
    loaded = Bundle.load(bundle)
    assert loaded.turns is not None
    assert loaded.turns.carry is not None
    assert loaded.policy.turns is not None
    assert "set aside from talks.jsonl" in loaded.policy.turns.provenance
    out = talks.parent / "out"
    result = invoke("replay", "--data", talks, "--bundle", bundle, "--out", out,
                    "--batch-size", 64, "--ledger", talks.parent / "ledger.db")  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["gate"]["f1phi2"]["value"] > 0.8
    best = metrics["at_best_threshold_here"]
    assert best["per_turn"]["f1phi2"]["value"] < best["gate"]["f1phi2"]["value"]
    assert set(best) == {"gate", *BASELINES}
    assert (metrics["turns_unseen"], metrics["turns_while_the_store_was_down"]) == (0, 0)
    decisions = [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]
    assert len(decisions) == metrics["turns"]
    assert all(row["explanation"] for row in decisions)
    blocked = {row["conversation"] for row in decisions if row["verdict"] == "BLOCK"}
    assert len(blocked) == metrics["conversations_blocked"]
    for name in ("risk.svg", "thresholds.svg", "timing.svg"):
        assert (out / name).read_bytes().startswith(b"<?xml")
    assert any("fitted on a file of this name" in limit for limit in metrics["limits"])
    again = CliRunner().invoke(app, ["gate", "replay", "--data", str(talks), "--out", str(out)])
    assert isinstance(again.exception, FileExistsError)


def test_options_that_cannot_be_are_refused_before_anything_is_scored(
    talks: Path, fitted: Any, tmp_path: Path
) -> None:
    for name, value in (("--blocked", 0), ("--blocked", 1), ("--confidence", 1.5)):
        result = invoke("fit", "--data", talks, "--out", tmp_path / "b", name, value)
        assert result.exit_code == 2
        assert "between 0 and 1" in result.output
    result = invoke("replay", "--data", talks, "--bundle", fitted[0], "--out", tmp_path / "r",
                    "--ledger", "foo:bar")  # fmt: skip
    assert result.exit_code == 2
    assert "no ledger at 'foo:bar'" in result.output
    assert not list(tmp_path.iterdir())


def test_a_bound_on_blocks_needs_conversations_enough(fitted: Any) -> None:
    bundle = Bundle.load(fitted[0])
    random = np.random.default_rng(0)
    conversations = [
        Conversation(str(n), (SAID,) * 3, n % 2 == 0, 3 if n % 2 == 0 else None) for n in range(300)
    ]
    hazards = [[6.0 * (n % 2 == 0), *random.random(1), 6.0] for n in range(300)]
    made, told = fit_gate(
        bundle, conversations, hazards, source="here", states=3, blocked=0.1, confidence=0.9
    )
    assert made.policy.turns is not None
    assert "at most 10.0% of harmless conversations" in made.policy.turns.provenance
    assert told["figures_where_it_was_chosen"]["benign_score"] >= 0.9
    with pytest.raises(GuaranteeError, match="too few"):
        fit_gate(bundle, conversations[:20], hazards[:20], source="x", states=3, blocked=0.01)
    with pytest.raises(ChainError, match="0 harmful conversations"):
        fit_gate(bundle, conversations[1::2], hazards[1::2], source="x", states=3)


def test_r_judge_says_what_it_cannot_tell(fitted: Any, tmp_path: Path) -> None:
    folder = os.environ.get("MIDSTREAM_DATA")
    if folder is None:
        pytest.skip("MIDSTREAM_DATA names no folder of public data")
    rows = json.loads((Path(folder) / "r_judge" / "rjudge.json").read_text())[::40]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows))
    out = tmp_path / "out"
    result = invoke("replay", "--data", path, "--bundle", fitted[0], "--out", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics["conversations"] == len(rows)
    assert metrics["gate"]["f1phi2"]["value"] is None
    assert metrics["gate"]["detected"]["value"] is not None
    assert any("at which turn" in limit for limit in metrics["limits"])
