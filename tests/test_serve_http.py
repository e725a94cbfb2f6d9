"""The HTTP front over a scripted engine: answers, ends, parameters, limits."""

import asyncio
import contextlib
import json
import logging
import random
import signal
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from http_service import (
    CHAT,
    CHATS,
    LONG,
    LONG_LIVED,
    PATIENCE,
    TEXT,
    TEXTS,
    Child,
    Service,
    events,
    fault,
    read_all,
    wait_for,
)
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import BUNDLE, ScriptedEngine, ScriptedStream
from starlette.responses import StreamingResponse

from midstream.serve.engine import Released
from midstream.serve.errors import ApiError
from midstream.serve.feed import Observer
from midstream.serve.settings import Settings, SettingsError
from midstream.serve.stops import StopStrings
from midstream.streams import Event


def streamed(service, extra=None, path=CHATS):
    body = CHAT if path == CHATS else TEXT
    return events(service.post(path, body | {"stream": True} | (extra or {})))


def text_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


# What a response looks like


def test_a_stream_is_role_deltas_end_and_done():
    service = Service("The ", "urn.")
    response = service.post(CHATS, CHAT | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    chunks = events(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "The "},
        {"content": "urn."},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert all(choice["index"] == 0 for choice in choices)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["id"] == service.engine.asked[0].stream
    assert ["midstream" in chunk for chunk in chunks] == [False, False, False, True]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_and_only_when_asked_for():
    *chunks, last = streamed(Service(), {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_text_completion_streams_text():
    chunks = streamed(Service("a", "b"), path=TEXTS)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_whole_responses():
    chat = Service("a", "b").post(CHATS, CHAT).json()
    assert chat["object"] == "chat.completion"
    assert chat["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert chat["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    text = Service("a", "b").post(TEXTS, TEXT).json()
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "ab")


def test_a_halt_is_a_content_filter_and_the_flagged_text_stays():
    facts = {
        "tier": "strict",
        "bundle": BUNDLE,
        "verdict": "HALT",
        "halted_at": 6,
        "cause": "sealed",
        "peak_risk": 0.9,
        "scored": 3,
        "unscored": 0,
    }
    script = {"risks": [0.1, 0.2, 0.9, 0.1], "halt_after": 2}
    asked = {"midstream": {"tier": "strict"}}
    chunks = streamed(Service(**script), asked)
    assert text_of(chunks) == "The urn "
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "content_filter",
    }
    assert chunks[-1]["midstream"] == facts
    whole = Service(**script).post(CHATS, CHAT | asked).json()
    assert whole["choices"][0]["message"]["content"] == "The urn "
    assert whole["choices"][0]["finish_reason"] == "content_filter"
    assert whole["midstream"] == facts


def test_a_response_ends_by_length():
    chunks = streamed(Service(), {"max_tokens": 2})
    assert (text_of(chunks), chunks[-1]["choices"][0]["finish_reason"]) == ("The urn ", "length")


@pytest.mark.parametrize("by_request", [True, False])
def test_annotations_say_up_to_where_text_was_judged(by_request):
    settings = {} if by_request else {"annotations": True}
    asked = {"midstream": {"annotations": True}} if by_request else {}
    service = Service("né ", "🙂", "x", "y", settings=settings, halt_after=3)
    chunks = streamed(service, asked)[1:]
    offsets = [chunk["choices"][0]["content_filter_offsets"] for chunk in chunks]
    assert [tuple(offset.values()) for offset in offsets] == [
        (3, 0, 3),
        (4, 3, 4),
        (5, 4, 5),
        (5, 0, 5),
    ]
    assert list(offsets[0]) == ["check_offset", "start_offset", "end_offset"]
    results = [chunk["choices"][0]["content_filter_results"] for chunk in chunks]
    assert results == [
        {},
        {},
        {},
        {
            "sealed": {"filtered": True, "detected": True},
            "temper": {"filtered": False, "detected": False},
        },
    ]
    whole = service.post(CHATS, CHAT | asked).json()["choices"][0]
    assert whole["content_filter_results"] == results[-1]
    assert whole["content_filter_offsets"] == offsets[-1]


def reading(change):
    """An engine whose streams' readers get what ``change`` makes of what happens."""

    class Changed(ScriptedStream):
        def put(self, event):
            super().put(change(event))

    return with_streams(Changed)


def with_streams(kind):
    class Engine(ScriptedEngine):
        async def submit(self, ask):
            stream = await super().submit(ask)
            stream.__class__ = kind
            return stream

    return Engine


def test_text_that_left_unscored_is_not_claimed_as_checked():
    def unscored(event):
        unscored = isinstance(event, Released) and event.text == "cd"
        return event._replace(risk=None) if unscored else event

    service = Service("ab", "cd", "ef", engine=reading(unscored))
    chunks = streamed(service, {"midstream": {"annotations": True}})[1:]
    checked = [c["choices"][0]["content_filter_offsets"]["check_offset"] for c in chunks]
    assert checked == [2, 2, 6, 6]


# Ends


def test_an_error_in_a_stream_ends_it_with_the_error_and_done(caplog):
    chunks = streamed(Service("a", "b", error="CUDA at /srv/secret.py"))
    assert text_of(chunks[:-1]) == "ab"
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert set(chunks[-1]) == {"error"}
    assert "secret" not in str(chunks)
    assert "CUDA at" in caplog.text  # the log names the cause


def test_an_error_before_the_first_token_is_a_status():
    service = Service("a", halt_after=0, error="lost")
    for stream in (True, False):
        assert fault(service.post(CHATS, CHAT | {"stream": stream}), 500)["code"] == "engine_error"
    service = Service("a", error="lost")
    assert fault(service.post(CHATS, CHAT), 500)["code"] == "engine_error"


def test_what_cannot_be_passed_on_ends_the_response_and_its_stream(caplog):
    def breaking(event):
        finished = isinstance(event, Event) and event.type == "finished"
        return Released(7, 0.1, None) if finished else event

    service = Service("a", "b", engine=reading(breaking))
    chunks = streamed(service)
    assert text_of(chunks[:-1]) == "ab"
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert service.engine.streams[0].cancelled
    assert "could not be passed on" in caplog.text


def test_an_engine_whose_stream_cannot_be_followed_is_told_of():
    class Broken(ScriptedStream):
        def follow(self, follower):
            raise RuntimeError("out of order: /srv/secret.py")

    service = Service("a", engine=with_streams(Broken))
    assert fault(service.post(CHATS, CHAT), 500)["code"] == "engine_error"
    assert service.engine.streams[0].cancelled


def test_a_bug_in_front_is_a_plain_500():
    class Bug(ScriptedEngine):
        async def submit(self, ask):
            raise KeyError("/srv/secret.py")

    service = Service(engine=Bug)
    assert fault(service.post(CHATS, CHAT), 500)["code"] == "internal_error"
    assert service.front.admission.count == 0


def test_what_the_engine_refuses_is_told_and_counted():
    class Refusing(ScriptedEngine):
        async def submit(self, ask):
            message = "tier: the server allows none looser than moderate"
            raise ApiError(400, message, code="invalid_value", param="midstream.tier")

    service = Service(engine=Refusing)
    asked = CHAT | {"midstream": {"tier": "loose"}}
    assert fault(service.post(CHATS, asked), 400)["param"] == "midstream.tier"
    assert service.watching.refusals == [("", 400, "invalid_value")]


@pytest.mark.parametrize("limit", ["start_seconds", "request_seconds"])
def test_a_response_that_takes_too_long_is_ended(limit):
    class Silent(ScriptedEngine):
        async def submit(self, ask):
            stream = await super().submit(ask)
            stream._task.cancel()
            if limit == "request_seconds":
                stream._tell("released", position=4, risk=0.1, text="a")
            return stream

    service = Service(engine=Silent, settings={limit: 0.2})
    body = CHAT | {"stream": True}
    if limit == "start_seconds":
        assert fault(service.post(CHATS, body), 504)["code"] == "timeout"
    else:
        chunks = events(service.post(CHATS, body))
        assert (text_of(chunks[:-1]), chunks[-1]["error"]["code"]) == ("a", "timeout")
    assert fault(service.post(CHATS, CHAT), 504)["code"] == "timeout"
    assert [stream.cancelled for stream in service.engine.streams] == [True, True]


def test_an_engine_that_does_not_take_a_request_is_not_waited_for():
    class Hanging(ScriptedEngine):
        async def submit(self, ask):
            await asyncio.sleep(3600)

    service = Service(engine=Hanging, settings={"start_seconds": 0.1})
    assert fault(service.post(CHATS, CHAT), 504)["code"] == "timeout"
    assert service.front.admission.count == 0


# Stop strings


@given(st.data())
def test_stop_strings_cut_the_same_however_the_text_is_split(data):
    text = data.draw(st.text("ab\n", max_size=20))
    stops = data.draw(st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watcher = StopStrings(stops)
    out = "".join(watcher.take(piece) for piece in pieces) + watcher.finish()
    ends = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    assert out == (text[: min(ends)[1]] if ends else text)
    assert watcher.hit == bool(ends)


@pytest.mark.parametrize("stop", ["n is", ["zzz", "n is"]])
def test_a_stop_string_across_tokens_ends_the_stream(stop):
    pieces = ["The ", "urn ", "is ", *["pale."] * 50]
    service = Service(*pieces, risks=[0.1] * len(pieces), delay=0.002)
    chunks = streamed(service, {"stop": stop})
    assert text_of(chunks) == "The ur"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert service.engine.streams[0].cancelled
    assert service.engine.streams[0].completion_tokens < len(pieces)
    assert service.post(CHATS, CHAT | {"stop": stop}).json()["choices"][0]["message"][
        "content"
    ] == "The ur"  # fmt: skip


def test_what_waits_for_a_stop_string_leaves_at_the_end():
    assert text_of(streamed(Service("ab", "a"), {"stop": ["abab", "ac"]})) == "aba"


# Requests


def test_what_the_engine_gets():
    service = Service()
    sent = CHAT | {
        "max_tokens": 7,
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "user": "somebody",
        "midstream": {"tier": "strict"},
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
        ],
    }
    trace = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    service.post(CHATS, sent, headers=trace)
    service.post(TEXTS, TEXT | {"prompt": [1, 2, 3.0]})
    chat, text = service.engine.asked
    assert chat.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\na"},
    )
    assert (chat.max_tokens, chat.tier, chat.prompt) == (5, "strict", None)
    assert chat.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 3}
    assert (chat.body, chat.trace, text.trace) == (sent, trace, {})
    assert (text.prompt, text.messages) == ((1, 2, 3), None)
    assert text.max_tokens == Settings().default_tokens
    assert chat.stream != text.stream


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"n": True},
        {"n": "1"},
        {"logprobs": True},
        {"logprobs": 5},
        {"top_logprobs": 3},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "auto"},
        {"functions": [{}]},
        {"function_call": "auto"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"seed": 1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -1},
        {"logit_bias": {"5": 1}},
        {"audio": {}},
        {"modalities": ["text", "audio"]},
        {"prediction": {}},
        {"reasoning_effort": "high"},
        {"store": True},
        {"web_search_options": {}},
        {"nonsense": None},
        {"Temperature": 1},
        {"midstream": {"halt_at": 2.0}},
        {"midstream": {"conversation": "a"}},
        {"stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_is_not_served_is_refused_by_name(extra):
    service = Service()
    error = fault(service.post(CHATS, CHAT | extra), 400)
    (name, value), *_ = extra.items()
    nested = name in ("midstream", "stream_options")
    assert error["param"] == (f"{name}.{next(iter(value))}" if nested else name)
    assert error["code"] == "unsupported_parameter"
    assert service.engine.asked == []
    assert service.watching.refusals == [("", 400, "unsupported_parameter")]


@pytest.mark.parametrize(
    "extra", [{"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"logprobs": 1}, {"messages": []}]
)
def test_the_same_of_texts(extra):
    error = fault(Service().post(TEXTS, TEXT | extra), 400)
    assert (error["param"], error["code"]) == (next(iter(extra)), "unsupported_parameter")


def test_values_that_ask_for_nothing_are_taken():
    service = Service()
    nothing = {
        "n": 1,
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "seed": None,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "stop": None,
        "store": False,
        "stream_options": None,
        "midstream": {},
    }
    assert service.post(CHATS, CHAT | nothing).status_code == 200


def test_an_engine_that_sends_requests_on_gets_more():
    service = Service(settings={"sent_on": ["seed", "min_p"], "conversations": True})
    extra = {"seed": 5, "min_p": 0.1, "midstream": {"conversation": "talk"}}
    assert service.post(CHATS, CHAT | extra).status_code == 200
    (ask,) = service.engine.asked
    assert (ask.body["seed"], ask.body["min_p"], ask.conversation) == (5, 0.1, "talk")
    with pytest.raises(ValueError, match="n'"):
        Settings(sent_on=["n"])


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content",
        ),
        ({"model": 5}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"midstream": {"tier": "lax"}}, "midstream.tier"),
        ({"midstream": []}, "midstream"),
    ],
)
def test_wrong_values_are_refused_by_name(extra, param):
    service = Service()
    assert fault(service.post(CHATS, CHAT | extra), 400)["param"] == param
    assert service.engine.asked == []


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [-1], [True], 5, None, [[1]]])
def test_wrong_prompts_are_refused(prompt):
    assert fault(Service().post(TEXTS, TEXT | {"prompt": prompt}), 400)["param"] == "prompt"


