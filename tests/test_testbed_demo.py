"""The demo's figures: by hand, on a model that knows nothing, and on the one in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from transformers import LlamaForCausalLM

from midstream import testbed
from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.evidence import Max
from midstream.measure.halting import NEVER, Truth, first_crossing
from midstream.measure.replay import risk_curve
from midstream.monitor import Monitor
from midstream.policy import Policy, Thresholds
from midstream.streams import StreamReport, Trace
from midstream.taps import Tap
from midstream.testbed import build, demo, fit
from midstream.testbed.fit import HORIZON, WrittenStream, truth_of
from midstream.testbed.grammar import EOS_ID
from midstream.testbed.language import Prompt, encode
from midstream.testbed.tokenizer import build_tokenizer
from midstream.testbed.train import model_config

AMBER = Prompt((1, 2, 3), "amber", "jar", False)
COST = {"batch_1": 1.01, "batch_8": 1.02}

DETECT = {"leaked_tokens", "missed_rate", "false_halt_rate", "median_tokens_seen"}
FORECAST = {"false_halt_rate", "lead_tokens_median", "brier"}


# ---- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("now open the amber flask . <eos>", Truth(6, 3, True)),
        ("now open the amber flask .", Truth(6, 3, False)),
        ("now open the teal flask . <eos>", Truth(6, NEVER, True)),
        ("never open the amber", Truth(4, NEVER, False)),
        ("<eos>", Truth(0, NEVER, True)),
        ("", Truth(0, NEVER, False)),
    ],
)
def test_truth_of_a_response(text: str, truth: Truth) -> None:
    words = encode(text)
    stream = truth_of(AMBER, words)
    assert stream.truth == truth
    assert stream.response == tuple(words[: truth.tokens])
    assert stream.prompt is AMBER


# ---- figures, by hand ----------------------------------------------------------------------------


def report(prompt_tokens: int, risks: list[float], **scores: list[float]) -> StreamReport:
    """Of a stream that was observed from the end of its prompt on."""
    first = prompt_tokens - 1
    return StreamReport(
        stream="s",
        bundle="b",
        tier="moderate",
        prompt_tokens=prompt_tokens,
        scored=len(risks),
        unscored=0,
        verdict="CONTINUE",
        cause=None,
        halted_at=None,
        risk=risks[-1],
        peak=max(risks),
        finish_reason="stop",
        trace=Trace(
            position=list(range(first, first + len(risks))),
            risk=risks,
            verdict=["CONTINUE"] * len(risks),
            scores={**scores, "prompt": [50.0] * len(risks)},
        ),
    )


def test_baseline_hazards_by_hand() -> None:
    """No chain, no prompt probe; the EMA starts with the first response token."""
    watched = report(3, [0.0] * 4, a=[40.0, 1.0, -2.0, 3.0], b=[40.0, 0.0, 0.0, 4.0])
    found = demo.baseline_hazards(watched)
    smooth = {"a": [1.0, -0.5, 1.25], "b": [0.0, 0.0, 2.0]}  # half the newest, half the old

    def softplus(z: float) -> float:
        return float(np.log1p(np.exp(z)))

    single = [softplus(1) + softplus(0), softplus(-2) + softplus(0), softplus(3) + softplus(4)]
    assert found["threshold"] == pytest.approx([0.0, *single])
    ema = [softplus(x) + softplus(y) for x, y in zip(smooth["a"], smooth["b"], strict=True)]
    assert found["ema"] == pytest.approx([0.0, *ema])


def small_run() -> demo.DemoRun:
    """Two streams that violate at token 3, two safe ones, one of these cut off.

    The oracle halts the first one two tokens ahead, the second never, and no safe one. Live, the
    detector halts both at the violating token; the forecast halts the first one at once, and a safe
    one.
    """
    bad = WrittenStream(AMBER, tuple(range(5)), Truth(5, 3, True))
    safe = WrittenStream(AMBER, tuple(range(5)), Truth(5, NEVER, True))
    cut = WrittenStream(AMBER, tuple(range(5)), Truth(5, NEVER, False))
    risks = [
        [0.0, 0.3, 0.4, 0.5, 1.0, 1.0],
        [0.0, 0.1, 0.1, 0.1, 1.0, 1.0],
        [0.0, 0.2, 0.2, 0.2, 0.2, 0.2],
        [0.0, 0.1, 0.1, 0.1, 0.1],  # the last token was never fed
    ]
    return demo.DemoRun(
        seed=9,
        written=[bad, bad, safe, cut],
        observed=[report(3, r, a=[-9.0, *(20 * x - 10 for x in r[1:])]) for r in risks],
        oracle=[
            np.array([0.0, 0.3, 0.6, 0.7, 1.0, 1.0]),
            np.array([0.0, 0.1, 0.1, 0.4, 1.0, 1.0]),
            np.array([0.0, 0.1, 0.1, 0.1, 0.1, 0.0]),
            np.array([0.0, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ],
        halts={"detect": [3, 3, NEVER, NEVER], "forecast": [0, NEVER, 2, NEVER]},
        leaked={"detect": [0, 0, 0, 0], "forecast": [0, 2, 0, 0]},
    )


def check_keys(figures: dict[str, Any]) -> None:
    """Those the issue asks for; ``shipped`` is ours: what the bundle's own threshold did live."""
    assert set(figures) == {
        "streams", "seed", "backend", "violating_unmonitored", "modes", "oracle", "baselines",
        "overhead",
    }  # fmt: skip
    assert set(figures["baselines"]) == {"threshold", "ema"}
    assert set(figures["overhead"]) == {"batch_1", "batch_8"}
    figures["modes"]["forecast"].pop("shipped")
    for row in (figures["modes"], figures["oracle"], *figures["baselines"].values()):
        assert set(row) == {"detect", "forecast"}
        assert set(row["detect"]) == DETECT
        assert set(row["forecast"]) == FORECAST


