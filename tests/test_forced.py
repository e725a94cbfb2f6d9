"""Texts that somebody else writes: judged while they come as they would be as a whole."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from midstream import testbed
from midstream.bank import Probe
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.forced import CHUNK, ForcedStreams, PromptError, PromptLengthError
from midstream.engines.hf.growing_text import LONGEST, GrowingText, literal
from midstream.engines.hf.scoring import GivenTokens, feed
from midstream.evidence import Ema
from midstream.monitor import Monitor, NoFreeSlotError
from midstream.policy import PolicyError, Segment, Thresholds
from midstream.streams import Event, StreamReport
from midstream.taps import Tap

NEVER = {"moderate": Thresholds(horizon=0, halt_at=1.0)}


def toy_monitor(**fields: Any) -> Monitor:
    return toy.monitor(**{"trace": CHUNK, **fields})


def deep(model: Any) -> Probe:
    d = model.config.hidden_size
    weight = torch.randn(d, generator=torch.Generator().manual_seed(0)) / d**0.5
    return Probe("deep", "h", Tap(1, "resid_post"), weight, evidence=Ema(alpha=0.5))


def run(forced: ForcedStreams) -> dict[str, list[Event]]:
    """Step until nothing is left to do."""
    told: dict[str, list[Event]] = {}
    for _ in range(10_000):
        if not forced.busy:
            return told
        for stream, events in forced.step():
            told.setdefault(stream.id, []).extend(events)
    raise AssertionError("it never came to an end")


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text or "" for event in events)


def read(forced: ForcedStreams, prompt: Any, parts: Sequence[str], **options: Any) -> list[Event]:
    """All events of one stream whose text comes in parts."""
    stream = forced.open("one", prompt, **options)
    told: list[Event] = []
    for part in parts:
        stream.feed(part)
        told += run(forced).get("one", [])
    stream.finish("stop")
    return told + run(forced).get("one", [])


def same_judgement(one: StreamReport, other: StreamReport, judged_from: int) -> None:
    """The same verdict and risk for each token of the response, within tolerance."""
    positions = [p for p in one.trace.position if p >= judged_from]
    assert positions == [p for p in other.trace.position if p >= judged_from]
    for name, scores in one.trace.scores.items():
        assert scores == pytest.approx(other.trace.scores[name], abs=2e-4)
    begin = one.trace.position.index(judged_from)
    assert one.trace.verdict[begin:] == other.trace.verdict[begin:]
    assert one.trace.risk[begin:] == pytest.approx(other.trace.risk[begin:], rel=1e-3, abs=1e-6)
    assert (one.halted_at, one.verdict, one.cause) == (other.halted_at, other.verdict, other.cause)


def whole(model: Any, monitor: Monitor, prompt: Sequence[int], ids: Sequence[int]) -> StreamReport:
    """What the scoring of given texts says of the same tokens."""
    every = [*prompt, *ids]
    given = GivenTokens("whole", every, [True] * len(every), prompt_tokens=len(prompt))
    return feed(model, [given], monitor)[0]


def in_company(
    forced: ForcedStreams, texts: Sequence[tuple[Sequence[int], Sequence[int]]], seed: int
) -> list[StreamReport]:
    """Feed all of them at once, in parts, some joining late and some waiting in between."""
    chance = random.Random(seed)
    left = {f"s{i}": (prompt, list(ids)) for i, (prompt, ids) in enumerate(texts)}
    opened: dict[str, Any] = {}
    reports: dict[str, StreamReport] = {}
    while len(reports) < len(texts):
        for name, (prompt, ids) in left.items():
            if name in opened and not ids:
                opened[name].finish("stop")
            elif name in opened and chance.random() < 0.6:
                count = chance.choice([1, 1, 1, 2, 5, 30])
                opened[name].feed(ids[:count])
                del ids[:count]
            elif name not in opened and forced.monitor.free_slots and chance.random() < 0.3:
                opened[name] = forced.open(name, list(prompt))
        for stream, events in forced.step():
            for event in events:
                if event.report is not None:
                    reports[stream.id] = event.report
    return [reports[f"s{i}"] for i in range(len(texts))]


@pytest.mark.parametrize("slots", [1, 3, 12])
def test_the_testbed_is_judged_as_in_one_pass(slots: int) -> None:
    model, _ = testbed.load()
    bundle = testbed.load_bundle()
    prompts = [testbed.sample_prompt(1, i) for i in range(12)]
    answers = testbed.generate_responses(model, prompts, seed=1)
    texts = [(p.ids, r) for p, r in zip(prompts, answers, strict=True)]
    monitor = Monitor(bundle, slots=slots, trace=512)
    with ForcedStreams(monitor, model, testbed.load()[1]) as forced:
        found = in_company(forced, texts, seed=slots)
    want = [whole(model, monitor, *text) for text in texts]
    assert any(report.verdict == "HALT" for report in want)
    assert any(report.verdict == "CONTINUE" for report in want)
    for one, other in zip(want, found, strict=True):
        if one.halted_at is None:
            same_judgement(one, other, one.prompt_tokens - 1)
            assert (one.scored, one.unscored) == (other.scored, other.unscored)
        else:  # after a halt nothing more is fed
            assert (other.verdict, other.halted_at, other.cause) == (
                "HALT", one.halted_at, one.cause,
            )  # fmt: skip
    assert monitor.free_slots == slots


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_each_architecture_is_read_right_or_refused(name: str) -> None:
    model: Any = tiny_models.tiny(name)
    monitor = toy.monitor(model, probes=[deep(model)], tiers=NEVER, slots=3, trace=CHUNK)
    forced = ForcedStreams(monitor, model, toy.tokenizer(), window=40)
    if name in ("mamba2", "bert"):
        with pytest.raises(UnsupportedGenerationError), forced:
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert monitor.free_slots == 3
        return
    chance = random.Random(0)
    texts = [
        ([chance.randrange(67) for _ in range(n)], [chance.randrange(67) for _ in range(m)])
        for n, m in [(3, 20), (1, 7), (12, 26), (8, 1)]
    ]
    with forced:
        found = in_company(forced, texts, seed=0)
    for text, report in zip(texts, found, strict=True):
        same_judgement(whole(model, monitor, *text), report, len(text[0]) - 1)


def test_attention_over_a_short_window_is_tried_out_as_well() -> None:
    model: Any = tiny_models.tiny("mistral")
    monitor = toy.monitor(model, probes=[deep(model)], tiers=NEVER, trace=CHUNK)
    model.config.sliding_window = 5
    forced = ForcedStreams(monitor, model, toy.tokenizer(), window=40)
    real = model.model.forward

    def other(**kwargs: Any) -> Any:  # a model that looks one token further back than it says
        if kwargs.get("past_key_values") is None:
            model.config.sliding_window = 4
        try:
            return real(**kwargs)
        finally:
            model.config.sliding_window = 5

    model.model.forward = other
    with (
        pytest.raises(UnsupportedGenerationError, match="otherwise when it comes in parts"),
        forced,
    ):
        pass


def test_a_token_costs_one_row() -> None:
    rows: list[int] = []
    model = toy.new_model()
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    with ForcedStreams(toy_monitor(tiers=NEVER), model, toy.tokenizer()) as forced:
        stream = forced.open("a", "w5 w6 w7")
        run(forced)
        del rows[:]
        for word in ("w8 ", "w9 ", "w10 "):
            stream.feed(word)
            run(forced)
        assert rows == [1, 1, 1]


def test_a_long_prompt_goes_in_turn_with_the_others() -> None:
    model, tokenizer = testbed.load()
    monitor = Monitor(testbed.load_bundle(), slots=4, trace=512)
    rows: list[tuple[int, int]] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _m, _a, out: rows.append(tuple(out.shape[:2]))
    )
    with hook, ForcedStreams(monitor, model, tokenizer) as forced:
        quick = forced.open("quick", [1, 3, 68, 5])
        run(forced)
        del rows[:]
        forced.open("slow", [1, *[68] * 399])
        for _ in range(8):
            quick.feed([148])
            forced.step()
    assert rows == [
        (1, CHUNK), (1, 2), (1, CHUNK), (1, 2), (1, CHUNK), (1, 2), (1, 16), (1, 2),
    ]  # fmt: skip


def test_the_memory_is_what_the_documentation_says() -> None:
    with ForcedStreams(toy_monitor(slots=5), toy.model(), toy.tokenizer(), window=33) as forced:
        bytes_per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, fp32
        assert forced.cache_bytes == 5 * (33 + 1) * bytes_per_token
        forced.open("a", "w5 w6")
        run(forced)
        assert forced.cache_bytes == 5 * (33 + 1) * bytes_per_token


# ------------------------------------------------------------------------------- text


SAMPLES = [
    "The island isn't far; it's 1,250 km away.\n\n  def f(x):\n\treturn x**2  # naïve\n",
    "word" * 60 + " ends",
    "   \n\n \t  leading and trailing   \n  ",
    "漢字かな交じり文が続く、句読点もある。次の文。",
    "emoji 👩‍👩‍👧 and 🇨🇭 flags 🎉🎉 done",
    "(a){b}[c]<d>\"e\"'f' ... --- !!! ??",
    "a" * 400,
    " " * 400,
    "",
]


@cache
def bpe(split: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's; or without a split into words, as of SentencePiece."""
    inner = Tokenizer(models.BPE())
    if split:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first"),
                pre_tokenizers.Split("\n", "isolated"),
            ]
        )
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({c for sample in SAMPLES for c in sample})
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<unk>", "<end>"],
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*SAMPLES, __doc__ or "", str(tiny_models.__doc__)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


