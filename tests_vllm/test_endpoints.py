"""Every endpoint through which tokens leave holds them back, and tells a client of a halt."""

from __future__ import annotations

import json
import urllib.request

import pytest
from environment import LIMIT
from serving import NAME, Server, references

from midstream import testbed
from midstream.policy import Policy

# Takes every response for a call of the one tool.
PARSER = """
from vllm.entrypoints.generate.base.protocol import (
    ExtractedToolCallInformation, FunctionCall, ToolCall,
)
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager


@ToolParserManager.register_module("all")
class AllToolParser(ToolParser):
    def extract_tool_calls(self, model_output, request):
        call = ToolCall(function=FunctionCall(name="open", arguments="{}"))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=None)
"""
TOOL = {"type": "function", "function": {"name": "open", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def eager_server(tmp_path_factory):
    """Its strict tier halts before the first token; what was never judged may leave."""
    folder = tmp_path_factory.mktemp("endpoints")
    bundle = testbed.load_bundle()
    policy = bundle.policy.model_dump()
    policy["tiers"]["strict"]["halt_at"] = 1e-6
    policy["on_unscored"] = "pass"
    bundle.with_policy(Policy.model_validate(policy)).save(folder / "bundle")
    (folder / "parser.py").write_text(PARSER)
    with Server(
        folder,
        *("--enable-auto-tool-choice", "--tool-call-parser", "all"),
        *("--tool-parser-plugin", str(folder / "parser.py"), "--enable-scale-out"),
        bundle=folder / "bundle",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def halted():
    return next(r for r in references(48) if (r.halted_after or 0) > 3)


STRICT = {"vllm_xargs": {"midstream_tier": "strict"}}


@pytest.mark.parametrize("options", [{}, {"logprobs": True}], ids=["plain", "logprobs"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_a_stream_that_is_halted_at_once_says_so(eager_server, halted, chat, options):
    """Though its only chunk has no token."""
    client = eager_server.client()
    create = client.chat.completions.create if chat else client.completions.create
    prompt = {"messages": halted.messages} if chat else {"prompt": halted.prompt}
    parts = list(create(model=NAME, stream=True, extra_body=STRICT, **prompt, **options))
    reasons = [choice.finish_reason for part in parts for choice in part.choices]
    assert [reason for reason in reasons if reason] == ["content_filter"]
    texts = [c.delta.content if chat else c.text for part in parts for c in part.choices]
    assert not any(texts)


def test_a_halted_response_is_no_tool_call(eager_server, halted):
    create = eager_server.client().chat.completions.create
    options = {"model": NAME, "messages": halted.messages, "temperature": 0, "tools": [TOOL]}
    short = create(**options, max_tokens=1).choices[0]
    assert short.finish_reason == "tool_calls"
    whole = create(**options, max_tokens=halted.max_tokens).choices[0]
    assert whole.finish_reason == "content_filter"


def post(running, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{running.port}{path}",
        json.dumps({"model": NAME, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LIMIT) as reply:
        return reply.read().decode()


def delivered(reference):
    _, tokenizer = testbed.load()
    return tokenizer.decode(reference.delivered).strip()


def test_responses_are_incomplete(eager_server, halted):
    asked = {
        "input": halted.messages,
        "temperature": 0,
        "max_output_tokens": halted.max_tokens,
    }
    replies = [json.loads(post(eager_server, "/v1/responses", asked))]
    events = post(eager_server, "/v1/responses", {**asked, "stream": True})
    replies.append(json.loads(events.split("event: response.completed\ndata: ")[1])["response"])
    for reply in replies:
        assert reply["status"] == "incomplete"
        assert reply["incomplete_details"] == {"reason": "content_filter"}
        assert reply["output"][0]["content"][0]["text"].strip() == delivered(halted)


def test_messages_have_no_stop_reason(eager_server, halted):
    """Those of vLLM's protocol are four, and none of them is a halt."""
    asked = {"messages": halted.messages, "temperature": 0, "max_tokens": halted.max_tokens}
    reply = json.loads(post(eager_server, "/v1/messages", asked))
    assert reply.get("stop_reason") is None
    assert reply["usage"]["output_tokens"] == len(halted.delivered)


def test_tokens_in_and_tokens_out(eager_server, halted):
    params = {"temperature": 0, "max_tokens": halted.max_tokens}
    asked = {"token_ids": halted.prompt, "sampling_params": params}
    choice = json.loads(post(eager_server, "/inference/v1/generate", asked))["choices"][0]
    assert choice["token_ids"] == halted.delivered
    assert choice["finish_reason"] == "content_filter"


def test_conversations_in_a_batch(eager_server, halted):
    asked = {"messages": [halted.messages] * 2, "temperature": 0, "max_tokens": halted.max_tokens}
    choices = json.loads(post(eager_server, "/v1/chat/completions/batch", asked))["choices"]
    assert [c["finish_reason"] for c in choices] == ["content_filter"] * 2
    assert [c["message"]["content"].strip() for c in choices] == [delivered(halted)] * 2


def test_a_token_that_no_step_can_judge_is_counted_where_it_may_leave(eager_server):
    """vLLM never feeds the last position of the window."""
    whole = references(2, (470,))[1]
    choice = (
        eager_server.client()
        .completions.create(
            model=NAME,
            prompt=whole.prompt,
            temperature=0,
            max_tokens=512 - len(whole.prompt),
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        .choices[0]
    )
    assert len(whole.prompt) + len(choice.token_ids) == 512
    (event,) = eager_server.logged("finished")
    assert (event["delivered"], event["delivered_unscored"]) == (len(choice.token_ids), 1)
    assert event["message"] == "length"
    assert "text" not in event
