"""Training from end to end on residuals that are made up: what is chosen, split and promised."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from kernel_cases import fresh_seed
from rich.console import Console

from midstream.commands.train import train as command
from midstream.fingerprint import Fingerprint
from midstream.learn.activations import InMemory
from midstream.learn.guarantee import GuaranteeError
from midstream.learn.methods import METHODS, methods_for
from midstream.learn.methods.method import Method, ReadOut, Task
from midstream.learn.splits import SplitError, split_tokens
from midstream.learn.tokens import Source, Tokens, TrainingDataError
from midstream.learn.train import SHARES, Trained, train
from midstream.show import comparison_table
from midstream.taps import Tap

HAZARD, OTHER = "spill", "other"
TASK = Task(HAZARD)
TAPS = (Tap(0, "resid_post"), Tap(1, "resid_post"))
WIDTH = 6
MODEL = Fingerprint(
    architecture="Toy",
    model_type="toy",
    hidden_size=WIDTH,
    layers=2,
    vocab_size=8,
    tokenizer_sha256=None,
    weights_sha256="0" * 64,
)


def made_up(seed: int, *, examples: int = 240, chat: bool = True, per_group: int = 1) -> InMemory:
    """Every third response spills from its middle on, where residuals rise along the first axis.

    Prompts of 5 tokens tell of it in their last one. Plain texts stand between special tokens.
    """
    random = np.random.default_rng(seed)
    before, after = (5, 0) if chat else (1, 1)
    lengths = random.integers(4, 16, examples)
    starts = np.concatenate([[0], np.cumsum(before + lengths + after)])
    special = np.zeros(starts[-1], np.bool_)
    labels = np.full((starts[-1], 2), -1, np.int8)
    hidden = {tap: random.normal(size=(starts[-1], WIDTH)) for tap in TAPS}
    bad = np.arange(examples) // per_group % 3 == 0
    spans = []
    for e, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        first, end = start + before, start + before + length
        labels[first:end, 0] = 0
        if not chat:
            special[[start, end]] = True
        if bad[e]:
            middle = (first + end) // 2
            labels[middle:end, 0] = 1
            spans.append((0, middle, end))
            for values in hidden.values():
                values[middle:end, 0] += 6
                values[first - 1, 1] += 6
    known = np.stack([bad, np.arange(examples) == 0], axis=1).astype(np.int8)
    return InMemory(
        Tokens(
            hazards=(HAZARD, OTHER),
            ids=tuple(f"e{e}" for e in range(examples)),
            groups=tuple(f"g{e // per_group}" for e in range(examples)),
            starts=starts,
            prompt_tokens=np.full(examples, before, np.int32),
            instruction_end=np.full(examples, 3 if chat else -1, np.int32),
            special=special,
            labels=labels,
            response_labels=known,
            prompt_labels=known if chat else np.full_like(known, -1),
            spans=np.array(spans, np.int64),
            contrast=np.full((examples, 3), -1, np.int32),
        ),
        {tap: torch.from_numpy(values).float() for tap, values in hidden.items()},
    )


def trained(data: InMemory, names: Sequence[str] = ("logistic",), **options: Any) -> Trained:
    options = {"false_halts": {"moderate": 0.2}, **options}
    return train(data, TASK, methods_for(names, data.tokens, HAZARD), MODEL, **options)


def test_every_method_takes_texts_between_special_tokens() -> None:
    data = made_up(fresh_seed(), chat=False)
    short: list[Method] = [
        replace(method, descent=replace(method.descent, steps=20))  # type: ignore[type-var]
        if hasattr(method, "descent")
        else method
        for method in methods_for(list(METHODS), data.tokens, HAZARD)
    ]
    found = train(data, TASK, short, MODEL, false_halts={"moderate": 0.2})
    methods = {compared.read_out.method for compared in found.compared}
    assert {"logistic", "scm", "span-max", "windowed", "attention", "rolling-max"} <= methods


def test_one_method_may_read_prompt_and_response_at_one_tap() -> None:
    data = made_up(fresh_seed())
    data._hidden[TAPS[1]] = data._hidden[TAPS[1]].flip(0)  # tells nothing of these labels
    bank = trained(data).bundle.bank
    assert {probe.reads for probe in bank.heads} == {"prompt", "response"}
    assert len({probe.tap for probe in bank.heads}) == 1


def test_the_guarantee_counts_one_response_of_each_group_and_response_tokens_alone() -> None:
    data = made_up(fresh_seed(), examples=480, per_group=4)
    found = trained(data).bundle.policy.provenance.false_halts
    assert found is not None
    tokens = data.tokens
    there = split_tokens(tokens, SHARES, TASK.seed, {HAZARD})["calibrate"]
    safe = [e for e in there if tokens.response_labels[e, 0] == 0]
    groups = Counter(tokens.groups[e] for e in safe)
    assert set(groups.values()) == {4}
    assert found["moderate"].responses == len(groups)
    longest = max(tokens.response_tokens[e] for e in safe)
    assert found["moderate"].max_tokens <= longest


def test_too_few_groups_for_the_guarantee_are_told_though_there_are_responses() -> None:
    with pytest.raises(GuaranteeError, match=r"add [0-9]+ more"):
        trained(made_up(fresh_seed(), examples=480, per_group=20))


def test_too_few_responses_are_told_before_anything_is_trained() -> None:
    class Never:
        name = "never"

        def fit(self, source: Source, task: Task) -> list[ReadOut]:
            pytest.fail("trained for nothing")

    with pytest.raises(GuaranteeError, match=r"add [0-9]+ more"):
        train(made_up(fresh_seed()), TASK, [Never()], MODEL, false_halts={"moderate": 1e-4})


def test_a_refusal_label_that_is_not_there_is_an_error_though_no_method_asks() -> None:
    data = made_up(fresh_seed())
    with pytest.raises(TrainingDataError, match="no hazard 'polite'"):
        train(data, Task(HAZARD, "polite"), methods_for(["lda"], data.tokens, HAZARD), MODEL)


def test_a_method_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    data = made_up(fresh_seed())
    with (
        patch("midstream.learn.activations.Activations.open", return_value=data),
        pytest.raises(typer.BadParameter, match="no 'lba'; there are logistic,"),
    ):
        command(tmp_path, tmp_path / "out", hazard=HAZARD, methods="logistic, lba")


def test_a_label_that_is_not_asked_for_may_be_too_rare_to_split() -> None:
    data = made_up(fresh_seed())
    with pytest.raises(SplitError, match=OTHER):
        split_tokens(data.tokens, SHARES, 0)
    assert trained(data).bundle.notes["hazard"] == HAZARD


def test_the_table_is_of_the_hazard_asked_for_though_another_is_told_better() -> None:
    def row(method: str, hazard: str, level: str) -> dict[str, Any]:
        return {"method": method, "hazard": hazard, "tap": "t", "level": level, "auroc": 0.5}

    rows = [row("refused", OTHER, "response"), row("spilt", HAZARD, "token")]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(rows, HAZARD))
    assert "spilt" in (text := console.export_text())
    assert "refused" not in text
