"""Spans: one per stream, by the conventions, without text; a broken collector disturbs nothing."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from http_service import PATIENCE
from scripted_engine import BUNDLE, ScriptedEngine, events

pytest.importorskip("opentelemetry.sdk", reason="needs midstream[otel]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from midstream.ledger.ledger import conversation_key
from midstream.serve import tracing
from midstream.serve.app import create_app
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed, Opened
from midstream.serve.tracing import Names, Tracing
from midstream.streams import Event

DOCS = Path(__file__).parents[1] / "docs" / "tracing.md"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ask(name="s-1", **fields):
    chat = ({"role": "user", "content": "Describe the urn."},)
    return Ask(
        **{"stream": name, "model": "testbed", "messages": chat, "prompt": None, "max_tokens": 9}
        | fields
    )


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Whatever sends has time for it, and has ended with the test."""
    monkeypatch.setattr(tracing, "FLUSHING", PATIENCE)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(PATIENCE))
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def exported():
    return InMemorySpanExporter()


@pytest.fixture
def feed(exported):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    feed = Feed([Tracing(provider)])
    yield feed
    assert feed.failures == 0


def serve(feed, *asks, **script):
    async def run():
        engine = ScriptedEngine(feed, **script)
        for asked in asks or [ask()]:
            async for _ in events(await engine.submit(asked)):
                pass

    asyncio.run(run())


def start(feed, **fields):
    opened = Opened(ask(), "moderate", BUNDLE, **fields)
    feed.opened(opened)
    return opened


def tell(feed, opened, type, **facts):
    feed.event(opened, Event(type=type, stream="s-1", bundle=BUNDLE, **facts))


def test_a_chat_that_is_halted(feed, exported):
    sampling = {"temperature": 0.7, "top_p": 0.9}
    serve(feed, ask(sampling=sampling, tier="strict", client="alice", conversation="c-7"),
          risks=[0.1, 0.2, 0.9, 0.3], halt_after=2)  # fmt: skip
    (span,) = exported.get_finished_spans()
    assert (span.name, span.kind) == ("chat testbed", SpanKind.SERVER)
    assert span.status.status_code == StatusCode.UNSET  # a halt is no error
    attributes = dict(span.attributes)
    assert attributes.pop(Names.TO_FIRST_CHUNK) >= 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "midstream",
        "gen_ai.request.model": "testbed",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.conversation.id": conversation_key("alice:c-7"),  # as in the audit log
        "gen_ai.response.id": "s-1",
        "gen_ai.response.model": "testbed",
        "gen_ai.response.finish_reasons": ("content_filter",),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 2,
        "midstream.client": "alice",
        "midstream.tier": "strict",
        "midstream.bundle": BUNDLE,
        "midstream.verdict": "HALT",
        "midstream.cause": "sealed",
        "midstream.halted_at": 6,
        "midstream.peak_risk": 0.9,
        "midstream.tokens.scored": 3,
        "midstream.tokens.unscored": 0,
        "midstream.tokens.delivered_unscored": 0,
    }
    facts = {Names.VERDICT: "HALT", Names.CAUSE: "sealed", Names.RISK: 0.9, Names.BUNDLE: BUNDLE}
    assert [(event.name, dict(event.attributes)) for event in span.events] == [
        ("midstream.halt", {Names.POSITION: 6} | facts),
        ("midstream.finish", facts),
    ]


def test_a_text_that_is_continued(feed, exported):
    serve(feed, ask(messages=None, prompt="The urn"))
    (span,) = exported.get_finished_spans()
    assert span.name == "text_completion testbed"
    assert span.attributes[Names.FINISH_REASONS] == ("stop",)
    assert not {Names.CLIENT, Names.CONVERSATION, Names.HALTED_AT} & set(span.attributes)


def test_holding_and_going_on_are_events(feed, exported):
    opened = start(feed)
    tell(feed, opened, "verdict", position=3, verdict="HOLD", cause="temper", risk=0.5)
    tell(feed, opened, "verdict", position=5, verdict="CONTINUE", risk=0.1)
    tell(feed, opened, "finished", message="stop")
    (span,) = exported.get_finished_spans()
    assert [event.name for event in span.events] == [Names.HOLD, Names.RESUME, Names.FINISH]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(times)


def test_a_stream_that_fails(feed, exported):
    serve(feed, error="the model's process ended")
    (span,) = exported.get_finished_spans()
    assert span.status.status_code == StatusCode.ERROR
    assert span.status.description == "the model's process ended"
    assert span.attributes[Names.FINISH_REASONS] == ("error",)
    assert span.attributes[Names.ERROR] == "engine_error"


def test_no_text_gets_into_a_span(feed, exported):
    chat = ask(body={"user": "SECRET"}, conversation="SECRET")
    text = ask("s-2", messages=None, prompt="SECRET")
    serve(feed, chat, text, pieces=["SECRET"] * 3, halt_after=2)
    spans = exported.get_finished_spans()
    assert len(spans) == 2
    for span in spans:
        assert "SECRET" not in span.to_json()
        assert "urn" not in span.to_json()


