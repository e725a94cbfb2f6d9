"""vLLM's own schedulers with the plugin's on top, one step and two steps deep, without a model.

Two deep is asynchronous scheduling, which the CPU build switches off: a step is scheduled before
the one before it is back.
"""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from midstream import testbed
from midstream.engines.vllm.checks import check_config
from midstream.engines.vllm.scheduler import MonitoredAsyncScheduler, MonitoredScheduler
from midstream.engines.vllm.settings import (
    KEY,
    PROCESSOR,
    SCHEDULER,
    WORKER,
    UnsupportedEngineError,
)
from midstream.engines.vllm.watch import JUDGEMENTS
from midstream.kernels.tables import Verdict

RUNNING, BLOCK, BLOCKS = 4, 16, 14


def configuration(bundle=testbed.BUNDLE_DIR):
    return EngineArgs(
        model=str(testbed.MODEL_DIR),
        dtype="float32",
        worker_cls=WORKER,
        scheduler_cls=SCHEDULER,
        logits_processors=[PROCESSOR],
        additional_config={KEY: {"bundle": str(bundle)}},
        max_num_seqs=RUNNING,
        max_num_batched_tokens=24,
        max_model_len=128,
        block_size=BLOCK,
        enable_prefix_caching=False,
    ).create_engine_config()


def scheduler(*, ahead=False, **options):
    config = configuration(**options)
    config.scheduler_config.async_scheduling = ahead
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    built = MonitoredScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    assert isinstance(built, MonitoredAsyncScheduler) == ahead
    return built


def token(request, position):
    """What the model writes there; never an end of sequence."""
    return 10 + random.Random(f"{request} {position}").randrange(100)


class Worker:
    """Judges and samples as a worker would, from what it is sent; knows no more."""

    def __init__(self, halts, *, scores=True):
        self.halts, self.scores = halts, scores
        self.known, self.most = {}, 0

    def run(self, step):
        for request in step.finished_req_ids:
            self.known.pop(request, None)
        first = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        self.known |= {n.req_id: len(n.prompt_token_ids) for n in step.scheduled_new_reqs}
        self.most = max(self.most, len(self.known))
        cached = step.scheduled_cached_reqs
        first |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled, judgements = [], {}
        for request, rows in step.num_scheduled_tokens.items():
            last = first[request] + rows - 1
            halts = self.halts.get(request, last + 1) <= last
            verdict = Verdict.HALT if halts else Verdict.CONTINUE
            unscored = 0 if self.scores else last + 1
            judgements[request] = (last, int(verdict), 0.5, None, unscored)
            whole = last + 1 == self.known[request]
            self.known[request] += whole
            sampled.append([token(request, last + 1)] if whole else [])
        requests = list(step.num_scheduled_tokens)
        output = ModelRunnerOutput(requests, {r: n for n, r in enumerate(requests)}, sampled)
        setattr(output, JUDGEMENTS, judgements)
        return output


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "a step ahead"])
@pytest.mark.parametrize("seed", range(5))
def test_streams_under_pressure(seed, ahead):
    """Prompts in chunks, preemptions, halts, leavers: each gets its own tokens, and no others."""
    draw = random.Random(seed)
    engine = scheduler(ahead=ahead)
    asked, halts, left = {}, {}, set()
    worker = Worker(halts)
    got, ends = {}, {}
    way, preempted, waiting = deque(), 0, 60
    while waiting or engine.has_requests() or way:
        if waiting and draw.random() < 0.5:
            waiting -= 1
            name = f"r{waiting}"
            prompt, limit = draw.randrange(1, 60), draw.randrange(1, 60)
            params = SamplingParams(max_tokens=limit)
            request = Request(name, [1] * prompt, params, None)
            asked[name] = prompt, limit
            if draw.random() < 0.5:
                halts[name] = draw.randrange(prompt + limit)
            engine.add_request(request)
        if draw.random() < 0.05 and asked.keys() - ends.keys():
            name = draw.choice(sorted(asked.keys() - ends.keys()))
            engine.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            ends[name] = None
            left.add(name)
        step = engine.schedule()
        preempted += len(step.preempted_req_ids or ())
        way.append((step, worker.run(step)))
        while len(way) > ahead or (way and not step.total_num_scheduled_tokens):
            for client in engine.update_from_output(*way.popleft()).values():
                for output in client.outputs:
                    got.setdefault(output.request_id, []).extend(output.new_token_ids)
                    if output.finish_reason is not None:
                        ends[output.request_id] = output
    assert preempted
    assert not engine._held
    assert worker.most <= RUNNING  # slots
    for name, (prompt, limit) in asked.items():
        last = min(halts.get(name, prompt + limit), prompt + limit)
        written = [token(name, position) for position in range(prompt, last)]
        if name in left:
            assert got.get(name, []) == written[: len(got.get(name, []))]
            continue
        assert got.get(name, []) == written
        halted = halts.get(name, prompt + limit) < prompt + limit
        assert ends[name].finish_reason == (FinishReason.STOP if halted else FinishReason.LENGTH)
        assert ends[name].stop_reason == (engine._halt_reason if halted else None)


def test_unscored_tokens_of_a_stream_whose_client_left_are_counted(tmp_path, logged):
    bundle = testbed.load_bundle()
    policy = bundle.policy.model_copy(update={"on_unscored": "pass"})
    bundle.with_policy(policy).save(tmp_path / "bundle")
    engine, worker = scheduler(bundle=tmp_path / "bundle"), Worker({}, scores=False)
    engine.add_request(Request("r", [1] * 3, SamplingParams(max_tokens=9), None))
    for _ in range(4):
        step = engine.schedule()
        engine.update_from_output(step, worker.run(step))
    engine.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    (event,) = logged
    assert (event["delivered"], event["delivered_unscored"]) == (3, 3)
    assert event["message"] == "abort"


def test_what_would_pass_the_monitor_by_is_refused(monkeypatch):
    config = configuration()
    check_config(config)
    config.weight_transfer_config = object()
    with pytest.raises(UnsupportedEngineError, match="--weight-transfer-config"):
        check_config(config)
    config.weight_transfer_config = None
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedEngineError, match="VLLM_USE_RUST_FRONTEND=1"):
        check_config(config)
