"""Read-outs side by side: what each is ranked by, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import fresh_seed
from sklearn.metrics import roc_auc_score

from midstream.learn.activations import InMemory
from midstream.learn.compare import compare, labels_at, read_logits
from midstream.learn.methods.method import ReadOut
from midstream.learn.tokens import Tokens, TrainingDataError
from midstream.probe import Probe
from midstream.taps import Tap

FIRST, SECOND = Tap(0, "resid_post"), Tap(1, "resid_post")


def some_tokens(random: np.random.Generator, examples: int = 40) -> Tokens:
    """The hazard is the second of two. Every fifth response is empty; special tokens close some."""
    prompt = random.integers(0, 4, examples)
    response = random.integers(1, 9, examples) * (np.arange(examples) % 5 > 0)
    closing = random.integers(0, 2, examples)
    prompt = np.maximum(prompt, response == 0)
    starts = np.concatenate([[0], np.cumsum(prompt + response + closing)])
    special = np.zeros(starts[-1], dtype=bool)
    special[starts[1:][closing == 1] - 1] = True
    labels = random.integers(-1, 2, (starts[-1], 2)).astype(np.int8)
    position = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
    labels[special | (position < np.repeat(prompt, np.diff(starts)))] = -1
    whole = np.resize(np.array([[0, 1], [1, 0], [0, -1]], np.int8), (examples, 2))
    return Tokens(
        hazards=("other", "spill"),
        ids=tuple(map(str, range(examples))),
        groups=tuple(map(str, range(examples))),
        starts=starts,
        prompt_tokens=prompt.astype(np.int32),
        instruction_end=np.full(examples, -1, np.int32),
        special=special,
        labels=labels,
        response_labels=whole,
        prompt_labels=np.full((examples, 2), -1, np.int8),
        spans=np.empty((0, 3), np.int64),
        contrast=np.full((examples, 3), -1, np.int32),
    )


def some_source(random: np.random.Generator, tokens: Tokens, width: int = 4) -> InMemory:
    rows = int(tokens.starts[-1])
    hidden = {tap: torch.from_numpy(random.normal(size=(rows, width))).float() for tap in TAPS}
    return InMemory(tokens, hidden, chunk_bytes=4 * width * 2 * 50)


TAPS = (FIRST, SECOND)


def read_out(
    random: np.random.Generator, name: str, taps: Any = (FIRST,), **fields: Any
) -> ReadOut:
    return ReadOut(
        name,
        tuple(
            Probe(
                f"{name} {tap}",
                "spill",
                tap,
                torch.from_numpy(random.normal(size=4)).float(),
                float(random.normal()),
                adds_to=None if tap == taps[0] else f"{name} {taps[0]}",
                **fields,
            )
            for tap in taps
        ),
    )


def test_what_each_level_is_ranked_by() -> None:
    random = np.random.default_rng(fresh_seed())
    tokens = some_tokens(random)
    logits = random.normal(size=int(tokens.starts[-1])).astype(np.float32) - 3

    found: dict[str, list[tuple[float, bool]]] = {"token": [], "response": [], "prompt": []}
    for e in range(len(tokens)):
        begin, end = tokens.starts[e], tokens.starts[e + 1]
        first = begin + tokens.prompt_tokens[e]
        last = end - int(tokens.special[end - 1])
        label = tokens.response_labels[e, 1]
        found["token"] += [
            (logits[row], tokens.labels[row, 1] == 1)
            for row in range(first, last)
            if tokens.labels[row, 1] >= 0
        ]
        if label >= 0 and last > first:
            found["response"].append((max(logits[first:last]), label == 1))
        if label >= 0 and first > begin:  # prompts have no labels of their own here
            found["prompt"].append((logits[first - 1], label == 1))
    for level, pairs in found.items():
        scores, labels = labels_at(logits, tokens, "spill", level)  # type: ignore[arg-type]
        assert scores.tolist() == [score for score, _ in pairs]
        assert labels.tolist() == [label for _, label in pairs]

    tokens.prompt_labels[:, 1] = np.resize([0, 0, 1, -1], len(tokens))
    _, labels = labels_at(logits, tokens, "spill", "prompt")
    asked = (tokens.prompt_tokens > 0) & (tokens.prompt_labels[:, 1] >= 0)
    assert labels.tolist() == (tokens.prompt_labels[asked, 1] == 1).tolist()

    tokens.response_labels[tokens.response_labels[:, 1] == 1] = 0
    with pytest.raises(TrainingDataError, match="response labels of one class"):
        labels_at(logits, tokens, "spill", "response")


def test_read_outs_come_best_first_with_their_area() -> None:
    random = np.random.default_rng(fresh_seed())
    tokens = some_tokens(random)
    tokens.labels[:] = np.minimum(tokens.labels, 0)  # no token shows it, so responses are ranked
    source = some_source(random, tokens)
    read_outs = [
        read_out(random, "one"),
        read_out(random, "both", TAPS),
        read_out(random, "asked", (SECOND,), reads="prompt"),
    ]
    logits = read_logits(read_outs, source)
    both = sum(
        source._hidden[probe.tap] @ probe.weight + probe.bias for probe in read_outs[1].probes
    )
    np.testing.assert_allclose(logits[1], both.numpy(), atol=1e-5)
    ranked = compare(read_outs, source)
    areas = [round(found.auroc, 3) for found in ranked]  # from there on they are ties
    assert areas == sorted(areas, reverse=True)
    for found in ranked:
        level = "prompt" if found.read_out.method == "asked" else "response"
        assert found.level == level
        values = logits[read_outs.index(found.read_out)]
        scores, labels = labels_at(values, tokens, "spill", level)  # type: ignore[arg-type]
        assert found.auroc == pytest.approx(roc_auc_score(labels, scores))


def test_of_equals_the_one_that_reads_fewer_and_earlier_taps_is_first() -> None:
    random = np.random.default_rng(fresh_seed())
    source = some_source(random, some_tokens(random))
    source._hidden[SECOND] = source._hidden[FIRST].clone()
    one = read_out(random, "first")
    (probe,) = one.probes
    later = ReadOut("later", (Probe("later", "spill", SECOND, probe.weight, probe.bias),))
    halves = ReadOut(
        "halves",
        (
            Probe("halves", "spill", FIRST, probe.weight / 2, probe.bias),
            Probe("half", "spill", SECOND, probe.weight / 2, adds_to="halves"),
        ),
    )
    order = [found.read_out.method for found in compare([halves, later, one], source)]
    assert order == ["first", "later", "halves"]
