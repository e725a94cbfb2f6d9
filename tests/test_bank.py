"""Probes, their evidence rules, and the bank that lays them out in columns."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from midstream.bank import BankSpec, Probe, ProbeBank
from midstream.evidence import Count, Cusum, Ema, Evidence, Last, Max, Mean, Run
from midstream.kernels import reference
from midstream.kernels.tables import Phase, Rule
from midstream.taps import SITES, Tap

WIDTH = 5
HERE = Tap(3, "resid_post")
NAMES = "zyxwvuts"  # not in the order of the alphabet


def probe(name: str = "lies", **changes: Any) -> Probe:
    fields: dict[str, Any] = {"hazard": "deceit", "tap": HERE, "weight": torch.arange(1.0, 6.0)}
    return Probe(name, **{**fields, **changes})


# ---------------------------------------------------------------------------------- evidence

floats = st.floats(-1e6, 1e6)
tokens = st.integers(1, 1 << 24)
rules = st.one_of(
    st.just(Last()),
    st.just(Max()),
    st.builds(Ema, alpha=st.floats(1e-6, 1.0)),
    st.builds(Mean, window=tokens),
    st.builds(Cusum, kappa=floats, alarm=st.floats(1e-6, 1e6)),
    st.builds(Count, theta=floats, k=tokens),
    st.builds(Run, theta=floats, k=tokens),
)


@given(rule=rules)
def test_a_rule_survives_json_bit_for_bit(rule: Evidence) -> None:
    adapter: TypeAdapter[Evidence] = TypeAdapter(Evidence)
    assert adapter.validate_json(adapter.dump_json(rule)) == rule


@pytest.mark.parametrize(
    ("rule", "code", "parameter", "window", "center"),
    [
        (Last(), Rule.LAST, 0.0, 1, 0.0),
        (Ema(alpha=0.25), Rule.EMA, 0.25, 1, 0.0),
        (Ema(alpha=1.0), Rule.EMA, 1.0, 1, 0.0),
        (Mean(window=8), Rule.MEAN, 0.0, 8, 0.0),
        (Cusum(kappa=-0.5, alarm=4.0), Rule.CUSUM, -0.5, 1, 4.0),
        (Count(theta=1.5, k=3), Rule.COUNT, 1.5, 1, 2.5),
        (Run(theta=1.5, k=1), Rule.RUN, 1.5, 1, 0.5),
        (Max(), Rule.MAX, 0.0, 1, 0.0),
    ],
)
def test_the_table_of_a_rule(
    rule: Evidence, code: Rule, parameter: float, window: int, center: float
) -> None:
    table = ProbeBank([probe(evidence=rule)]).evidence_table()
    assert [tensor.dtype for tensor in table.tensors()] == [
        torch.int32,
        torch.float32,
        torch.int32,
        torch.float32,
        torch.int32,
    ]
    assert [tensor.tolist() for tensor in table.tensors()] == [
        [code],
        [parameter],
        [window],
        [center],
        [Phase.RESPONSE],
    ]


def test_there_is_a_class_for_every_rule_of_the_kernels() -> None:
    assert {rule.code for rule in (Last, Ema, Mean, Cusum, Count, Run, Max)} == set(Rule)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"rule": "ema", "alpha": 0.0}, "alpha"),
        ({"rule": "ema", "alpha": 1e-60}, "alpha"),  # 0 in fp32
        ({"rule": "ema", "alpha": 1.01}, "alpha"),
        ({"rule": "ema", "alpha": math.nan}, "alpha"),
        ({"rule": "ema"}, "alpha"),
        ({"rule": "ema", "alpha": "0.5"}, "alpha"),
        ({"rule": "mean", "window": 0}, "window"),
        ({"rule": "mean", "window": 2.5}, "window"),
        ({"rule": "mean", "window": True}, "window"),
        ({"rule": "cusum", "kappa": math.inf, "alarm": 1.0}, "kappa"),
        ({"rule": "cusum", "kappa": 1e39, "alarm": 1.0}, "kappa"),  # infinite in fp32
        ({"rule": "cusum", "kappa": 0.0, "alarm": 0.0}, "alarm"),
        ({"rule": "cusum", "kappa": 0.0, "alarm": math.nan}, "alarm"),
        ({"rule": "count", "theta": math.nan, "k": 1}, "theta"),
        ({"rule": "count", "theta": 0.0, "k": 0}, "k"),
        ({"rule": "run", "theta": 0.0, "k": (1 << 24) + 1}, "k"),  # fp32 cannot count that far
        ({"rule": "run", "theta": 0.0, "k": 1, "window": 3}, "window"),
        ({"rule": "last", "alpha": 0.5}, "alpha"),
        ({"rule": "median"}, "rule"),
        ({"alpha": 0.5}, "rule"),
    ],
)
def test_a_bad_rule_is_refused_by_its_key(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(Evidence).validate_python(given)
    assert len(refusal.value.errors()) == 1
    assert key in str(refusal.value)


# ------------------------------------------------------------------------------------ probes


def test_a_probe_keeps_its_own_fp32_copy() -> None:
    original = torch.ones(WIDTH, requires_grad=True)
    kept = probe(weight=original, bias=0.1)
    with torch.no_grad():
        original.zero_()
    assert kept.weight.tolist() == [1.0] * WIDTH
    assert not kept.weight.requires_grad
    assert kept.bias == float(np.float32(0.1))
    assert probe(weight=torch.ones(WIDTH, dtype=torch.float64)).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": ""}, "name"),
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"hazard": ""}, "hazard"),
        ({"weight": torch.ones(1, WIDTH)}, "weight"),
        ({"weight": torch.ones(())}, "weight"),
        ({"weight": torch.ones(0)}, "weight"),
        ({"weight": torch.ones(WIDTH, dtype=torch.int32)}, "weight"),
        ({"weight": torch.tensor([1.0, math.nan])}, "weight"),
        ({"weight": torch.tensor([1.0, -math.inf])}, "weight"),
        ({"weight": torch.tensor([1.0, 1e39], dtype=torch.float64)}, "weight"),
        ({"bias": math.nan}, "bias"),
        ({"bias": 1e39}, "bias"),
        ({"eps": -1e-6}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"eps": math.inf}, "eps"),
        ({"norm": "layer"}, "norm"),
        ({"reads": "both"}, "reads"),
    ],
)
def test_a_bad_probe_is_refused_by_its_name_and_key(changes: dict[str, Any], key: str) -> None:
    name = changes.get("name", "lies")
    with pytest.raises(ValueError, match=f"^probe {name!r}: {key}: ".replace("\\", "\\\\")):
        probe(**{"name": name, **changes})


@pytest.mark.parametrize("norm", ["none", "rms"])
@given(
    seed=st.integers(0, 2**32 - 1),
    slope=st.floats(-4, 4, width=16),
    intercept=st.floats(-4, 4, width=16),
)
def test_folding_gives_what_the_pipeline_gives(
    norm: str, seed: int, slope: float, intercept: float
) -> None:
    """Against scaler, linear model and calibration one after the other in fp64."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(3.0, 10.0, (7, WIDTH))
    coefficients, bias = draw.normal(size=WIDTH), draw.normal()
    mean, scale = draw.normal(size=WIDTH), draw.uniform(0.1, 5.0, WIDTH)

    phi = hidden
    if norm == "rms":
        phi = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-5)
    decision = (phi - mean) / scale @ coefficients + bias
    expected = slope * decision + intercept

    folded = Probe.folded(
        "lies",
        "deceit",
        HERE,
        coefficients,
        bias,
        mean=mean,
        scale=scale,
        slope=slope,
        intercept=intercept,
        norm=norm,  # type: ignore[arg-type]
        eps=1e-5,
    )
    got = phi @ folded.weight.double().numpy() + folded.bias
    # Every term is rounded to fp32 once: half an ulp of each, plus half an ulp of the bias.
    terms = np.abs(phi) @ np.abs(slope * coefficients / scale) + abs(folded.bias)
    assert (np.abs(got - expected) <= 2.0**-24 * terms * 1.01).all()

    out = torch.empty(7, 1)
    rows = torch.tensor(hidden, dtype=torch.float32)
    weight, offset = folded.weight[None], torch.tensor([folded.bias])
    reference.score(rows, weight, offset, out, rms_norm=norm == "rms", eps=1e-5)
    assert np.allclose(out[:, 0].numpy(), expected, rtol=1e-5, atol=1e-5 * terms.max())


