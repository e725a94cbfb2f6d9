"""Closed-form and direction-based training, each against another implementation or its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import fresh_seed
from torch import Tensor

from midstream.evidence import Last, Mean
from midstream.learn.activations import InMemory
from midstream.learn.methods import METHODS, method_class
from midstream.learn.methods.ccs import (
    CCS,
    PolarityAwareCCS,
    contradiction_index,
    polar_consistency,
)
from midstream.learn.methods.harc import HARC
from midstream.learn.methods.latent_guard import LatentGuard
from midstream.learn.methods.lda import LDA, shrinkage
from midstream.learn.methods.logistic import JointLogistic, Logistic
from midstream.learn.methods.mass_mean import MassMean, MassMeanIID
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.moments import class_moments
from midstream.learn.methods.units import units_of
from midstream.learn.tokens import Chunk, Tokens, TrainingDataError
from midstream.taps import Tap

TAPS = (Tap(0, "resid_post"), Tap(1, "resid_mid"), Tap(2, "resid_post"))
HARM = Task("harm")
BOTH = Task("harm", refusal="refusal")
TRAINERS = [Logistic, JointLogistic, MassMean, MassMeanIID, LDA]


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def make_tokens(random: np.random.Generator, examples: int = 60, **changed: Any) -> Tokens:
    """Prompts of 3 to 6 tokens, of which the template's last 0 to 2 follow the instruction."""
    prompt = random.integers(3, 7, examples).astype(np.int32)
    lengths = prompt + random.integers(1, 60, examples)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    in_prompt = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) < np.repeat(prompt, lengths)
    labels = random.integers(-1, 2, (starts[-1], 2)).astype(np.int8)
    labels[in_prompt] = -1
    # Every combination is there: harm, refusal and known or not.
    sides = np.stack(np.meshgrid([0, 1, -1], [0, 1, -1]), axis=-1).reshape(-1, 2)
    sides = np.resize(sides, (examples, 2)).astype(np.int8)
    fields: dict[str, Any] = {
        "hazards": ("harm", "refusal"),
        "ids": tuple(f"e{i}" for i in range(examples)),
        "groups": tuple(f"g{i}" for i in range(examples)),
        "starts": starts,
        "prompt_tokens": prompt,
        "instruction_end": (prompt - 1 - random.integers(0, 3, examples)).astype(np.int32),
        "special": np.zeros(len(labels), dtype=bool),
        "labels": labels,
        "response_labels": random.permutation(sides),
        "prompt_labels": random.permutation(sides),
        "spans": np.empty((0, 3), dtype=np.int64),
        "contrast": np.full((examples, 3), -1, dtype=np.int32),
    }
    return Tokens(**{**fields, **changed})


class Shuffled(InMemory):
    """Chunks of a few examples, in an order that is not that of the tokens."""

    def chunks(self, seed: int | None = None) -> Iterator[Chunk]:
        return super().chunks(7)


def rotation(random: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(width, width)))[0]


def make_source(
    random: np.random.Generator, tokens: Tokens, width: int = 8, signal: float = 2.0
) -> InMemory:
    """Correlated residuals of unequal scale and far offset, shifted where anything is harmful."""
    rows = int(tokens.starts[-1])
    example = tokens.example_of
    harmful = (
        (tokens.labels[:, 0] == 1) * 1.0
        + (tokens.response_labels[example, 0] == 1)
        + (tokens.prompt_labels[example, 0] == 1)
    )
    refusing = (tokens.response_labels[example, 1] == 1) * 1.0
    hidden = {}
    for tap in TAPS:
        mix = rotation(random, width) * np.exp(random.uniform(-1, 1, width))[:, None]
        mix = mix @ rotation(random, width) * np.exp(random.uniform(-5, 5, width))
        latent = random.normal(size=(rows, width))
        latent[:, 0] += signal * harmful
        latent[:, 1] += signal * refusing
        hidden[tap] = torch.from_numpy(
            latent @ mix + mix.std(axis=0) * random.normal(size=width) * 10
        ).float()
    return Shuffled(tokens, hidden, chunk_bytes=4 * width * len(TAPS) * 300)


def all_hidden(source: InMemory) -> dict[Tap, np.ndarray]:
    return {tap: values.double().numpy() for tap, values in source._hidden.items()}


