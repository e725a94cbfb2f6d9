"""The SGLang adapter in a stand-in of SGLang: it decides as the transformers engine does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import sglang_standin as standin
import torch
import toy
from sglang_standin import Engine, ServerArgs
from transformers import LogitsProcessor

from midstream.bank import Probe
from midstream.bundle import Bundle, WrongModelError
from midstream.engines.sglang import Front, UnsupportedEngineError, server_arguments, watched
from midstream.engines.sglang import hooks as hooks_module
from midstream.engines.sglang.arguments import UNTRIED
from midstream.monitor import Monitor
from midstream.policy import PolicyError, Thresholds
from midstream.streams import StreamReport
from midstream.taps import Tap

STOP = toy.PAD
"""Token that is reserved for halts."""
BADS = (toy.BAD, 9)
NEW = 14


class Noise(LogitsProcessor):
    """Makes generate sample as the stand-in does."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + standin.gumbel(self.seed, ids.shape[1], scores.shape[1])


def make_bundle(**fields: Any) -> Bundle:
    """Probes at the embedding, which decides, and where two parts have to be added."""
    lm = toy.model()
    generator = torch.Generator().manual_seed(1)
    idle = [
        Probe(
            name=f"idle-{i}",
            hazard="idleness",
            tap=tap,
            weight=torch.randn(32, generator=generator) / 32,
            bias=-30.0,
        )
        for i, tap in enumerate([Tap(0, "resid_post"), Tap(1, "resid_pre"), Tap(1, "resid_post")])
    ]
    fields = {"on_unscored": "halt", "probes": [toy.detector(lm, BADS), *idle], **fields}
    return toy.bundle(lm, **fields)


class World:
    """A server of the stand-in with the monitor in it, and what the monitor reported."""

    def __init__(self, monkeypatch: Any, folder: Path, bundle: Bundle, **options: Any) -> None:
        bundle.save(folder)
        self.policy = bundle.policy
        parser = argparse.ArgumentParser()
        parser.add_argument("--forward-hooks", type=json.loads)
        parser.add_argument("--max-running-requests", type=int)
        parser.add_argument("--enable-custom-logit-processor", action="store_true")
        parser.add_argument("--disable-cuda-graph", action="store_true")
        given = server_arguments(folder, stop_id=STOP, max_running_requests=8)
        args = ServerArgs(**{**vars(parser.parse_args(given)), **options})
        monkeypatch.setenv(UNTRIED, "1")
        standin.install(monkeypatch, args)
        self.reports: dict[str, StreamReport] = {}
        monkeypatch.setattr(hooks_module, "_tell", self._report)
        monkeypatch.setattr(hooks_module, "_watch", None)
        self.engine = Engine(toy.model(), args)
        self.monitor = hooks_module.watch().monitor

    def _report(self, report: StreamReport) -> None:
        assert report.stream not in self.reports
        self.reports[report.stream] = report

    def ask(self, rid: str, prompt: list[int], **body: Any) -> standin.Req:
        seed = int(rid[1:]) if rid in ASKED else 0
        sampling = {"max_new_tokens": NEW, "sampling_seed": seed, **body.pop("sampling_params", {})}
        tier = body.pop("tier", None)
        request = watched(
            {**body, "sampling_params": sampling}, self.policy, stop_id=STOP, tier=tier
        )
        return self.engine.add(rid, prompt, request)

    def finish(self) -> None:
        """Run to the end, and one pass more, with which the last slots come back."""
        self.engine.run()
        self.engine.idle()
        assert self.monitor.free_slots == len(self.monitor.slots.position)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def make(bundle: Bundle | None = None, **options: Any) -> World:
        return World(monkeypatch, tmp_path / "bundle", bundle or make_bundle(), **options)

    return make


def prompts(count: int, seed: int = 0) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    words = [w for w in range(5, 24) if w not in BADS]
    return {
        f"r{i}": [toy.BOS, *(words[int(x)] for x in torch.randint(
            len(words), (int(torch.randint(3, 12, (1,), generator=generator)),),
            generator=generator))]
        for i in range(count)
    }  # fmt: skip


class Hf:
    """What the transformers engine makes of the same prompts."""

    def __init__(self, asked: dict[str, list[int]], bundle: Bundle | None = None) -> None:
        lm = toy.model()
        monitor = Monitor(bundle or make_bundle(), slots=1, trace=64)
        self.reports: dict[str, StreamReport] = {}
        self.released: dict[str, list[int]] = {}
        self.sampled: dict[str, list[int]] = {}
        with monitor.attach(lm) as m:
            for rid, prompt in asked.items():
                ids = torch.tensor([prompt])
                out = lm.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    suppress_tokens=[STOP],
                    logits_processor=[Noise(int(rid[1:])), m.halting()],
                )
                self.reports[rid] = m.reports[0]
                self.released[rid] = m.released(out)[0].tolist()
                self.sampled[rid] = m.responses(out)[0]


