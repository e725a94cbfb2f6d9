"""What a policy has clients told of a halt reaches them, beside the text and never in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from http_service import CHAT, CHATS, TEXT, TEXTS, Service, events
from scripted_engine import BUNDLE

from midstream.serve.engine import Ask, Follower, Released
from midstream.serve.relay import Relay
from midstream.serve.settings import Settings
from midstream.streams import Event

MESSAGE = "The rest was withheld."
HALTS: dict[str, Any] = {"halt_after": 2, "halt_message": MESSAGE}


@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), (TEXTS, TEXT)])
def test_the_message_stands_beside_the_finish_reason(path: str, body: dict[str, Any]) -> None:
    chunks = events(Service(**HALTS).post(path, body | {"stream": True}))
    *earlier, last = (chunk["choices"][0] for chunk in chunks)
    assert (last["finish_reason"], last["stop_reason"]) == ("content_filter", MESSAGE)
    assert not any("stop_reason" in choice for choice in earlier)
    (choice,) = Service(**HALTS).post(path, body).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("content_filter", MESSAGE)
    assert choice.get("text", choice.get("message", {}).get("content")) == "The urn "
    assert MESSAGE not in str([choice["delta"] for choice in earlier if "delta" in choice])


def test_annotations_do_not_count_it() -> None:
    asked = CHAT | {"midstream": {"annotations": True}}
    (choice,) = Service(**HALTS).post(CHATS, asked).json()["choices"]
    assert choice["stop_reason"] == MESSAGE
    assert choice["content_filter_offsets"]["end_offset"] == len("The urn ")


@pytest.mark.parametrize(
    "script",
    [
        {"halt_message": MESSAGE},
        {"halt_after": 2},
        {**HALTS, "error": "the model's process ended"},
    ],
)
def test_otherwise_there_is_none(script: dict[str, Any]) -> None:
    """Nothing was halted; the policy has no message; the response broke off."""
    assert "stop_reason" not in Service(**script).post(CHATS, CHAT).text
    assert "stop_reason" not in Service(**script).post(CHATS, CHAT | {"stream": True}).text


def test_a_halt_after_a_stop_string_is_not_the_clients() -> None:
    class Halted:
        ask = Ask("s", "testbed", None, "x", 9)
        prompt_tokens, completion_tokens, halt_message = 4, 1, MESSAGE

        def cancel(self) -> None:
            pass

        def follow(self, follower: Follower) -> None:
            follower(Released(4, 0.1, "The urn. Stop"))
            for type, facts in (
                ("halted", {"verdict": "HALT"}),
                ("finished", {"message": "content_filter"}),
            ):
                told = {"type": type, "stream": "s", "bundle": BUNDLE, **facts}
                follower(Event.model_validate(told))

    async def run() -> None:
        end = await Relay(Halted(), ("Stop",), Settings()).run(print)
        assert (end.finish_reason, end.halt_message) == ("stop", None)

    asyncio.run(run())