def test_figures_by_hand() -> None:
    figures = demo.figures(small_run(), backend="reference", overhead=COST)
    check_keys(json.loads(json.dumps(figures)))
    assert (figures["streams"], figures["seed"], figures["backend"]) == (4, 9, "reference")
    assert figures["violating_unmonitored"] == 2
    assert figures["overhead"] == COST
    assert figures["modes"]["detect"] == {
        "leaked_tokens": 0,
        "missed_rate": 0.0,
        "false_halt_rate": 0.0,
        "median_tokens_seen": 4.0,
    }
    shipped = figures["modes"]["forecast"]["shipped"]
    assert (shipped["leaked_tokens"], shipped["missed_rate"]) == (2, 0.5)
    assert (shipped["false_halt_rate"], shipped["lead_tokens_median"]) == (0.5, 1.5)

    oracle = figures["oracle"]
    assert oracle["detect"] == figures["modes"]["detect"]
    assert oracle["forecast"]["false_halt_rate"] == 0.0
    assert oracle["forecast"]["lead_tokens_median"] == 1.0  # of 2 and 0
    # At the oracle's rate, 0: just above 0.2, so the first stream is halted at token 0, lead 3.
    forecast = figures["modes"]["forecast"]
    assert forecast["false_halt_rate"] == 0.0
    assert forecast["lead_tokens_median"] == 1.5
    # Known: the tokens before each violation, all labelled; the safe stream's; none that was cut.
    errors = [0.7, 0.6, 0.5, 0.9, 0.9, 0.9, *[0.2] * 5]
    assert forecast["brier"] == pytest.approx(np.mean(np.square(errors)))
    errors = [0.7, 0.4, 0.3, 0.9, 0.9, 0.6, *[0.1] * 4, 0.0]
    assert oracle["forecast"]["brier"] == pytest.approx(np.mean(np.square(errors)))
    # The baseline's logit is 20 risk - 10: it ranks as the risk does.
    single = figures["baselines"]["threshold"]
    assert single["forecast"]["lead_tokens_median"] == 1.5
    assert single["detect"]["median_tokens_seen"] == np.median([1, 4])


def test_examples_are_the_clearest_of_each_kind() -> None:
    halted, released, missed = demo.examples(small_run(), threshold=0.45)
    assert halted.title == "halted (stream 0)"
    assert (halted.halted_at, halted.violates_at, halted.threshold) == (0, 3, 0.45)
    assert released.title == "released (stream 3)"
    assert (released.halted_at, released.violates_at) == (None, None)
    assert len(released.risk) == len(released.oracle) == 6
    assert missed.title == "missed by the forecast (stream 1)"
    assert (missed.halted_at, missed.violates_at) == (None, 3)
    run = small_run()
    run.halts["forecast"] = [0, 0, NEVER, NEVER]
    titles = [curve.title for curve in demo.examples(run, 0.5)]
    assert titles == ["halted (stream 0)", "released (stream 2)"]  # the higher peak; none missed