def check_same(world: World, asked: dict[str, list[int]], reqs: dict[str, Any], hf: Hf) -> None:
    for rid, want in hf.reports.items():
        got, req = world.reports[rid], reqs[rid]
        ends = (STOP, toy.EOS)
        assert toy.before_end(req.output_ids, ends) == hf.sampled[rid]
        # The overlap scheduler also feeds the last token of a stream that has ended.
        fed_late = got.halted_at == len(asked[rid]) + len(req.output_ids) - 1
        assert not (fed_late and world.engine.args.disable_overlap_schedule)
        if not fed_late:
            assert got.verdict == want.verdict
            assert (got.halted_at, got.cause) == (want.halted_at, want.cause)
        # SGLang counts before it looks for the end token.
        at_the_limit = len(req.output_ids) == NEW and got.verdict != "HALT"
        reason = "length" if at_the_limit else want.finish_reason
        assert got.finish_reason == reason
        rows = {position: row for row, position in enumerate(got.trace.position)}
        for i, position in enumerate(want.trace.position):
            if position < len(asked[rid]) - 1:
                continue  # it may have come out of the cache
            for name, scores in want.trace.scores.items():
                scored = got.trace.scores[name][rows[position]]
                assert scored == pytest.approx(scores[i], abs=2e-4), (rid, name, position)
            assert got.trace.verdict[rows[position]] == want.trace.verdict[i]
        # One id at a time, as a client that streams gets them.
        front, left = Front(world.policy, STOP), []
        end = req.finished_reason.to_json()
        for i, token in enumerate(req.output_ids, start=1):
            left += front.take([token], end if i == len(req.output_ids) else None)
        assert left == hf.released[rid]
        assert front.finish_reason == reason
        assert Front(world.policy, STOP).take(req.output_ids, end) == left


ASKED = prompts(14)


@pytest.fixture(scope="module")
def hf() -> Hf:
    return Hf(ASKED)


def test_the_prompts_try_halts_and_other_ends(hf: Hf) -> None:
    verdicts = [report.verdict for report in hf.reports.values()]
    assert verdicts.count("HALT") >= 4
    assert verdicts.count("CONTINUE") >= 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disable_overlap_schedule": False},
        {"chunked_prefill_size": 3},
        {"chunked_prefill_size": 5, "enable_mixed_chunk": True},
        {"chunked_prefill_size": 4, "enable_mixed_chunk": True, "disable_overlap_schedule": False},
    ],
    ids=["plain", "overlap", "chunked", "mixed", "mixed-overlap"],
)
def test_streams_halt_where_they_halt_in_transformers(
    world: Any, hf: Hf, options: dict[str, Any]
) -> None:
    w = world(**options)
    reqs = {rid: w.ask(rid, prompt) for rid, prompt in ASKED.items()}
    w.finish()
    check_same(w, ASKED, reqs, hf)
    if options.get("enable_mixed_chunk"):
        assert "MIXED" in w.engine.modes
    if not options:
        for rid, report in w.reports.items():
            assert (report.scored, report.unscored) == (
                hf.reports[rid].scored,
                hf.reports[rid].unscored,
            )


def test_a_retracted_stream_goes_on_where_it_was(world: Any, hf: Hf) -> None:
    w = world()
    reqs = {rid: w.ask(rid, prompt) for rid, prompt in ASKED.items()}
    w.engine.radix = Forgetful()  # so that everything is computed again
    for _ in range(5):
        w.engine.step()
        if len(w.engine.running) > 1:
            w.engine.retract(w.engine.running[-1])
    w.finish()
    check_same(w, ASKED, reqs, hf)


