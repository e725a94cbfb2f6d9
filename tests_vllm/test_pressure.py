"""Chunked prompts, prefixes from the cache, and preemptions: little room for keys and values."""

from __future__ import annotations

import asyncio
import random
import urllib.request

import pytest
from environment import LIMIT
from serving import NAME, Server, ask, ask_all, assert_as_reference, references


@pytest.fixture(scope="module")
def cramped(tmp_path_factory):
    """Room for one of 16 streams at its full length, and prompts in chunks of 24 rows."""
    with Server(
        tmp_path_factory.mktemp("cramped"),
        *("--max-num-batched-tokens", "24", "--block-size", "32", "--max-model-len", "256"),
        *("--num-gpu-blocks-override", "10", "--enable-prefix-caching"),
    ) as running:
        yield running


def counted(running, name):
    """Sum of one of vLLM's own counters."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=LIMIT) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_every_row_is_put_under_its_own_stream(cramped):
    asked, before, rounds = references(48), cramped.idle_status()["retired"], 0
    # Two streams that meet are enough; the loop is for a machine on which none do.
    while rounds == 0 or (rounds < 50 and not counted(cramped, "vllm:num_preemptions_total")):
        assert_as_reference(asked, ask_all(cramped, asked))
        rounds += 1
    assert counted(cramped, "vllm:num_preemptions_total") > 0
    assert cramped.idle_status()["retired"] - before == 48 * rounds


def test_a_prefix_from_the_cache_is_counted_as_unscored(cramped):
    """Prompt tokens that the cache spared the model; the response is judged as ever."""
    asked = references(48)[:1] * 2
    before = cramped.idle_status()["unscored"]
    hits_before = counted(cramped, "vllm:prefix_cache_hits_total")
    assert_as_reference(asked, ask_all(cramped, asked, at_once=1))
    hits = counted(cramped, "vllm:prefix_cache_hits_total") - hits_before
    assert hits > 0
    assert cramped.idle_status()["unscored"] - before == hits


def test_soak(cramped, request):
    """Random lengths and ways, clients that leave, prompts seen before: nothing is left behind."""
    count = request.config.getoption("soak")
    draw = random.Random(0)
    asked = [draw.choice(references(48)) for _ in range(count)]
    before = cramped.idle_status()

    async def leave(client, reference, patience):
        stream = await client.completions.create(
            model=NAME, prompt=reference.prompt, max_tokens=200, stream=True
        )
        async with stream:
            await asyncio.sleep(patience)

    async def run():
        gate = asyncio.Semaphore(24)  # more than there are slots
        async with cramped.async_client() as client:

            async def one(number, reference):
                patience = draw.uniform(0.0, 1.0)
                async with gate:
                    if number % 5 == 0:
                        return await leave(client, reference, patience)
                    chat, stream = number % 2 == 0, number % 3 != 0
                    return await ask(client, reference, chat=chat, stream=stream)

            return await asyncio.gather(*(one(n, r) for n, r in enumerate(asked)))

    answers = asyncio.run(run())
    stayed = [n for n in range(count) if n % 5]
    assert_as_reference([asked[n] for n in stayed], [answers[n] for n in stayed])
    after = cramped.idle_status()
    assert after["retired"] - before["retired"] <= count
    assert counted(cramped, "vllm:num_preemptions_total") > 0