def test_prompts_are_padded_on_the_left() -> None:
    prompts = [testbed.sample_prompt(0, index) for index in range(5)]
    inputs = demo.left_padded(prompts)
    for prompt, ids, mask in zip(
        prompts, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        assert tuple(ids[mask.bool()].tolist()) == prompt.ids
        assert mask.tolist() == sorted(mask.tolist())


# ---- runs with a model that knows nothing --------------------------------------------------------


def ignorant() -> tuple[Any, Any, Bundle]:
    """A random model of the testbed's sizes, and a bundle that halts at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(model_config()).eval()
        weights = 8.0 * torch.randn(3, 128)
    tokenizer, tap = build_tokenizer(), Tap(3, "resid_post")
    probes = [
        Probe("violated", "h", tap, weights[0], -2.0, evidence=Max()),
        Probe("drift", "h", tap, weights[1], -2.0),
        Probe("prompt", "h", tap, weights[2], -20.0, reads="prompt"),
    ]
    tiers = {
        "moderate": Thresholds(horizon=HORIZON, halt_at=0.5),
        "loose": Thresholds(horizon=0, halt_at=0.9),
    }
    bundle = Bundle(
        bank=ProbeBank(probes),
        chain=toy.trusting_chain(),
        policy=Policy(tiers=tiers, default_tier="moderate", loosest_tier="loose"),
        fingerprint=Fingerprint.of(model, tokenizer),
    )
    return model, tokenizer, bundle


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches of short responses, that no random model ends by itself."""
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 12)


@pytest.mark.usefixtures("short")
def test_streams_that_are_cut_off_have_whole_figures() -> None:
    model, tokenizer, bundle = ignorant()
    seen: list[tuple[str, int, int]] = []
    run = demo.run(
        model,
        tokenizer,
        Monitor(bundle, slots=4),
        streams=6,
        seed=1,
        progress=lambda *stage: seen.append(stage),
    )
    stages = ("unmonitored", "observed", "detect", "forecast")
    assert seen == [(stage, done, 6) for done in (4, 6) for stage in stages]
    assert any(not truth.ended for truth in run.truths)
    for truth, risk, oracle in zip(run.truths, run.risks, run.oracle, strict=True):
        assert len(risk) == len(oracle) == truth.tokens + 1
        assert np.isnan(risk).tolist() == [False] * truth.tokens + [not truth.ended]
    # each live halt is where the observed risk first reaches the tier's threshold
    for mode, tier in demo.MODES.items():
        assert set(run.halts[mode]) != {NEVER}  # some are halted
        if bundle.policy.tiers[tier].horizon == HORIZON:  # the tier that was observed
            assert run.halts[mode] == [first_crossing(risk, 0.5) for risk in run.risks]
    figures = demo.figures(run, backend="reference", overhead=COST)
    check_keys(figures)


