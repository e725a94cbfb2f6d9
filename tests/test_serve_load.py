"""The load bench: its short form against the real server, and that it sees what is wrong."""

from __future__ import annotations

import asyncio
import gc
import socketserver
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import load_client
import numpy as np
import pytest
import serve_load
from load_client import Tally
from load_server import RECORD, key_of
from scripted_engine import ScriptedEngine
from serve_load import LoadError

from midstream import testbed
from midstream.serve import garbage, serving
from midstream.serve.app import create_app
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed, Observer, Opened
from midstream.serve.messages import Accepted, Left, Ready, Step
from midstream.serve.run import Server
from midstream.streams import Event

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'data: {"id": "chatcmpl-00ff", "choices": [%b], "usage": %b, "midstream": %b}\n\n'
FACTS = b'{"scored": 2, "unscored": 0, "halted_at": null, "cause": null}'
WORD = CHUNK % (b'{"delta": {"content": "a"}, "finish_reason": null}', b"null", b"null")
LAST = CHUNK % (b'{"delta": {}, "finish_reason": "stop"}', b"null", FACTS)
USAGE = CHUNK % (b"", b'{"prompt_tokens": 3, "completion_tokens": 2}', b"null")
DONE = b"data: [DONE]\n\n"


def test_200_streams_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """That no slot leaks, all ends are told and all counts agree is checked by the bench."""
    if not version("transformers").startswith("5.23."):
        pytest.skip("continuous batching is watched in transformers 5.23 only")
    monkeypatch.setattr(serve_load, "MAX_TOKENS", 24)
    found = serve_load.load(streams=200, seconds=15.0)
    assert found["errors"] == 0
    assert found["streams_left"] >= 1
    assert sum(found["streams_finished"].values()) >= 200 - found["streams_left"]
    assert {"stop", "length", "content_filter"} <= set(found["streams_finished"])
    assert found["serve_p99_added_ms_200_streams"] >= found["added_p50_ms"] > 0
    assert found["read_p99_ms"] >= found["serve_p99_added_ms_200_streams"]