def unit_vectors(source: InMemory, tap: Tap, level: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and labels of hazard 0, one example after the other, written as the paper would."""
    tokens, hidden = source.tokens, all_hidden(source)[tap]
    if level == "token":
        known = tokens.labels[:, 0] >= 0
        return hidden[known], tokens.labels[known, 0]
    vectors, labels = [], []
    for e in range(len(tokens)):
        own = hidden[tokens.starts[e] : tokens.starts[e + 1]]
        label = (tokens.response_labels if level == "response" else tokens.prompt_labels)[e, 0]
        if label < 0:
            continue
        p = tokens.prompt_tokens[e]
        vectors.append(own[p:].mean(axis=0) if level == "response" else own[p - 1])
        labels.append(label)
    return np.array(vectors), np.array(labels)


def logits(read_out: ReadOut, hidden: dict[Tap, np.ndarray]) -> np.ndarray:
    """As served, but in fp64."""
    total = np.zeros(len(next(iter(hidden.values()))))
    for probe in read_out.probes:
        rows = hidden[probe.tap]
        if probe.norm == "rms":
            rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + probe.eps)
        total += rows @ probe.weight.double().numpy() + probe.bias
    return total


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def close(found: np.ndarray, expected: np.ndarray, relative: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


# ---- what is shared ------------------------------------------------------------------------------


def test_every_method_is_found_by_its_own_name() -> None:
    for name in METHODS:
        found = method_class(name)()
        assert found.name == name
        assert dataclasses.is_dataclass(found)
    with pytest.raises(ValueError, match=r"no method 'magic'; there are logistic, "):
        method_class("magic")


@pytest.mark.parametrize("level", ["token", "response", "prompt"])
def test_moments_are_those_of_all_units_at_once(random: np.random.Generator, level: Any) -> None:
    source = make_source(random, make_tokens(random))
    units = units_of("m", source.tokens, "harm", level)
    assert len(list(source.chunks())) > 3
    for tap, moments in class_moments("m", source, units, scatter=True).items():
        x, y = unit_vectors(source, tap, level)
        assert moments.count.tolist() == [(y == 0).sum(), (y == 1).sum()]
        means = np.stack([x[y == c].mean(axis=0) for c in (0, 1)])
        close(moments.mean.numpy(), means, 1e-6)
        close(moments.covariance.numpy(), (x - means[y]).T @ (x - means[y]) / len(y), 1e-5)


def test_a_far_offset_does_not_spoil_the_covariance(random: np.random.Generator) -> None:
    tokens = make_tokens(random)
    rows = int(tokens.starts[-1])
    hidden = torch.from_numpy(random.normal(size=(rows, 4)) + 30_000).float()
    source = InMemory(tokens, {TAPS[0]: hidden}, chunk_bytes=4 * 4 * 100)
    units = units_of("m", tokens, "harm", "token")
    x, y = unit_vectors(source, TAPS[0], "token")
    means = np.stack([x[y == c].mean(axis=0) for c in (0, 1)])
    found = class_moments("m", source, units, scatter=True)[TAPS[0]]
    close(found.covariance.numpy(), (x - means[y]).T @ (x - means[y]) / len(y), 1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("level", ["token", "response", "prompt"])
def test_read_outs_say_what_they_read(
    random: np.random.Generator, trainer: Any, level: Any
) -> None:
    pytest.importorskip("sklearn")
    source = make_source(random, make_tokens(random))
    read_outs = trainer(level=level).fit(source, HARM)
    assert [t for r in read_outs for t in r.taps] == list(TAPS)
    names = [probe.name for r in read_outs for probe in r.probes]
    assert len(set(names)) == len(names)
    for read_out in read_outs:
        first, *others = read_out.probes
        assert first.reads == ("prompt" if level == "prompt" else "response")
        assert first.evidence == (Mean(window=32) if level == "response" else Last())
        assert first.adds_to is None
        assert all(part.adds_to == first.name for part in others)
        assert {part.reads for part in others} <= {first.reads}
        vectors = {tap: unit_vectors(source, tap, level)[0] for tap in TAPS}
        labels = unit_vectors(source, TAPS[0], level)[1]
        found = logits(read_out, vectors)
        assert found[labels == 1].mean() > found[labels == 0].mean()


def test_labels_that_cannot_teach_are_refused(random: np.random.Generator) -> None:
    pytest.importorskip("sklearn")
    tokens = make_tokens(random)
    source = make_source(random, tokens)

    def fit(method: Any, task: Task = HARM, **changed: Any) -> None:
        method.fit(InMemory(dataclasses.replace(tokens, **changed), source._hidden), task)

    with pytest.raises(TrainingDataError, match="no hazard 'theft' in the labels; there are harm"):
        fit(MassMean(), Task("theft"))
    nothing = np.full_like(tokens.labels, -1)
    with pytest.raises(
        TrainingDataError,
        match=rf"lda: hazard 'harm': none of {len(nothing)} token labels is known; give examples",
    ):
        fit(LDA(), labels=nothing)
    known = (tokens.prompt_labels[:, 0] >= 0).sum()
    with pytest.raises(
        TrainingDataError,
        match=f"mass-mean: hazard 'harm': all {known} known prompt labels are 1; give prompts with",
    ):
        fit(MassMean(level="prompt"), prompt_labels=np.where(tokens.prompt_labels < 0, -1, 1))
    with pytest.raises(TrainingDataError, match=r"examples have no prompt token, first 'e\d+'"):
        fit(MassMean(level="prompt"), prompt_tokens=np.zeros_like(tokens.prompt_tokens))
    lengths = np.diff(tokens.starts).astype(np.int32)
    with pytest.raises(TrainingDataError, match=r"examples have no response token, first 'e\d+'"):
        fit(MassMean(level="response"), prompt_tokens=lengths)
    with pytest.raises(TrainingDataError, match="names no response label for refusal"):
        fit(HARC())
    with pytest.raises(TrainingDataError, match="none of 60 responses is harmful by"):
        fit(HARC(), BOTH, response_labels=np.abs(tokens.response_labels[:, [0, 0]]))
    with pytest.raises(TrainingDataError, match=r"examples have no instruction token"):
        fit(LatentGuard(), instruction_end=np.full_like(tokens.instruction_end, -1))
    refused = np.stack([tokens.prompt_labels[:, 0], 1 - tokens.prompt_labels[:, 0]], axis=1)
    with pytest.raises(TrainingDataError, match="none of 60 prompts that were refused and harm"):
        fit(LatentGuard(), BOTH, response_labels=np.where(tokens.prompt_labels < 0, -1, refused))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite_are_refused(
    random: np.random.Generator, trainer: Any, value: float
) -> None:
    tokens = make_tokens(random)
    source = make_source(random, tokens)
    row = int(random.choice(np.flatnonzero(tokens.labels[:, 0] >= 0)))
    source._hidden[TAPS[1]][row, 3] = value
    with pytest.raises(
        TrainingDataError,
        match=rf"{trainer.name}: 1 residuals at resid_mid.1 are not finite, first in example "
        rf"'e{tokens.example_of[row]}' at token {tokens.position[row]};",
    ):
        trainer().fit(source, HARM)


# ---- logistic regression -------------------------------------------------------------------------


def pipeline(x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(
        StandardScaler(), LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000)
    ).fit(x.astype(np.float32), y)


@pytest.mark.parametrize("level", ["token", "response", "prompt"])
def test_logistic_is_scikit_learns_at_every_tap(random: np.random.Generator, level: Any) -> None:
    pytest.importorskip("sklearn")
    source = make_source(random, make_tokens(random))
    method = Logistic(level=level, strength=0.3, balanced=True)
    for tap, read_out in zip(TAPS, method.fit(source, HARM), strict=True):
        x, y = unit_vectors(source, tap, level)
        close(logits(read_out, {tap: x}), pipeline(x, y).decision_function(x), 2e-3)


def test_joint_logistic_is_scikit_learns_on_all_taps_side_by_side(
    random: np.random.Generator,
) -> None:
    pytest.importorskip("sklearn")
    source = make_source(random, make_tokens(random))
    (read_out,) = JointLogistic(strength=0.3, balanced=True).fit(source, HARM)
    hidden = {tap: unit_vectors(source, tap, "token")[0] for tap in TAPS}
    y = unit_vectors(source, TAPS[0], "token")[1]
    x = np.concatenate([hidden[tap] for tap in TAPS], axis=1)
    close(logits(read_out, hidden), pipeline(x, y).decision_function(x), 2e-3)


# ---- mass-mean and LDA ---------------------------------------------------------------------------


def test_mass_mean_is_the_difference_of_the_means(random: np.random.Generator) -> None:
    source = make_source(random, make_tokens(random))
    for tap, read_out in zip(TAPS, MassMean().fit(source, HARM), strict=True):
        x, y = unit_vectors(source, tap, "token")
        m1, m0 = x[y == 1].mean(axis=0), x[y == 0].mean(axis=0)
        close(logits(read_out, {tap: x}), (x - (m1 + m0) / 2) @ (m1 - m0))


def test_mass_mean_iid_divides_by_the_covariance_within_the_classes(
    random: np.random.Generator,
) -> None:
    source = make_source(random, make_tokens(random))
    for tap, read_out in zip(TAPS, MassMeanIID().fit(source, HARM), strict=True):
        x, y = unit_vectors(source, tap, "token")
        m1, m0 = x[y == 1].mean(axis=0), x[y == 0].mean(axis=0)
        centred = np.concatenate([x[y == 1] - m1, x[y == 0] - m0])
        theta = np.linalg.inv(centred.T @ centred / len(x)) @ (m1 - m0)
        close(logits(read_out, {tap: x}), (x - (m1 + m0) / 2) @ theta, 1e-3)


def test_mass_mean_iid_bears_features_that_depend_on_each_other(
    random: np.random.Generator,
) -> None:
    source = make_source(random, make_tokens(random))
    plain = MassMeanIID().fit(source, HARM)
    doubled = {tap: torch.cat([h, h[:, :3]], dim=1) for tap, h in source._hidden.items()}
    again = MassMeanIID().fit(InMemory(source.tokens, doubled), HARM)
    for one, two, tap in zip(plain, again, TAPS, strict=True):
        x, y = doubled[tap].double().numpy(), all_hidden(source)[tap]
        close(logits(two, {tap: x}), logits(one, {tap: y}), 1e-2)


def gaussians(random: np.random.Generator, share: float) -> tuple[InMemory, np.ndarray, float]:
    """Two Gaussian classes with the weight and bias of their log-odds, at one tap."""
    rows, width = 60_000, 6
    starts = np.arange(0, rows + 1, 100)
    tokens = make_tokens(
        random,
        examples=len(starts) - 1,
        starts=starts,
        prompt_tokens=np.zeros(len(starts) - 1, dtype=np.int32),
        labels=(random.random((rows, 2)) < share).astype(np.int8),
    )
    mix = rotation(random, width) * np.exp(random.uniform(-1, 1, width))
    mean, step = random.normal(size=width), mix.T @ random.normal(size=width) / 2
    harm = tokens.labels[:, :1]
    x = random.normal(size=(rows, width)) @ mix + mean + harm * step
    weight = np.linalg.solve(mix.T @ mix, step)
    bias = np.log(share / (1 - share)) - weight @ (mean + step / 2)
    return InMemory(tokens, {TAPS[0]: torch.from_numpy(x).float()}), weight, float(bias)


def test_lda_finds_the_log_odds_of_two_gaussians() -> None:
    # an estimate, whose error depends on how far apart the two are drawn
    source, weight, bias = gaussians(np.random.default_rng(1), share=0.2)
    (read_out,) = LDA().fit(source, HARM)
    x = all_hidden(source)[TAPS[0]]
    bayes = x @ weight + bias
    found = logits(read_out, {TAPS[0]: x})
    assert np.abs(found - bayes).mean() < 0.06  # sampling error of 60,000 rows, some 0.02
    (iid,) = MassMeanIID().fit(source, HARM)
    assert cosine(iid.probes[0].weight, weight) > 0.995
    assert cosine(read_out.probes[0].weight, weight) > 0.995


def test_lda_is_scikit_learns_with_the_shrinkage_of_ledoit_and_wolf(
    random: np.random.Generator,
) -> None:
    pytest.importorskip("sklearn")
    from sklearn.covariance import ledoit_wolf_shrinkage
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    source = make_source(random, make_tokens(random, examples=40))
    method = LDA(level="response")
    for tap, read_out in zip(TAPS, method.fit(source, HARM), strict=True):
        x, y = unit_vectors(source, tap, "response")
        means = np.stack([x[y == c].mean(axis=0) for c in (0, 1)])
        scale = (x - means[y]).std(axis=0)
        amount = ledoit_wolf_shrinkage((x - means[y]) / scale, assume_centered=True)
        assert 0.01 < amount <= 1
        assert read_out.facts["shrinkage"] == pytest.approx(amount, rel=1e-4)
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=amount).fit(x / scale, y)
        close(logits(read_out, {tap: x}), reference.decision_function(x / scale), 1e-3)


def test_shrinkage_is_ledoit_and_wolfs_for_any_rows(random: np.random.Generator) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    for rows, width in ((5, 20), (50, 10), (500, 3)):
        x = random.normal(size=(rows, width)) @ random.normal(size=(width, width))
        fourth = float(((x**2).sum(axis=1) ** 2).sum())
        expected = covariance.ledoit_wolf_shrinkage(x, assume_centered=True)
        assert shrinkage(torch.from_numpy(x.T @ x / rows), fourth, rows) == pytest.approx(expected)
    assert shrinkage(torch.eye(4, dtype=torch.float64), 10.0, 10) == 1.0


def test_lda_bears_a_constant_feature(random: np.random.Generator) -> None:
    source = make_source(random, make_tokens(random))
    before = LDA().fit(source, HARM)
    assert all(torch.isfinite(r.probes[0].weight).all() for r in before)
    for hidden in source._hidden.values():
        hidden[:, 2] = 0.1
    for read_out in LDA().fit(source, HARM):
        assert float(read_out.probes[0].weight[2]) == pytest.approx(0, abs=1e-6)


# ---- CCS -----------------------------------------------------------------------------------------


def contrast_tokens(
    random: np.random.Generator, statements: int, polar: bool
) -> tuple[Tokens, np.ndarray]:
    """Texts in random order, and whether the statement of each is harmful."""
    polarities = (0, 1) if polar else (0,)
    rows = np.array(
        [(pair, neg, yes) for pair in range(statements) for neg in polarities for yes in (0, 1)]
    )
    rows = random.permutation(rows).astype(np.int32)
    harmful_pair = np.arange(statements) % 2
    harmful = harmful_pair[rows[:, 0]] ^ rows[:, 1]
    labels = np.stack([harmful, np.zeros_like(harmful)], axis=1).astype(np.int8)
    tokens = make_tokens(random, examples=len(rows), contrast=rows, response_labels=labels)
    # A special token closes every third text, as encoders have it.
    tokens.special[
        tokens.starts[1:][np.diff(tokens.starts) > tokens.prompt_tokens + 1][::3] - 1
    ] = True
    return tokens, harmful


def last_rows(tokens: Tokens) -> np.ndarray:
    """The last token of each text that is not a special one."""
    return tokens.starts[1:] - 1 - tokens.special[tokens.starts[1:] - 1]


def contrast_source(
    random: np.random.Generator, statements: int = 60, polar: bool = True, width: int = 8
) -> InMemory:
    """The last token knows whether its text is true, and which word it ends in."""
    tokens, harmful = contrast_tokens(random, statements, polar)
    yes = tokens.contrast[:, 2]
    true = 2.0 * (harmful == yes) - 1
    topic = random.normal(size=(statements, width))[tokens.contrast[:, 0]]
    hidden = {}
    for tap in TAPS:
        rows = random.normal(size=(int(tokens.starts[-1]), width))
        axis, word = np.linalg.qr(random.normal(size=(width, 2)))[0].T
        last = 10 + 0.3 * topic + 0.2 * random.normal(size=topic.shape)
        last += 2 * true[:, None] * axis + 4 * (yes[:, None] - 0.5) * word
        rows[last_rows(tokens)] = last
        hidden[tap] = torch.from_numpy(rows).float()
    return Shuffled(tokens, hidden, chunk_bytes=4 * width * len(TAPS) * 300)


def contrast_sides(source: InMemory, tap: Tap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """No rows, yes rows and labels of the yes, in order of pair and polarity."""
    tokens = source.tokens
    last = all_hidden(source)[tap][last_rows(tokens)]
    order = np.lexsort((tokens.contrast[:, 1], tokens.contrast[:, 0]))
    no, yes = (order[tokens.contrast[order, 2] == side] for side in (0, 1))
    return last[no], last[yes], tokens.response_labels[yes, 0]


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def ccs_by_hand(
    no: np.ndarray,
    yes: np.ndarray,
    labels: np.ndarray,
    supervision: float,
    w: np.ndarray,
    b: float,
    epochs: int,
) -> tuple[np.ndarray, float, float]:
    """AdamW (learning rate 0.015, decay 0.01) on the paper's loss, gradients by hand, in fp64."""
    known = labels >= 0
    x0, x1 = no - no.mean(axis=0), yes - yes.mean(axis=0)
    theta = np.append(w, b).astype(float)
    first, second = np.zeros_like(theta), np.zeros_like(theta)

    def loss_and_gradient() -> tuple[float, np.ndarray]:
        p0, p1 = sigmoid(x0 @ theta[:-1] + theta[-1]), sigmoid(x1 @ theta[:-1] + theta[-1])
        lower = np.minimum(p0, p1)
        loss = (lower**2).mean() + ((p0 - (1 - p1)) ** 2).mean()
        of_p0 = 2 * (p0 + p1 - 1) + 2 * lower * (p0 < p1)
        of_p1 = 2 * (p0 + p1 - 1) + 2 * lower * (p1 < p0)
        said = (p1 + 1 - p0) / 2
        surprise = np.where(labels == 1, -np.log(said), -np.log(1 - said))
        loss += supervision * surprise[known].mean()
        push = supervision * known * (said - labels) / (said * (1 - said)) / 2
        of_p0, of_p1 = (of - way * push / known.mean() for of, way in ((of_p0, 1), (of_p1, -1)))
        g0, g1 = of_p0 * p0 * (1 - p0) / len(p0), of_p1 * p1 * (1 - p1) / len(p1)
        return loss, np.append(g0 @ x0 + g1 @ x1, g0.sum() + g1.sum())

    for step in range(1, epochs + 1):
        _, gradient = loss_and_gradient()
        theta *= 1 - 0.015 * 0.01
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        theta -= 0.015 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return theta[:-1], float(theta[-1]), loss_and_gradient()[0]


@pytest.mark.parametrize("supervision", [0.0, 0.7])
def test_ccs_is_the_best_of_restarts_that_were_trained_alone(
    random: np.random.Generator, supervision: float
) -> None:
    source = contrast_source(random, statements=20)
    source.tokens.response_labels[random.permutation(80)[:30]] = -1
    seed, restarts, epochs, width = int(random.integers(1000)), 4, 40, source.width
    draws = torch.Generator().manual_seed(seed)
    w = torch.empty(len(TAPS), width, restarts).uniform_(-1, 1, generator=draws) / width**0.5
    b = torch.empty(len(TAPS), 1, restarts).uniform_(-1, 1, generator=draws) / width**0.5
    method = CCS(epochs=epochs, restarts=restarts, supervision=supervision)
    found = method.fit(source, Task("harm", seed=seed))
    for index, (tap, read_out) in enumerate(zip(TAPS, found, strict=True)):
        no, yes, labels = contrast_sides(source, tap)
        trained = [
            ccs_by_hand(
                *(no, yes, labels, supervision),
                *(w[index, :, r].double().numpy(), float(b[index, 0, r]), epochs),
            )
            for r in range(restarts)
        ]
        weight, bias, loss = min(trained, key=lambda one: one[2])
        assert read_out.facts["loss"] == pytest.approx(loss, rel=1e-3)
        p0 = sigmoid((no - no.mean(axis=0)) @ weight + bias)
        p1 = sigmoid((yes - yes.mean(axis=0)) @ weight + bias)
        accuracy = ((0.5 * (p1 + 1 - p0) > 0.5) == labels)[labels >= 0].mean()
        sign = 1 if accuracy >= 0.5 else -1
        assert read_out.facts["accuracy"] == pytest.approx(max(accuracy, 1 - accuracy))
        middle = (no.mean(axis=0) + yes.mean(axis=0)) / 2
        close(logits(read_out, {tap: yes}), sign * ((yes - middle) @ weight + bias), 2e-3)
        offset = sign * weight @ (yes.mean(axis=0) - middle)
        assert read_out.facts["answer_offset"] == pytest.approx(offset, abs=2e-3)


@pytest.mark.parametrize("harm_is", [0, 1])
def test_ccs_finds_what_is_true_and_labels_give_the_sign(harm_is: int) -> None:
    random = np.random.default_rng(2)  # a descent, which need not find it in every draw
    source = contrast_source(random)
    labels = source.tokens.response_labels
    labels[:, 0] ^= 1 - harm_is
    sign_only = labels.copy()
    hidden_labels = random.permutation(len(labels))[:-40]
    sign_only[hidden_labels] = -1
    for told in (labels, sign_only):
        tokens = dataclasses.replace(source.tokens, response_labels=told)
        for tap, read_out in zip(
            TAPS, CCS(epochs=400).fit(InMemory(tokens, source._hidden), HARM), strict=True
        ):
            no, yes, truth = contrast_sides(source, tap)
            no, yes = no - no.mean(axis=0), yes - yes.mean(axis=0)
            weight = read_out.probes[0].weight.double().numpy()
            assert (((yes - no) @ weight > 0) == truth).mean() > 0.95
            assert read_out.facts["accuracy"] > 0.95
            assert read_out.probes[0].reads == "response"


def test_ccs_without_labels_warns_and_leaves_the_sign(random: np.random.Generator) -> None:
    source = contrast_source(random, statements=20)
    with_labels = CCS(epochs=100).fit(source, HARM)
    source.tokens.response_labels[:] = -1
    with pytest.warns(UserWarning, match="the sign is not known"):
        without = CCS(epochs=100).fit(source, HARM)
    for one, two in zip(with_labels, without, strict=True):
        assert two.facts["labelled_pairs"] == 0
        assert "accuracy" not in two.facts
        assert abs(cosine(one.probes[0].weight, two.probes[0].weight)) == pytest.approx(1)
    with pytest.raises(TrainingDataError, match="no yes text has a response label to supervise"):
        CCS(supervision=1.0).fit(source, HARM)


def test_supervision_turns_ccs_to_the_labels() -> None:
    """Two things are consistent; the labels speak of the weaker."""
    random = np.random.default_rng(3)  # as above
    source = contrast_source(random, statements=100, polar=False)
    tokens, yes = source.tokens, source.tokens.contrast[:, 2]
    other = random.integers(0, 2, 100)[tokens.contrast[:, 0]]
    for hidden in source._hidden.values():
        along = np.zeros(source.width)
        along[0] = 0.7
        hidden[last_rows(tokens)] += torch.from_numpy(
            np.outer(2.0 * (other == yes) - 1, along)
        ).float()
    tokens.response_labels[:, 0] = other
    alone = CCS(epochs=400).fit(source, HARM)
    helped = CCS(epochs=400, supervision=1.0).fit(source, HARM)
    for one, two in zip(alone, helped, strict=True):
        assert two.facts["accuracy"] > max(0.9, one.facts["accuracy"])


def test_polar_indices_of_values_worked_out_by_hand() -> None:
    # A yes, A no, not-A yes, not-A no -> consistency, contradiction
    cases = [
        ((1.0, 0.0, 0.0, 1.0), 0.0, 0.0),
        ((0.9, 0.2, 0.3, 0.6), 0.05, 0.27 + 0.12),
        ((0.4, 0.3, 0.8, 0.1), 0.17, 0.32 + 0.03),
        ((0.4, 0.3, 0.8, 0.6), -0.145, 0.32 + 0.18),
        ((1.0, 1.0, 1.0, 1.0), 0.0, 2.0),
    ]
    answers = torch.tensor([case[0] for case in cases], dtype=torch.float64).T
    assert polar_consistency(*answers).tolist() == pytest.approx([case[1] for case in cases])
    assert contradiction_index(*answers).tolist() == pytest.approx([case[2] for case in cases])


@pytest.mark.parametrize("harm_is", [0, 1])
def test_pa_ccs_reports_the_indices_of_its_own_answers(seed: int, harm_is: int) -> None:
    # The same data twice, so that the sign of each tap is turned once.
    source = contrast_source(np.random.default_rng(seed), statements=20)
    source.tokens.response_labels[:, 0] ^= 1 - harm_is
    for tap, read_out in zip(TAPS, PolarityAwareCCS(epochs=60).fit(source, HARM), strict=True):
        no, yes, _ = contrast_sides(source, tap)
        offset = read_out.facts["answer_offset"]
        p0 = sigmoid(logits(read_out, {tap: no}) + offset)
        p1 = sigmoid(logits(read_out, {tap: yes}) - offset)
        a1, n1, a0, n0 = p1[::2], p1[1::2], p0[::2], p0[1::2]
        consistency = 0.5 * ((a1 - n0) ** 2 + (a0 - n1) ** 2) * np.sign(a1 - n1) * np.sign(n0 - a0)
        assert read_out.facts["polar_consistency"] == pytest.approx(consistency.mean(), abs=1e-5)
        assert read_out.facts["contradiction_index"] == pytest.approx(
            (a1 * n1 + a0 * n0).mean(), abs=1e-5
        )
        assert read_out.probes[0].name == f"harm pa-ccs {tap}"


def test_contrast_pairs_that_are_not_whole_are_refused(random: np.random.Generator) -> None:
    source = contrast_source(random, statements=10)
    everything = np.arange(len(source.tokens))
    with pytest.raises(TrainingDataError, match=r"one yes and one no, found \[[01]\] in examples"):
        CCS().fit(source.select(everything[1:]), HARM)
    asserted = everything[source.tokens.contrast[:, 1] == 0]
    with pytest.raises(TrainingDataError, match="pa-ccs: 10 of 10 statements have no opposite"):
        PolarityAwareCCS().fit(source.select(asserted), HARM)
    with pytest.raises(TrainingDataError, match="ccs: 0 contrast pairs in 60 examples"):
        CCS().fit(make_source(random, make_tokens(random)), HARM)
    source.tokens.prompt_tokens[3] = np.diff(source.tokens.starts)[3]
    with pytest.raises(TrainingDataError, match="1 of 40 contrast texts end in the prompt"):
        CCS().fit(source, HARM)


# ---- Latent Guard --------------------------------------------------------------------------------


def at(tokens: Tokens, positions: np.ndarray, examples: np.ndarray) -> np.ndarray:
    return (tokens.starts[:-1] + positions)[examples]


@pytest.mark.parametrize("task", [HARM, BOTH])
def test_latent_guard_is_the_mean_of_literal_cosines(
    random: np.random.Generator, task: Task
) -> None:
    pytest.importorskip("sklearn")
    source = make_source(random, make_tokens(random, examples=90))
    tokens, hidden = source.tokens, all_hidden(source)
    guard, *directions = LatentGuard().fit(source, task)
    harm, refused = tokens.prompt_labels[:, 0], tokens.response_labels[:, 1]
    if task.refusal:
        bad = np.flatnonzero((harm == 1) & (refused == 1))
        good = np.flatnonzero((harm == 0) & (refused == 0))
    else:
        bad, good = np.flatnonzero(harm == 1), np.flatnonzero(harm == 0)
    known = np.flatnonzero(harm >= 0)

    difference = np.zeros(len(hidden[TAPS[0]]))
    for tap in TAPS:
        h = hidden[tap]
        c1 = h[at(tokens, tokens.instruction_end, bad)].mean(axis=0)
        c0 = h[at(tokens, tokens.instruction_end, good)].mean(axis=0)
        difference += [(cosine(row, c1) - cosine(row, c0)) / len(TAPS) for row in h]
    close(logits(guard, hidden), difference, 1e-4)
    assert {(p.norm, p.reads) for p in guard.probes} == {("rms", "prompt")}
    assert [p.adds_to for p in guard.probes] == [None, guard.probes[0].name, guard.probes[0].name]

    def accuracy(scores: np.ndarray, positions: np.ndarray) -> float:
        said = scores[at(tokens, positions, known)] > 0
        truth = harm[known] == 1
        return float((said[truth].mean() + (~said[~truth]).mean()) / 2)

    def auroc(scores: np.ndarray, positions: np.ndarray) -> float:
        found = scores[at(tokens, positions, known)]
        above = found[harm[known] == 1][:, None] - found[harm[known] == 0]
        return float((above > 0).mean() + 0.5 * (above == 0).mean())

    for read_out, scores in [(guard, difference)] + [(r, logits(r, hidden)) for r in directions]:
        facts = read_out.facts
        assert facts["accuracy_instruction"] == pytest.approx(
            accuracy(scores, tokens.instruction_end)
        )
        assert facts["accuracy_served"] == pytest.approx(accuracy(scores, tokens.prompt_tokens - 1))
        # fp32 may swap a pair or two of the thousand
        assert facts["auroc_instruction"] == pytest.approx(
            auroc(scores, tokens.instruction_end), abs=3e-3
        )
        assert facts["auroc_served"] == pytest.approx(
            auroc(scores, tokens.prompt_tokens - 1), abs=3e-3
        )
        gap = (tokens.prompt_tokens - 1 - tokens.instruction_end)[known].mean()
        assert facts["template_tokens"] == pytest.approx(gap)

    assert [(r.method, r.taps) for r in directions] == [
        (f"latent-guard-{kind}", (tap,)) for tap in TAPS for kind in ("harmfulness", "refusal")
    ]
    for read_out in directions:
        (probe,) = read_out.probes
        refusal = read_out.method.endswith("refusal")
        positions = tokens.prompt_tokens - 1 if refusal else tokens.instruction_end
        h = hidden[probe.tap]
        m1 = h[at(tokens, positions, bad)].mean(axis=0)
        m0 = h[at(tokens, positions, good)].mean(axis=0)
        close(logits(read_out, hidden), (h - (m1 + m0) / 2) @ (m1 - m0))
        assert probe.reads == "prompt"
        assert probe.hazard == (task.refusal if refusal and task.refusal else "harm")


# ---- HARC ----------------------------------------------------------------------------------------


def test_harc_scores_layers_by_the_formula_and_reads_the_best(
    random: np.random.Generator,
) -> None:
    source = make_source(random, make_tokens(random, examples=90))
    tokens, hidden = source.tokens, all_hidden(source)
    harm_prompt = tokens.prompt_labels[:, 0]
    bad, benign = np.flatnonzero(harm_prompt == 1), np.flatnonzero(harm_prompt == 0)
    harm, refusal = tokens.response_labels.T
    helpful = np.flatnonzero((harm == 0) & (refusal == 0))
    harmful = np.flatnonzero((harm == 1) & (refusal != 1))
    refusing = np.flatnonzero((refusal == 1) & (harm != 1))

    def pooled(tap: Tap, examples: Sequence[int]) -> np.ndarray:
        rows = []
        for e in examples:
            begin = tokens.starts[e] + tokens.prompt_tokens[e]
            rows.append(hidden[tap][begin : min(begin + 32, tokens.starts[e + 1])].mean(axis=0))
        return np.array(rows)

    expected = {}
    for tap in TAPS:
        h = hidden[tap]
        v_harm, v_ref = (
            h[at(tokens, place, bad)].mean(axis=0) - h[at(tokens, place, benign)].mean(axis=0)
            for place in (tokens.instruction_end, tokens.prompt_tokens - 1)
        )
        v_harm_resp, v_ref_resp = (
            pooled(tap, group).mean(axis=0) - pooled(tap, helpful).mean(axis=0)
            for group in (harmful, refusing)
        )
        expected[tap] = (
            (1 - abs(cosine(v_ref, v_harm)))
            * (1 - abs(cosine(v_ref_resp, v_harm_resp)))
            * abs(cosine(v_harm, v_harm_resp))
            * abs(cosine(v_ref, v_ref_resp))
        )
    harc, harc_refusal = HARC().fit(source, BOTH)
    for read_out, group, hazard in ((harc, harmful, "harm"), (harc_refusal, refusing, "refusal")):
        assert read_out.facts == pytest.approx(
            {f"score {tap}": score for tap, score in expected.items()}, rel=1e-3
        )
        assert read_out.taps == tuple(sorted(sorted(TAPS, key=lambda tap: -expected[tap])[:2]))
        first, other = read_out.probes
        assert (first.hazard, first.evidence, first.reads) == (hazard, Mean(window=32), "response")
        assert (first.adds_to, other.adds_to) == (None, first.name)
        for examples, value in ((group, 0.5), (helpful, -0.5)):
            found = logits(read_out, {tap: pooled(tap, examples) for tap in TAPS})
            assert found.mean() == pytest.approx(value, abs=1e-3)
        for probe in read_out.probes:
            step = pooled(probe.tap, group).mean(axis=0) - pooled(probe.tap, helpful).mean(axis=0)
            assert cosine(probe.weight, step) == pytest.approx(1)


def test_harc_leaves_out_taps_where_a_direction_vanishes(random: np.random.Generator) -> None:
    """After a template the embedding of the last prompt token is the same in every prompt."""
    source = make_source(random, make_tokens(random))
    end = source.tokens.starts[:-1] + source.tokens.prompt_tokens - 1
    for tap in TAPS[:2]:
        source._hidden[tap][end] = 1.0
    harc, _ = HARC().fit(source, BOTH)
    assert harc.taps == TAPS[2:]
    assert harc.facts[f"score {TAPS[0]}"] == 0
    source._hidden[TAPS[2]][end] = 1.0
    with pytest.raises(TrainingDataError, match=r"the layer score is 0 at all of resid_post\.0, "):
        HARC().fit(source, BOTH)


def test_tensor_logits_agree_with_those_in_double(random: np.random.Generator) -> None:
    pytest.importorskip("sklearn")
    source = make_source(random, make_tokens(random, examples=40))
    hidden: dict[Tap, Tensor] = source._hidden
    for read_out in (*LatentGuard().fit(source, BOTH), *HARC().fit(source, BOTH)):
        close(read_out.logits(hidden).double().numpy(), logits(read_out, all_hidden(source)), 1e-3)