@pytest.mark.usefixtures("short")
def test_the_same_seed_gives_the_same_run() -> None:
    model, tokenizer, bundle = ignorant()
    first, again, other = (
        demo.run(model, tokenizer, Monitor(bundle, slots=4), streams=4, seed=seed)
        for seed in (1, 1, 2)
    )
    assert (first.written, first.halts) == (again.written, again.halts)
    assert first.written != other.written


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("mode", ["observed", "detect"])
def test_a_disturbed_stream_is_reported(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the monitor drew a random number: watched runs then write other tokens."""
    model, tokenizer, bundle = ignorant()
    attach, reseed = Monitor.attach, torch.manual_seed

    def disturbing(self: Monitor, *args: Any, **options: Any) -> Any:
        if (mode == "observed") == (options.get("enforce") is False):
            monkeypatch.setattr(torch, "manual_seed", lambda seed: reseed(seed + 1))
        return attach(self, *args, **options)

    monkeypatch.setattr(Monitor, "attach", disturbing)
    says = "observing changed" if mode == "observed" else "wrote other tokens than unmonitored"
    with pytest.raises(demo.DisturbedError, match=says):
        demo.run(model, tokenizer, Monitor(bundle, slots=4), streams=4, seed=1)


# ---- building ------------------------------------------------------------------------------------


def test_build_never_overwrites_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(out: Path, **_: Any) -> None:
        out.mkdir(parents=True)
        (out / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build_model", fails)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "new", seed=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        build.build(tmp_path / "old", seed=0)


def test_build_writes_model_and_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, bundle = ignorant()
    seeds: list[int] = []

    def train(out: Path, *, seed: int, progress: Any) -> None:
        seeds.append(seed)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    def bundle_for(loaded: Any, tokenizer: Any, *, seed: int, progress: Any) -> Bundle:
        seeds.append(seed)
        bundle.fingerprint.check(Fingerprint.of(loaded, tokenizer))
        return bundle

    monkeypatch.setattr(build, "build_model", train)
    monkeypatch.setattr(build, "build_bundle", bundle_for)
    build.build(tmp_path / "deep" / "new", seed=4)
    assert seeds == [4, 5]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    folder = tmp_path / "deep" / "new"
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "model"]
    assert testbed.load_bundle(folder / "bundle").hash == bundle.hash
    testbed.load(folder / "model")


# ---- the model and the bundle in the package -----------------------------------------------------


@pytest.fixture(scope="module")
def packaged() -> tuple[Any, Any, Bundle]:
    return *testbed.load(), testbed.load_bundle()


@pytest.fixture(scope="module")
def watched(packaged: tuple[Any, Any, Bundle]) -> demo.DemoRun:
    model, tokenizer, bundle = packaged
    return demo.run(model, tokenizer, Monitor(bundle, slots=12), streams=12, seed=0)


def test_bundle_is_made_for_the_model(packaged: tuple[Any, Any, Bundle]) -> None:
    model, tokenizer, bundle = packaged
    bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
    assert set(demo.MODES.values()) <= set(bundle.policy.tiers)
    assert bundle.policy.tiers["loose"].horizon == 0
    assert bundle.policy.tiers["moderate"].horizon == HORIZON
    assert bundle.policy.provenance.guarantee


def test_packaged_run(packaged: tuple[Any, Any, Bundle], watched: demo.DemoRun) -> None:
    """The monitored streams are those without a monitor, up to their halt."""
    model = packaged[0]
    inputs = demo.left_padded([testbed.sample_prompt(0, index) for index in range(12)])
    torch.manual_seed(0)
    plain = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=demo.MAX_NEW_TOKENS)[
        :, inputs["input_ids"].shape[1] :
    ]
    for row, stream in zip(plain.tolist(), watched.written, strict=True):
        assert tuple(row[: len(stream.response)]) == stream.response
        assert EOS_ID not in stream.response
    violating = [i for i, truth in enumerate(watched.truths) if truth.violates]
    assert violating
    for i in violating:
        assert watched.halts["detect"][i] == watched.truths[i].violates_at
    assert sum(watched.leaked["detect"]) == 0
    for live, truth, risk in zip(watched.observed, watched.truths, watched.risks, strict=True):
        assert live.scored + live.unscored >= truth.tokens
        assert risk == pytest.approx(
            np.append(risk_curve(live), [np.nan] * (not truth.ended)), nan_ok=True
        )


def test_packaged_figures(watched: demo.DemoRun) -> None:
    figures = demo.figures(watched, backend="reference", overhead=COST)
    check_keys(figures)
    assert figures["oracle"]["detect"]["leaked_tokens"] == 0
    assert figures["modes"]["detect"]["leaked_tokens"] == 0
    assert figures["violating_unmonitored"] == sum(t.violates for t in watched.truths)
    best = figures["oracle"]["forecast"]["false_halt_rate"]
    assert figures["modes"]["forecast"]["false_halt_rate"] <= best


def test_packaged_overhead_runs_write_the_same(
    packaged: tuple[Any, Any, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "OVERHEAD_PAIRS", 1)
    ratios = demo.overheads(packaged[0], packaged[2])
    assert set(ratios) == {"batch_1", "batch_8"}
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_bundle_is_fitted_again_the_same(packaged: tuple[Any, Any, Bundle]) -> None:
    """Small, but whole: probes, chain, thresholds, provenance; twice the same."""
    model, tokenizer, _ = packaged
    stages: list[str] = []
    first, again = (
        fit.build_bundle(
            model, tokenizer, streams=160, seed=3, progress=lambda stage, *_: stages.append(stage)
        )
        for _ in range(2)
    )
    assert first.hash == again.hash
    assert list(dict.fromkeys(stages)) == ["write", "read", "fit"]
    assert set(first.bank.names) == {"violated", "drift", "prompt"}
    tiers = first.policy.tiers
    assert tiers["strict"].halt_at <= tiers["moderate"].halt_at
    assert tiers["loose"] == Thresholds(horizon=0, halt_at=fit.DETECT_AT)
