"""What is collected is what the model computed, and what is fitted is what scikit-learn fitted."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import toy

from midstream.evidence import Last, Max
from midstream.learn.collect import residuals
from midstream.learn.methods.logistic import fit_logistic
from midstream.probe import Probe
from midstream.taps import Tap

TAPS = [Tap(0, "resid_pre"), Tap(0, "resid_post"), Tap(1, "resid_post")]
SEQUENCES = [[1, 9, 8, 7, 6, 5], [1, 5], [1, 6, 7], [1], [1, 9, 8, 4, 4, 4, 4], [1, 7]]


def expected(sequence: list[int]) -> list[np.ndarray]:
    """Of `TAPS`, from ``output_hidden_states``; the last is compared after the final norm."""
    with torch.inference_mode():
        states = toy.model()(torch.tensor([sequence]), output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


def compare(rows: dict[Tap, np.ndarray], sequence: list[int], tolerance: float) -> None:
    with torch.inference_mode():
        normed = toy.model().model.norm(torch.from_numpy(rows[TAPS[2]])).numpy()
    found = [rows[TAPS[0]], rows[TAPS[1]], normed]
    for mine, theirs in zip(found, expected(sequence), strict=True):
        assert mine.dtype == np.float32
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= tolerance


def test_one_sequence_equals_output_hidden_states_exactly() -> None:
    for sequence in SEQUENCES:
        found = residuals(toy.model(), [sequence], TAPS)
        compare({tap: rows[0] for tap, rows in found.items()}, sequence, 0.0)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_padding_and_sorting_change_neither_values_nor_order(batch_size: int) -> None:
    found = residuals(toy.model(), SEQUENCES, TAPS, batch_size=batch_size)
    assert list(found) == TAPS
    for index, sequence in enumerate(SEQUENCES):
        compare({tap: found[tap][index] for tap in TAPS}, sequence, 2e-6)


def test_collecting_reports_progress_and_leaves_no_hooks() -> None:
    seen: list[tuple[int, int]] = []
    model = toy.new_model()
    residuals(
        model,
        SEQUENCES,
        TAPS,
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 6), (6, 6)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert residuals(model, [], TAPS) == {tap: [] for tap in TAPS}


# ---- logistic regression -------------------------------------------------------------------------


def data(rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different scale and offset, labels that depend on them."""
    random = np.random.default_rng(seed)
    unit = random.normal(size=(rows, 6))
    noise = random.normal(size=rows)
    labels = unit @ [1.0, -1.0, 0.5, 0.0, 2.0, 0.0] + noise > 0.7
    hidden = unit * [1e-2, 1.0, 50.0, 1.0, 3.0, 1.0] + [0.0, 5.0, -300.0, 0.0, 40.0, 0.0]
    hidden[:, 5] = 0.1  # tells nothing
    return hidden.astype(np.float32), labels


def logits(probe: Probe, hidden: np.ndarray) -> np.ndarray:
    return hidden.astype(np.float64) @ probe.weight.double().numpy() + probe.bias


@pytest.mark.parametrize("balanced", [False, True])
def test_the_folded_probe_is_the_pipeline(balanced: bool) -> None:
    sklearn = pytest.importorskip("sklearn.pipeline")
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    hidden, labels = data()
    reference = sklearn.make_pipeline(
        StandardScaler(),
        LogisticRegression(C=0.3, max_iter=1000, class_weight="balanced" if balanced else None),
    ).fit(hidden, labels)
    probe = fit_logistic("p", "harm", TAPS[0], hidden, labels, strength=0.3, balanced=balanced)
    fresh, _ = data(seed=1)
    assert logits(probe, fresh) == pytest.approx(reference.decision_function(fresh), abs=2e-4)
    accuracy = ((logits(probe, fresh) > 0) == data(seed=1)[1]).mean()
    assert accuracy > 0.8


def test_a_far_offset_does_not_spoil_the_fit() -> None:
    """Sums of many fp32 rows lose what the mean needs; the moments are taken in fp64."""
    random = np.random.default_rng(2)
    signal = random.normal(size=200_000).astype(np.float32)
    hidden = np.stack([signal + 3000, np.ones_like(signal)], axis=1)
    labels = signal + 0.5 * random.normal(size=len(signal)) > 1
    probe = fit_logistic("p", "harm", TAPS[0], hidden, labels)
    assert logits(probe, np.array([[3001.0, 1.0]])) == pytest.approx(0, abs=0.05)
    predicted = 1 / (1 + np.exp(-logits(probe, hidden)))
    assert predicted.mean() == pytest.approx(labels.mean(), abs=2e-3)  # as the intercept demands


def test_strength_and_fields_reach_the_probe() -> None:
    hidden, labels = data()
    weak = fit_logistic("p", "harm", TAPS[1], hidden, labels, strength=1e-4)
    strong = fit_logistic(
        "q", "harm", TAPS[1], hidden, labels, strength=100.0, reads="prompt", evidence=Max()
    )
    assert logits(weak, hidden).std() < 0.2 * logits(strong, hidden).std()
    assert (weak.name, weak.hazard, weak.tap, weak.reads) == ("p", "harm", TAPS[1], "response")
    assert (strong.name, strong.reads) == ("q", "prompt")
    assert isinstance(weak.evidence, Last)
    assert isinstance(strong.evidence, Max)


@pytest.mark.parametrize("value", [False, True])
def test_labels_that_are_all_the_same_are_refused(value: bool) -> None:
    hidden, _ = data()
    with pytest.raises(ValueError, match=rf"probe 'p': all 400 labels are {value}"):
        fit_logistic("p", "harm", TAPS[0], hidden, np.full(400, value))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"midstream\[learn\]"):
        fit_logistic("p", "harm", TAPS[0], *data())
