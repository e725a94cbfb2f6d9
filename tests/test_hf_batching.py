"""Continuous batching under a monitor: same-step halts, labelled rows, slots that come back."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import transformers
from tokenizers import Tokenizer, decoders, models
from toy import BOS, EOS
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState

from midstream import testbed
from midstream.bank import Probe
from midstream.bundle import WrongModelError
from midstream.engines.hf import BatchingAttachment, GenerationFailedError, Request, Response
from midstream.engines.hf import manager as seams
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.monitor import Monitor, MonitorInUseError, NoFreeSlotError
from midstream.policy import PolicyError, Thresholds
from midstream.streams import Event, released
from midstream.taps import Tap
from midstream.testbed.demo import sample_prompt

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{seams.VERSION}."),
    reason=f"continuous batching is watched in transformers {seams.VERSION} only",
)

FLAGGED = BOS
"""A word that the toy writes sooner or later, or never, greedily."""


@pytest.fixture(autouse=True)
def _no_loop_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if "_run_generation_loop" in t.name]


def batching(**changes: Any) -> ContinuousBatchingConfig:
    """A small cache; the default would take most of the machine's memory."""
    return ContinuousBatchingConfig(
        **{"num_blocks": 64, "page_size": 4, "max_batch_tokens": 32, **changes}
    )


def monitor(lm: Any = None, **fields: Any) -> Monitor:
    lm = lm or toy.model()
    return toy.monitor(lm, **{"probes": [toy.detector(lm, bad=(FLAGGED,))], **fields})


def attach(watching: Monitor, lm: Any = None, tok: Any = None, **options: Any) -> Any:
    return watching.attach_batching(
        lm or toy.new_model(),
        tok,
        **{"batching": batching(), "generation_config": greedy(), **options},
    )


def greedy(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**{"do_sample": False, "max_new_tokens": 12, **changes})


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 24, (n,), generator=gen).tolist() for n in lengths]


LENGTHS = (5, 2, 7, 1, 4, 7, 30, 3, 11, 9, 7, 40)
NEVER = prompts(*LENGTHS)[5]
"""After this one the toy never writes it, for as long as its window is."""


def written(prompt: Sequence[int], tokens: int = 12) -> list[int]:
    """What the toy writes when nobody watches, in the one loop that packs nothing."""
    return list(_written(tuple(prompt), tokens))


@cache
def _written(prompt: tuple[int, ...], tokens: int) -> list[int]:
    out = toy.model().generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return toy.before_end(out[0, len(prompt) :].tolist())


def check(response: Response, prompt: Sequence[int], limit: int = 12) -> bool:
    """Check a response against `generate`; return whether it was halted."""
    want = written(prompt, limit)
    at = toy.first_bad(want, (FLAGGED,))
    report = response.report
    assert report is not None
    assert report.prompt_tokens == len(prompt)
    if at is None:
        assert response.tokens == want
        assert (report.verdict, report.scored, report.unscored) == ("CONTINUE", len(want), 0)
        assert response.finish_reason == ("length" if len(want) == limit else "stop")
    else:
        assert response.tokens == want[:at]
        assert (report.verdict, report.halted_at) == ("HALT", len(prompt) + at)
        assert (report.scored, report.unscored) == (at + 1, 0)
        assert response.finish_reason == report.finish_reason == "content_filter"
    return at is not None


