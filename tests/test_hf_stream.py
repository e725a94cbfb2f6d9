"""One watched stream: events in order, text that may leave, a clean end in every case."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import BAD, EOS
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria

from midstream.bundle import WrongModelError
from midstream.engines.hf import stream
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.monitor import Monitor, MonitorInUseError, NoFreeSlotError
from midstream.policy import PolicyError, Thresholds
from midstream.streams import Event


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "midstream-generate"]


class Writer(LogitsProcessor):
    """Writes the given tokens, after that w9 for ever."""

    def __init__(self, tokens: list[int], pause: float = 0.0) -> None:
        self.tokens, self.pause, self.calls = tokens, pause, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause)
        token = self.tokens[self.calls] if self.calls < len(self.tokens) else 9
        self.calls += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[0, token] = 0.0
        return forced


class Fails(LogitsProcessor):
    """Goes wrong at the third token."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("boom")
        return scores


def open_stream(
    monitor: Monitor, tokens: list[int], tok: Any = None, **options: Any
) -> Iterator[Event]:
    return stream(
        options.pop("model", toy.model()),
        tok or toy.tokenizer(),
        options.pop("prompt", "w7 w8"),
        monitor,
        logits_processor=[options.pop("writer", Writer(tokens))],
        **{"max_new_tokens": len(tokens), **options},
    )


def text_of(events: list[Event]) -> str:
    return "".join(e.text or "" for e in events if e.type == "released")


def types(events: list[Event]) -> list[str]:
    return [e.type for e in events]


def words(*tokens: int) -> str:
    return toy.tokenizer().decode(list(tokens))


def test_a_stream_that_ends_by_itself() -> None:
    monitor = toy.monitor()
    events = list(open_stream(monitor, [9, 8, 7, EOS], max_new_tokens=10))
    assert types(events) == ["admitted", *["released"] * 3, "finished"]
    assert [e.text for e in events[1:4]] == ["w9", "w8", "w7"]
    assert [e.position for e in events] == [0, 3, 4, 5, None]
    report = events[-1].report
    assert report is not None
    assert (report.finish_reason, report.verdict) == ("stop", "CONTINUE")
    assert (report.prompt_tokens, report.scored, report.unscored) == (3, 3, 0)
    assert report.trace.position == list(range(6))
    assert {(e.stream, e.bundle) for e in events} == {(report.stream, monitor.bundle.hash)}
    risks = toy.expected_risks([-20.0] * 3)
    assert [e.risk for e in events[1:4]] == pytest.approx(risks, rel=1e-3)
    assert monitor.free_slots == 8


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stream_that_ends_by_length_has_its_last_token_scored(length: int) -> None:
    events = list(open_stream(toy.monitor(), [9, 8, 7, 6, 5][:length]))
    report = events[-1].report
    assert report is not None
    assert (report.finish_reason, report.scored, report.unscored) == ("length", length, 0)
    assert text_of(events) == words(*[9, 8, 7, 6, 5][:length])


def test_what_is_written_is_what_plain_generate_writes() -> None:
    ids = toy.tokenizer()("w7 w8", return_tensors="pt")["input_ids"]
    for seed in range(6):
        torch.manual_seed(seed)
        bare = toy.model().generate(ids, do_sample=True, max_new_tokens=20)[0, 3:].tolist()
        response = toy.before_end(bare)
        torch.manual_seed(seed)
        events = list(
            stream(
                toy.model(),
                toy.tokenizer(),
                "w7 w8",
                toy.monitor(),
                max_new_tokens=20,
                do_sample=True,
            )
        )
        at = toy.first_bad(response)
        assert text_of(events) == toy.tokenizer().decode(response[:at], skip_special_tokens=True)
        assert ("halted" in types(events)) == (at is not None)


@pytest.mark.parametrize("hold_back", [1, 3, "turn"])
@pytest.mark.parametrize("at", [0, 1, 4, 5])
def test_a_halted_stream_never_shows_the_bad_token(hold_back: Any, at: int) -> None:
    written = [9, 8, 7, 6, 5, 9]
    written[at] = BAD
    monitor = toy.monitor(hold_back=hold_back)
    events = list(open_stream(monitor, written))
    shown = {1: at, 3: max(0, at - 2), "turn": 0}[hold_back]
    assert text_of(events) == words(*written[:shown])
    assert types(events)[-2:] == ["halted", "finished"]
    halted = events[-2]
    assert (halted.position, halted.cause, halted.verdict) == (3 + at, "bad", "HALT")
    report = events[-1].report
    assert report is not None
    assert (report.halted_at, report.finish_reason, report.unscored) == (
        3 + at,
        "content_filter",
        0,
    )
    assert monitor.free_slots == 8


@pytest.mark.parametrize(
    ("hold_back", "pieces"),
    [(1, ["w9", "w8", "w7", "w6"]), (3, ["w9", "w8", "w7w6"]), ("turn", ["w9w8w7w6"])],
)
def test_held_back_text_leaves_in_the_end(hold_back: Any, pieces: list[str]) -> None:
    events = list(open_stream(toy.monitor(hold_back=hold_back), [9, 8, 7, 6, EOS]))
    assert [e.text for e in events if e.type == "released"] == pieces


