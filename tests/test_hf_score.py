"""Given texts: scored as if the model had just written them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
import toy
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from midstream.bank import Probe
from midstream.bundle import WrongModelError
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.scoring import TextScore, score
from midstream.evidence import Ema
from midstream.monitor import Monitor, MonitorInUseError, NoFreeSlotError
from midstream.policy import PolicyError, Thresholds
from midstream.taps import Tap

TEXTS = ["w7 w8 bad w9", "w5", "w9  w9\tw8 w7 w6 w5 w5 w6", "bad", "w10 w11 w12"]


def scored(texts: Any = TEXTS, monitor: Monitor | None = None, **options: Any) -> list[TextScore]:
    return list(score(toy.model(), toy.tokenizer(), texts, monitor or toy.monitor(), **options))


def deep(model: Any, tap: Tap | None = None) -> Probe:
    d = model.config.hidden_size
    weight = torch.randn(d, generator=torch.Generator().manual_seed(0)) / d**0.5
    return Probe("deep", "h", tap or Tap(1, "resid_post"), weight, evidence=Ema(alpha=0.5))


def never(model: Any, **options: Any) -> Monitor:
    tiers = {"moderate": Thresholds(horizon=0, halt_at=1.0)}
    return toy.monitor(model, probes=[deep(model)], tiers=tiers, **options)


def test_every_token_is_judged_and_stands_where_it_says() -> None:
    for text, result in zip(TEXTS, scored(), strict=True):
        pieces = [text[start:end] for start, end in result.offsets]
        assert pieces == text.split()
        trace, report = result.report.trace, result.report
        assert trace.position == list(range(len(pieces)))
        logits = [20.0 if word == "bad" else -20.0 for word in pieces]
        assert trace.scores["bad"] == pytest.approx(logits, abs=1e-3)
        assert trace.risk == pytest.approx(toy.expected_risks(logits), rel=1e-3)
        assert (report.scored, report.unscored, report.prompt_tokens) == (len(pieces), 0, 0)
        at = pieces.index("bad") if "bad" in pieces else None
        assert report.halted_at == at


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("slots", [1, 3])
def test_batches_change_nothing(batch_size: int, slots: int) -> None:
    model = toy.model()
    alone = [next(score(model, toy.tokenizer(), [text], never(model))) for text in TEXTS]
    together = list(
        score(model, toy.tokenizer(), TEXTS, never(model, slots=slots), batch_size=batch_size)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.offsets == other.offsets
        assert one.report.trace.scores["deep"] == pytest.approx(
            other.report.trace.scores["deep"], abs=1e-5
        )
        assert one.report.trace.risk == pytest.approx(other.report.trace.risk, rel=1e-4)
    assert [r.report.stream for r in together] == [f"text-{i}" for i in range(len(TEXTS))]


def test_the_risk_is_that_of_the_same_tokens_while_decoding() -> None:
    model = toy.model()
    for seed in range(3):
        torch.manual_seed(seed)
        # the prompt is <bos> alone, which the tokenizer also puts before a given text
        with never(model).attach(model) as m:
            ids = torch.tensor([[toy.BOS]])
            out = model.generate(
                ids, do_sample=True, max_new_tokens=14, suppress_tokens=[0, 1, 2, 3],
                logits_processor=[m.halting()],
            )  # fmt: skip
        words = [toy.WORDS[token] for token in out[0, 1:-1].tolist()]
        result = scored([" ".join(words)], never(model))[0]
        decoded = m.reports[0].trace
        assert decoded.position[1:] == [p + 1 for p in result.report.trace.position]
        assert result.report.trace.scores["deep"] == pytest.approx(
            decoded.scores["deep"][1:], abs=1e-4
        )
        assert result.report.trace.risk == pytest.approx(decoded.risk[1:], rel=1e-3)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"t{i}" for i in range(4, 60))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=10,
    )  # fmt: skip


@pytest.mark.parametrize("headless", [False, True])
def test_encoders(headless: bool) -> None:
    model: Any = tiny_models.tiny("bert")
    if headless:
        model = model.bert
    tok, probe = bert_tokenizer(), deep(model, Tap(2, "resid_post"))
    monitor = toy.monitor(
        model, probes=[probe], tiers={"moderate": Thresholds(horizon=0, halt_at=1.0)}
    )
    texts = ["t5 t6 t7", "t9", "t8 t8 t8 t8 t8"]
    for text, result in zip(texts, score(model, tok, texts, monitor), strict=True):
        ids = tok(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**ids, output_hidden_states=True).hidden_states[3][0, 1:-1]
        want = (states @ probe.weight).tolist()
        assert result.report.trace.scores["deep"] == pytest.approx(want, abs=1e-4)
        assert [text[a:b] for a, b in result.offsets] == text.split()
        assert result.report.scored == len(want)


def test_inference_mode_comes_and_goes() -> None:
    model = toy.new_model()
    with torch.inference_mode():
        monitor = toy.monitor(model, backend="reference")
    long = " ".join(["w7"] * 50)
    for _ in range(2):
        assert scored([long] * 3, monitor)[0].report.scored == 50  # more rows than were reserved
        with torch.inference_mode(), monitor.attach(model) as m:
            options = {"logits_processor": [m.halting()], "max_new_tokens": 3}
            model.generate(torch.full((3, 60), 9), **options)


def test_what_the_window_cuts_off_is_counted() -> None:
    long = " ".join(["w7"] * 100)
    result, short = scored([long, "w5"], toy.monitor(trace=100))
    assert len(result.offsets) == toy.WINDOW - 1  # <bos> takes one place
    assert (result.report.scored, result.report.unscored) == (63, 37)
    assert (short.report.scored, short.report.unscored) == (1, 0)


def test_the_tokenizers_own_limit_counts_as_well() -> None:
    model, tok = tiny_models.tiny("bert"), bert_tokenizer()
    monitor = toy.monitor(model, probes=[deep(model)])
    result = next(score(model, tok, ["t5 " * 30], monitor))
    assert (result.report.scored, result.report.unscored) == (8, 22)


def test_a_text_longer_than_the_trace_is_refused() -> None:
    monitor = toy.monitor(trace=2)
    with pytest.raises(UnsupportedGenerationError, match=r"8 tokens, the monitor keeps 2.*trace=8"):
        scored(["w5", TEXTS[2]], monitor)
    assert monitor.free_slots == 8


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_text_without_tokens_is_refused(text: str) -> None:
    monitor = toy.monitor()
    with pytest.raises(UnsupportedGenerationError, match="has no token to score"):
        scored(["w5", text], monitor)
    assert monitor.free_slots == 8


def test_texts_are_read_lazily_and_a_reader_may_stop() -> None:
    read: list[str] = []

    def texts() -> Iterator[str]:
        for i in itertools.count(5):
            read.append(f"w{i}")
            yield f"w{i}"

    model, monitor = toy.new_model(), toy.monitor()
    results = score(model, toy.tokenizer(), texts(), monitor, batch_size=3)
    assert [next(results).report.stream for _ in range(2)] == ["text-0", "text-1"]
    assert len(read) == 3
    assert monitor.free_slots == 8
    # meanwhile model and monitor are free for anything else
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(list(score(model, toy.tokenizer(), ["w5 w6 w7"], monitor))) == 1
    with monitor.exclusive(), pytest.raises(MonitorInUseError, match="in use"):
        list(results)


def test_a_failure_leaves_nothing_behind() -> None:
    model, monitor = toy.new_model(), toy.monitor()
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(score(model, toy.tokenizer(), TEXTS, monitor))
    hook.remove()
    assert monitor.free_slots == 8
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(list(score(model, toy.tokenizer(), ["w5 w6"], monitor))) == 1


def test_a_sick_row_is_unscored_and_touches_no_other() -> None:
    model = toy.new_model()

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 2] = torch.nan
        return output

    with model.model.embed_tokens.register_forward_hook(poison):
        sick, well = score(model, toy.tokenizer(), ["w7 w8 w9", "w7 bad"], toy.monitor(model))
    assert sick.report.trace.scores["bad"][1] is None
    assert (sick.report.scored, sick.report.unscored) == (2, 1)
    assert well.report == scored(["w5", "w7 bad"])[1].report


def test_the_tokenizer_stays_as_it_was() -> None:
    tok = toy.tokenizer()
    state = tok.backend_tokenizer.to_str(), tok.padding_side, tok.pad_token
    scored()
    assert (tok.padding_side, tok.pad_token) == state[1:]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state[0]))
    assert bare.pad_token is None
    padless = list(score(toy.model(), bare, TEXTS, toy.monitor()))
    assert bare.pad_token is None
    assert [r.report for r in padless] == [r.report for r in scored()]


def test_refusals() -> None:
    monitor = toy.monitor()
    with pytest.raises(WrongModelError):
        list(score(toy.new_model(num_hidden_layers=3), toy.tokenizer(), TEXTS, monitor))
    with pytest.raises(PolicyError):
        scored(tier="loose", monitor=monitor)
    for i in range(8):
        monitor.admit(str(i), 1)
    with pytest.raises(NoFreeSlotError):
        scored(monitor=monitor)


def test_tiers() -> None:
    tiers = {"strict": Thresholds(horizon=0, halt_at=1e-6), "moderate": toy.HORIZON_0}
    assert scored(["w5 w6"], toy.monitor(tiers=tiers), tier="strict")[0].report.halted_at == 0
    assert scored(["w5 w6"], toy.monitor(tiers=tiers))[0].report.halted_at is None
