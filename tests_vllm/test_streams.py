"""Streams of a real server, against the Hugging Face engine and against vLLM alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import NAME, Server, ask_all, assert_as_reference, references

from midstream import testbed


def test_halts_where_the_hugging_face_engine_does(server):
    """16 at a time, of mixed lengths, streaming and not, chat and plain completions."""
    asked = references(48)
    before = server.idle_status()
    assert_as_reference(asked, ask_all(server, asked))
    after = server.idle_status()
    assert after["retired"] - before["retired"] == 48
    halts = sum(reference.finish_reason == "content_filter" for reference in asked)
    assert after["halted"] - before["halted"] == halts
    assert after["unscored"] == before["unscored"]


def test_a_flagged_token_never_leaves(server):
    """Not as text, as an id, or in the logprobs; and no sooner than its judgement."""
    flagged = next(r for r in references(48) if r.finish_reason == "content_filter")
    parts = list(
        server.client().completions.create(
            model=NAME,
            prompt=flagged.prompt,
            temperature=0,
            max_tokens=flagged.max_tokens,
            logprobs=2,
            stream=True,
            extra_body={"return_token_ids": True},
        )
    )
    ids = [token for part in parts for token in part.choices[0].token_ids or []]
    assert ids == flagged.delivered
    choices = [part.choices[0] for part in parts]
    shown = [token for c in choices if c.logprobs for token in c.logprobs.tokens]
    assert len(shown) == len(ids)
    assert choices[-1].finish_reason == "content_filter"
    policy = testbed.load_bundle().policy
    assert choices[-1].stop_reason == policy.on_halt.message


def test_a_client_that_leaves_frees_its_slot(server):
    asked = references(48)

    def leave_early(reference):
        stream = server.client().chat.completions.create(
            model=NAME,
            messages=reference.messages,
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            next(iter(stream))

    with ThreadPoolExecutor(8) as readers:
        list(readers.map(leave_early, asked[:8]))
    server.idle_status()
    assert_as_reference(asked[:4], ask_all(server, asked[:4]))


def test_requests_that_are_not_halted_are_those_of_vllm_alone(server, tmp_path_factory):
    """Ids and logprobs, bit for bit, one request at a time: no other rows change the arithmetic."""
    asked = [r for r in references(48) if r.finish_reason != "content_filter"][:8]

    def sampled(running, **options):
        replies = [
            running.client().completions.create(
                model=NAME,
                prompt=reference.prompt,
                max_tokens=reference.max_tokens,
                logprobs=5,
                extra_body={"return_token_ids": True},
                **options,
            )
            for reference in asked
        ]
        return [
            (c.token_ids, c.logprobs.token_logprobs, c.logprobs.top_logprobs, c.finish_reason)
            for c in (reply.choices[0] for reply in replies)
        ]

    ways = {"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}
    watched = [sampled(server, **way) for way in ways]
    with Server(tmp_path_factory.mktemp("alone"), bundle=None) as alone:
        plain = [sampled(alone, **way) for way in ways]
    assert watched[0] == plain[0]
    pairs = list(zip(watched[1], plain[1], strict=True))
    for mine, theirs in pairs:
        kept = len(mine[0])
        if mine[3] == "content_filter":
            theirs = *(column[:kept] for column in theirs[:3]), mine[3]
        assert mine == theirs


def test_a_client_may_be_stricter_but_not_looser(server):
    _, tokenizer = testbed.load()
    reference = next(r for r in references(48) if r.finish_reason == "content_filter")
    create = server.client().completions.create
    options = {"model": NAME, "prompt": reference.prompt, "temperature": 0}
    limit = reference.max_tokens
    length = {
        tier: create(
            **options, max_tokens=limit, extra_body={"vllm_xargs": {"midstream_tier": tier}}
        ).usage.completion_tokens
        for tier in ("strict", "moderate", "loose")
    }
    assert length["strict"] <= length["moderate"] == len(reference.delivered) <= length["loose"]
    with pytest.raises(openai.BadRequestError, match="no tier 'none'"):
        create(**options, extra_body={"vllm_xargs": {"midstream_tier": "none"}})
    assert len(tokenizer)  # the server is still there
    assert server.status()["slots"] == 16
