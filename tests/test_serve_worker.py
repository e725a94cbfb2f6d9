"""The local engine: requests served by the real worker process, with the testbed's model."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import broken_workers
import pytest
import serving
import torch
import transformers
from serving import House, answer, ask, ended, events_of, text_of

from midstream import testbed
from midstream.engines.hf import manager as seams
from midstream.serve.errors import ApiError
from midstream.serve.serving import LocalStream

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{seams.VERSION}."),
    reason=f"continuous batching is watched in transformers {seams.VERSION} only",
)


@pytest.fixture(scope="module")
def pause(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, streams stand still after some tokens."""
    return tmp_path_factory.mktemp("house") / "pause"


@pytest.fixture(scope="module")
def house(pause: Path) -> Iterator[House]:
    main = partial(broken_workers.pausing, str(pause))
    with serving.house(slots=4, max_waiting=8, main=main) as made:
        yield made


def refusal(house: House, *args: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        house.run(house.engine.submit(ask(*args, **fields)))
    return caught.value


def test_streams_are_served_to_their_end(house: House) -> None:
    async def many(begin: int) -> Any:
        asked = (answer(house.engine, ask(i)) for i in range(begin, begin + 12))
        return await asyncio.gather(*asked)

    told, reasons = [], set()
    while not {"content_filter", "stop"} <= reasons:  # each is about a third of all
        told += house.run(many(len(told)))
        reasons = {events[-1].message for _, events in told}
        assert len(told) < 240
    _, tokenizer = testbed.load()
    for stream, events in told:
        report = events[-1].report
        assert [e.type for e in events].count("finished") == 1
        assert (events[0].type, events[-1].type) == ("admitted", "finished")
        assert stream.prompt_tokens == report.prompt_tokens
        assert report.unscored == 0
        halted = report.halted_at is not None
        assert (events[-1].message == "content_filter") == halted
        # the testbed's prompts are scored, too; a halted token was, and never left
        assert stream.completion_tokens == report.scored - report.prompt_tokens - halted
        assert house.seen.streams[stream.ask.stream] == events
        ids = tokenizer(text_of(events), add_special_tokens=False)["input_ids"]
        assert len(ids) == stream.completion_tokens


def test_a_cancelled_stream_ends_and_gives_its_slot_back(house: House, pause: Path) -> None:
    async def cancel() -> Any:
        pause.write_text("5")
        streams = [await house.engine.submit(ask(1)) for _ in range(5)]  # the last one waits
        while not all(text_of(house.seen.streams[s.ask.stream]) for s in streams[:4]):
            await asyncio.sleep(0.01)
        for stream in streams:
            stream.cancel()
        told = [await events_of(stream) for stream in streams]
        pause.unlink()
        streams[0].cancel()  # without effect
        return streams, told

    streams, told = house.run(cancel())
    assert {events[-1].message for events in told} == {"cancelled"}
    assert all(0 < stream.completion_tokens <= 3 for stream in streams[:4])
    assert (streams[4].completion_tokens, told[4][-1].report) == (0, None)


def test_what_cannot_be_served_is_refused_with_a_code(house: House) -> None:
    for options, status, code, param in [
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"tier": "brave"}, 400, "invalid_tier", "midstream.tier"),
        ({"prompt": "the urn " * 600}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": ""}, 400, "invalid_prompt", "prompt"),
        ({"prompt": (5, 9999)}, 400, "invalid_prompt", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_unicode", "prompt"),
        ({"sampling": {"temperature": -1.0}}, 400, "invalid_value", None),
    ]:
        error = refusal(house, **options)
        assert (error.status, error.code, error.param) == (status, code, param), options
        assert "Traceback" not in error.message
    assert house.run(answer(house.engine, ask(3)))[1][-1].type == "finished"


def test_whoever_looks_closely_is_told_every_token(house: House, pause: Path) -> None:
    async def look() -> Any:
        pause.write_text("2")
        stream = await house.engine.submit(ask(1))
        other = await house.engine.submit(ask(2))
        house.engine.look_closely(stream.ask.stream, True)
        last = await house.engine.submit(ask(0, max_tokens=1))  # taken after that was heard of
        pause.unlink()
        told = await asyncio.gather(events_of(stream), events_of(other))
        await events_of(last)
        house.engine.look_closely(stream.ask.stream, False)  # it has ended: without effect
        return told

    events, others = house.run(look())
    scored = [event for event in events if event.type == "scored"]
    trace = events[-1].report.trace
    recorded = {
        at: (trace.risk[i], trace.verdict[i], {name: z[i] for name, z in trace.scores.items()})
        for i, at in enumerate(trace.position)
    }
    first = events[-1].report.prompt_tokens + 3
    assert {event.position for event in scored} >= {at for at in recorded if at > first}
    for event in scored:
        assert (event.risk, event.verdict, event.scores) == recorded[event.position]
    assert "scored" not in {event.type for event in others}


def test_more_than_may_wait_are_told_to_come_back(house: House) -> None:
    async def crowd() -> Any:
        asked = (answer(house.engine, ask(i)) for i in range(20))
        return await asyncio.gather(*asked, return_exceptions=True)

    told = house.run(crowd())
    refused = [error for error in told if isinstance(error, ApiError)]
    served = [one for one in told if not isinstance(one, BaseException)]
    assert len(refused) == 20 - (4 + 8)  # slots, and max_waiting
    assert {(e.status, e.code, e.retry_after) for e in refused} == {(429, "too_many_requests", 1.0)}
    assert all(events[-1].type == "finished" for _, events in served)


def test_a_client_that_never_reads_keeps_nobody_waiting(house: House) -> None:
    async def leave_unread() -> Any:
        streams = [await house.engine.submit(ask(i)) for i in range(8)]
        await answer(house.engine, ask(9))  # waits behind them for a slot
        while not all(ended(house.seen.streams[s.ask.stream]) for s in streams):
            await asyncio.sleep(0.01)
        return [(stream, await events_of(stream)) for stream in streams]

    for stream, events in house.run(leave_unread()):
        assert house.seen.streams[stream.ask.stream] == events


def test_temperature_zero_is_what_generate_writes_greedily(house: House) -> None:
    model, tokenizer = testbed.load()
    for index in range(4):
        prompt = testbed.sample_prompt(0, index)
        ids = torch.tensor([prompt.ids])
        want = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        asked = ask(index, max_tokens=40, tier="loose", sampling={"temperature": 0.0})
        stream, events = house.run(answer(house.engine, asked))
        whole = tokenizer.decode(want, skip_special_tokens=True)
        assert stream.completion_tokens
        assert whole.startswith(text_of(events))
        if events[-1].message != "content_filter":
            assert text_of(events) == whole


def test_a_stricter_tier_may_be_asked_for_and_is_judged_by(house: House) -> None:
    _, events = house.run(answer(house.engine, ask(1, tier="strict")))
    assert events[-1].report.tier == "strict"
    assert house.seen.openings[events[0].stream].tier == "strict"


def test_the_prompt_may_be_ids(house: House) -> None:
    prompt = testbed.sample_prompt(0, 3)
    stream, events = house.run(answer(house.engine, ask(prompt=prompt.ids)))
    assert stream.prompt_tokens == len(prompt.ids)
    assert events[-1].type == "finished"


def test_one_who_does_not_wait_for_the_answer_leaves_nothing_behind(
    house: House, pause: Path
) -> None:
    async def impatient() -> str:
        pause.touch()
        asked = ask(1)
        waits = asyncio.create_task(house.engine.submit(asked))
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        while not ended(house.seen.streams.get(asked.stream, [])):
            await asyncio.sleep(0.01)
        pause.unlink()
        return asked.stream

    stream = house.run(impatient())
    assert house.seen.streams[stream][-1].message == "cancelled"


def test_a_wall_clock_that_jumps_changes_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([1e9, -1e9, 0.0])
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + next(jumps))
    told = [house.run(answer(house.engine, ask(i))) for i in range(3)]
    assert all(events[-1].type == "finished" for _, events in told)
    assert house.engine.unready is None


def test_how_full_it_is_is_told_and_nothing_is_left_of_streams_that_ended(house: House) -> None:
    """Comes last: after all of the above that ran in this process."""
    house.run(answer(house.engine, ask(1)))
    stats = house.settled()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is LocalStream]
    assert (stats.slots, stats.slots_used, stats.waiting) == (4, 0, 0)
    told = house.seen.told_stats
    scored = sum(e[-1].report.scored for e in house.seen.streams.values() if e[-1].report)
    assert sum(s.judged_rows for s in told) >= scored > 0
    assert any(s.judge_seconds for s in told)
    assert all(0 < seconds < 60 for s in told for seconds in s.judge_seconds)
    assert house.seen.notices[0][0] == "started"
    assert len(house.seen.notices) == 1