class Forgetful(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        return


def test_a_prefix_out_of_the_radix_cache_is_a_gap(world: Any, hf: Hf) -> None:
    w = world()
    for name in ("first", "second"):
        reqs = {rid: w.ask(rid, prompt) for rid, prompt in ASKED.items()}
        w.finish()
        check_same(w, ASKED, reqs, hf)
        hits = w.engine.prefix_hits
        if name == "first":
            w.reports.clear()
    assert hits >= len(ASKED)


def test_a_cached_prompt_that_probes_read_counts_as_unscored(world: Any) -> None:
    probe = toy.detector(toy.model(), BADS, reads="prompt", name="prompt")
    w = world(make_bundle(probes=[toy.detector(toy.model(), BADS), probe], on_unscored="pass"))
    prompt = ASKED["r0"]
    for rid in ("cold", "warm"):
        w.ask(rid, prompt)
        w.engine.run()
    w.finish()
    cold, warm = w.reports["cold"], w.reports["warm"]
    assert warm.unscored == cold.unscored + len(prompt) - 1
    assert warm.scored == cold.scored - (len(prompt) - 1)


def test_rows_of_other_streams_keep_their_bits(world: Any) -> None:
    w = world(make_bundle(tiers={"moderate": Thresholds(horizon=0, halt_at=1.0)}))
    bare = Engine(toy.model(), ServerArgs())
    for rid, prompt in ASKED.items():
        w.ask(rid, prompt)
        never = {str(STOP): -torch.inf}
        seed = int(rid[1:])
        bare.add(rid, prompt, {"sampling_params": {"logit_bias": never, "sampling_seed": seed}})
    for _ in range(6):
        w.engine.step()
        bare.step()
        assert torch.equal(w.engine.logits, bare.logits)


def test_requests_without_the_processor_write_nothing(world: Any, caplog: Any) -> None:
    w = world()
    bare = w.engine.add("bare", ASKED["r0"], {})
    ours = w.ask("r1", ASKED["r1"])
    w.engine.run()
    assert set(bare.output_ids) == {STOP}
    assert STOP not in ours.output_ids[:1]
    assert "no monitor could watch" in caplog.text


@pytest.mark.parametrize("what", ["tier", "stop", "slots"])
def test_requests_that_cannot_be_watched_are_turned_away(
    world: Any, caplog: Any, what: str
) -> None:
    w = world()
    request = watched({}, w.policy, stop_id=STOP)
    if what == "tier":
        request["sampling_params"]["custom_params"] = {"midstream_tier": "loose"}
    elif what == "stop":
        request["sampling_params"]["stop_token_ids"] = [7]
    else:
        taken = [w.monitor.admit(f"s{i}", 1) for i in range(w.monitor.free_slots)]
    req = w.engine.add("turned", ASKED["r0"], request)
    w.engine.step()
    assert req.output_ids == [STOP]
    assert "turned away" in caplog.text
    w.engine.run()
    if what == "slots":
        for slot in taken:
            w.monitor.retire(slot)
    w.finish()
    assert "turned" not in w.reports


def test_streams_that_are_dropped_while_they_wait_give_their_slots_back(world: Any) -> None:
    w = world()
    req = w.ask("dropped", ASKED["r0"])
    w.engine.step()
    w.engine.step()
    w.engine.retract(req)
    w.engine.waiting.remove(req)
    w.engine.pending = None
    w.engine.model.zero_grad()
    req.sampling_params.custom_params = None  # SGLang's cycle
    del req
    w.finish()
    assert w.reports["dropped"].finish_reason == "abort"
    assert w.reports["dropped"].unscored == 1


def test_a_request_may_have_the_name_of_one_that_has_just_ended(world: Any, hf: Hf) -> None:
    w = world()
    halted = next(rid for rid, report in hf.reports.items() if report.verdict == "HALT")
    w.ask("again", ASKED[halted])
    w.engine.run()
    first = w.monitor.free_slots
    w.ask("again", ASKED["r0"])
    w.engine.step()  # retires the first, admits the second
    assert w.monitor.free_slots == first
    assert w.reports.pop("again").prompt_tokens == len(ASKED[halted])
    w.finish()
    report = w.reports["again"]
    assert report.prompt_tokens == len(ASKED["r0"])
    assert report.scored + report.unscored >= 1


def test_idle_passes_do_nothing(world: Any) -> None:
    w = world()
    w.engine.idle()
    assert w.monitor.observed_rows == 0


# What is refused.


def test_a_replayed_pass_is_found_out(world: Any) -> None:
    w = world()
    w.engine.replays = True
    w.ask("r0", ASKED["r0"])
    w.engine.step()
    with pytest.raises(UnsupportedEngineError, match="r0 are sampled and their forward pass was"):
        w.engine.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda specs: specs.pop(3), "no rows were read at resid_post.0"),
        (lambda specs: specs.append(specs[3]), "resid_post.0 was read twice"),
    ],
)
def test_taps_that_are_not_read_once_are_found_out(
    world: Any, change: Any, message: str, monkeypatch: Any
) -> None:
    made = standin.register_forward_hooks

    def register(model: Any, specs: Any) -> None:
        specs = list(specs)
        change(specs)
        made(model, specs)

    monkeypatch.setattr(standin, "register_forward_hooks", register)
    w = world()
    w.ask("r0", ASKED["r0"])
    with pytest.raises(UnsupportedEngineError, match=message):
        w.engine.step()