def test_a_missing_field_is_named():
    error = fault(Service().post(CHATS, {"model": "testbed"}), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_parameter")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "\xc3"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        json.dumps(CHAT).encode("utf-16"),
    ],
    ids=range(11),
)
def test_what_is_not_json_is_refused(raw):
    response = Service().request(
        "POST", CHATS, content=raw, headers={"Content-Type": "application/json"}
    )
    fault(response, 400)


def test_a_body_must_say_that_it_is_json():
    service = Service()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = service.request(
            "POST", CHATS, content=json.dumps(CHAT), headers={"Content-Type": kind}
        )
        assert fault(response, 415)["code"] == "unsupported_media_type"
    kind = "application/json; charset=utf-8"
    response = service.request(
        "POST", CHATS, content=json.dumps(CHAT), headers={"Content-Type": kind}
    )
    assert response.status_code == 200


def test_models():
    service = Service(models=("testbed", "org/name"))
    listed = service.request("GET", "/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["testbed", "org/name"]
    assert service.request("GET", "/v1/models/org/name").json() == listed["data"][1]
    assert fault(service.request("GET", "/v1/models/other"), 404)["code"] == "model_not_found"
    error = fault(service.post(CHATS, CHAT | {"model": "other"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_unknown_paths_and_methods():
    service = Service()
    assert fault(service.request("GET", "/v2"), 404)["code"] == "not_found"
    response = service.request("GET", CHATS)
    assert fault(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_health_and_readiness():
    service = Service()
    assert service.request("GET", "/ready").json() == {"status": "ready"}
    service.engine.unready = "the model is being loaded"
    ready = service.request("GET", "/ready")
    assert ready.status_code == 503
    assert ready.json() == {"status": "unready", "reason": "the model is being loaded"}
    assert service.request("GET", "/health").json() == {"status": "ok"}
    refused = service.post(CHATS, CHAT)
    assert fault(refused, 503)["code"] == "not_ready"
    assert int(refused.headers["retry-after"]) >= 1


def test_further_routers_are_served():
    router = APIRouter()

    @router.get("/metrics")
    async def metrics():
        return "up"

    assert Service(routers=[router]).request("GET", "/metrics").json() == "up"


def test_the_access_log_has_no_text(caplog):
    caplog.set_level(logging.INFO)
    service = Service("answered")
    service.post(f"{CHATS}?secret=urn", CHAT)
    service.request("GET", "/nowhere%0aforged")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("midstream")]
    access = [r.getMessage() for r in caplog.records if r.name == "midstream.serve.access"]
    chat, nowhere = (line.split() for line in access)
    assert chat[:4] == ["client=-", "method=POST", f"route={CHATS}", "status=200"]
    assert chat[-1] == f"stream={service.engine.asked[0].stream}"
    assert nowhere[1:4] == ["method=GET", "route=-", "status=404"]
    for secret in ("urn", "answered", "secret", "forged", "nowhere"):
        assert secret not in "".join(ours)


# Limits


def test_limits_of_the_prompt():
    service = Service(settings={"max_messages": 2, "max_prompt_chars": 10})
    message = {"role": "user", "content": "12345"}
    assert service.post(CHATS, CHAT | {"messages": [message] * 2}).status_code == 200
    assert fault(service.post(CHATS, CHAT | {"messages": [message] * 3}), 400)["param"] == (
        "messages"
    )
    long = [message, {"role": "user", "content": "123456"}]
    error = fault(service.post(CHATS, CHAT | {"messages": long}), 400)
    assert error["code"] == "context_length_exceeded"
    for prompt in ("12345678901", [1] * 11):
        error = fault(service.post(TEXTS, TEXT | {"prompt": prompt}), 400)
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(chunked):
    service = Service(settings={"max_body_bytes": 1000})
    read = []

    async def parts():
        for _ in range(100):
            read.append(1)
            yield b"x" * 100

    async def send():
        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = parts() if chunked else b"x" * 10_000
            kind = {"Content-Type": "application/json"}
            return await client.post(CHATS, content=content, headers=kind)

    assert fault(asyncio.run(send()), 413)["code"] == "body_too_large"
    assert len(read) < 20  # what follows is not read


def held_open(service, address, count):
    """Streams that stay open, counted by the server."""
    socks = [address.send(CHAT | LONG) for _ in range(count)]
    service.wait_for_streams(count)
    return socks


def test_streams_at_once_are_limited_and_their_places_come_back():
    service = Service(**LONG_LIVED, settings={"max_streams": 2})
    with service.listening() as address:
        socks = held_open(service, address, 2)
        refused = address.post(CHAT)
        assert fault(refused, 429)["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert address.get("/health").status_code == 200
        for sock in socks:
            sock.close()
        service.settled()
        assert [stream.cancelled for stream in service.engine.streams] == [True, True]
        held_open(service, address, 3)[0].close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(stream):
    service = Service(**LONG_LIVED)
    with service.listening() as address:
        sock = address.send(CHAT | LONG | {"stream": stream})
        service.wait_for_streams(1)
        sock.close()
        wait_for(lambda: [e.type for e in service.watching.events[-1:]] == ["finished"])
        assert service.watching.events[-1].message == "cancelled"
        service.settled()


def test_a_client_that_does_not_read_is_cut():
    big = ["x", *["x" * 65536] * 4095]
    service = Service(
        pieces=big, risks=[0.1] * len(big), settings={"slow_reader_seconds": 0.3}
    )  # fmt: skip
    with service.listening() as address:
        sock = address.send(CHAT | LONG, receive_buffer=4096)
        service.wait_for_streams(1)
        service.settled()
        assert b"[DONE]" not in read_all(sock)
        assert "[DONE]" in address.post(CHAT | {"stream": True, "max_tokens": 1}).text


def test_clients_that_come_and_go_leave_nothing_behind():
    calm = {"header_seconds": PATIENCE, "body_seconds": PATIENCE, "slow_reader_seconds": PATIENCE}
    service = Service(pieces=["x"] * 40, risks=[0.1] * 40, delay=0.002, settings=calm)
    chance = random.Random(5)

    async def visit(address, kind, after):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        raw = json.dumps(CHAT | {"stream": kind != "whole"}).encode()
        head = f"POST {CHATS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
        sent = head.encode() + raw
        writer.write(sent[: after % len(sent)] if kind == "half" else sent)
        if kind in ("leaves", "half"):
            await asyncio.sleep(after / 10_000)
            writer.transport.abort()
            return None
        text = await reader.read(-1)
        writer.close()
        return b"[DONE]" in text if kind == "stays" else b'"finish_reason": "stop"' in text

    async def flood(address):
        kinds = ["stays", "leaves", "half", "whole"] * 40
        return await asyncio.gather(*(visit(address, k, chance.randrange(900)) for k in kinds))

    with service.listening() as address:
        ends = asyncio.run(flood(address))
        service.settled()
        wait_for(lambda: all(stream._task.done() for stream in service.engine.streams))
        assert ends.count(True) == 80
        assert ends.count(False) == 0
        assert not service.front.admission._relays
        assert not service.front.admission._of_client


def test_a_body_that_does_not_come_is_not_waited_for():
    service = Service(settings={"body_seconds": 0.2})
    with service.listening() as address:
        sock = address.connect()
        head = f"POST {CHATS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
        service.settled()


# The end of the server

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO)
sys.path.insert(0, sys.argv[1])
from http_service import LONG_LIVED, Draining, Service
from midstream.serve.run import run
service = Service(engine=Draining, **LONG_LIVED)
run(service.app, host="127.0.0.1", port=0, drain=float(sys.argv[2]))
print("notices", service.watching.notices, "left", service.front.admission.count)
"""


@contextlib.contextmanager
def process(drain):
    child = Child(SCRIPT, str(Path(__file__).parent), str(drain))
    try:
        child.wait_until_ready()
        yield child
    finally:
        child.close()


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, address, body):
        super().__init__(daemon=True)
        self.url, self.body, self.text = address.url, body, ""
        self.begun = threading.Event()
        self.start()

    def run(self):
        with httpx.stream("POST", self.url + CHATS, json=self.body, timeout=PATIENCE) as response:
            for part in response.iter_text():
                self.text += part
                self.begun.set()


def ended_well(child):
    status, out = child.ended()
    assert status == 0, child.log
    assert out == "notices ['stopping'] left 0\n"
    assert "Traceback" not in child.log


def test_a_signal_drains_and_a_second_one_cuts_with_a_terminal_signal():
    with process(drain=PATIENCE) as child:
        address = child.address
        long = Reader(address, CHAT | LONG)
        short = Reader(address, CHAT | {"stream": True, "max_tokens": 20})
        assert long.begun.wait(PATIENCE)
        assert short.begun.wait(PATIENCE)
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: address.get("/ready").status_code == 503)
        assert address.get("/ready").json()["reason"] == "the server is shutting down"
        assert address.get("/health").status_code == 200
        assert fault(address.post(CHAT), 503)["code"] == "server_shutting_down"
        short.join(PATIENCE)
        assert events(short.text)[-1]["choices"][0]["finish_reason"] == "length"
        assert long.is_alive()
        child.send_signal(signal.SIGTERM)
        long.join(PATIENCE)
        assert events(long.text)[-1]["error"]["code"] == "server_shutting_down"
        ended_well(child)


def test_what_does_not_end_in_time_is_cut_with_a_terminal_signal():
    with process(drain=0.2) as child:
        long = Reader(child.address, CHAT | LONG)
        assert long.begun.wait(PATIENCE)
        child.send_signal(signal.SIGTERM)
        long.join(PATIENCE)
        assert events(long.text)[-1]["error"]["code"] == "server_shutting_down"
        ended_well(child)


def test_whoever_looks_on_ends_before_the_last_connections_are_waited_for(caplog, monkeypatch):
    """So that a viewer of the page does not hold up the end."""
    monkeypatch.setattr("midstream.serve.run.GRACE", 2 * PATIENCE)
    router, closed = APIRouter(), asyncio.Event()

    @router.get("/look")
    async def look():
        async def updates():
            yield b"first"
            await closed.wait()

        return StreamingResponse(updates())

    class Looking(Observer):
        def close(self):
            closed.set()

    service = Service(routers=[router])
    service.engine.feed.add(Looking())
    with service.listening() as address:
        viewer = address.connect()
        viewer.sendall(b"GET /look HTTP/1.1\r\nHost: t\r\n\r\n")
        assert viewer.recv(1000)
    assert read_all(viewer).endswith(b"0\r\n\r\n")
    assert "graceful shutdown exceeded" not in caplog.text


def test_an_engine_that_does_not_come_up_ends_the_server():
    from midstream.serve.run import run

    class NoModelError(ValueError):
        pass

    async def start():
        raise NoModelError("no such folder")

    service = Service()
    with pytest.raises(NoModelError):
        run(service.app, host="127.0.0.1", port=0, drain=0.0, start=start)


def test_a_port_that_is_taken_is_said():
    from midstream.serve.run import ListenError, listen

    with listen("127.0.0.1", 0) as sock, pytest.raises(ListenError, match="cannot listen on"):
        listen("127.0.0.1", sock.getsockname()[1])


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("max_streams: 3\nannotations: true\n")
    assert Settings.load(file) == Settings(max_streams=3, annotations=True)
    for text, message in [
        ("max_stream: 3\n", "max_stream: unknown key"),
        ("max_streams: 0\n", "max_streams: .*greater"),
        ("default_tokens: 5000\n", "must not exceed max_tokens"),
        ("sent_on: [seed]\n", "sent_on: follows from the engine"),
        ("- 1\n", "expected a mapping"),
    ]:
        file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            Settings.load(file)
