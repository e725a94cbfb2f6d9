"""Which tokens leave the scheduler with which output, on vLLM's own output type."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from midstream import testbed
from midstream.engines.vllm.frontend import stop_reason
from midstream.engines.vllm.scheduler import MonitoredScheduler, _Held
from midstream.kernels.tables import Verdict
from midstream.streams import Session

PROMPT = 5
GO, HOLD, HALT = Verdict.CONTINUE, Verdict.HOLD, Verdict.HALT


def sent(verdicts, tokens, finish=None, unscored=None, **policy):
    """What leaves in each step: ``tokens`` are sampled one a step, after the step's verdict.

    ``unscored`` is how many rows had no score by then.
    """
    held_back = testbed.load_bundle().policy.model_copy(update=policy)
    scheduler = object.__new__(MonitoredScheduler)
    scheduler._halt_reason = stop_reason(held_back)
    scheduler._held = {"r": _Held(Session("r", held_back, "0" * 64), 99)}
    outputs = []
    for step, (verdict, token) in enumerate(zip(verdicts, tokens, strict=True)):
        missed = unscored[step] if unscored else 0
        scheduler._judgements = {"r": (PROMPT - 1 + step, verdict, 0.5, None, missed)}
        event = EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, float(step))
        row = np.array([[float(token or 0)]], dtype=np.float32)
        output = EngineCoreOutput(
            request_id="r",
            new_token_ids=[] if token is None else [token],
            new_logprobs=LogprobsLists(row.astype(np.int32), row, row[0].astype(np.int32)),
            finish_reason=finish if step == len(tokens) - 1 else None,
            events=[event],
            prefill_stats=SimpleNamespace() if step == 0 else None,
        )
        if scheduler._lets_go(output):
            outputs.append(output)
    assert bool(scheduler._held) == (finish is None)
    for output in outputs:
        shown = [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist()
        assert shown == output.new_token_ids
    assert all(output.prefill_stats is None for output in outputs[1:])
    if outputs:
        assert outputs[0].prefill_stats is not None
        assert len(outputs[0].events) + sum(len(o.events) for o in outputs[1:]) >= len(outputs)
    return [output.new_token_ids for output in outputs]


def test_a_token_leaves_with_its_own_judgement():
    assert sent([GO] * 4, [10, 11, 12, 13]) == [[10], [11], [12]]


def test_the_end_leaves_with_the_last_token():
    assert sent([GO] * 3, [10, 11, 2], FinishReason.STOP) == [[10], [11, 2]]
    assert sent([GO] * 3, [10, 11, None], FinishReason.LENGTH) == [[10], [11]]


def test_a_halt_sends_nothing_more():
    assert sent([GO, GO, HALT], [10, 11, None], FinishReason.STOP) == [[10], []]


@pytest.mark.parametrize(
    ("hold_back", "leaving"), [(2, [[10], [11, 12, 2]]), ("turn", [[10, 11, 12, 2]])]
)
def test_longer_hold_back(hold_back, leaving):
    assert sent([GO] * 4, [10, 11, 12, 2], FinishReason.STOP, hold_back=hold_back) == leaving


def test_a_hold_keeps_tokens_until_it_ends():
    verdicts = [GO, HOLD, HOLD, GO, GO]
    assert sent(verdicts, [10, 11, 12, 13, 2], FinishReason.STOP) == [[10, 11, 12], [13, 2]]


def test_a_stream_that_ends_held_is_told_as_filtered():
    held = testbed.load_bundle().policy
    scheduler = object.__new__(MonitoredScheduler)
    scheduler._halt_reason = stop_reason(held)
    scheduler._held = {"r": _Held(Session("r", held, "0" * 64), 99)}
    for position, verdict, token, finish in (
        (PROMPT - 1, GO, 10, None),
        (PROMPT, HOLD, 2, FinishReason.STOP),
    ):
        scheduler._judgements = {"r": (position, verdict, 0.5, None, 0)}
        output = EngineCoreOutput("r", [token], finish_reason=finish)
        sends = scheduler._lets_go(output)
    assert sends
    assert output.new_token_ids == []
    assert output.stop_reason == stop_reason(held)


def test_a_token_without_a_judgement_never_leaves():
    scheduler = object.__new__(MonitoredScheduler)
    scheduler._held, scheduler._judgements = {}, {}
    output = EngineCoreOutput("r", [10])
    assert not scheduler._lets_go(output)
    assert output.new_token_ids == []
    with pytest.raises(RuntimeError, match="judged nothing"):
        scheduler._update_request_with_output(SimpleNamespace(request_id="r"), [10])


@pytest.mark.parametrize(
    ("tokens", "finish", "unscored", "delivered"),
    [
        # One of the prompt, which a cache spared, and that of 11; 2 ends the stream.
        ([10, 11, 12, 2], FinishReason.STOP, [1, 1, 2, 2], (3, 1)),
        # No step is left in which 13 could be judged.
        ([10, 11, 12, 13], FinishReason.LENGTH, [0, 0, 0, 1], (4, 2)),
    ],
)
def test_tokens_that_leave_without_a_score_are_counted(logged, tokens, finish, unscored, delivered):
    sent([GO] * 4, tokens, finish, unscored, on_unscored="pass")
    (event,) = logged
    assert (event["type"], event["message"]) == ("finished", str(finish))
    assert (event["delivered"], event["delivered_unscored"]) == delivered


def test_a_stream_whose_tokens_all_had_scores_is_not_logged(logged):
    sent([GO] * 4, [10, 11, 12, 2], FinishReason.STOP, [1] * 4, on_unscored="pass")
    assert logged == []