class Counts:
    """How often the engine did what a test needs to have happened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.prefix_hits = 0
        self.preempted: list[str] = []
        self.has_preempted = threading.Event()
        search, reset = (
            PagedAttentionCache.search_prefix_match,
            RequestState.create_equivalent_initial_request,
        )

        def searching(*args: Any) -> int:
            found = search(*args)
            self.prefix_hits += found > 0
            return found

        def resetting(state: RequestState) -> RequestState:
            self.preempted.append(state.request_id)
            self.has_preempted.set()
            return reset(state)

        patch.setattr(PagedAttentionCache, "search_prefix_match", searching)
        patch.setattr(RequestState, "create_equivalent_initial_request", resetting)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 6},
        {"scheduler_type": "prefill_first"},
        {"scheduler_type": "prefill_first", "max_batch_tokens": 6},
        {"allow_block_sharing": False},
        {"page_size": 32, "num_blocks": 16},
        {"max_requests_per_batch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_requests_halt_at_the_tokens_at_which_generate_has_them_halted(
    options: dict[str, Any], slots: int
) -> None:
    watching = monitor(slots=slots)
    asked = prompts(*LENGTHS)
    with attach(watching, batching=batching(**options)) as m:
        responses = m.generate_batch(asked)
    seen = [check(response, ids) for response, ids in zip(responses, asked, strict=True)]
    assert 0 < sum(seen) < len(seen)
    assert watching.free_slots == slots


def test_a_cache_that_is_too_small_for_all_preempts_and_recomputes(counts: Counts) -> None:
    watching, asked = monitor(), [*prompts(7, 7, 5, 9), NEVER, NEVER[1:], *prompts(8, 6)]
    small = batching(num_blocks=12, safety_margin=0.0, allow_block_sharing=False)
    with attach(watching, batching=small) as m:
        responses = m.generate_batch(asked, max_new_tokens=20)
    assert counts.preempted
    seen = [check(response, ids, 20) for response, ids in zip(responses, asked, strict=True)]
    assert 0 < sum(seen) < len(seen)


def test_what_was_preempted_goes_on_when_all_that_run_are_cancelled(counts: Counts) -> None:
    """For the manager takes in nothing new between a preemption and the end of some request."""
    small = batching(num_blocks=12, safety_margin=0.0, allow_block_sharing=False)
    with attach(monitor(), batching=small) as m:
        requests = [m.submit(NEVER, max_new_tokens=35) for _ in range(3)]
        assert counts.has_preempted.wait(120)
        for request in requests:
            if request.id not in counts.preempted:
                request.cancel()
        for request in requests:
            response = request.result(120)
            assert response.finish_reason == "cancelled" or check(response, NEVER, 35) is False


def test_a_prompt_that_was_seen_before_is_not_fed_again(counts: Counts) -> None:
    head, *tails = prompts(12, 3, 5, 2, 7)
    watching = monitor()
    with attach(watching) as m:
        for tail in tails:
            check(m.generate_batch([head + tail])[0], head + tail)
    assert counts.prefix_hits == len(tails) - 1


def test_with_a_probe_that_reads_prompts_every_prompt_is_fed_whole(
    counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    lm = toy.model()
    readers = [
        toy.detector(lm, bad=(FLAGGED,)),
        toy.detector(lm, bad=(7,), name="asked", hazard="asking", reads="prompt"),
    ]
    watching = toy.monitor(lm, probes=readers)
    asked = [[5, 7, 9, 7, 8, 9, 5, 6, 11], [5, 8, 9, 7, 8, 9, 5, 6, 11], [5] * 9, [5] * 9]
    with attach(watching) as m:
        batch = [m.generate_batch([ids])[0].report for ids in asked]
    assert "allow_block_sharing is switched off" in caplog.text
    assert counts.prefix_hits == 0
    for ids, report in zip(asked, batch, strict=True):
        with watching.attach(lm, enforce=False) as bare:
            lm.generate(torch.tensor([ids]), max_new_tokens=13, do_sample=False)
        assert report.unscored == 0
        upto = len(report.trace.position)
        assert report.trace.risk == pytest.approx(bare.reports[0].trace.risk[:upto], nan_ok=True)


def test_rows_stand_under_the_streams_whose_tokens_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The probe reads the embedding, which says which token a row is of."""
    lm, watching = toy.new_model(), monitor(slots=3)
    table = lm.get_input_embeddings().weight
    hidden: list[torch.Tensor] = []
    rows: list[tuple[int, int, int]] = []
    monkeypatch.setattr(watching, "observe", lambda tap, h: hidden.append(h) or observe(tap, h))
    monkeypatch.setattr(watching, "advance", lambda slot, at: keep(slot, at) or advance(slot, at))
    monkeypatch.setattr(
        watching, "retire", lambda slot, *a, **k: check_slot(slot) or retire(slot, *a, **k)
    )
    observe, advance, retire = (
        Monitor.observe.__get__(watching),
        Monitor.advance.__get__(watching),
        Monitor.retire.__get__(watching),
    )
    seen: list[list[int]] = []

    def keep(slot: torch.Tensor, position: torch.Tensor) -> None:
        tokens = (hidden.pop()[0, :, None] == table).all(dim=2).int().argmax(dim=1)
        rows.extend(zip(slot.tolist(), position.tolist(), tokens.tolist(), strict=True))

    def check_slot(slot: int) -> None:
        mine = {at: token for s, at, token in rows if s == slot}
        rows[:] = [row for row in rows if row[0] != slot]
        seen.append([mine[at] for at in range(len(mine))])

    asked = prompts(*LENGTHS, seed=3)
    options = batching(max_batch_tokens=9, num_blocks=24, allow_block_sharing=False)
    with attach(watching, lm, enforce=False, batching=options) as m:
        responses = m.generate_batch(asked)
    told = [ids + response.tokens for ids, response in zip(asked, responses, strict=True)]
    assert sorted(seen) == sorted(told)


class Swapped:
    """A batch that tells the tokens, or the positions, of its rows in another order."""

    def __init__(self, batch: Any, what: str) -> None:
        self.requests_in_batch = batch.requests_in_batch
        self.input_ids, self.position_ids = batch.input_ids, batch.position_ids
        if what == "requests":
            self.requests_in_batch = batch.requests_in_batch[::-1]
        else:
            rows = sum(f.query_length for f in self.requests_in_batch)
            setattr(self, what, getattr(batch, what)[:rows].flip(0))


