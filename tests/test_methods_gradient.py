"""Losses against loops over their formulas, and what the shared training loop promises of them."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import fresh_seed
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from midstream.evidence import Count, Ema, Max, Mean
from midstream.learn.activations import InMemory
from midstream.learn.methods import method_class
from midstream.learn.methods.method import Method, ReadOut, Task
from midstream.learn.methods.ragged import cross_entropy, mean_where
from midstream.learn.methods.scm import scm_loss
from midstream.learn.methods.sgd import Batch, Descent, batches, moments, train
from midstream.learn.tokens import Tokens, TrainingDataError
from midstream.taps import Tap

NAMES = ("scm", "span-max", "windowed", "attention", "rolling-max")
TAPS = (Tap(0, "resid_post"), Tap(1, "resid_mid"), Tap(3, "resid_post"))
HAZARD = "spill"
SHORT = Descent(steps=40, batch=4)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name: str, **parameters: Any) -> Method:
    return method_class(name)(**parameters)


def some_tokens(random: np.random.Generator, examples: int, longest: int = 40) -> Tokens:
    """Prompts and responses of any length, empty ones too; a label in three is not known.

    The hazard is the second of two. Its spans may overlap. A special token closes some texts, as
    encoders have it.
    """
    prompt = random.integers(0, 5, examples)
    response = random.integers(0, longest, examples)
    response[:2] = longest  # one with and one without it, whatever the draw
    closing = random.integers(0, 2, examples)
    starts = np.concatenate([[0], np.cumsum(prompt + response + closing)])
    special = np.zeros(starts[-1], dtype=bool)
    special[starts[1:][closing == 1] - 1] = True
    labels = np.full((starts[-1], 2), -1, np.int8)
    whole = np.full((examples, 2), -1, np.int8)
    spans = []
    for e in range(examples):
        begin = int(starts[e] + prompt[e])
        end = begin + int(response[e])
        if end - begin == 0:
            continue
        harmful = e != 1 and (e == 0 or bool(random.random() < 0.5))
        labelled = e < 2 or random.random() < 0.8
        if e < 2 or random.random() < 0.8:
            whole[e, 1] = harmful
        if not labelled:
            continue
        labels[begin:end, 1] = 0
        for _ in range(int(random.integers(1, 4)) if harmful else 0):
            first = int(random.integers(begin, end))
            after = int(random.integers(first + 1, min(end, first + 6) + 1))
            labels[first:after, 1] = 1
            spans.append([1, first, after])
        for row in range(begin, end):
            if labels[row, 1] == 0 and random.random() < 0.2:
                labels[row, 1] = -1
        spans.append([0, begin, end])
    return Tokens(
        hazards=("other", HAZARD),
        ids=tuple(f"example {e}" for e in range(examples)),
        groups=tuple(str(e) for e in range(examples)),
        starts=starts,
        prompt_tokens=prompt.astype(np.int32),
        instruction_end=np.full(examples, -1, np.int32),
        special=special,
        labels=labels,
        response_labels=whole,
        prompt_labels=np.full((examples, 2), -1, np.int8),
        spans=np.array(spans, np.int64).reshape(-1, 3),
        contrast=np.full((examples, 3), -1, np.int32),
    )


def some_source(
    random: np.random.Generator,
    examples: int = 24,
    width: int = 8,
    taps: int = 3,
    rise: float = 3.0,
    **options: Any,
) -> InMemory:
    """Residuals that rise along a direction, in standard deviations, in spans of the hazard."""
    tokens = some_tokens(random, examples)
    hidden = {}
    for tap in TAPS[:taps]:
        direction = random.normal(size=width)
        rows = random.normal(size=(int(tokens.starts[-1]), width))
        rows += rise * (tokens.labels[:, 1:] == 1) * direction / np.linalg.norm(direction)
        rows = rows * np.exp(random.normal(size=width)) + 4 * random.normal(size=width)
        hidden[tap] = torch.from_numpy(rows).float()
    return InMemory(tokens, hidden, **options)


# The formulas, one tap at a time, with loops.


def entropy(z: float, label: int) -> float:
    """``-log sigmoid(z)`` or ``-log(1 - sigmoid(z))``."""
    z = z if label else -z
    return max(-z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def response_rows(tokens: Tokens, e: int) -> range:
    begin, end = int(tokens.starts[e] + tokens.prompt_tokens[e]), int(tokens.starts[e + 1])
    return range(begin, end - int(tokens.special[begin:end].sum()))


def response_lengths(tokens: Tokens) -> NDArray[np.int64]:
    return np.array([len(response_rows(tokens, e)) for e in range(len(tokens))])


def plain_scm(z: Any, tokens: Tokens, examples: Sequence[int], done: float) -> float:
    token, response, logic = [], [], []
    for e in examples:
        rows = response_rows(tokens, e)
        labelled = [row for row in rows if tokens.labels[row, 1] >= 0]
        token += [entropy(z[0][row], tokens.labels[row, 1]) for row in labelled]
        last = z[1][rows[-1]]
        if tokens.response_labels[e, 1] >= 0:
            response.append(entropy(last, tokens.response_labels[e, 1]))
        if labelled:
            c = sigmoid(last)
            most = max(sigmoid(z[0][row]) for row in labelled)
            logic.append(-math.log(max(1 - c + c * most, 1e-8)))
    return 0.6 * mean(token) + 0.4 * mean(response) + 1.0 * mean(logic)


def plain_span_max(z: Any, tokens: Tokens, examples: Sequence[int], done: float) -> float:
    def clip(value: float) -> float:
        return min(max(value, -100.0), 100.0)

    token, spans = [], []
    for e in examples:
        run: list[float] = []
        for row in response_rows(tokens, e):
            label = tokens.labels[row, 1]
            if label >= 0:
                token.append((10 if label else 1) * entropy(clip(z[0][row]), label))
            if label == 0:
                run.append(clip(z[0][row]))
            elif run:
                spans.append(entropy(max(run), 0))
                run = []
        if run:
            spans.append(entropy(max(run), 0))
        for hazard, first, after in tokens.spans:
            if hazard == 1 and tokens.starts[e] <= first < tokens.starts[e + 1]:
                spans.append(entropy(max(clip(z[0][row]) for row in range(first, after)), 1))
    return (1 - done) * mean(token) + done * mean(spans)


def plain_means(z: Any, rows: range, window: int) -> list[float]:
    found = []
    for t in range(len(rows)):
        inside = [z[row] for row in rows[max(0, t - window + 1) : t + 1]]
        found.append(sum(inside) / len(inside))
    return found


def plain_windowed(z: Any, tokens: Tokens, examples: Sequence[int], done: float) -> float:
    losses = []
    for e in examples:
        rows = response_rows(tokens, e)
        means = plain_means(z[0], rows, 16)[min(16, len(rows)) - 1 :]
        weights = [math.exp(m - max(means)) for m in means]
        label = tokens.response_labels[e, 1]
        losses.append(
            sum(w * entropy(m, label) for w, m in zip(weights, means, strict=True)) / sum(weights)
        )
    return mean(losses)


def plain_attention(z: Any, tokens: Tokens, examples: Sequence[int], done: float) -> float:
    losses = []
    for e in examples:
        rows = response_rows(tokens, e)
        top = max(z[1][row] for row in rows)
        weights = [math.exp(z[1][row] - top) for row in rows]
        pooled = sum(w * z[0][row] for w, row in zip(weights, rows, strict=True)) / sum(weights)
        losses.append(entropy(pooled, tokens.response_labels[e, 1]))
    return mean(losses)


def plain_rolling_max(z: Any, tokens: Tokens, examples: Sequence[int], done: float) -> float:
    return mean(
        [
            entropy(
                max(plain_means(z[0], response_rows(tokens, e), 10)), tokens.response_labels[e, 1]
            )
            for e in examples
        ]
    )


PLAIN: dict[str, Callable[[Any, Tokens, Sequence[int], float], float]] = {
    "scm": plain_scm,
    "span-max": plain_span_max,
    "windowed": plain_windowed,
    "attention": plain_attention,
    "rolling-max": plain_rolling_max,
}


class Asked(Exception):
    """What a method asks of the training loop."""

    def __init__(self, examples: NDArray[np.bool_], loss: Any, biases: tuple[bool, ...]) -> None:
        self.examples, self.loss, self.biases = examples, loss, biases


def asked(name: str, source: InMemory, monkeypatch: pytest.MonkeyPatch) -> Asked:
    method = made(name)

    def instead(
        method: str, source: Any, task: Any, examples: Any, loss: Any, descent: Any, **rest: Any
    ) -> None:
        raise Asked(examples, loss, rest.get("biases", (True,)))

    monkeypatch.setattr(importlib.import_module(type(method).__module__), "train", instead)
    with pytest.raises(Asked) as caught:
        method.fit(source, Task(HAZARD))
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_its_gradient_follow_from_the_formula(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(fresh_seed())
    source = some_source(random, taps=2)
    tokens = source.tokens
    wanted = asked(name, source, monkeypatch)
    # The paper's holistic head has no bias; to that of attention scores the softmax is blind.
    assert wanted.biases == ((True, False) if name in ("scm", "attention") else (True,))
    heads, rows = len(wanted.biases), int(tokens.starts[-1])
    # Some examples have logits beyond every clip and clamp.
    stretch = random.choice([1.0, 1.0, 2.0, 60.0, 200.0], len(tokens))[tokens.example_of]
    everywhere = random.normal(size=(heads, 2, rows)) * stretch
    seen: list[int] = []
    for batch, _ in batches(source, wanted.examples, 5, 0):
        examples = batch.examples.tolist()
        seen += examples
        done = float(random.random())
        logits = torch.from_numpy(everywhere[:, :, batch.rows]).requires_grad_()
        value = wanted.loss(logits, batch, done)
        value.sum().backward()
        for tap in range(2):
            z = everywhere[:, tap].copy()

            def plain(z: Any = z, examples: list[int] = examples, done: float = done) -> float:
                return PLAIN[name](z, tokens, examples, done)

            assert value[tap].item() == pytest.approx(plain(), rel=1e-9, abs=1e-9)
            for place in random.choice(len(batch.rows), min(12, len(batch.rows)), replace=False):
                for head in range(heads):
                    row, step = batch.rows[place], 1e-5
                    here = plain()
                    z[head, row] += step
                    right = (plain() - here) / step
                    z[head, row] -= 2 * step
                    left = (here - plain()) / step
                    z[head, row] += step
                    # They differ where another token is within a step of being the largest one.
                    low, high = sorted((left, right))
                    room = 1e-4 * max(-low, high) + 1e-6
                    assert low - room <= logits.grad[head, tap, place].item() <= high + room
    length = response_lengths(tokens)
    known = tokens.response_labels[:, 1] >= 0
    labelled = np.array(
        [(tokens.labels[response_rows(tokens, e), 1] >= 0).any() for e in range(24)]
    )
    usable = {"scm": known | labelled, "span-max": labelled}.get(name, known) & (length > 0)
    assert sorted(seen) == np.flatnonzero(usable).tolist()


def test_the_logic_loss_asks_for_a_harmful_token_and_is_held_at_its_floor() -> None:
    labels = torch.tensor([[0, 0, -1]], dtype=torch.int8)
    unknown = torch.tensor([-1], dtype=torch.int8)
    sure = torch.tensor([[40.0]], dtype=torch.float64)
    for most, wanted in ((-80.0, -math.log(1e-8)), (0.0, math.log(2)), (80.0, 0.0)):
        token = torch.tensor([[[-90.0, most, 99.0]]], dtype=torch.float64)
        found = scm_loss(token, sure, labels, unknown, 0.0, 1.0)
        assert found.item() == pytest.approx(wanted, abs=1e-9)
    # Nothing follows from a response of which no token is labelled.
    assert scm_loss(token, sure, labels.fill_(-1), unknown, 0.6, 1.0).item() == 0


# What is trained.


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_direction_is_found(name: str) -> None:
    random = np.random.default_rng(1)  # a descent of few steps ends near it in most draws
    source = some_source(random, examples=500, width=6, taps=2)
    method = made(name, descent=Descent(steps=200, rate=0.02))
    read_outs = method.fit(source.select(np.arange(350)), Task(HAZARD))
    assert [read_out.taps for read_out in read_outs] == [(tap,) for tap in TAPS[:2]]
    held_out = source.select(np.arange(350, 500))
    labels = held_out.tokens.labels[:, 1]
    for read_out in read_outs:
        (tap,) = read_out.taps
        logits = read_out.logits({tap: held_out._hidden[tap]}).numpy()
        # Along the direction itself it would be Phi(3 / sqrt(2)) = 0.983.
        assert 0.93 < roc_auc_score(labels[labels >= 0], logits[labels >= 0]) < 0.993


def cross_entropy_of(labels: NDArray[np.int8]) -> Callable[[torch.Tensor, Batch, float], Any]:
    def loss(logits: torch.Tensor, batch: Batch, done: float) -> torch.Tensor:
        here = torch.from_numpy(labels[batch.rows])
        return mean_where(cross_entropy(logits[0], here), here != -1)

    return loss


def test_the_loop_reaches_the_minimum_and_folds_the_moments_into_the_probe() -> None:
    random = np.random.default_rng(fresh_seed())
    source = some_source(random, examples=60, rise=1.0)
    tokens = source.tokens
    for tap in TAPS:
        source._hidden[tap][:, 2] = 3.7  # says nothing
    chosen = np.arange(60) % 3 > 0
    labels = tokens.labels[:, 1]
    heads = train(
        "loop",
        source,
        Task(HAZARD),
        chosen,
        cross_entropy_of(labels),
        Descent(steps=600, batch=60, rate=0.1, decay=0.0),
    )
    used = np.repeat(chosen, np.diff(tokens.starts)) & tokens.in_response
    learnt = used & (labels >= 0)
    for index, tap in enumerate(TAPS):
        hidden = source._hidden[tap].double().numpy()
        center, spread = hidden[used].mean(axis=0), hidden[used].std(axis=0)
        assert np.allclose(heads.mean[index], center, atol=1e-5)
        assert np.allclose(
            np.delete(heads.scale[index].numpy(), 2), np.delete(spread, 2), rtol=1e-5
        )
        spread[2] = 1.0
        rows = (hidden - center) / spread
        best = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(rows[learnt], labels[learnt])
        wanted = best.decision_function(rows)
        trained = rows @ heads.weight[index, 0].double().numpy() + float(heads.bias[index, 0])
        assert heads.weight[index, 0, 2] == 0
        assert np.abs(trained - wanted).max() < 0.02 * np.abs(wanted).max()
        probe = heads.probe("loop", Task(HAZARD), index, Max())
        served = ReadOut("loop", (probe,)).logits({tap: source._hidden[tap]})
        assert np.allclose(served, trained, atol=1e-3, rtol=1e-4)
        assert probe.weight[2] == 0
        assert (probe.name, probe.hazard) == (f"{HAZARD} loop {tap}", HAZARD)


def test_the_logits_of_the_loop_are_those_of_the_heads_it_returns() -> None:
    random = np.random.default_rng(fresh_seed())
    source = some_source(random, chunk_bytes=4096)
    seen: dict[int, torch.Tensor] = {}
    share: list[float] = []

    def loss(logits: torch.Tensor, batch: Batch, done: float) -> torch.Tensor:
        share.append(done)
        for column, row in enumerate(batch.rows.tolist()):
            seen[row] = logits[..., column].detach()
        return logits.mean(dim=(0, 2))

    still = Descent(steps=1, batch=4, rate=1e-9)
    everyone = np.ones(24, bool)
    heads = train(
        "loop", source, Task(HAZARD, seed=3), everyone, loss, still, biases=(True, False, True)
    )
    rows = np.flatnonzero(source.tokens.in_response)
    assert sorted(seen) == rows.tolist()
    found = heads.logits([source._hidden[tap][rows] for tap in TAPS])
    wanted = torch.stack([seen[row] for row in rows.tolist()], dim=-1)
    assert found.shape == (3, 3, len(rows))
    assert torch.allclose(found, wanted, atol=1e-5)
    # Standardised logits of weights that began with a spread of 0.01.
    assert 0.001 < wanted.std() / math.sqrt(8) < 0.03
    assert share == sorted(share)
    assert 0 == share[0] < share[-1] < 1
    other = train(
        "loop", source, Task(HAZARD, seed=4), everyone, loss, still, biases=(True, False, True)
    )
    assert not torch.allclose(heads.weight, other.weight, atol=1e-4)


def test_moments_are_merged_over_chunks() -> None:
    source = some_source(np.random.default_rng(fresh_seed()), examples=60, chunk_bytes=1 << 12)
    assert len(list(source.chunks())) > 5
    chosen = np.arange(60) % 3 > 0
    center, spread = moments("loop", source, Task(HAZARD), chosen)
    used = np.repeat(chosen, np.diff(source.tokens.starts)) & source.tokens.in_response
    for index, tap in enumerate(TAPS):
        hidden = source._hidden[tap].double().numpy()[used]
        assert np.allclose(center[index].numpy(), hidden.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert np.allclose(spread[index].numpy(), hidden.std(axis=0), rtol=1e-5)


def test_a_head_without_a_bias_has_none_while_it_is_trained() -> None:
    source = some_source(np.random.default_rng(fresh_seed()), taps=1)
    source._hidden[TAPS[0]][:] = 2.5
    seen = []

    def loss(logits: torch.Tensor, batch: Batch, done: float) -> torch.Tensor:
        seen.append(logits.detach()[:, 0].abs().amax(dim=1))
        return -logits.mean(dim=(0, 2))

    everyone = np.ones(24, bool)
    heads = train("loop", source, Task(HAZARD), everyone, loss, SHORT, biases=(True, False))
    assert seen[-1][0] > 0.1
    assert max(float(step[1]) for step in seen) == 0
    assert heads.bias[0, 0] > 0.1
    assert heads.bias[0, 1] == 0


def test_batches_hold_every_response_of_the_chosen_once() -> None:
    random = np.random.default_rng(fresh_seed())
    source = some_source(random, examples=50, chunk_bytes=8192)
    tokens = source.tokens
    chosen = random.random(50) < 0.7
    seen = []
    for batch, hidden in batches(source, chosen, 3, 7):
        assert len(batch.examples) <= 3
        rows = np.concatenate([response_rows(tokens, e) for e in batch.examples])
        assert batch.rows.tolist() == rows.tolist()
        for tap, values in zip(TAPS, hidden, strict=True):
            assert torch.equal(values, source._hidden[tap][rows])
        assert batch.mask.sum(dim=1).tolist() == batch.lengths.tolist()
        padded = batch.padded(torch.arange(float(len(rows))), -1.0)
        assert padded[batch.mask].tolist() == list(range(len(rows)))
        assert bool((padded[~batch.mask] == -1).all())
        seen += batch.examples.tolist()
    length = response_lengths(tokens)
    assert sorted(seen) == np.flatnonzero(chosen & (length > 0)).tolist()
    assert seen != sorted(seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_tap_is_trained_as_if_alone(name: str) -> None:
    source = some_source(np.random.default_rng(fresh_seed()))
    together = made(name, descent=SHORT).fit(source, Task(HAZARD))
    for tap, read_out in zip(TAPS, together, strict=True):
        hidden = {tap: source._hidden[tap]}
        (alone,) = made(name, descent=SHORT).fit(InMemory(source.tokens, hidden), Task(HAZARD))
        expected = alone.logits(hidden)
        assert torch.allclose(read_out.logits(hidden), expected, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("name", NAMES)
def test_training_again_gives_the_same_bits_and_another_seed_others(name: str) -> None:
    source = some_source(np.random.default_rng(fresh_seed()), taps=1)
    first, again, other = (
        made(name, descent=SHORT).fit(source, Task(HAZARD, seed=seed))[0] for seed in (5, 5, 6)
    )
    assert torch.equal(first.probes[0].weight, again.probes[0].weight)
    assert first.probes[0].bias == again.probes[0].bias
    assert dict(first.facts) == dict(again.facts)
    assert not torch.equal(first.probes[0].weight, other.probes[0].weight)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_the_prompt_are_never_read(name: str) -> None:
    source = some_source(np.random.default_rng(fresh_seed()), taps=1)
    before = made(name, descent=SHORT).fit(source, Task(HAZARD))[0]
    source._hidden[TAPS[0]][~source.tokens.in_response] = torch.nan
    after = made(name, descent=SHORT).fit(source, Task(HAZARD))[0]
    assert torch.equal(before.probes[0].weight, after.probes[0].weight)


# What is served, and what is said of it.


def largest_and_counts(
    read_out: ReadOut, source: InMemory, cut: float
) -> tuple[list[float], list[int], list[bool]]:
    tokens = source.tokens
    logits = read_out.logits({tap: source._hidden[tap] for tap in read_out.taps}).tolist()
    largest, counts, harmful = [], [], []
    for e in range(len(tokens)):
        rows = response_rows(tokens, e)
        if len(rows) and tokens.response_labels[e, 1] >= 0:
            largest.append(max(logits[row] for row in rows))
            counts.append(sum(logits[row] >= cut for row in rows))
            harmful.append(bool(tokens.response_labels[e, 1]))
    return largest, counts, harmful


def test_each_method_has_the_evidence_that_follows_its_pooling() -> None:
    source = some_source(np.random.default_rng(fresh_seed()), taps=1)
    found = {
        name: made(name, descent=SHORT).fit(source, Task(HAZARD))[0].probes[0].evidence
        for name in NAMES
    }
    assert isinstance(found.pop("scm"), Count)
    assert found == {
        "span-max": Max(),
        "windowed": Ema(alpha=2 / 17),
        "attention": Max(),
        "rolling-max": Mean(window=10),
    }


def test_scm_chooses_the_delay_with_the_best_f1() -> None:
    source = some_source(np.random.default_rng(fresh_seed()), examples=60, taps=2)
    for read_out in made("scm", theta=0.3, descent=SHORT).fit(source, Task(HAZARD)):
        evidence = read_out.probes[0].evidence
        assert isinstance(evidence, Count)
        assert evidence.theta == pytest.approx(math.log(0.3 / 0.7))
        best = []
        for moved in (-1e-5, 1e-5):  # a logit this near the threshold may be counted or not
            _, counts, harmful = largest_and_counts(read_out, source, evidence.theta + moved)
            f1 = [
                f1_score(harmful, [count >= k for count in counts], zero_division=0)
                for k in range(1, 51)
            ]
            best.append((1 + f1.index(max(f1)), pytest.approx(max(f1))))
        assert (evidence.k, read_out.facts["delay_f1"]) in best
        assert evidence.k == read_out.facts["delay_k"]
    (fixed, _) = made("scm", k=70, descent=SHORT).fit(source, Task(HAZARD))
    assert fixed.probes[0].evidence == Count(theta=0.0, k=70)


def test_attention_measures_what_serving_its_values_loses() -> None:
    source = some_source(np.random.default_rng(fresh_seed()), examples=80, taps=2)
    for read_out in made("attention", descent=SHORT).fit(source, Task(HAZARD)):
        largest, _, harmful = largest_and_counts(read_out, source, 0.0)
        # rounding may swap a few of some thousand pairs of responses
        served = roc_auc_score(harmful, largest)
        assert read_out.facts["auroc_served"] == pytest.approx(served, abs=5e-3)
        assert 0.5 < read_out.facts["auroc_pooled"] <= 1


# What cannot be learnt from.


@pytest.mark.parametrize("name", NAMES)
def test_missing_labels_are_an_error_that_names_the_level(name: str) -> None:
    source = some_source(np.random.default_rng(fresh_seed()), taps=1)
    levels = {"scm": ["token", "response"], "span-max": ["token"]}.get(name, ["response"])
    for level in levels:
        field = {"token": "labels", "response": "response_labels"}[level]
        for label, problem in ((-1, "none of"), (0, "all")):
            table = getattr(source.tokens, field).copy()
            table[table >= 0] = label
            bare = dataclasses.replace(source.tokens, **{field: table})
            with pytest.raises(
                TrainingDataError, match=f"^{name}: hazard '{HAZARD}': {problem}.* {level} labels"
            ):
                made(name).fit(InMemory(bare, source._hidden), Task(HAZARD))
    with pytest.raises(TrainingDataError, match=r"no hazard 'flood'.*spill"):
        made(name).fit(source, Task("flood"))


@pytest.mark.parametrize(("value", "message"), [(math.nan, "not finite"), (1e25, "too large")])
def test_residuals_that_cannot_be_standardised_are_named(value: float, message: str) -> None:
    source = some_source(np.random.default_rng(fresh_seed()))
    row = response_rows(source.tokens, 0)[-1]
    source._hidden[TAPS[1]][row, 4] = value
    with pytest.raises(TrainingDataError, match=rf"^windowed: .*at {TAPS[1]} are {message}"):
        made("windowed").fit(source, Task(HAZARD))


def test_a_loss_that_is_not_finite_names_the_method_and_the_tap() -> None:
    source = some_source(np.random.default_rng(fresh_seed()))

    def loss(logits: torch.Tensor, batch: Batch, done: float) -> torch.Tensor:
        return logits.mean(dim=(0, 2)) * torch.tensor([1.0, math.inf, 1.0])

    with pytest.raises(
        TrainingDataError, match=rf"^loop: hazard '{HAZARD}': the loss at {TAPS[1]}"
    ):
        train("loop", source, Task(HAZARD), np.ones(24, bool), loss, SHORT)


def test_examples_without_a_response_teach_nothing() -> None:
    source = some_source(np.random.default_rng(fresh_seed()))
    length = response_lengths(source.tokens)
    loss = cross_entropy_of(source.tokens.labels[:, 1])
    with pytest.raises(TrainingDataError, match="no response token"):
        train("loop", source, Task(HAZARD), length == 0, loss, SHORT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Descent(steps=0), "steps"),
        (lambda: Descent(batch=0), "batch"),
        (lambda: Descent(rate=0.0), "rate"),
        (lambda: Descent(rate=math.nan), "rate"),
        (lambda: Descent(decay=-0.1), "decay"),
        (lambda: made("scm", theta=1.0), "theta"),
        (lambda: made("scm", k=0), "k"),
        (lambda: made("windowed", window=0), "window"),
        (lambda: made("windowed", temperature=0.0), "temperature"),
        (lambda: made("rolling-max", window=0), "window"),
    ],
)
def test_parameters_out_of_range_are_refused_before_training(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.* must be"):
        make()
