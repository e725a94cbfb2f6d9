"""What the official client of OpenAI makes of the service, over a real socket."""

import signal
from itertools import count

import openai
import pytest
from http_service import CHAT, LONG_LIVED, PATIENCE, TEXT, Child, Service, wait_for

from midstream import testbed
from midstream.serve.keys import Keys

MESSAGES = CHAT["messages"]
KEY = "a-key-of-some-length"


def client_of(address, key="-"):
    return openai.OpenAI(
        base_url=f"{address.url}/v1", api_key=key, timeout=PATIENCE, max_retries=0
    )  # fmt: skip


@pytest.fixture(scope="module")
def halting():
    service = Service(halt_after=3, keys=Keys({"ada": KEY}))
    with service.listening() as address:
        yield service, client_of(address, KEY)


def test_a_halted_stream(halting):
    _, client = halting
    chunks = list(
        client.chat.completions.create(
            model="testbed",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"midstream": {"tier": "strict", "annotations": True}},
        )
    )
    *content, last, usage = chunks
    assert content[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in content) == "The urn is "
    assert last.choices[0].finish_reason == "content_filter"
    assert last.choices[0].content_filter_results["sealed"]["filtered"]
    assert last.midstream["tier"] == "strict"
    assert last.midstream["cause"] == "sealed"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 3


def test_a_halted_response(halting):
    service, client = halting
    done = client.chat.completions.create(model="testbed", messages=MESSAGES, max_tokens=9)
    assert done.choices[0].message.content == "The urn is "
    assert done.choices[0].finish_reason == "content_filter"
    assert done.usage.total_tokens == 7
    assert done.midstream["halted_at"] == 7
    assert service.engine.asked[-1].client == "ada"


def test_text_completions(halting):
    _, client = halting
    done = client.completions.create(**TEXT)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (
        "The urn is ",
        "content_filter",
    )
    chunks = list(client.completions.create(**TEXT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The urn is "
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_models(halting):
    _, client = halting
    assert [model.id for model in client.models.list()] == ["testbed"]
    assert client.models.retrieve("testbed").owned_by == "midstream"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_errors_are_those_the_client_knows(halting):
    _, client = halting
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="testbed", messages=MESSAGES, n=3)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as refused:
        create(model="gpt", messages=MESSAGES)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_an_error_in_a_stream_is_raised():
    service = Service("a", "b", error="lost")
    with service.listening() as address:
        stream = client_of(address).chat.completions.create(
            model="testbed", messages=MESSAGES, stream=True
        )
        text = [next(stream).choices[0].delta.content for _ in range(3)]
        assert text == ["", "a", "b"]
        with pytest.raises(openai.APIError, match="the engine failed"):
            next(stream)


def test_closing_a_stream_frees_its_slot():
    service = Service(**LONG_LIVED)
    with service.listening() as address:
        stream = client_of(address).chat.completions.create(
            model="testbed", messages=MESSAGES, stream=True, max_tokens=4096
        )
        next(iter(stream))
        stream.close()
        wait_for(lambda: [e.type for e in service.watching.events[-1:]] == ["finished"])
        assert service.watching.events[-1].message == "cancelled"
        service.settled()


@pytest.fixture
def served(tmp_path):
    """The command itself, on the testbed, with keys and settings from files."""
    keys, limits = tmp_path / "keys", tmp_path / "settings.yaml"
    keys.write_text(f"ada:{KEY}\n")
    keys.chmod(0o600)
    limits.write_text("max_tokens: 200\ndefault_tokens: 20\n")
    arguments = ["serve", "--port", "0", "--slots", "4", "--drain", "20"]
    arguments += ["--api-keys", str(keys), "--settings", str(limits)]
    child = Child("from midstream.cli import main; main()", *arguments)
    try:
        yield child
    finally:
        child.close()


def test_the_command_halts_the_testbeds_model(served):
    served.wait_until_ready()
    client = client_of(served.address, KEY)
    # About a third of the testbed's responses violate.
    for index in count():
        chunks = list(
            client.chat.completions.create(
                model="testbed",
                messages=testbed.sample_prompt(0, index).messages,
                stream=True,
                max_tokens=200,
            )
        )
        if chunks[-1].choices[0].finish_reason == "content_filter":
            break
        assert index < 100
    assert chunks[-1].choices[0].stop_reason == "The archive withheld the rest of this answer."
    facts = chunks[-1].midstream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text
    assert facts["verdict"] == "HALT"
    assert facts["cause"]
    assert facts["peak_risk"] > 0.1
    assert facts["scored"] >= len(text.split())
    assert facts["unscored"] == 0
    asked = {"midstream": {"tier": "strict"}}
    done = client.chat.completions.create(model="testbed", messages=MESSAGES, extra_body=asked)
    assert (facts["tier"], done.midstream["tier"]) == ("moderate", "strict")
    assert done.usage.completion_tokens <= 20
    served.send_signal(signal.SIGTERM)
    status, _ = served.ended()
    assert status == 0, served.log
    assert "Traceback" not in served.log
    assert testbed.sample_prompt(0, index).messages[-1]["content"] not in served.log
    # A text as short as "on" is in the log by chance.
    assert len(text) < 16 or text not in served.log