def test_folding_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(60, WIDTH)) * [1, 10, 0.1, 3, 1] + 2
    labels = hidden[:, 0] + hidden[:, 1] / 10 + draw.normal(size=60) > 4
    scaler = preprocessing.StandardScaler().fit(hidden)
    model = linear_model.LogisticRegression().fit(scaler.transform(hidden), labels)
    folded = Probe.folded(
        "lies",
        "deceit",
        HERE,
        model.coef_[0],
        model.intercept_[0],
        mean=scaler.mean_,
        scale=scaler.scale_,
    )
    got = hidden @ folded.weight.double().numpy() + folded.bias
    assert np.allclose(got, model.decision_function(scaler.transform(hidden)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"scale": [1.0, 0.0]}, "scale"),
        ({"scale": [1.0, -1.0]}, "scale"),
        ({"scale": [1.0, math.nan]}, "scale"),
        ({"scale": [1.0]}, "scale"),
        ({"mean": [1.0, 2.0, 3.0]}, "mean"),
        ({"mean": math.nan}, "bias"),
        ({"weight": [[1.0, 2.0]]}, "weight"),
        ({"slope": math.inf}, "weight"),
    ],
)
def test_folding_refuses_by_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"'lies': {key}: "):
        Probe.folded("lies", "deceit", HERE, **{"weight": [1.0, 2.0], **changes})


