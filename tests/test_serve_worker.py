"""The local engine: requests served by the real worker process, with the testbed's model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import serving
import transformers
from serving import House, answer, ask, text_of

from midstream import testbed
from midstream.engines.hf import manager as seams
from midstream.serve.errors import ApiError

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{seams.VERSION}."),
    reason=f"continuous batching is watched in transformers {seams.VERSION} only",
)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with serving.house(slots=4, max_waiting=8) as made:
        yield made


def refusal(house: House, *args: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        house.run(house.engine.submit(ask(*args, **fields)))
    return caught.value


def test_streams_are_served_to_their_end(house: House) -> None:
    async def many() -> Any:
        return await asyncio.gather(*(answer(house.engine, ask(i)) for i in range(12)))

    told = house.run(many())
    reasons = {events[-1].message for _, events in told}
    assert {"content_filter", "stop"} <= reasons
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


def test_a_cancelled_stream_ends_and_gives_its_slot_back(house: House) -> None:
    async def cancel() -> Any:
        stream = await house.engine.submit(ask(1, max_tokens=400))
        seen = []
        async for event in stream:
            seen.append(event)
            if event.type == "released":
                stream.cancel()
        stream.cancel()  # without effect
        return stream, seen

    stream, seen = house.run(cancel())
    assert seen[-1].message == "cancelled"
    assert 0 < stream.completion_tokens < 100


def test_what_cannot_be_served_is_refused_with_a_code(house: House) -> None:
    for options, status, code, param in [
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"tier": "brave"}, 400, "invalid_tier", "tier"),
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
