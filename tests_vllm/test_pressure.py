"""Chunked prompts, prefixes from the cache, and preemptions: little room for keys and values."""

from __future__ import annotations

import urllib.request

import pytest
from serving import Server, ask_all, assert_as_reference, references


@pytest.fixture(scope="module")
def cramped(tmp_path_factory):
    """Room for 4 of 16 streams at their full length, and prompts in chunks of 24 rows."""
    with Server(
        tmp_path_factory.mktemp("cramped"),
        *("--max-num-batched-tokens", "24", "--block-size", "32", "--max-model-len", "256"),
        *("--num-gpu-blocks-override", "24", "--enable-prefix-caching"),
    ) as running:
        yield running


def counted(running, name):
    """Sum of one of vLLM's own counters."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_every_row_is_put_under_its_own_stream(cramped):
    asked = references(48)
    assert_as_reference(asked, ask_all(cramped, asked))
    assert counted(cramped, "vllm:num_preemptions_total") > 0
    assert cramped.idle_status()["retired"] == 48


def test_a_prefix_from_the_cache_is_counted_as_unscored(cramped):
    """Prompt tokens that the cache spared the model; the response is judged as ever."""
    asked = references(48)[:1] * 2
    before = cramped.idle_status()["unscored"]
    assert_as_reference(asked, ask_all(cramped, asked, at_once=1))
    hits = counted(cramped, "vllm:prefix_cache_hits_total")
    assert hits > 0
    assert cramped.idle_status()["unscored"] - before == hits