def test_holding_and_going_on_are_told() -> None:
    # one bad token gives risk 0.91: held, and not halted
    tiers = {"moderate": Thresholds(horizon=0, halt_at=0.95, hold_at=0.5, release_at=0.3)}
    monitor = toy.monitor(tiers=tiers)
    events = list(open_stream(monitor, [9, BAD, 8, 7, EOS]))
    assert types(events) == [
        "admitted",
        "released",
        "verdict",
        "released",
        "verdict",
        "released",
        "finished",
    ]
    assert [e.verdict for e in events if e.type == "verdict"] == ["HOLD", "CONTINUE"]
    assert [e.text for e in events if e.type == "released"] == ["w9", "badw8", "w7"]
    # whoever ends on hold keeps what was held
    events = list(open_stream(monitor, [9, BAD, EOS]))
    assert text_of(events) == "w9"


def test_observing_only_lets_everything_pass_and_reports_the_halt() -> None:
    events = list(open_stream(toy.monitor(), [9, BAD, 8], enforce=False))
    assert text_of(events) == words(9, BAD, 8)
    assert "halted" not in types(events)
    report = events[-1].report
    assert report is not None
    assert (report.verdict, report.halted_at, report.scored) == ("HALT", 4, 3)
    assert report.finish_reason == "length"  # nothing was filtered, so it does not say so