@pytest.mark.parametrize("what", ["requests", "input_ids", "position_ids"])
def test_rows_under_wrong_labels_end_everything_and_nothing_leaves(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    watching = monitor()
    right = seams.WatchedManager.batch.fget
    assert right is not None
    wrong_from = 3
    steps = iter(range(100))
    swapped = property(
        lambda self: Swapped(right(self), what) if next(steps) >= wrong_from else right(self)
    )
    monkeypatch.setattr(seams.WatchedManager, "batch", swapped)
    with attach(watching, enforce=False) as m:
        requests = [m.submit(ids) for ids in (NEVER, *prompts(5))]
        for request in requests:
            with pytest.raises(GenerationFailedError, match="not those of its requests"):
                request.result(120)
        with pytest.raises(UnsupportedGenerationError, match="the generation loop has ended"):
            m.submit([5])
    assert watching.free_slots == 8
    # two steps were right: the prompts, and the first token, which then may leave
    assert all(len(request._released) <= wrong_from - 1 for request in requests)


def test_unwatched_requests_are_the_same_before_and_after_and_beside_a_halt() -> None:
    lm, asked = toy.new_model(), prompts(*LENGTHS)

    def bare() -> list[list[int]]:
        outputs = lm.generate_batch(
            asked,
            generation_config=greedy(eos_token_id=EOS),
            continuous_batching_config=batching(),
        )
        return [output.generated_tokens for output in outputs.values()]

    before, implementation = bare(), lm.config._attn_implementation
    watching = monitor(slots=len(LENGTHS))
    with attach(watching, lm, enforce=False) as m:
        observed = m.generate_batch(asked)
    assert [response.tokens for response in observed] == [toy.before_end(ids) for ids in before]
    with attach(watching, lm) as m:
        halted = m.generate_batch(asked)
    for response, ids in zip(halted, before, strict=True):
        assert response.tokens == toy.before_end(ids)[: len(response.tokens)]
    assert bare() == before
    assert lm.config._attn_implementation == implementation
    assert not {"generate", "generate_batch", "init_continuous_batching"} & set(vars(lm))
    assert not any(module._forward_hooks for module in lm.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_keep_their_bits_beside_the_monitor(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    lm, asked, steps = toy.new_model(), prompts(*LENGTHS), []
    lm.set_attn_implementation(implementation)
    sample = ModelRunner._sample
    monkeypatch.setattr(
        ModelRunner, "_sample", lambda self, s, out: steps.append(s.clone()) or sample(self, s, out)
    )
    options = batching(max_batch_tokens=256, num_blocks=256, allow_block_sharing=False)
    config = greedy(eos_token_id=EOS)
    lm.generate_batch(asked, generation_config=config, continuous_batching_config=options)
    bare = steps.copy()
    steps.clear()
    with attach(monitor(slots=16), lm, enforce=False, batching=options) as m:
        with m._lock:  # so that the first step has all of them
            m._slots = 0
        requests = [m.submit(ids) for ids in asked]
        with m._lock:
            m._slots = 16
            m._hand_over()
        for request in requests:
            request.result(120)
    assert len(bare) == 12
    for one, other in zip(bare, steps[:12], strict=True):
        assert torch.equal(one, other)


def test_sampled_requests_are_the_same_under_a_seed() -> None:
    lm, asked = toy.new_model(), prompts(5, 3, 6, 2)
    options = batching(seed=11, max_batch_tokens=64, allow_block_sharing=False)
    config = greedy(do_sample=True, top_k=0, eos_token_id=EOS, temperature=1.3)
    outputs = lm.generate_batch(asked, generation_config=config, continuous_batching_config=options)
    with attach(monitor(), lm, enforce=False, batching=options, generation_config=config) as m:
        observed = m.generate_batch(asked)
    bare = [toy.before_end(output.generated_tokens) for output in outputs.values()]
    assert [response.tokens for response in observed] == bare
    assert len({tuple(ids) for ids in bare}) == len(bare)


@pytest.fixture(scope="module")
def testbed_model() -> Any:
    return testbed.load()


@pytest.mark.parametrize("tier", ["loose", "moderate"])
def test_the_testbed_halts_where_it_halts_with_generate(testbed_model: Any, tier: str) -> None:
    """A prompt fed whole, alone, samples as `generate` does: the loop has no seeds per request."""
    lm, tok = testbed_model
    watching = Monitor(testbed.load_bundle(), slots=2)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 48}
    asked = [list(sample_prompt(0, index).ids) for index in range(24)]
    want = []
    for seed, ids in enumerate(asked):
        torch.manual_seed(seed)
        with watching.attach(lm, tok, tier=tier) as bare:
            rows = lm.generate(torch.tensor([ids]), logits_processor=[bare.halting()], **options)
        want.append((bare.reports[0], bare.released(rows)[0].tolist()))
    with watching.attach_batching(
        lm,
        tok,
        tier=tier,
        batching=batching(num_blocks=128, max_batch_tokens=64),
        generation_config=GenerationConfig(**options),
    ) as m:
        for seed, (ids, (report, tokens)) in enumerate(zip(asked, want, strict=True)):
            torch.manual_seed(seed)
            response = m.generate_batch([ids])[0]
            assert response.report.halted_at == report.halted_at
            assert response.report.verdict == report.verdict
            assert response.tokens[: len(tokens)] == tokens
            fed = len(report.trace.position)
            assert response.report.trace.risk[:fed] == pytest.approx(
                report.trace.risk, abs=1e-4, nan_ok=True
            )
    halts = [report.halted_at is not None for report, _ in want]
    assert 0 < sum(halts) < len(halts)


def test_the_testbed_gives_the_same_risks_packed_as_alone(testbed_model: Any) -> None:
    lm, tok = testbed_model
    watching = Monitor(testbed.load_bundle(), slots=8)
    asked = [list(sample_prompt(0, index).ids) for index in range(16)]
    config = greedy(max_new_tokens=30)
    options = batching(num_blocks=128, max_batch_tokens=50)
    with watching.attach_batching(lm, tok, batching=options, generation_config=config) as m:
        packed = m.generate_batch(asked)
        alone = [m.generate_batch([ids])[0] for ids in asked]
    for one, other in zip(packed, alone, strict=True):
        assert one.tokens == other.tokens
        assert one.report.trace.risk == pytest.approx(
            other.report.trace.risk, abs=1e-4, nan_ok=True
        )


# -- streaming ----------------------------------------------------------------------------------


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text or "" for event in events if event.type == "released")


def types(events: Sequence[Event]) -> list[str]:
    return [event.type for event in events]


@pytest.mark.parametrize("hold_back", [1, 3, "turn"])
def test_events_carry_the_text_that_may_leave(hold_back: Any) -> None:
    watching, tok = monitor(hold_back=hold_back), toy.tokenizer()
    asked = prompts(*LENGTHS)
    with attach(watching, tok=tok) as m:
        requests = [m.submit(ids) for ids in asked]
        streams = [list(request) for request in requests]
    halts = 0
    for request, events, ids in zip(requests, streams, asked, strict=True):
        response = request.result()
        report, want = response.report, written(ids)
        assert report is not None
        assert response.tokens == released(report, want, watching.policy)
        assert text_of(events) == tok.decode(response.tokens, skip_special_tokens=True)
        assert (types(events)[0], types(events)[-1]) == ("admitted", "finished")
        assert events[-1].report == report
        assert {event.stream for event in events} == {request.id}
        positions = [e.position for e in events if e.type == "released" and e.position is not None]
        assert positions == sorted(positions)
        if report.verdict == "HALT":
            halts += 1
            assert types(events)[-2:] == ["halted", "finished"]
            assert events[-2].position == report.halted_at
    assert 0 < halts < len(asked)


def test_a_token_leaves_with_its_own_judgement_and_not_before() -> None:
    watching, tok = monitor(), toy.tokenizer()
    ids = prompts(7, seed=1)[0]
    with attach(watching, tok=tok) as m:
        events = list(m.submit(ids))
    shown = [event for event in events if event.type == "released"]
    # the first of the response has position len(ids), and the pass that judges it feeds it
    assert [event.position for event in shown] == list(range(len(ids), len(ids) + len(shown)))


def test_a_reader_may_stop_and_read_on() -> None:
    tok = toy.tokenizer()
    with attach(monitor(), tok=tok) as m:
        request = m.submit(NEVER)
        events = [next(event for event in request if event.type == "released")]
        events += list(request)
    assert text_of(events) == tok.decode(request.result(0).tokens)


def test_characters_cut_over_tokens_come_whole_and_none_is_lost() -> None:
    """Most words of this tokenizer are single bytes of characters of two to four."""
    letters = [bytes_to_unicode()[byte] for byte in "éß€😀".encode()]
    words = [*toy.WORDS[:3], *dict.fromkeys(letters), *"abcdefghijklmnopq"][: len(toy.WORDS)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, words[0]))
    backend.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = greedy(do_sample=True, top_k=0, temperature=3.0)
    cut = whole = 0
    with attach(monitor(), tok=tok, enforce=False, generation_config=config) as m:
        for request in [m.submit(ids) for ids in prompts(*[2] * 60)]:
            events = list(request)
            want = tok.decode(request.result().tokens, skip_special_tokens=True)
            assert text_of(events) == want
            cut += "\ufffd" in want
            whole += bool(set(want) & set("éß€😀"))
    assert cut
    assert whole