@contextmanager
def answering(*parts: bytes) -> Iterator[tuple[str, int]]:
    """A server that answers each request on a connection with these bytes, part by part."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(1 << 16):
                for part in parts:
                    self.request.sendall(part)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield ("127.0.0.1", server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


def clients(*parts: bytes) -> Tally:
    with answering(*parts) as address, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(load_client.run, address, [b"{}"], 2, 0.2).result()  # it is nice


def test_clients_count_what_they_get() -> None:
    body = chunked(WORD, WORD, LAST + USAGE + DONE)
    tally = clients(HEAD + body[:100], body[100:300], body[300:] + b"0\r\n\r\n")
    whole = tally.reasons["stop"]
    assert tally.faults == []
    assert tally.streams == [("chatcmpl-00ff", 2)] * whole
    counts = (tally.prompt, tally.tokens, tally.scored, tally.halts)
    assert counts == (3 * whole, 2 * whole, 2 * whole, {})
    assert len(tally.arrived) == len(tally.read) == 2 * whole
    late = np.array(tally.read) - np.array(tally.arrived)
    assert (late > -0.01).all()  # both on one clock
    assert (late < load_client.PATIENCE).all()


@pytest.mark.parametrize(
    "body",
    [
        chunked(WORD, LAST + USAGE),
        chunked(WORD, USAGE + DONE),
        chunked(WORD, LAST + LAST + USAGE + DONE),
        chunked(WORD, b'data: {"error": {"message": "gone"}}\n\n' + DONE),
        chunked(DONE),
    ],
    ids=["no mark after it", "no reason", "two reasons", "an error", "nothing"],
)
def test_a_stream_without_its_end_is_a_fault(body: bytes) -> None:
    tally = clients(HEAD + body + b"0\r\n\r\n")
    assert tally.faults
    assert not tally.streams


def test_a_refusal_is_a_fault() -> None:
    tally = clients(b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}")
    assert tally.faults[0].startswith("HTTP/1.1 429")


def test_times_are_those_of_the_same_tokens() -> None:
    first, second = "chatcmpl-" + "0a" * 12, "chatcmpl-" + "0b" * 12
    log = b"".join(
        RECORD.pack(key_of(stream), at)
        for stream, at in [(first, 1.0), (second, 1.0), (second, 2.0), (first, 3.0), (first, 9.0)]
    )
    tally = Tally(
        streams=[(second, 2), (first, 3)],
        arrived=array("d", [1.25, 2.5, 1.125, 3.0625, 9.5]),
        read=array("d", [1.5, 3.0, 1.25, 3.125, 10.0]),
    )
    arrived, read, steps = serve_load.added(tally, serve_load.steps_of(log), 1.0, 9.0)
    assert arrived.tolist() == [250.0, 500.0, 125.0, 62.5]
    assert read.tolist() == [500.0, 1000.0, 250.0, 125.0]
    assert steps.tolist() == [1000.0, 1000.0]
    tally.streams[0] = (second, 3)
    with pytest.raises(LoadError, match="2 pieces of text left the worker, 3 arrived"):
        serve_load.added(tally, serve_load.steps_of(log), 1.0, 9.0)


class Quiet:
    def complaints(self) -> list[str]:
        return []


def told(**changes: float) -> dict[tuple[str, ...], float]:
    agreed = {
        ("requests_finished_total", "stop"): 5.0,
        ("requests_finished_total", "content_filter"): 2.0,
        ("requests_finished_total", "cancelled"): 1.0,
        ("halts_total", "drift"): 2.0,
        ("tokens_scored_total",): 100.0,
        ("tokens_unscored_total",): 0.0,
        ("generation_tokens_total",): 90.0,
        ("prompt_tokens_total",): 60.0,
        ("tokens_delivered_unscored_total",): 0.0,
        ("feed_failures_total",): 0.0,
        ("worker_restarts_total",): 0.0,
    }
    return agreed | {tuple(key.split("__")): value for key, value in changes.items()}


SEEN: dict[str, Any] = {
    "reasons": {"stop": 5, "content_filter": 2},
    "halts": {"drift": 2},
    "prompt": 50,
    "tokens": 90,
    "scored": 100,
    "left": 1,
}


def test_server_and_clients_agree() -> None:
    serve_load.check(Tally(**SEEN), told(), Quiet())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"requests_finished_total__stop": 4.0},
        {"requests_finished_total__error": 1.0},
        {"halts_total__drift": 1.0},
        {"halts_total__violated": 2.0},
        {"tokens_scored_total": 99.0},
        {"generation_tokens_total": 90.0 + 2 * serve_load.MAX_TOKENS},
        {"tokens_delivered_unscored_total": 1.0},
        {"feed_failures_total": 1.0},
        {"worker_restarts_total": 1.0},
        {"requests_refused_total__429__busy": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_they_do_not_agree_it_fails(change: dict[str, float]) -> None:
    with pytest.raises(LoadError):
        serve_load.check(Tally(**SEEN), told(**change), Quiet())  # type: ignore[arg-type]


def test_a_token_does_not_wait_for_those_who_look_on(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Looks(Observer):
        def event(self, stream: Opened, event: Event) -> None:
            order.append(f"{event.stream} seen")

    class Silent:
        def __init__(self, *parts: Any) -> None:
            pass

        def send(self, message: Any) -> None:
            pass

    async def run() -> None:
        part = serving.Serving(None, None, Feed([Looks()]), None, None)  # type: ignore[arg-type]
        policy = testbed.load_bundle().policy
        part._received(Ready("b" * 64, policy, "moderate", 8))

        async def read(name: str) -> None:
            stream = await part.submit(Ask(name, "testbed", None, "The urn", 4))
            stream.follow(lambda event: order.append(f"{name} {type(event).__name__}"))

        readers = [asyncio.create_task(read(name)) for name in ("a", "b")]
        await asyncio.sleep(0)
        for name in ("a", "b"):
            part._received(Accepted(name, 3))
        for _ in range(3):
            await asyncio.sleep(0)
        left = [Left(name, 1, 4, 0.1, "urn", 0) for name in ("a", "b")]
        await asyncio.gather(*readers)
        part._received(Step(1.0, 2, None, 6, left))
        ends = [Event(type="error", stream=name, bundle="b" * 64) for name in ("a", "b")]
        part._received(Step(2.0, 0, None, 8, ends))
        while len(order) < 8:
            await asyncio.sleep(0)

    monkeypatch.setattr(serving, "Worker", Silent)
    asyncio.run(asyncio.wait_for(run(), 60))
    delivered = ["a Released", "b Released", "a Event", "b Event"]
    assert order == [*delivered, "a seen", "b seen", "a seen", "b seen"]


def test_the_garbage_collector_leaves_alone_what_is_there_at_the_start() -> None:
    async def run() -> None:
        async def nothing() -> None:
            pass

        feed = Feed()
        await Server(create_app(ScriptedEngine(feed), feed), drain=0.0)._start(nothing)

    thresholds = gc.get_threshold()
    try:
        asyncio.run(run())
        assert gc.get_freeze_count() > 10_000
        looks = [kind["collections"] for kind in gc.get_stats()]
        _Cycle.alive = 0
        for _ in range(1_000):
            _Cycle()
        garbage.collect()
        assert _Cycle.alive >= 1_000  # too little to stop anybody for
        for _ in range(30):  # as the streams that ended may
            for _ in range(1_000):
                _Cycle()
            garbage.collect()
        assert _Cycle.alive < 5_000
        # where it is called, the collector does not look of itself, when tokens may wait
        assert gc.get_stats()[0]["collections"] == looks[0]
        assert gc.get_stats()[2]["collections"] > looks[2]
        for _ in range(100_000):
            _Cycle()
        assert _Cycle.alive < 50_000  # and where it is not, it does
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


class _Cycle:
    alive = 0

    def __init__(self) -> None:
        self.itself = self
        _Cycle.alive += 1

    def __del__(self) -> None:
        _Cycle.alive -= 1


def test_a_slope_is_per_minute() -> None:
    at = np.arange(100.0)
    assert serve_load.slope(at, 250 + at * 0.5) == pytest.approx(30.0)