def test_a_mode_of_speculative_decoding_is_refused(world: Any) -> None:
    world()
    batch = standin.ForwardBatch(
        standin.ForwardMode.TARGET_VERIFY, None, None, None, None, None, [], []
    )
    with pytest.raises(UnsupportedEngineError, match="in mode TARGET_VERIFY"):
        hooks_module.watch().begin(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"disable_cuda_graph": False}, "replays without hooks; expected True"),
        ({"enable_custom_logit_processor": False}, "nothing is halted"),
        ({"enable_torch_compile": True}, "compiled code skips hooks"),
        ({"speculative_algorithm": "EAGLE"}, "feeds tokens that are thrown away; expected None"),
        ({"tp_size": 2}, "tp_size=2: nobody tried .*; expected 1"),
        ({"pp_size": 2}, "in a pipeline no process"),
        ({"enable_dp_attention": True}, "splits rows over ranks"),
        ({"enable_two_batch_overlap": True}, "two interleaved passes"),
        ({"enable_lora": True}, "an adapter changes"),
        ({"disaggregation_mode": "decode"}, "computed elsewhere"),
        ({"max_running_requests": None}, "each stream needs a slot"),
        ({"pp_size": 2, "enable_lora": True}, "pp_size=2: .*; enable_lora=True: "),
    ],
)
def test_server_arguments_that_cannot_be_watched_are_refused(
    world: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=message):
        world(**change)


def test_the_engine_is_refused_until_someone_says_that_it_was_tried(
    monkeypatch: Any, tmp_path: Path
) -> None:
    make_bundle().save(tmp_path / "bundle")
    standin.install(monkeypatch, ServerArgs())
    monkeypatch.delenv(UNTRIED, raising=False)
    with pytest.raises(UnsupportedEngineError, match="never run against the engine itself"):
        hooks_module.begin({"bundle": str(tmp_path / "bundle"), "stop_id": STOP})


def test_a_server_without_the_hooks_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(hooks_module, "_watch", None)
    engine = Engine(toy.model(), ServerArgs())
    engine.add("r0", ASKED["r0"], watched({}, make_bundle().policy, stop_id=STOP))
    with pytest.raises(UnsupportedEngineError, match="without the monitor's hooks"):
        engine.step()


def test_a_bundle_for_another_model_is_refused(world: Any) -> None:
    w = world()
    other = toy.new_model()
    other.model.embed_tokens.weight.data += 1.0
    engine = Engine(other, w.engine.args)
    engine.add("r0", ASKED["r0"], watched({}, w.policy, stop_id=STOP))
    with pytest.raises(WrongModelError, match="weights_sha256"):
        engine.step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_unscored": "hold"}, "tell the front end of a halt only"),
        (
            {"tiers": {"moderate": Thresholds(horizon=0, halt_at=0.5, hold_at=0.2)}},
            "tell the front end of a halt only",
        ),
        (
            {"segments": {"reasoning": {"opens": [[20]], "closes": [[21]]}}},
            "segments are not told apart",
        ),
        (
            {"probes": [toy.detector(toy.model(), tap=Tap(0, "resid_mid"))]},
            "resid_mid.0: SGLang adds attention",
        ),
    ],
)
def test_bundles_that_the_seams_cannot_serve_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    make_bundle(**fields).save(tmp_path / "bundle")
    with pytest.raises(UnsupportedEngineError, match=message):
        server_arguments(tmp_path / "bundle", stop_id=STOP, max_running_requests=8)


@pytest.mark.parametrize(
    "body",
    [
        {"custom_logit_processor": "{}"},
        {"input_embeds": [[0.0]]},
        {"return_logprob": True},
        {"sampling_params": {"ignore_eos": True}},
        {"sampling_params": {"custom_params": {"a": 1}}},
        {"sampling_params": {"regex": "a+"}},
        {"sampling_params": {"n": 2}},
        {"sampling_params": [{}, {}]},
        {"sampling_params": {"stop_token_ids": [STOP]}},
        {"sampling_params": {"logit_bias": {str(STOP): 1.0}}},
    ],
)
def test_requests_with_more_than_a_prompt_and_sampling_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedEngineError, match="a watched request is one stream with"):
        watched(body, make_bundle().policy, stop_id=STOP)


def test_a_tier_is_checked_and_passed_on() -> None:
    tiers = {
        "strict": Thresholds(horizon=0, halt_at=0.2),
        "moderate": Thresholds(horizon=0, halt_at=0.5),
    }
    policy = make_bundle(tiers=tiers).policy
    asked = watched({"text": "a"}, policy, stop_id=STOP, tier="strict")
    assert asked["sampling_params"]["custom_params"] == {"midstream_tier": "strict"}
    assert asked["text"] == "a"
    with pytest.raises(PolicyError):
        watched({}, policy, stop_id=STOP, tier="loose")