def test_held_text_waits_and_what_ends_on_hold_stays() -> None:
    tiers = {"moderate": Thresholds(horizon=0, halt_at=0.95, hold_at=0.5, release_at=0.3)}
    watching, tok = monitor(tiers=tiers), toy.tokenizer()
    held = 0
    with attach(watching, tok=tok) as m:
        for ids in prompts(*LENGTHS):
            request = m.submit(ids)
            events = list(request)
            report = request.result().report
            assert report is not None
            want = released(report, written(ids), watching.policy)
            assert request.result().tokens == want
            held += "HOLD" in [event.verdict for event in events]
    assert held


@pytest.mark.parametrize(("on_unscored", "leaves"), [("hold", 0), ("halt", 0), ("pass", 1)])
def test_a_token_that_was_sampled_and_never_fed_is_unscored(
    on_unscored: Any, leaves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attachment is left while the loop stands between two steps."""
    watching = monitor(on_unscored=on_unscored)
    stands, go_on = threading.Event(), threading.Event()
    before = BatchingAttachment.before_step

    def stop_there(self: BatchingAttachment) -> None:
        if any(request.response_tokens > 2 for request in self._requests.values()):
            stands.set()
            go_on.wait(120)
        before(self)

    monkeypatch.setattr(BatchingAttachment, "before_step", stop_there)
    with attach(watching) as m:
        request = m.submit(NEVER, max_new_tokens=50)
        assert stands.wait(120)
        threading.Timer(0.3, go_on.set).start()
    response, want = request.result(0), written(NEVER, 50)
    report = response.report
    assert report is not None
    assert (response.finish_reason, report.unscored) == ("cancelled", 1)
    assert response.tokens == want[: report.scored + leaves]


@pytest.mark.parametrize("hold_back", [1, 3, "turn"])
def test_tokens_that_leave_without_a_score_are_counted(
    hold_back: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, tok = monitor(on_unscored="pass", hold_back=hold_back), toy.tokenizer()
    observe, seen = Monitor.observe, itertools.count()

    def blinded(self: Monitor, tap: Tap, hidden: torch.Tensor) -> None:
        observe(self, tap, hidden if next(seen) % 3 else torch.full_like(hidden, torch.nan))

    monkeypatch.setattr(Monitor, "observe", blinded)
    with attach(watching, tok=tok) as m:
        request = m.submit(NEVER, max_new_tokens=10)
        end = list(request)[-1]
    report = request.result().report
    assert report is not None
    assert (end.type, end.delivered) == ("finished", len(request.result().tokens) or None)
    trace = report.trace
    missing = [p for p, risk in zip(trace.position, trace.risk, strict=True) if risk is None]
    assert end.delivered_unscored == sum(p >= report.prompt_tokens for p in missing) > 0


# -- requests from many threads -------------------------------------------------------------------


def test_random_requests_from_threads_bring_every_slot_back() -> None:
    watching = monitor(slots=4)
    small = batching(num_blocks=40, max_batch_tokens=16)
    results: list[tuple[list[int], int, Response]] = []
    cancelled: list[Response] = []

    def client(seed: int, m: BatchingAttachment) -> None:
        rng = random.Random(seed)
        for turn in range(8):
            ids = prompts(rng.randint(1, 20), seed=seed * 100 + turn)[0]
            limit = rng.randint(1, 14)
            request = m.submit(ids, max_new_tokens=limit)
            if rng.random() < 0.4:
                time.sleep(rng.random() * 0.02)
                request.cancel()
            response = request.result(60)
            kept = cancelled if response.finish_reason == "cancelled" else None
            kept.append(response) if kept is not None else results.append((ids, limit, response))

    with attach(watching, batching=small) as m:
        threads = [threading.Thread(target=client, args=(seed, m)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert watching.free_slots == 4
        assert not m._requests
    assert len(results) + len(cancelled) == 48
    assert results
    for ids, limit, response in results:
        check(response, ids, limit)


def test_a_cancelled_request_ends_and_its_slot_serves_the_next() -> None:
    watching, tok = monitor(slots=1), toy.tokenizer()
    assert toy.first_bad(written(NEVER, 40), (FLAGGED,)) is None
    with attach(watching, tok=tok) as m:
        first = m.submit(NEVER, max_new_tokens=40)
        waiting = m.submit([6, 7], request_id="waits")
        last = m.submit([8, 9])
        waiting.cancel()
        assert waiting.result(120) == Response([], "cancelled", None)
        assert types(list(waiting)) == ["finished"]
        seen = []
        for event in first:
            seen.append(event)
            if event.type == "released":
                first.cancel()
        assert seen[-1].message == "cancelled"
        response = first.result()
        assert response.report is not None
        assert 0 < len(response.tokens) < 40
        first.cancel()  # without effect
        check(last.result(120), [8, 9])
    assert watching.free_slots == 1


def test_leaving_the_attachment_ends_what_runs_and_what_waits() -> None:
    watching = monitor(slots=1)
    with attach(watching) as m:
        requests = [m.submit(NEVER, max_new_tokens=50) for _ in range(3)]
    assert {request.result(0).finish_reason for request in requests} <= {"cancelled", "length"}
    assert requests[2].result(0).finish_reason == "cancelled"
    assert watching.free_slots == 1
    with pytest.raises(UnsupportedGenerationError, match="the attachment was left"):
        m.submit([5])


def test_an_error_of_the_model_reaches_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, watching = toy.new_model(), monitor(slots=2)
    add, taken = seams.WatchedManager.add_request, []
    monkeypatch.setattr(
        seams.WatchedManager, "add_request", lambda *a, **k: taken.append(add(*a, **k))
    )
    calls = iter(range(100))

    def fail_at_the_fourth(*_: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("out of memory, say")

    lm.model.layers[1].register_forward_pre_hook(fail_at_the_fourth)
    with attach(watching, lm, toy.tokenizer(), enforce=False) as m:
        requests = [m.submit(ids) for ids in prompts(7, 5, 6, 4)]
        for request in requests:
            with pytest.raises(GenerationFailedError, match="out of memory, say"):
                request.result(120)
        seen = []
        with pytest.raises(GenerationFailedError):  # noqa: PT012
            for event in requests[0]:
                seen.append(event)
        assert types(seen)[-1] == "error"
        with pytest.raises(UnsupportedGenerationError, match="out of memory, say"):
            m.submit([5])
    assert len(taken) == 2  # the manager logs the ids of those that it takes no more
    assert watching.free_slots == 2
    with attach(watching, lm) as m:
        assert len(m.generate_batch([[5], [6]])) == 2


def failing_sample(patch: pytest.MonkeyPatch) -> None:
    """Sampling fails in the step in which a request was halted, after it was judged."""
    sample = ModelRunner._sample

    def fail(self: Any, scores: torch.Tensor, out: torch.Tensor) -> None:
        if torch.isinf(scores).any():
            raise RuntimeError("sampling failed, say")
        sample(self, scores, out)

    patch.setattr(ModelRunner, "_sample", fail)


def test_a_token_flagged_in_a_step_that_fails_does_not_pass_as_unscored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing_sample(monkeypatch)
    ids = prompts(*LENGTHS)[0]
    want = written(ids)
    at = toy.first_bad(want, (FLAGGED,))
    assert at
    with attach(monitor(on_unscored="pass")) as m:
        request = m.submit(ids)
        with pytest.raises(GenerationFailedError, match="sampling failed, say"):
            request.result(120)
    assert request._released == want[:at]


def test_readers_hear_of_the_end_also_when_no_slot_can_be_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the device is lost: every look at the slot table fails as the step did."""
    failing_sample(monkeypatch)
    watching = monitor(slots=2)

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(watching, "retire", lost)
    with attach(watching) as m:
        requests = [m.submit(ids) for ids in (prompts(*LENGTHS)[0], NEVER, [5], [6])]
        for request in requests:
            with pytest.raises(GenerationFailedError, match="sampling failed, say"):
                request.result(120)


def test_after_errors_at_any_step_every_request_has_ended_and_all_slots_are_free() -> None:
    lm, watching = toy.new_model(), monitor(slots=3)
    outcomes: list[str] = []

    def client(seed: int, m: BatchingAttachment) -> None:
        rng = random.Random(seed)
        for turn in range(6):
            try:
                request = m.submit(prompts(rng.randint(1, 9), seed=10 * seed + turn)[0])
                if rng.random() < 0.3:
                    request.cancel()
                outcomes.append(request.result(60).finish_reason)
            except GenerationFailedError:
                outcomes.append("failed")
            except UnsupportedGenerationError:
                outcomes.append("refused")

    for fatal in (1, 2, 5, 9):
        steps = iter(range(1000))

        def fail(*_: Any, steps: Iterator[int] = steps, fatal: int = fatal) -> None:
            if next(steps) == fatal:
                raise RuntimeError("out of memory, say")

        hook = lm.model.layers[1].register_forward_pre_hook(fail)
        with attach(watching, lm) as m:
            threads = [threading.Thread(target=client, args=(seed, m)) for seed in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        hook.remove()
        assert watching.free_slots == 3
    assert len(outcomes) == 4 * 5 * 6
    assert {"failed", "refused"} <= set(outcomes)


def test_a_name_serves_again_as_soon_as_its_request_has_ended() -> None:
    """It is asked for between the end of the cancelled one and the step that drops it."""
    watching = monitor(slots=2)
    with attach(watching) as m:
        first = m.submit(NEVER, max_new_tokens=40, request_id="mine")
        again: list[Any] = []
        close = first._close

        def ask_again() -> None:
            close()
            again.append(m.submit([5, 6], request_id="mine"))

        first._close = ask_again
        first.cancel()
        assert first.result(120).finish_reason == "cancelled"
        check(again[0].result(120), [5, 6])
        assert m.submit([5], request_id="stream-3").result(120).report.stream == "stream-3"
        m.submit(NEVER, max_new_tokens=40, request_id="stream-4")
        assert m.submit([5, 6]).id == "stream-5"  # the fourth, but the name is in use


def test_many_short_requests_leave_nothing_behind() -> None:
    rng, watching = random.Random(0), monitor(slots=8)
    kept: list[int] = []
    with attach(watching, batching=batching(max_batch_tokens=64)) as m:
        for _ in range(3):
            requests = [m.submit([rng.randint(5, 23)] * 3, max_new_tokens=1) for _ in range(200)]
            for request in requests[::5]:
                request.cancel()
            for request in requests:
                request.result(60)
                request.cancel()  # without effect
            requests.clear()
            gc.collect()
            kept.append(sum(type(thing) in (Request, RequestState) for thing in gc.get_objects()))
        assert [len(m._requests), len(m._waiting), len(m._cancelled)] == [0] * 3
    assert max(kept) <= 2 * 8 + 2  # those of the last step
    request.cancel()
    assert not m._cancelled


def test_tiers_and_priors_are_each_requests_own() -> None:
    tiers = {
        "strict": Thresholds(horizon=0, halt_at=0.0),
        "moderate": Thresholds(horizon=0, halt_at=0.5),
    }
    watching = monitor(tiers=tiers)
    with attach(watching) as m:
        strict, moderate = m.submit(NEVER, tier="strict"), m.submit(NEVER)
        known = m.submit(NEVER, prior=[0.01, 0.99])
        assert (strict.result(120).tokens, moderate.result(20).tokens) == ([], written(NEVER))
        reports = [r.result(120).report for r in (strict, moderate, known)]
        assert [report.tier for report in reports] == ["strict", "moderate", "moderate"]
        assert reports[2].verdict == "HALT"
        with pytest.raises(PolicyError, match="no tier"):
            m.submit(NEVER, tier="loose")
        with pytest.raises(ValueError, match="prior"):
            m.submit(NEVER, prior=[0.5])
    with attach(watching, tier="strict") as m:
        assert m.generate_batch([NEVER])[0].report.tier == "strict"


def test_segments_are_judged_by_their_own_thresholds() -> None:
    """Greedily the toy writes 12, 4, 18, 10, 1 over and over."""
    inside = {
        "scratch": {
            "opens": [[12]],
            "closes": [[10]],
            "tiers": {"moderate": {"horizon": 0, "halt_at": 1.0}},
        }
    }
    lm = toy.model()
    fields = {"probes": [toy.detector(lm, bad=(4, FLAGGED))], "segments": inside}
    watching = toy.monitor(lm, **fields)
    asked = prompts(*LENGTHS)
    with attach(watching) as m:
        responses = m.generate_batch(asked)
    for ids, response in zip(asked, responses, strict=True):
        with watching.attach(lm) as bare:
            lm.generate(
                torch.tensor([ids]),
                max_new_tokens=13,
                do_sample=False,
                logits_processor=[bare.halting()],
            )
        report = bare.reports[0]
        assert response.report.halted_at == report.halted_at
        assert response.report.segments == report.segments
    assert any("scratch" in response.report.segments for response in responses)


def test_a_request_may_have_its_own_temperature() -> None:
    config = greedy(do_sample=True, top_k=0, temperature=1.5)
    options = batching(per_request_processors=True, seed=3)
    with attach(monitor(), batching=options, generation_config=config, enforce=False) as m:
        cold = m.submit(NEVER, temperature=1e-4).result(120)
        assert cold.tokens == written(NEVER)
        for wrong, message in [
            ({"temperature": 0.0}, "temperature: expected 1e-5 to 1e5, got 0.0"),
            ({"temperature": 1e-39}, "temperature: expected 1e-5 to 1e5"),  # would end the loop
            ({"top_p": 0.5}, "Unknown logit_processor_kwargs"),
            ({"temperature": 1}, "has type int"),
        ]:
            with pytest.raises((ValueError, TypeError), match=message):
                m.submit(NEVER, **wrong)


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "engines.md"
    _, section = page.read_text(encoding="utf-8").split("## transformers, continuous batching")
    names: dict[str, Any] = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    assert len(names["responses"]) == len(names["texts"]) == 32
    reasons = {response.finish_reason for response in names["responses"]}
    assert reasons <= {"stop", "length", "content_filter"}
    assert names["monitor"].free_slots == 16
    assert capsys.readouterr().out.strip().endswith(names["request"].result().finish_reason)


def test_an_attachment_can_be_entered_again() -> None:
    watching = monitor()
    with attach(watching) as m:
        check(m.generate_batch([[5, 6]])[0], [5, 6])
    with m:
        check(m.generate_batch([[5, 6]])[0], [5, 6])


# -- what is refused ------------------------------------------------------------------------------


def test_a_bundle_for_another_model_is_refused() -> None:
    with pytest.raises(WrongModelError, match="wrong model"):
        attach(monitor(), toy.new_model(num_hidden_layers=3))


def test_a_model_or_a_monitor_has_one_attachment() -> None:
    lm, watching, other = toy.new_model(), monitor(), monitor()
    ids = torch.tensor([[5, 6]])
    with attach(watching, lm):
        with pytest.raises(UnsupportedGenerationError, match="watched already"):
            attach(other, lm).__enter__()
        with pytest.raises(UnsupportedGenerationError, match="watched already"):
            other.attach(lm).__enter__()
        with pytest.raises(MonitorInUseError, match="another monitor"):
            attach(watching, toy.new_model()).__enter__()
        for entry in (lm.generate, lm.generate_batch, lm.init_continuous_batching):
            with pytest.raises(UnsupportedGenerationError, match="serves a watched generation"):
                entry(ids)
        with pytest.raises(UnsupportedGenerationError, match="outside of the generation loop"):
            lm(ids)
    with other.attach(lm) as m:
        with pytest.raises(UnsupportedGenerationError, match="watched already"):
            attach(watching, lm).__enter__()
        lm.generate(ids, max_new_tokens=2, logits_processor=[m.halting()])
    full = monitor(slots=1)
    full.admit("another", 1)
    with pytest.raises(NoFreeSlotError, match="0 free slots"):
        attach(full).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph is replayed without the monitor's hooks"),
        ({"use_cuda_graph": (False, True)}, "use_cuda_graph"),
        ({"q_padding_interval_size": 64}, "are for CUDA graphs"),
        ({"default_compile_level": 1}, "what is compiled is replayed without"),
        ({"use_async_batching": True}, "runs a step ahead of the verdicts"),
        ({"return_logprobs": True}, "they would leave unjudged"),
        ({"max_queue_size": 4}, "requests wait in front of the manager"),
        (
            {"return_logprobs": True, "use_async_batching": True},
            r"use_async_batching .*; return_logprobs",
        ),
    ],
)
def test_what_would_pass_the_hooks_by_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedGenerationError, match=message):
        attach(monitor(), batching=batching(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "submit the prompt several times"),
        ({"num_beams": 2}, "leave num_beams"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"stop_strings": ["w7"]}, "stop_strings: continuous batching ignores it"),
        ({"eos_token_id": -1}, "no eos_token_id"),
        ({"max_length": 20, "max_new_tokens": None}, "max_length: .* give max_new_tokens"),
        ({"eos_token_id": [EOS, -1]}, r"eos_token_id has \[-1\]: expected 0 to 23"),
        ({"eos_token_id": 24}, r"eos_token_id has \[24\]"),
        ({"max_time": 1.0, "guidance_scale": 2.0}, r"guidance_scale .*; max_time"),
    ],
)
def test_generation_that_cannot_be_watched_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedGenerationError, match=message):
        attach(monitor(), generation_config=greedy(**options))


