"""What docs/turns.md shows is what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy
import turn_cases

from midstream.ledger.open import open_ledger
from midstream.policy import Policy
from midstream.turn_policy import TurnPolicy
from midstream.turns import TurnGate

TEXT = (Path(__file__).parent.parent / "docs" / "turns.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return TEXT.split(f"```{language}\n")[1].split("```")[0]


def test_the_policy_is_one_and_names_every_key() -> None:
    policy = Policy.from_yaml(toy.policy().to_yaml() + block("yaml")).turns
    assert policy is not None
    assert (policy.horizon, policy.block_at, policy.hold, policy.expiry) == (
        0,
        0.47,
        "whole",
        30 * 86400,
    )
    assert all(f"  {key}: " in block("yaml") for key in TurnPolicy.model_fields)


@pytest.mark.parametrize(("block_at", "delivers"), [(0.5, True), (0.0, False)])
def test_the_example_runs(
    block_at: float, delivers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "bundle": turn_cases.bundle(block_at=block_at),
        "response": "They are made of wax.",
        "write": lambda history, prior: turn_cases.QUIET,
    }
    exec(block("python"), names)
    decision = names["decision"]
    assert decision.delivers == delivers
    assert names["text"] == ("They are made of wax." if delivers else "I cannot go on with this.")
    said = [{"role": "assistant", "content": names["text"]}, {"role": "user", "content": "Go on."}]
    gate = TurnGate(names["bundle"], open_ledger("turns.db"))
    assert gate.open("conversation 17", [*names["history"], *said]).unseen == 0