def test_the_parent_is_the_one_that_the_request_names(feed, exported):
    parent = f"00-{TRACE}-{SPAN}-01"
    serve(feed, ask(trace={"traceparent": parent, "tracestate": "vendor=1"}))
    (span,) = exported.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert (f"{span.parent.span_id:016x}", span.parent.is_remote) == (SPAN, True)
    assert span.context.trace_state["vendor"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_the_header_of_a_request_gets_there(feed, exported, stream):
    async def ask_over_http():
        app = create_app(ScriptedEngine(feed), feed)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            body = {"model": "testbed", "prompt": "The urn", "stream": stream}
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
            answer = await client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200

    asyncio.run(ask_over_http())
    (span,) = exported.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == SPAN


@pytest.mark.parametrize("parent", ["", "00", f"00-{'0' * 32}-{SPAN}-01", "zz-\x00-\ud800-1"])
def test_nonsense_in_its_place_begins_a_trace(feed, exported, parent):
    serve(feed, ask(trace={"traceparent": parent, "tracestate": "===,,"}))
    (span,) = exported.get_finished_spans()
    assert span.parent is None


def test_durations_do_not_follow_the_wall_clock(feed, exported):
    opened = start(feed, at=time.time() - 86400)  # the clock was set on by a day since
    tell(feed, opened, "halted", position=5, verdict="HALT", risk=0.9)
    tell(feed, opened, "finished", message="content_filter")
    (span,) = exported.get_finished_spans()
    assert span.start_time == int(opened.at * 1e9)
    assert (
        0 <= span.events[0].timestamp - span.start_time <= span.end_time - span.start_time < 36e11
    )


def test_the_end_of_the_server_ends_what_is_left(exported):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exported))
    feed = Feed([Tracing(provider)])
    start(feed)
    feed.close()
    assert len(exported.get_finished_spans()) == 1


def test_a_collector_gets_the_spans():
    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            taken.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    taken = []
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        feed = Feed([Tracing.to_collector(f"http://127.0.0.1:{server.server_port}/")])
        serve(feed, ask("s-1"), ask("s-2"))
        feed.close()
        server.shutdown()
        thread.join()
    assert {path for path, _ in taken} == {"/v1/traces"}
    names, services = [], set()
    for _, body in taken:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            services |= {
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            }
            names += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert (names, services) == (["chat testbed"] * 2, {"midstream"})


@pytest.fixture(params=["nobody there", "never answers", "raises"])
def broken(request, monkeypatch, threads):
    monkeypatch.setattr(tracing, "FLUSHING", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # else it goes on long after the test
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            server.listen()
        if request.param != "raises":
            yield Tracing.to_collector(f"http://127.0.0.1:{server.getsockname()[1]}")
            return
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(Raises(), schedule_delay_millis=1))
        yield Tracing(provider)


class Raises(SpanExporter):
    def export(self, spans):
        raise OSError("no route to host")

    def shutdown(self):
        raise OSError("no route to host")


def test_a_broken_collector_disturbs_nothing(broken):
    feed = Feed([broken])
    many = [ask(f"s-{n}") for n in range(600)]  # more than a batch, so that sending begins
    serve(feed, *many, halt_after=1)
    feed.close()
    assert feed.failures == 0


class Hangs(SpanExporter):
    def __init__(self):
        self.may_end, self.ended = threading.Event(), False

    def export(self, spans):
        self.may_end.wait(PATIENCE)
        return SpanExportResult.FAILURE

    def shutdown(self):
        self.may_end.wait(PATIENCE)
        self.ended = True


def test_the_end_of_the_server_does_not_wait_for_a_collector_that_hangs(monkeypatch, caplog):
    """The SDK alone would."""
    monkeypatch.setattr(tracing, "FLUSHING", 0.1)
    hangs, provider = Hangs(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(hangs))
    feed = Feed([Tracing(provider)])
    serve(feed)
    feed.close()
    assert not hangs.ended
    assert "the collector did not take the last spans within 0.1 s" in caplog.text
    hangs.may_end.set()


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"'localhost:4318'; expected one such as http://local"):
        Tracing.to_collector("localhost:4318")


def test_the_docs_list_all_names():
    text = DOCS.read_text()
    listed = set(re.findall(r"`((?:gen_ai|midstream|error)\.[\w.]+)`", text))
    names = {value for key, value in vars(Names).items() if key.isupper()} - {Names.REQUEST}
    sampling = {Names.REQUEST + name for name in ("temperature", "top_p", "top_k")}
    assert listed == names | sampling


def test_without_opentelemetry_it_says_what_to_install():
    code = """if True:
        import sys
        import midstream.serve.feed, midstream.serve.metrics
        assert "midstream.serve.tracing" not in sys.modules
        there = [name for name in sys.modules if name.startswith("opentelemetry")]
        sys.modules.update(dict.fromkeys([*there, "opentelemetry"]))
        import midstream.serve.tracing"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last == "ImportError: traces need OpenTelemetry: pip install 'midstream[otel]'"