def test_another_version_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The module's own reference: transformers replaces itself in sys.modules when it is loaded.
    monkeypatch.setattr("midstream.engines.hf.manager.transformers.__version__", "5.24.0")
    with pytest.raises(UnsupportedGenerationError, match=r"5\.24\.0.*install 'transformers==5\.23"):
        attach(monitor())


def test_requests_that_cannot_be_served_are_refused() -> None:
    watching = monitor(slots=1)
    with attach(watching, batching=batching(num_blocks=5)) as m:
        room = m._room
        assert 4 <= room < toy.WINDOW
        for prompt, options, message in [
            ([], {}, "prompt is empty"),
            ([5, 6.0], {}, "neither a text, nor chat messages, nor token ids"),
            ([5], {"request_id": 7}, "request_id: expected a str, got 7"),
            ([5] * room, {}, f"room for {room}; shorten it"),
            ([24], {}, r"ids \[24\], expected 0 to 23"),
            ([5, -1], {}, r"ids \[-1\]"),
            ([5], {"max_new_tokens": 0}, "expected at least 1, got 0"),
            ("w7", {}, "needs the tokenizer"),
        ]:
            with pytest.raises(UnsupportedGenerationError, match=message):
                m.submit(prompt, **options)
        with pytest.raises(UnsupportedGenerationError, match="without a tokenizer"):
            list(m.submit([5]))
        m.submit(NEVER)
        waiting = m.submit([5], request_id="mine")
        with pytest.raises(UnsupportedGenerationError, match="'mine' is there already"):
            m.submit([5], request_id="mine")
        waiting.result(120)
        response = m.submit(NEVER, max_new_tokens=50).result(120)
        assert (response.finish_reason, len(response.tokens)) == ("length", room - len(NEVER))
    assert watching.free_slots == 1


