"""Ends that come at an awkward moment: of a client, of the server, of a worker in the making."""

from __future__ import annotations

import asyncio
import json
import resource
from types import SimpleNamespace
from typing import Any

import pytest
from http_service import CHAT, CHATS, LONG_LIVED, PATIENCE, Service, fault, read_all, wait_for
from serving import run
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from midstream import testbed
from midstream.bundle import Bundle
from midstream.engines.hf.growing_text import GrowingText, literal
from midstream.serve import rotation
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.live import Live
from midstream.serve.live_routes import live_router
from midstream.serve.local import LocalEngine
from midstream.serve.relay import ClientGoneError, Relay
from midstream.serve.reloads import ReloadError
from midstream.serve.rotation import Rotation
from midstream.serve.run import allow_sockets
from midstream.serve.serving import Serving
from midstream.serve.settings import Settings
from midstream.streams import Event

# -- clients --------------------------------------------------------------------------------------


def test_a_client_that_goes_just_before_the_first_event_ends_its_stream() -> None:
    class Endless:
        ask = Ask("s", "m", None, "x", 9)
        prompt_tokens = completion_tokens = 0
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

        def follow(self, follower: Any) -> None:
            relay.leave()
            follower(Event(type="admitted", stream="s", bundle="b"))

    stream = Endless()

    async def follow() -> None:
        nonlocal relay
        relay = Relay(stream, (), Settings())
        with pytest.raises(ClientGoneError):
            await relay.run(print)

    relay: Any = None
    run(follow())
    assert stream.cancelled


def pipelined(body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {CHATS} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    return (f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw) * 2


def test_a_client_that_goes_with_a_request_behind_its_own_ends_its_stream() -> None:
    service = Service(**LONG_LIVED)
    with service.listening() as address:
        sock = address.connect()
        sock.sendall(pipelined({**CHAT, "max_tokens": 4096}))
        service.wait_for_streams(1)
        sock.close()
        service.settled()
        (stream,) = service.engine.streams
        assert stream.cancelled


def test_a_request_behind_another_is_left_to_be_sent_again() -> None:
    service = Service()
    with service.listening() as address:
        sock = address.connect()
        sock.sendall(pipelined(CHAT))
        told = read_all(sock)
        assert told.count(b"HTTP/1.1 ") == told.count(b"HTTP/1.1 200 OK") == 1
        assert len(service.engine.asked) == 1


def test_a_client_that_goes_while_the_engine_begins_is_not_waited_for() -> None:
    service = Service(settings={"start_seconds": 10 * PATIENCE})
    began, left = [], []

    async def submit(ask: Ask) -> Any:
        began.append(ask)
        try:
            await asyncio.Event().wait()
        finally:
            left.append(ask)

    service.engine.submit = submit
    with service.listening() as address:
        sock = address.send(CHAT)
        wait_for(lambda: began)
        sock.close()
        service.settled()
        assert left == began


# -- workers --------------------------------------------------------------------------------------


class Loading(Serving):
    """A worker that is ready when it is told so; without a process."""

    made: list[Loading]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may_serve, self.given_up = asyncio.Event(), False
        self.worker.stop = self._stopped  # type: ignore[method-assign]

    async def _stopped(self) -> None:
        pass

    async def start(self) -> None:
        self.made.append(self)
        try:
            await self.may_serve.wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise


class Rotating(Rotation):
    _serve = Loading


@pytest.fixture
def rotating(monkeypatch: pytest.MonkeyPatch) -> Rotation:
    from midstream import testbed

    bundle = testbed.load_bundle()

    def load(folder: Any) -> Bundle:
        return bundle

    monkeypatch.setattr(rotation, "_load", load)
    monkeypatch.setattr("midstream.serve.workers.Worker.pid", 1)
    Loading.made = []
    plan = {
        "model": None, "slots": 1, "cache_tokens": None, "batch_tokens": 8, "tier": None,
        "device": "cpu", "threads": 1,
    }  # fmt: skip
    return Rotating(Feed(), None, plan, lambda channel, plan: None)


async def loading(count: int) -> Loading:
    while len(Loading.made) < count:
        await asyncio.sleep(0)
    return Loading.made[-1]


def test_a_reload_while_the_server_starts_is_refused(rotating: Rotation) -> None:
    async def start() -> None:
        starting = asyncio.create_task(rotating.start())
        await asyncio.sleep(0)
        with pytest.raises(ReloadError, match="under way"):
            await rotating.reload(None)
        (await loading(1)).may_serve.set()
        await starting
        assert rotating.unready is None
        assert len(Loading.made) == 1
        await rotating.close(0.0)

    run(start())


def test_an_end_does_not_wait_for_a_model_that_is_being_loaded(rotating: Rotation) -> None:
    async def end() -> None:
        starting = asyncio.create_task(rotating.start())
        (await loading(1)).may_serve.set()
        await starting
        reloading = asyncio.create_task(rotating.reload(None))
        second = await loading(2)
        await rotating.close(0.0)
        assert second.given_up
        with pytest.raises(ReloadError, match="shutting down"):
            await reloading

    run(end())


def test_an_end_while_the_server_starts_is_no_failure(rotating: Rotation) -> None:
    async def end() -> None:
        starting = asyncio.create_task(rotating.start())
        first = await loading(1)
        starting.cancel()
        await rotating.close(0.0)
        assert first.given_up
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(end())


def test_nobody_gets_a_looser_tier_than_the_server_was_started_with() -> None:
    engine = LocalEngine(Feed(), tier="strict")
    policy = testbed.load_bundle().policy
    policy.tier_for("moderate")  # which would allow it
    ready = SimpleNamespace(policy=policy, tier="strict")
    engine._serving, engine._unready = SimpleNamespace(ready=ready, streams={}), None
    asked = Ask("s", "testbed", None, "x", 9, tier="moderate")
    with pytest.raises(ApiError, match="'moderate' is looser than this server allows") as refused:
        run(engine.submit(asked))
    assert (refused.value.status, refused.value.param) == (400, "midstream.tier")


# -- the server -----------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_for_its_connections(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 2048 if before[1] == resource.RLIM_INFINITY else before[1]
    wanted = min(hard, 2048) - 256
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        allow_sockets(wanted)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted + 256, before[1])
        assert not caplog.text
        allow_sockets(8)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted + 256, before[1])
        if before[1] != resource.RLIM_INFINITY:
            allow_sockets(before[1])
            assert f"{before[1]} files may be open" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_path_that_is_no_number_gets_the_standard_error() -> None:
    service = Service(routers=[live_router(Live(), lambda key: False)])
    for path in ("x", "9" * 5000):
        response = service.request("GET", f"/live/streams/{path}")
        assert fault(response, 404)["code"] == "not_found"
        assert path not in response.text


# -- text that cannot be judged -------------------------------------------------------------------


def test_a_tokenizer_that_drops_what_it_does_not_know_is_refused() -> None:
    """Its characters have no token, and would leave with whatever comes after them."""
    drops = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, []))
    assert GrowingText(drops).push("\u2603" * 99) == []
    with pytest.raises(ValueError, match="drops characters that it does not know"):
        literal(PreTrainedTokenizerFast(tokenizer_object=drops))
    told = models.BPE({"a": 0, "b": 1, " ": 2, "?": 3}, [], unk_token="?")
    literal(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(told)))