def grown(tokenizer: Tokenizer, parts: Sequence[str], before: str = "") -> tuple[Any, GrowingText]:
    text = GrowingText(tokenizer, before)
    pieces = [piece for part in parts for piece in text.push(part)]
    return pieces + text.finish(), text


def cut(text: str, chance: random.Random) -> list[str]:
    parts = []
    while text:
        size = chance.choice([1, 1, 2, 3, 5, 8, 200])
        parts.append(text[:size])
        text = text[size:]
    return parts


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("sample", SAMPLES[:6])
def test_the_tokens_are_those_of_the_whole_text(sample: str, split: bool) -> None:
    tokenizer = literal(bpe(split))
    want = tokenizer.encode(sample, add_special_tokens=False).ids
    for seed in range(10):
        pieces, text = grown(tokenizer, cut(sample, random.Random(seed)))
        assert "".join(piece.text for piece in pieces) + text.rest == sample
        if sample != SAMPLES[1]:  # a word of 240 letters is no word
            assert [piece.token for piece in pieces] == want
            assert text.seams == 0


@given(st.lists(st.text(max_size=12), max_size=30), st.booleans(), st.text(max_size=20))
@settings(max_examples=300)
def test_every_character_has_one_token_in_order(parts: list[str], split: bool, before: str) -> None:
    tokenizer = literal(bpe(split))
    pieces, text = grown(tokenizer, parts, before)
    assert "".join(piece.text for piece in pieces) + text.rest == "".join(parts)
    if split and not text.seams:  # bytes: what was fed can be written out again
        written = bpe(split).backend_tokenizer.decode([p.token for p in pieces])
        assert written == "".join(parts)


