"""The vLLM plugin's watch, on stand-ins of a model runner and its scheduler: rows and streams."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy

from midstream.engines.vllm.runner import Batch
from midstream.engines.vllm.settings import UnsupportedEngineError
from midstream.engines.vllm.watch import Watch
from midstream.kernels.tables import Verdict
from midstream.policy import PolicyError

EMBEDDING = toy.model().get_input_embeddings().weight.detach()


class FakeEngine:
    """Feeds given tokens as vLLM would: in chunks, in any order, some of them twice."""

    def __init__(self, slots=8, agree=None, **fields):
        self.monitor = toy.monitor(slots=slots, **fields)
        self.watch = Watch(self.monitor, self, toy.EOS, agree)
        self.finished = set()

    def attach(self, taps, read):
        self.taps, self.read = taps, read

    def batch(self, scheduler_output):
        return self.ran

    def processors(self):
        return []

    def step(self, work, new=(), padding=0):
        """Feed ``{request: (first position, tokens)}``; return the judgements."""
        output = SimpleNamespace(
            finished_req_ids=self.finished,
            scheduled_new_reqs=new,
            total_num_scheduled_tokens=sum(len(tokens) for _, tokens in work.values()),
        )
        self.finished = set()
        fed = torch.tensor([token for _, tokens in work.values() for token in tokens]).long()
        self.ran = Batch(
            list(work),
            np.array([len(tokens) for _, tokens in work.values()], dtype=np.int32),
            np.array([first for first, _ in work.values()], dtype=np.int32),
            fed,
        )
        with self.watch.step(output):
            if not work:
                return {}  # neither fed nor sampled
            for tap in self.taps:
                rows = torch.cat([fed, torch.full((padding,), toy.BAD)])
                self.read(tap, EMBEDDING[rows])
        return self.watch.judge(output)()

    def finish(self, *requests):
        self.finished.update(requests)


def new(request, prompt, tier=None):
    extra = None if tier is None else {"midstream_tier": tier}
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(req_id=request, prompt_token_ids=prompt, sampling_params=params)


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_judged_under_its_own_stream(seed):
    """Chunked prompts, shuffled batches, recomputed prefixes and padding, all at once."""
    draw = random.Random(seed)
    engine = FakeEngine()
    prompts = {f"r{n}": [draw.randint(5, 22) for _ in range(draw.randint(1, 12))] for n in range(8)}
    responses = {
        name: [draw.choices(range(5, 23), k=1)[0] for _ in range(draw.randint(3, 15))]
        for name in prompts
    }
    for name in list(responses)[::2]:
        responses[name][draw.randrange(len(responses[name]))] = toy.BAD
    computed = dict.fromkeys(prompts, 0)
    seen = set()
    halted = {}
    while computed:
        work, fresh = {}, []
        for name in draw.sample(list(computed), draw.randint(1, len(computed))):
            text = prompts[name] + responses[name]
            if name not in seen:
                fresh.append(new(name, prompts[name]))
                seen.add(name)
            elif draw.random() < 0.15:
                computed[name] = 0  # preempted, and fed again from the start
            first = computed[name]
            known = max(len(prompts[name]), first + 1)  # what was sampled so far
            chunk = text[first : min(known, first + draw.randint(1, 6))]
            work[name] = (first, chunk)
            computed[name] += len(chunk)
        judged = engine.step(work, fresh, padding=draw.randint(0, 3))
        for name, (position, verdict, *_) in judged.items():
            assert position == computed[name] - 1
            if verdict == Verdict.HALT and name not in halted:
                halted[name] = position
        for name in [n for n in computed if computed[n] == len(prompts[n] + responses[n])]:
            del computed[name]
            engine.finish(name)
    engine.step({}, ())
    expected = {
        name: len(prompts[name]) + at
        for name, response in responses.items()
        if (at := toy.first_bad(response)) is not None
    }
    assert halted == expected
    status = engine.watch.status()
    assert status["free"] == status["slots"] == 8
    assert status["scored"] == sum(map(len, responses.values()))
    assert (status["retired"], status["halted"], status["unscored"]) == (8, len(expected), 0)


def test_a_prefix_from_the_cache_is_a_gap():
    probe = toy.detector(toy.model(), reads="prompt", name="prompt")
    engine = FakeEngine(probes=[toy.detector(toy.model()), probe])
    engine.step({"a": (6, [9])}, [new("a", [9] * 7)])
    engine.finish("a")
    engine.step({})
    assert engine.watch.status()["unscored"] == 6


def test_judgements_say_how_many_rows_had_no_score():
    engine = FakeEngine(on_unscored="pass")
    read = engine.read
    engine.step({"a": (0, [7])}, [new("a", [7])])
    counts = []
    for position, missing in enumerate([False, True, False, True], start=1):
        engine.read = lambda tap, rows, m=missing: read(tap, rows * float("nan") if m else rows)
        counts.append(engine.step({"a": (position, [8])})["a"][4])
    assert counts == [0, 1, 1, 2]


def test_the_rank_that_decides_is_heard_before_a_row_is_halted_or_told():
    engine = FakeEngine(agree=lambda: engine.monitor.slots.verdict.fill_(int(Verdict.HALT)))
    judged = engine.step({"a": (0, [7])}, [new("a", [7])])
    assert judged["a"][1] == Verdict.HALT
    assert engine.watch.force_end(torch.randn(1, 24)).argmax() == toy.EOS


def test_only_halted_rows_are_forced_to_end():
    engine = FakeEngine()
    engine.step({"a": (0, [7]), "b": (0, [7]), "c": (0, [7])}, [new(n, [7]) for n in "abc"])
    engine.step({"c": (1, [8]), "a": (1, [toy.BAD]), "b": (1, [9])})
    logits = torch.randn(3, 24)
    before = logits.clone()
    after = engine.watch.force_end(logits)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].argmax() == toy.EOS
    assert torch.isneginf(after[1]).sum() == 23
    with pytest.raises(UnsupportedEngineError, match="4 rows of logits for 3 requests"):
        engine.watch.force_end(torch.randn(4, 24))
    engine.watch.sampled()
    assert torch.equal(engine.watch.force_end(before.clone()), before)  # a dummy run


def test_a_stream_that_is_scheduled_again_keeps_its_slot():
    """The newer runner sends a resumed request as if it were new."""
    engine = FakeEngine(slots=1)
    engine.step({"a": (0, [7, 8])}, [new("a", [7])])
    judged = engine.step({"a": (0, [7, 8, toy.BAD])}, [new("a", [7])])
    assert judged["a"][1] == Verdict.HALT
    engine.finish("a", "never scheduled")
    engine.step({"b": (0, [7])}, [new("b", [7])])
    assert engine.watch.status()["streams"] == 1


def test_a_segment_is_followed_once():
    """Also where its tokens are fed again after a preemption."""
    segments = {"thought": {"opens": [[10]], "closes": [[11]]}}

    def reports(chunks):
        engine = FakeEngine(segments=segments)
        engine.monitor.recognise_segments()
        text = [7, 10, 8, 9, 11, 12]
        engine.step({"a": (0, text[:1])}, [new("a", text[:1])])
        for first, last in chunks:
            engine.step({"a": (first, text[first:last])})
        return engine.monitor.retire(0).segments

    straight = [(n, n + 1) for n in range(1, 6)]
    again = [*straight[:3], (0, 5), straight[4]]
    assert reports(again) == reports(straight)
    assert {name: part.scored for name, part in reports(straight).items()} == {
        "thought": 4,
        "answer": 1,
    }


def test_rows_that_were_not_read_are_refused():
    engine = FakeEngine()
    engine.taps = ()
    with pytest.raises(UnsupportedEngineError, match="0 rows were read of a step of 1"):
        engine.step({"a": (0, [7])}, [new("a", [7])])


def test_a_pass_that_fails_leaves_nothing_behind():
    engine = FakeEngine()
    read = engine.read

    def fail(tap, hidden):
        read(tap, hidden)
        raise RuntimeError("out of memory")

    engine.read = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step({"a": (0, [toy.BAD] * 3)}, [new("a", [7])])
    assert engine.monitor.observed_rows == 0
    read(engine.taps[0], EMBEDDING[[5]])  # the engine profiles itself
    assert engine.monitor.observed_rows == 0


def test_an_unknown_tier_is_refused():
    with pytest.raises(PolicyError, match="no tier 'lax'"):
        FakeEngine().step({"a": (0, [7])}, [new("a", [7], tier="lax")])