# -------------------------------------------------------------------------------------- bank

taps = st.builds(Tap, st.integers(0, 3), st.sampled_from(SITES))


@st.composite
def banks(draw: st.DrawFn) -> ProbeBank:
    placed = draw(st.lists(taps, min_size=1, max_size=8))
    phi = {
        tap: draw(st.sampled_from([("none", 1e-6), ("rms", 1e-5)])) for tap in sorted(set(placed))
    }
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    weights = st.lists(numbers, min_size=WIDTH, max_size=WIDTH)
    return ProbeBank(
        Probe(
            NAMES[index],
            draw(st.sampled_from(["deceit", "harm"])),
            tap,
            torch.tensor(draw(weights)),
            draw(numbers),
            *phi[tap],
            draw(rules),
            draw(st.sampled_from(["response", "prompt"])) if index else "response",
        )
        for index, tap in enumerate(placed)
    )


@given(bank=banks())
def test_columns_are_contiguous_per_tap_and_in_order(bank: ProbeBank) -> None:
    assert list(bank.taps) == sorted({p.tap for p in bank.probes})
    assert [p.tap for p in bank.probes] == sorted(p.tap for p in bank.probes)
    end = 0
    for tap in bank.taps:
        columns = bank.columns(tap)
        assert (columns.start, columns.step) == (end, None)
        end = columns.stop
        group = bank.probes[columns]
        numbers = [NAMES.index(p.name) for p in group]
        assert numbers == sorted(numbers)
        assert {p.tap for p in group} == {tap}
        assert torch.equal(bank.weight(tap), torch.stack([p.weight for p in group]))
        assert bank.weight(tap).shape == (len(group), bank.hidden_size)
        assert bank.bias(tap).tolist() == [p.bias for p in group]
        assert {(p.norm, p.eps) for p in group} == {(bank.norm(tap), bank.eps(tap))}
    assert end == len(bank.probes) == len(bank.names) == len(bank.hazards)
    assert bank.window == max(
        [p.evidence.window for p in bank.probes if p.evidence.rule == "mean"] + [0]
    )
    table = bank.evidence_table()
    assert table.center.tolist() == [float(np.float32(p.evidence.center)) for p in bank.probes]
    assert (table.phase == Phase.PROMPT).tolist() == [p.reads == "prompt" for p in bank.probes]


def test_taps_stand_in_the_order_of_the_forward_pass() -> None:
    order = [Tap(0, "resid_post"), Tap(1, "resid_pre"), Tap(1, "resid_mid"), Tap(1, "resid_post")]
    bank = ProbeBank(probe(f"p{i}", tap=tap) for i, tap in enumerate(reversed(order)))
    assert list(bank.taps) == order
    assert bank.names == ("p3", "p2", "p1", "p0")


@given(bank=banks())
def test_a_bank_survives_storage_bit_for_bit(bank: ProbeBank) -> None:
    stored = safetensors.torch.save(bank.tensors())
    spec = BankSpec.model_validate_json(bank.spec().model_dump_json())
    back = ProbeBank.from_parts(spec, safetensors.torch.load(stored))
    for one, other in zip(bank.probes, back.probes, strict=True):
        assert torch.equal(one.weight.view(torch.int32), other.weight.view(torch.int32))
        for key in ("name", "hazard", "tap", "bias", "norm", "eps", "evidence", "reads"):
            assert getattr(one, key) == getattr(other, key)
    assert safetensors.torch.save(back.tensors()) == stored
    assert back.spec() == bank.spec()