@given(
    st.lists(st.sampled_from(["the", " urn", " ", ".", "\n", "is", "VIOLET", " pale ?", "<eos>"]))
)
def test_the_testbeds_words(parts: list[str]) -> None:
    tokenizer = literal(testbed.load()[1])
    pieces, text = grown(tokenizer, parts)
    assert "".join(piece.text for piece in pieces) + text.rest == "".join(parts)
    want = tokenizer.encode("".join(parts), add_special_tokens=False).ids
    assert [piece.token for piece in pieces] == want


@pytest.mark.parametrize("sample", [*SAMPLES, "xy" * 500, "\n" * 500])
def test_text_without_blanks_waits_no_longer_than_it_must(sample: str) -> None:
    text = GrowingText(literal(bpe(True)))
    for character in sample:
        text.push(character)
        assert len(text.rest) <= LONGEST
    if sample.startswith("xy"):
        assert len(text.rest) < 40


def test_newlines_may_belong_to_what_is_before_them() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), (".", "\u010a\u010a")]
    names = [*alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    split = pre_tokenizers.Split(Regex(r"[^\s\p{L}]+[\r\n]*|\s+|\p{L}+"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    for text in ("far.\n\nso.\n\n\n ", "a.\n\n", ".\n"):
        assert 257 in inner.encode(text).ids or text == ".\n"
        pieces, grew = grown(inner, list(text))
        assert [piece.token for piece in pieces] == inner.encode(text).ids
        assert grew.seams == 0


def test_nor_where_a_word_is_one_token_however_long() -> None:
    text = GrowingText(literal(testbed.load()[1]))
    for character in "xy" * 300:
        text.push(character)
        assert len(text.rest) <= LONGEST


def test_a_prompt_does_not_swallow_the_text() -> None:
    tokenizer = literal(bpe(True))
    for before in ("The isl", "The ", "<end>", ""):
        pieces, text = grown(tokenizer, ["and", " is", " far"], before)
        assert "".join(piece.text for piece in pieces) == "and is far"
        assert text.seams == 0


# ------------------------------------------------------------------------------ streams


def test_what_leaves_is_what_came_up_to_the_bad_word() -> None:
    with ForcedStreams(toy_monitor(), toy.model(), toy.tokenizer()) as forced:
        events = read(forced, "w5 w6", ["w7  w", "8\t", "bad", " w9 w10"])
    assert text_of(events) == "w7  w8"
    assert [event.type for event in events] == [
        "admitted", "released", "released", "halted", "finished",
    ]  # fmt: skip
    last = events[-1]
    assert (last.message, last.verdict, last.cause) == ("content_filter", "HALT", "bad")
    assert (last.delivered, last.delivered_unscored) == (2, 0)
    assert last.report is not None
    assert (last.report.halted_at, last.report.prompt_tokens) == (5, 3)
    assert forced.monitor.free_slots == 8


@given(st.data())
@settings(max_examples=60)
def test_nothing_of_or_after_a_bad_word_leaves(data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(["w5", "w9", "w12", "bad"]), max_size=12))
    blank = st.sampled_from([" ", "  ", "\n", " \t "])
    text = "".join(word + data.draw(blank) for word in words)
    parts = cut(text, random.Random(data.draw(st.integers(0, 99))))
    depth = data.draw(st.sampled_from([1, 2, 5, "turn"]))
    monitor = toy_monitor(hold_back=depth, slots=1)
    with ForcedStreams(monitor, toy.model(), toy.tokenizer()) as forced:
        events = read(forced, [{"role": "user", "content": "w5"}], parts)
    first = text.find("bad")
    left = text_of(events)
    assert events[-1].type == "finished"
    if first < 0:
        assert left == text
        assert events[-1].message == "stop"
    else:
        assert text.startswith(left)
        assert left.rstrip() == "" or len(left) <= first
        assert "bad" not in left
        assert events[-1].message == "content_filter"
        if depth == "turn":
            assert left == ""
        if depth == 1:
            assert left.split() == text[:first].split()


def test_white_space_alone_leaves_at_the_end() -> None:
    with ForcedStreams(toy_monitor(), toy.model(), toy.tokenizer()) as forced:
        assert text_of(read(forced, "w5", [" ", "\n", " " * 300])) == " \n" + " " * 300
        assert forced.monitor.free_slots == 8


def test_a_bad_prompt_halts_before_the_first_word() -> None:
    lm = toy.model()
    before = toy.detector(lm, name="before", reads="prompt")
    bundle = toy.bundle(probes=[before, toy.detector(lm)])
    chain = bundle.chain.model_copy(update={"prior": [0.9, 0.1]})
    monitor = Monitor(dataclasses.replace(bundle, chain=chain), slots=2, trace=CHUNK)
    with ForcedStreams(monitor, toy.model(), toy.tokenizer()) as forced:
        fine = read(forced, "w5 w6", ["w7 w8"])
        bad = read(forced, "w5 bad", ["w7 w8"])
    assert text_of(fine) == "w7 w8"
    assert text_of(bad) == ""
    assert bad[-1].message == "content_filter"


@pytest.mark.parametrize("on_unscored", ["hold", "halt"])
def test_at_the_windows_end_the_stream_halts(on_unscored: str) -> None:
    monitor = toy_monitor(on_unscored=on_unscored)
    with ForcedStreams(monitor, toy.model(), toy.tokenizer(), window=10) as forced:
        fits = read(forced, "w5 w6", ["w7 "] * 7)
        assert (text_of(fits), fits[-1].message) == ("w7 " * 7, "stop")
        events = read(forced, "w5 w6", ["w7 "] * 20)
    assert text_of(events) == ("w7 " * 7).rstrip()
    last = events[-1]
    assert (last.message, last.verdict, last.cause) == ("content_filter", "HALT", "unscored")
    assert events[-2].type == "halted"
    assert "window of 10 tokens is full" in str(events[-2].message)
    assert last.report is not None
    assert (last.report.scored, last.report.unscored, last.report.halted_at) == (7, 1, 10)


@pytest.mark.parametrize("hold_back", [1, 3, "turn"])
def test_or_passes_unscored_and_says_so(hold_back: Any) -> None:
    monitor = toy_monitor(on_unscored="pass", hold_back=hold_back)
    with ForcedStreams(monitor, toy.model(), toy.tokenizer(), window=10) as forced:
        events = read(forced, "w5 w6", ["w7 "] * 12 + ["bad "] * 8)
    assert text_of(events) == "w7 " * 12 + "bad " * 8
    assert [event.cause for event in events if event.type == "verdict"] == ["unscored"]
    unjudged = [event for event in events if event.type == "released" and event.risk is None]
    assert bool(unjudged) == (hold_back != "turn")
    report = events[-1].report
    assert report is not None
    assert (report.scored, report.unscored, report.finish_reason) == (7, 13, "stop")
    assert (events[-1].delivered, events[-1].delivered_unscored) == (20, 13)


def test_a_stream_that_is_held_at_the_windows_end_passes_nothing() -> None:
    tiers = {"moderate": Thresholds(horizon=0, halt_at=1.0, hold_at=0.5)}
    monitor = toy_monitor(on_unscored="pass", tiers=tiers)
    with ForcedStreams(monitor, toy.model(), toy.tokenizer(), window=10) as forced:
        events = read(forced, "w5 w6", ["w7 "] * 5 + ["bad "] * 8)
    assert text_of(events) == ("w7 " * 5).rstrip()
    assert (events[-1].message, events[-1].cause) == ("content_filter", "unscored")


def test_held_text_leaves_when_the_risk_has_fallen() -> None:
    tiers = {"moderate": Thresholds(horizon=0, halt_at=1.0, hold_at=0.5)}
    with ForcedStreams(toy_monitor(tiers=tiers), toy.model(), toy.tokenizer()) as forced:
        stream = forced.open("one", "w5")
        stream.feed("w7 bad ")
        events = run(forced)["one"]
        assert (text_of(events), events[-1].verdict) == ("w7", "HOLD")
        stream.feed("w8 ")
        events = run(forced)["one"]
        assert (text_of(events), events[-1].verdict) == (" bad w8", "CONTINUE")
        stream.feed("bad")
        stream.finish("length")
        last = run(forced)["one"]
    assert text_of(last) == ""  # it ends while it is held
    assert last[-1].message == "length"


def test_a_sick_row_is_unscored_and_leaves_nothing_in_its_slot() -> None:
    model = toy.new_model()
    sick = [False]

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if sick[0] else output

    # A probe behind the attention, which a NaN in a key or a value would reach.
    monitor = toy.monitor(model, probes=[deep(model)], tiers=NEVER, slots=2, trace=CHUNK)
    with (
        model.model.embed_tokens.register_forward_hook(poison),
        ForcedStreams(monitor, model, toy.tokenizer()) as forced,
    ):
        sick[0] = True
        events = read(forced, "w5 w6", ["w7 w8 w9 w10 w11 " * 3])
        assert text_of(events) == ""  # on_unscored: hold
        assert events[-1].report is not None
        assert events[-1].report.scored == 0
        sick[0] = False
        # In the same slot, in one pass with a longer one, for which more of each row is read.
        both = [forced.open(name, "w5" + " w6" * n) for name, n in (("long", 4), ("longer", 12))]
        for stream in both:
            stream.feed("w7 w8")
            stream.finish("stop")
        for events in run(forced).values():
            assert text_of(events) == "w7 w8"
            assert events[-1].report is not None
            assert events[-1].report.unscored == 0


def test_a_pass_that_fails_ends_its_streams_and_no_other(caplog: Any) -> None:
    model = toy.new_model()
    broken = [False]

    def fail(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("out of memory in a place nobody may learn of")

    with (
        model.model.layers[1].register_forward_pre_hook(fail),
        ForcedStreams(toy_monitor(slots=2), model, toy.tokenizer()) as forced,
    ):
        well, ill = forced.open("well", "w5"), forced.open("ill", "w6")
        well.feed("w7 ")
        told = run(forced)
        broken[0] = True
        ill.feed("w8 w9 w10 w11 ")  # more rows than the next pass, and some taps were read
        told = run(forced)
        assert [event.type for event in told["ill"]] == ["error"]
        assert told["ill"][0].message == "the watching model failed: RuntimeError"
        broken[0] = False
        ill.feed("w8 ")
        well.feed("w8 bad")
        well.finish("stop")
        told = run(forced)
        assert text_of(told["well"]) == " w8"
        assert told["well"][-1].message == "content_filter"
        assert "ill" not in told
        assert forced.monitor.free_slots == 2


def test_segments_are_judged_by_their_own_thresholds() -> None:
    aside = Segment(opens=["w20"], closes=["w21"], tiers=NEVER)
    texts = ["w7 w20 bad bad w21 w8", "w7 w20 w8 w21 bad w8", "w20 bad w21 w9 bad"]
    for text in texts:
        ids = toy.tokenizer()(text, add_special_tokens=False)["input_ids"]
        monitor = toy_monitor(segments={"aside": aside})
        with ForcedStreams(monitor, toy.model(), toy.tokenizer()) as forced:
            events = read(forced, [toy.BOS, 5], [text[:9], text[9:]])
        report = events[-1].report
        assert report is not None
        want = whole(toy.model(), monitor, [toy.BOS, 5], ids)
        assert (report.halted_at, report.cause) == (want.halted_at, want.cause)
        if want.halted_at is None:
            assert report.segments == want.segments
            assert text_of(events) == text


def test_names_of_special_tokens_are_words_like_any_other() -> None:
    for tokenizer, text in ((bpe(True), "a <end> b<end>"), (testbed.load()[1], "a <eos> <bos>. ")):
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        pieces, grew = grown(literal(tokenizer), [text])
        assert not special & {piece.token for piece in pieces}
        assert "".join(piece.text for piece in pieces) + grew.rest == text
        assert special & set(tokenizer(text)["input_ids"])  # not of the tokenizer itself


def test_chats_and_tiers() -> None:
    tiers = {"strict": Thresholds(horizon=0, halt_at=1e-6), **{"moderate": toy.HORIZON_0}}
    with ForcedStreams(toy_monitor(tiers=tiers), toy.model(), toy.tokenizer()) as forced:
        chat = [{"role": "user", "content": "w5 w6"}]
        mild, strict = read(forced, chat, ["w7"]), read(forced, chat, ["w7"], tier="strict")
        assert (text_of(mild), text_of(strict)) == ("w7", "")
        assert mild[-1].report is not None
        assert mild[-1].report.prompt_tokens == 4
        with pytest.raises(PolicyError):
            forced.open("a", chat, tier="loose")


def test_refusals() -> None:
    lm = toy.new_model()  # the shared one has hooks of transformers' own, after some tests
    with pytest.raises(UnsupportedGenerationError, match=f"trace={CHUNK} or more"):
        ForcedStreams(toy.monitor(), lm, toy.tokenizer())
    for window in (7, toy.WINDOW + 1):
        with pytest.raises(UnsupportedGenerationError, match="window: expected 8 to 64"):
            ForcedStreams(toy_monitor(), lm, toy.tokenizer(), window=window)
    monitor = toy_monitor(slots=1)
    taken = monitor.admit("other", 1)
    with (
        pytest.raises(UnsupportedGenerationError, match="1 slots of the monitor are taken"),
        ForcedStreams(monitor, lm, toy.tokenizer()),
    ):
        pass
    monitor.retire(taken)
    bare = PreTrainedTokenizerFast(tokenizer_object=toy.tokenizer().backend_tokenizer)
    with ForcedStreams(monitor, lm, bare) as forced:
        with pytest.raises(PromptError, match="chat template"):
            forced.open("a", [{"role": "user", "content": "w5"}])
        with pytest.raises(PromptLengthError, match=r"prompt has 64 tokens.*window is 64"):
            forced.open("a", [5] * 64)
        with pytest.raises(PromptError, match=r"ids \[99\], expected 0 to 23"):
            forced.open("a", [5, 99])
        for empty in ("", [], ()):
            with pytest.raises(PromptError, match="empty"):
                forced.open("a", empty)
        stream = forced.open("a", "w5")
        with pytest.raises(UnsupportedGenerationError, match="open already"):
            forced.open("a", "w5")
        with pytest.raises(NoFreeSlotError):
            forced.open("b", "w5")
        stream.feed("w7 w8")
        run(forced)
        forced.close(stream)
        forced.close(stream)
        events = run(forced)["a"]
        assert events[-1].message == "cancelled"
        stream.feed("w9 ")
        stream.finish("stop")
        assert not forced.busy
        forced.open("b", "w5")
    assert monitor.free_slots == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())


def test_a_text_that_broke_off_is_judged_and_ends_with_an_error() -> None:
    with ForcedStreams(toy_monitor(), toy.model(), toy.tokenizer()) as forced:
        for text, kinds, left in (("w7 w8", ["error"], "w7 w8"), ("w7 bad", ["finished"], "w7")):
            stream = forced.open("one", "w5")
            stream.feed(text)
            stream.finish("error", "the line went dead")
            events = run(forced)["one"]
            assert text_of(events) == left
            assert [e.type for e in events if e.type in ("error", "finished")] == kinds
        assert forced.monitor.free_slots == 8


def test_scores_are_told_of_streams_that_are_looked_at_closely() -> None:
    with ForcedStreams(toy_monitor(), toy.model(), toy.tokenizer()) as forced:
        stream = forced.open("one", "w5 w6")
        stream.feed("w7 ")
        run(forced)
        stream.closely = True
        stream.feed("w8 bad ")
        events = run(forced)["one"]
    scored = [event for event in events if event.type == "scored"]
    assert [event.position for event in scored] == [4, 5]
    assert [event.verdict for event in scored] == ["CONTINUE", "HALT"]
    assert [round(event.scores["bad"]) for event in scored if event.scores] == [-20, 20]