def test_the_window_ends_a_response() -> None:
    ids = [9] * (toy.WINDOW - 3)
    with attach(monitor(), enforce=False) as m:
        response = m.submit(ids, max_new_tokens=50).result(120)
        assert (response.finish_reason, len(response.tokens)) == ("length", 3)
        with pytest.raises(UnsupportedGenerationError, match="has 64 tokens"):
            m.submit([9] * toy.WINDOW)


def test_a_layer_that_runs_twice_is_refused() -> None:
    lm = toy.new_model()
    lm.model.layers[1] = lm.model.layers[0]
    tap = Tap(0, "resid_post")
    probe = Probe("x", "x", tap, torch.zeros(32), 0.0)
    watching = toy.monitor(lm, probes=[probe])
    with attach(watching, lm) as m, pytest.raises(GenerationFailedError, match="run once"):
        m.submit([5, 6]).result(120)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(implementation: str) -> None:
    lm, asked = toy.new_model(), prompts(*LENGTHS)
    lm.set_attn_implementation(implementation)
    with attach(monitor(lm), lm) as m:
        for response, ids in zip(m.generate_batch(asked), asked, strict=True):
            check(response, ids)
    assert lm.config._attn_implementation == implementation


def test_verdicts_that_only_the_device_can_see_halt_alike() -> None:
    """On a GPU the host does not look at them before it samples."""
    asked = prompts(*LENGTHS)
    with attach(monitor()) as m:
        m._streams._on_host = False
        seen = [check(r, ids) for r, ids in zip(m.generate_batch(asked), asked, strict=True)]
    assert 0 < sum(seen) < len(seen)


def test_a_manager_that_cannot_be_made_leaves_no_trace() -> None:
    lm, watching = toy.new_model(), monitor()
    lm.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="page_size"):
        attach(watching, lm, batching=batching(page_size=2)).__enter__()
    assert lm.config._attn_implementation == "eager"
    assert "generate" not in vars(lm)
    assert not any(module._forward_hooks for module in lm.modules())
    with attach(watching, lm) as m:
        assert len(m.generate_batch([[5]])) == 1
