"""What a request can ask for beside the monitor: it works, or is refused with one clear message."""

from __future__ import annotations

import openai
import pytest
from serving import NAME, references

from midstream import testbed


@pytest.fixture(scope="module")
def complete(server):
    """Greedy completions of a reference's prompt, as a function of further options."""
    client = server.client()

    def ask(reference, **extra):
        known = {
            key: extra.pop(key)
            for key in ("max_tokens", "temperature", "logprobs", "stop", "n", "echo", "logit_bias")
            if key in extra
        }
        return client.completions.create(
            model=NAME,
            prompt=reference.prompt,
            **{"max_tokens": reference.max_tokens, "temperature": 0, **known},
            extra_body={"return_token_ids": True, **extra},
        )

    return ask


@pytest.fixture(scope="module")
def halted():
    return next(r for r in references(48) if r.finish_reason == "content_filter")


@pytest.fixture(scope="module")
def whole():
    return next(r for r in references(48) if r.finish_reason == "length")


END = testbed.EOS_ID


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True},
        {"min_tokens": 16},
        {"logit_bias": {str(END): -100.0}},
        {"stop_token_ids": [END]},
        {"logprobs": 5},
        {"structured_outputs": {"regex": r"[\s\S]*"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_halt_overrules(complete, halted, options):
    """Options that keep a stream going, or ban or ask for the forced id, do not undo a halt."""
    for choice in complete(halted, **options).choices:
        assert choice.finish_reason == "content_filter"
        assert choice.token_ids == halted.delivered


def test_each_of_several_choices_is_a_stream(complete, halted):
    choices = complete(halted, n=2, temperature=0.001).choices  # vLLM wants n = 1 at 0
    assert [choice.token_ids for choice in choices] == [halted.delivered] * 2
    assert {choice.finish_reason for choice in choices} == {"content_filter"}


def test_stop_ids_and_stop_strings_end_a_stream(complete, whole):
    _, tokenizer = testbed.load()
    wanted = whole.response[9]
    first = whole.response.index(wanted)
    by_id = complete(whole, stop_token_ids=[wanted]).choices[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", wanted)
    assert by_id.token_ids == whole.response[: first + 1]
    assert by_id.text.strip() == tokenizer.decode(whole.response[:first])
    word = tokenizer.decode(wanted).strip()
    by_text = complete(whole, stop=word).choices[0]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", word)
    assert word not in by_text.text
    assert by_text.text.strip() == tokenizer.decode(whole.response[:first]).strip()


def test_one_token_is_judged_as_well(complete, whole):
    choice = complete(whole, max_tokens=1).choices[0]
    assert choice.token_ids == whole.response[:1]
    assert choice.finish_reason == "length"


def test_guided_decoding_keeps_to_its_grammar(complete, whole):
    """The grammar reads the tokenizer's pieces as they are, word marks included."""
    grammar = {"regex": "(▁a|▁the)▁flask▁stands"}
    choice = complete(whole, structured_outputs=grammar).choices[0]
    assert choice.text.strip() in ("a flask stands", "the flask stands")
    assert choice.finish_reason == "stop"


def test_logprobs_are_those_of_the_tokens_delivered(complete, whole):
    choice = complete(whole, logprobs=3, echo=False).choices[0]
    assert len(choice.logprobs.token_logprobs) == len(choice.token_ids) == whole.max_tokens
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)


def test_the_prompt_can_be_echoed_with_its_logprobs(complete, whole):
    choice = complete(whole, echo=True, logprobs=1, max_tokens=4).choices[0]
    assert len(choice.logprobs.tokens) == len(whole.prompt) + 4


def test_a_full_window_withholds_the_token_that_no_step_can_judge(complete, server):
    """vLLM never feeds the last position of the window, so its token stays inside."""
    whole = references(2, (470,))[1]
    before = server.idle_status()["unscored"]
    choice = complete(whole, max_tokens=512 - len(whole.prompt), ignore_eos=True).choices[0]
    assert choice.finish_reason == "length"
    assert len(whole.prompt) + len(choice.token_ids) == 511
    assert server.idle_status()["unscored"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_beam_search": True, "n": 2}, "beam search asks for every token as a new request"),
        (
            {"include_stop_str_in_output": True, "stop_token_ids": [5]},
            "would deliver a token that was never judged",
        ),
        ({"vllm_xargs": {"midstream_tier": "lax"}}, "no tier 'lax'"),
    ],
)
def test_refused(complete, whole, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(whole, **options)


def test_the_log_names_a_halt_and_no_text(complete, halted, server):
    reply = complete(halted)
    event = server.logged("halted")[-1]
    assert event["stream"].startswith(reply.id)
    assert event["position"] == len(halted.prompt) + halted.halted_after
    assert event["bundle"] == testbed.load_bundle().hash
    assert "text" not in event