def test_parts_are_stored_and_have_no_evidence_of_their_own() -> None:
    bank = ProbeBank(
        [
            probe("late part", tap=Tap(1, "resid_post"), adds_to="head"),
            probe("head", tap=Tap(1, "resid_pre"), evidence=Max()),
            probe("other", tap=Tap(0, "resid_post")),
            probe("early part", tap=Tap(0, "resid_post"), adds_to="head"),
        ]
    )
    spec = BankSpec.model_validate_json(bank.spec().model_dump_json())
    assert spec.model_dump_json().count("adds_to") == 2  # bundles without parts stay as they were
    for same in (bank, ProbeBank.from_parts(spec, bank.tensors())):
        assert [p.name for p in same.probes] == ["other", "early part", "head", "late part"]
        assert same.names == ("other", "head")
        assert same.terms == [[0], [2, 1, 3]]
        assert same.evidence_table().rule.tolist() == [Rule.LAST, Rule.MAX]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adds_to": "nobody"}, "adds_to: 'nobody' is not in the bank"),
        ({"adds_to": "part"}, "adds_to: 'part' is itself a part of another"),
        ({"adds_to": "head", "hazard": "other"}, "looks for 'other' in the response"),
        ({"adds_to": "head", "reads": "prompt"}, "in the prompt"),
        ({"adds_to": "head", "evidence": Max()}, "a part has none; give the rule to 'head'"),
    ],
)
def test_a_part_that_fits_no_head_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ProbeBank([probe("head"), probe("part", **changes)])


def test_moving_a_bank_changes_the_weights_of_the_copy_alone() -> None:
    bank = ProbeBank([probe(weight=torch.tensor([1.0, 1.0 + 2**-20]), bias=1.0 + 2**-20)])
    moved = bank.to("cpu", torch.bfloat16)
    assert moved.weight(HERE).dtype == torch.bfloat16
    assert moved.bias(HERE).tolist() == [1.0 + 2**-20]
    assert bank.weight(HERE).dtype == torch.float32
    assert torch.equal(moved.tensors()[f"{HERE}.weight"], bank.weight(HERE))


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ([], "none reads the response"),
        ([probe(reads="prompt")], "none reads the response"),
        ([probe("a"), probe("b"), probe("a")], "name 'a' is used 2 times"),
        ([probe("a"), probe("b", weight=torch.ones(4))], "'a' and 'b': weights of 5 and 4 numbers"),
        (
            [probe("a"), probe("b", tap=Tap(4, "resid_pre"), weight=torch.ones(4))],
            "'a' and 'b': weights of 5 and 4 numbers",
        ),
        ([probe("a"), probe("b", norm="rms")], "'a' and 'b': norm none, .* norm rms"),
        ([probe("a", norm="rms"), probe("b", norm="rms", eps=1e-5)], "eps 1e-06 .* eps 1e-05"),
    ],
)
def test_probes_that_cannot_share_a_bank_are_named(probes: list[Probe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeBank(probes)


def test_probes_of_different_taps_may_differ_in_norm() -> None:
    bank = ProbeBank([probe("a"), probe("b", tap=Tap(0, "resid_pre"), norm="rms", eps=1e-5)])
    assert [(bank.norm(tap), bank.eps(tap)) for tap in bank.taps] == [("rms", 1e-5), ("none", 1e-6)]


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("resid_post.3.weight", None, r"tensors are \['resid_post.3.bias'\], the bank needs"),
        ("resid_post.4.weight", torch.ones(1, WIDTH), "resid_post.4.weight.*the bank needs"),
        ("resid_post.3.weight", torch.ones(2, WIDTH), r"torch.float32 \[2, 5\], the bank needs"),
        ("resid_post.3.weight", torch.ones(1, 4), r"torch.float32 \[1, 4\], the bank needs"),
        (
            "resid_post.3.weight",
            torch.ones(1, WIDTH).half(),
            "torch.float16 .* needs torch.float32",
        ),
        ("resid_post.3.bias", torch.ones(1, 1), r"\[1, 1\], the bank needs torch.float32 \[1\]"),
        ("resid_post.3.weight", torch.full((1, WIDTH), math.nan), "5 of 5 values are not finite"),
        ("resid_post.3.bias", torch.tensor([math.inf]), "bias: inf is not finite"),
    ],
)
def test_tensors_that_do_not_fit_the_layout_are_named(
    key: str, tensor: torch.Tensor | None, message: str
) -> None:
    bank = ProbeBank([probe()])
    tensors = bank.tensors()
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    with pytest.raises(ValueError, match=message):
        ProbeBank.from_parts(bank.spec(), tensors)