def test_a_failure_is_an_event_before_it_is_raised() -> None:
    model = toy.new_model()
    calls = iter(range(100))

    def fail_at_the_third(*_: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("out of memory, say")

    model.model.layers[1].register_forward_pre_hook(fail_at_the_third)
    monitor = toy.monitor(model)
    seen = []
    with pytest.raises(RuntimeError, match="out of memory"):  # noqa: PT012
        for event in stream(model, toy.tokenizer(), "w5", monitor, max_new_tokens=9):
            seen.append(event)
    assert types(seen)[0] == "admitted"
    assert types(seen)[-1] == "error"
    assert seen[-1].message == "RuntimeError: out of memory, say"
    assert monitor.free_slots == 8


def test_chat_messages() -> None:
    messages = [{"role": "user", "content": "w7 w8"}]
    events = list(open_stream(toy.monitor(), [9, EOS], prompt=messages))
    report = events[-1].report
    assert report is not None
    assert report.prompt_tokens == 4  # <bos> w7 w8 w22
    assert text_of(events) == "w9"


class StopAt7(StoppingCriteria):
    """Ends the stream at w7."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == 7


@pytest.mark.parametrize(
    ("on_unscored", "text"), [("hold", "w9w8"), ("halt", "w9w8"), ("pass", "w9w8w7")]
)
def test_a_stopping_criterion_leaves_the_last_token_unscored(on_unscored: str, text: str) -> None:
    monitor = toy.monitor(on_unscored=on_unscored)
    events = list(
        open_stream(monitor, [9, 8, 7, 6, 5], stopping_criteria=[StopAt7()], pad_token_id=EOS)
    )
    report = events[-1].report
    assert report is not None
    assert (report.scored, report.unscored, report.finish_reason) == (2, 1, "stop")
    assert text_of(events) == text


def test_the_window_ends_a_stream() -> None:
    prompt = " ".join(["w7"] * (toy.WINDOW - 4))  # and <bos>
    events = list(open_stream(toy.monitor(), [9] * 10, prompt=prompt))
    report = events[-1].report
    assert report is not None
    assert (report.finish_reason, report.scored, report.unscored) == ("length", 3, 0)


def byte_level() -> PreTrainedTokenizerFast:
    """Each of the 24 ids is a byte or a few; most are parts of longer characters."""
    alphabet = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    letters = Tokenizer(models.BPE(alphabet, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols = [c for text in ("é", "€", "🙂", "a", " ") for c in bytes_of(letters, text)]
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "!": BAD}
    for symbol in dict.fromkeys(symbols):
        vocab.setdefault(symbol, len(vocab))
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def bytes_of(letters: Tokenizer, text: str) -> list[str]:
    return list(letters.encode(text).tokens)


@pytest.mark.parametrize("hold_back", [1, 2, "turn"])
@pytest.mark.parametrize("text", ["a é€🙂 a", "🙂🙂", "é"])
def test_characters_of_several_tokens_are_shown_whole(hold_back: Any, text: str) -> None:
    tok = byte_level()
    written = tok.encode(text)
    assert len(written) > len(text)
    events = list(open_stream(toy.monitor(hold_back=hold_back), [*written, EOS], tok, prompt="aa"))
    assert text_of(events) == text
    assert all("\ufffd" not in (e.text or "") for e in events)


def test_text_is_what_the_released_ids_decode_to_whatever_they_are() -> None:
    tok = byte_level()
    for seed in range(25):
        gen = torch.Generator().manual_seed(seed)
        written = torch.randint(5, len(tok), (9,), generator=gen).tolist()
        events = list(open_stream(toy.monitor(), written, tok, prompt="aa"))
        assert text_of(events) == tok.decode(written)


def test_a_reader_that_closes_early_stops_the_generation() -> None:
    monitor, writer = toy.monitor(), Writer([9] * 50, pause=0.01)
    events = open_stream(monitor, [9] * 50, writer=writer)
    assert types(list(itertools.islice(events, 3))) == ["admitted", "released", "released"]
    events.close()  # type: ignore[attr-defined]
    assert monitor.free_slots == 8
    assert writer.calls < 40
    assert list(open_stream(monitor, [9]))[-1].type == "finished"


def test_closing_stops_also_a_stream_that_has_nothing_to_say() -> None:
    monitor, writer = toy.monitor(hold_back="turn"), Writer([9] * 50, pause=0.01)
    events = open_stream(monitor, [9] * 50, writer=writer)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert writer.calls < 40
    assert monitor.free_slots == 8


def test_a_stream_that_is_never_read_does_nothing() -> None:
    monitor = toy.monitor()
    open_stream(monitor, [9])
    assert monitor.free_slots == 8


def test_a_slow_reader_holds_the_model_back_and_misses_nothing() -> None:
    writer = Writer([9] * 40)
    events = open_stream(toy.monitor(), [9] * 40, writer=writer)
    first = next(events)
    time.sleep(0.3)
    assert writer.calls < 25
    rest = list(events)
    assert types([first, *rest]) == ["admitted", *["released"] * 40, "finished"]


def test_an_exception_of_the_model_reaches_the_reader() -> None:
    monitor = toy.monitor()
    events = open_stream(monitor, [9] * 5, writer=Fails())
    with pytest.raises(RuntimeError, match="boom"):
        list(events)
    assert monitor.free_slots == 8
    assert list(open_stream(monitor, [9]))[-1].type == "finished"


def test_an_exception_of_the_model_ends_with_a_reader_that_is_gone() -> None:
    errors: list[Any] = []
    before, threading.excepthook = threading.excepthook, errors.append
    try:
        events = open_stream(toy.monitor(), [9] * 5, writer=Fails())
        next(events)
        events.close()  # type: ignore[attr-defined]
    finally:
        threading.excepthook = before
    assert errors == []


def test_two_streams_at_a_time_need_two_models_and_two_monitors() -> None:
    model, monitor = toy.new_model(), toy.monitor(hold_back="turn")
    first = open_stream(monitor, [9] * 50, model=model, writer=Writer([9] * 30, pause=0.02))
    next(first)
    with pytest.raises(MonitorInUseError, match="another monitor"):
        list(open_stream(monitor, [9], model=toy.new_model()))
    with pytest.raises(UnsupportedGenerationError, match=r"watched already.*copy of the model"):
        list(open_stream(toy.monitor(), [9], model=model))
    second = open_stream(toy.monitor(), [7, 6, 5], model=toy.new_model())
    assert text_of(list(second)) == words(7, 6, 5)
    assert text_of(list(first)) == words(*[9] * 50)


def test_many_streams_in_threads_do_not_mix() -> None:
    results: dict[int, list[Event]] = {}

    def read(i: int) -> None:
        tokens = [9] * 12
        tokens[i + 2] = BAD
        model = toy.new_model()
        results[i] = list(open_stream(toy.monitor(model), tokens, model=model))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text_of(results[i]) for i in range(4)] == [words(*[9] * (i + 2)) for i in range(4)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ""}, UnsupportedGenerationError, "prompt is empty"),
        ({"prompt": []}, UnsupportedGenerationError, "prompt is empty"),
        (
            {"prompt": "w7 " * toy.WINDOW},
            UnsupportedGenerationError,
            "65 tokens, the model's window is 64",
        ),
        ({"max_new_tokens": 0}, UnsupportedGenerationError, "max_new_tokens: expected at least 1"),
        ({"num_beams": 2}, UnsupportedGenerationError, "num_beams=1"),
        (
            {"num_return_sequences": 2, "do_sample": True},
            UnsupportedGenerationError,
            "one sequence",
        ),
        ({"tier": "loose"}, PolicyError, "loose"),
        ({"model": toy.new_model(num_hidden_layers=3)}, WrongModelError, "wrong model"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    monitor = toy.monitor()
    with pytest.raises(error, match=message):
        list(open_stream(monitor, [9, 8], **options))
    assert monitor.free_slots == 8


def test_a_monitor_that_is_full_says_so() -> None:
    monitor = toy.monitor(slots=1)
    monitor.admit("another", 1)
    with pytest.raises((NoFreeSlotError, UnsupportedGenerationError), match="0 free slots"):
        list(open_stream(monitor, [9]))


def test_a_tokenizer_the_bundle_was_not_made_for_is_refused() -> None:
    monitor = Monitor(toy.bundle(tok=toy.tokenizer()), slots=1)
    assert list(open_stream(monitor, [9]))[-1].type == "finished"
    with pytest.raises(WrongModelError, match="tokenizer"):
        list(open_stream(monitor, [9], byte_level()))
