"""What Prometheus is told: documented names, right counts, bounded labels."""

import asyncio
import inspect
import re
import time
from pathlib import Path

import httpx
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import BUNDLE, ScriptedEngine, events

from midstream.serve import audit_file, rotation
from midstream.serve.app import create_app
from midstream.serve.assemble import Watch, assemble
from midstream.serve.audit import AuditLog
from midstream.serve.engine import Ask
from midstream.serve.feed import EngineStats, Feed, Observer, Opened
from midstream.serve.keys import Keys
from midstream.serve.metrics import MOST_LABELS, Metrics, metrics_router
from midstream.serve.settings import Settings
from midstream.streams import Event

DOCS = Path(__file__).parents[1] / "docs"
OPENMETRICS = "application/openmetrics-text;version=1.0.0;escaping=underscores"
ROW = re.compile(r"^\| `(midstream:\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)


def ask(name="s-1", max_tokens=16):
    return Ask(name, "testbed", None, "The urn", max_tokens, client="alice")


@pytest.fixture
def metrics():
    return Metrics("testbed")


@pytest.fixture
def feed(metrics):
    feed = Feed([metrics])
    metrics.watch(feed)
    return feed


def scrape(metrics, accept=""):
    async def get():
        app = FastAPI()
        app.include_router(metrics_router(metrics))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get("/metrics", headers={"accept": accept})

    return asyncio.run(get())


def samples(metrics):
    """Every value by name and labels, in the way a scrape gives them."""
    found = {}
    for family in text_string_to_metric_families(scrape(metrics).text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels) if name != "model_name"]
            found[sample.name.removeprefix("midstream:"), *labels] = sample.value
    return found


def serve(feed, *asks, cancel=False, **script):
    async def run():
        engine = ScriptedEngine(feed, **script)
        for asked in asks or [ask()]:
            stream = await engine.submit(asked)
            if cancel:
                stream.cancel()
            async for _ in events(stream):
                pass

    asyncio.run(run())


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path, queue_bytes=2000)
    yield log
    log.close()


def test_the_table_in_the_docs_is_what_is_exported(metrics, feed, log):
    metrics.watch_audit(log)
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall((DOCS / "metrics.md").read_text())
    }
    serve(feed)
    serve(feed, ask("s-2"), halt_after=1)
    feed.event(opened := start(feed, "s-3"), Event(type="verdict", verdict="HOLD", **of(opened)))
    feed.notice("reloaded", {"bundle": BUNDLE})
    feed.refused("alice", 429, "too_many_requests")
    exported = {}
    for family in text_string_to_metric_families(scrape(metrics).text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels}
        assert "model_name" in labels
        assert {sample.labels["model_name"] for sample in family.samples} == {"testbed"}
        exported[name] = (family.type, labels - {"model_name", "le"})
    assert exported == documented


def start(feed, name):
    opened = Opened(ask(name), "moderate", BUNDLE)
    feed.opened(opened)
    return opened


def of(opened):
    return {"stream": opened.ask.stream, "bundle": opened.bundle}


@pytest.mark.parametrize("accept", ["", "text/plain;version=0.0.4", OPENMETRICS])
def test_whoever_asks_gets_the_same_names(metrics, feed, accept):
    serve(feed, ask(), halt_after=2)
    answer = scrape(metrics, accept)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)  # each declared once
    for family in families:
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert family.name.startswith("midstream:")


def test_streams_are_counted_by_how_they_end(metrics, feed):
    serve(feed)  # 4 tokens, stop
    serve(feed, ask("s-2", max_tokens=3))
    serve(feed, ask("s-3"), halt_after=2)
    serve(feed, ask("s-4"), cancel=True)
    serve(feed, ask("s-5"), error="the worker was killed")
    found = samples(metrics)
    ends = {key[1]: n for key, n in found.items() if key[0] == "requests_finished_total"}
    assert ends == {"stop": 1, "length": 1, "content_filter": 1, "cancelled": 1, "error": 1}
    assert found["halts_total", "sealed"] == 1
    assert found["generation_tokens_total",] == 4 + 3 + 2 + 0 + 4
    assert found["tokens_scored_total",] == 4 + 3 + 3 + 0  # an error leaves no report
    assert found["prompt_tokens_total",] == 4 * 4
    assert found["num_streams",] == 0


def test_streams_in_flight_and_their_times(metrics, feed):
    streams = [start(feed, f"s-{n}") for n in range(3)]
    for opened in streams[:2]:
        for _ in range(4):
            feed.event(opened, Event(type="released", text="a", risk=0.1, **of(opened)))
    found = samples(metrics)
    assert found["num_streams",] == 3
    assert found["time_to_first_token_seconds_count",] == 2
    assert found["inter_token_latency_seconds_count",] == 2 * 3
    for opened in streams:
        feed.event(opened, Event(type="error", message="gone", **of(opened)))
    assert samples(metrics)["num_streams",] == 0


def test_tokens_that_left_without_a_score_stand_apart(metrics, feed):
    assert samples(metrics)["tokens_delivered_unscored_total",] == 0  # there before the first
    for n, type in enumerate(("finished", "error")):
        opened = start(feed, f"s-{n}")
        end = Event(
            type=type, message="stop", delivered=9, delivered_unscored=2 + n, **of(opened)
        )  # fmt: skip
        feed.event(opened, end)
    found = samples(metrics)
    assert found["tokens_delivered_unscored_total",] == 5
    assert found["generation_tokens_total",] == 18


def test_the_risk_histogram_has_the_peak_of_each_stream(metrics, feed):
    serve(feed, risks=[0.1, 0.62, 0.3, 0.2])
    serve(feed, ask("s-2"), risks=[0.05, 0.04, 0.03, 0.02])
    found = samples(metrics)
    levels = {level: found["stream_peak_risk_bucket", level] for level in ("0.05", "0.6", "0.7")}
    assert levels == {"0.05": 1, "0.6": 1, "0.7": 2}


def test_holds_count_and_going_on_does_not(metrics, feed):
    opened = start(feed, "s-1")
    for verdict in ("HOLD", "CONTINUE", "HOLD"):
        feed.event(opened, Event(type="verdict", verdict=verdict, cause="temper", **of(opened)))
    assert samples(metrics)["holds_total", "temper"] == 2


def test_how_full_the_engine_is(metrics, feed):
    feed.stats(EngineStats(200, 20, 0, 64, (0.0001, 0.0004)))
    feed.stats(EngineStats(200, 180, 7, 36, (0.3,)))
    found = samples(metrics)
    names = ("num_slots", "num_slots_used", "num_requests_waiting", "rows_judged_total")
    assert [found[name,] for name in names] == [200, 180, 7, 100]
    assert found["judge_step_seconds_count",] == 3
    assert found["judge_step_seconds_bucket", "0.0005"] == 2


def test_a_reload_changes_the_bundle_that_is_shown(metrics, feed):
    feed.notice("started", {"bundle": "a" * 64})
    feed.notice("reload_refused", {"bundle": "c" * 64, "reason": "halt_at: expected a number"})
    start(feed, "s-1")  # of the old bundle, or the scripted one
    assert [key[1] for key in samples(metrics) if key[0] == "build_info"] == ["a" * 64]
    feed.notice("reloaded", {"bundle": "d" * 64})
    found = samples(metrics)
    assert [key[1] for key in found if key[0] == "build_info"] == ["d" * 64]
    assert (found["reloads_total", "done"], found["reloads_total", "refused"]) == (1, 1)


def test_clients_cannot_make_series(metrics, feed):
    for n in range(MOST_LABELS + 50):
        feed.refused(f"client {n}", 400, f"code {n}")
        opened = start(feed, f"stream {n}")
        feed.event(opened, Event(type="finished", message=f"reason {n}", **of(opened)))
    text = scrape(metrics).text
    found = samples(metrics)
    for name in ("requests_refused_total", "requests_finished_total"):
        values = {key[1:]: value for key, value in found.items() if key[0] == name}
        assert len(values) == MOST_LABELS + 1
        assert sum(values.values()) == MOST_LABELS + 50  # none is lost
        width = len(next(iter(values)))
        assert values[("other",) * width] >= 50
    for private in ("client 0", "stream 0", "alice", "urn"):
        assert private not in text


def test_nothing_is_kept_of_streams_that_ended(metrics, feed):
    serve(feed, *(ask(f"s-{n}") for n in range(20)))
    before = len(scrape(metrics).text.splitlines())
    serve(feed, *(ask(f"t-{n}") for n in range(200)))
    assert len(scrape(metrics).text.splitlines()) == before
    assert not [
        value for value in vars(metrics).values() if isinstance(value, dict) and "t-0" in value
    ]


def test_observers_that_fail_are_counted(caplog):
    class Broken(Observer):
        def event(self, stream, event):
            raise OSError("no space left")

    metrics = Metrics("testbed")
    feed = Feed([Broken(), metrics])
    metrics.watch(feed)
    serve(feed)
    assert samples(metrics)["feed_failures_total",] == feed.failures == 6  # admitted, 4, finished
    assert "no space left" in caplog.text


def test_an_audit_log_that_cannot_be_written_is_seen(metrics, log, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    metrics.watch_audit(log)
    names = ("audit_failing", "audit_waiting_bytes", "audit_records_missing_total")
    wait_until(lambda: samples(metrics)["audit_waiting_bytes",] == 0)
    assert [samples(metrics)[name,] for name in names] == [0, 0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(audit_file.os, "write", full)
        for _ in range(100):
            log.notice("n", {})
        wait_until(lambda: log.failing)
        found = samples(metrics)
        assert found["audit_failing",] == 1
        assert 0 < found["audit_waiting_bytes",] == log.waiting_bytes <= 2000
        assert 0 < found["audit_records_missing_total",] == log.missing < 100
    missing = log.missing
    wait_until(lambda: log.failing is None and log.waiting_bytes == 0)
    assert [samples(metrics)[name,] for name in names] == [0, 0, missing]


def test_a_server_with_an_audit_log_exports_how_it_does(tmp_path):
    class Judged(ScriptedEngine):
        bundle = None

        def look_closely(self, stream, on):
            pass

    def served(**watch):
        feed = Feed()
        app = assemble(Judged(feed), feed, settings=Settings(), keys=Keys(), watch=Watch(**watch))

        async def get():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return (await client.get("/metrics")).text

        text = asyncio.run(get())
        feed.close()
        return text

    assert "midstream:audit_failing" not in served()
    assert 'midstream:audit_failing{model_name="testbed"} 0.0' in served(audit=tmp_path / "log")


def wait_until(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_servers_in_one_process_count_apart(metrics, feed):
    other = Metrics("another")
    serve(Feed([other]))
    assert samples(metrics)["generation_tokens_total",] == 0
    assert samples(other)["generation_tokens_total",] == 4


def test_rules_and_scrape_config_speak_of_what_is_exported(metrics, feed):
    scraping = yaml.safe_load((DOCS / "prometheus.yaml").read_text())
    (rules_file,) = scraping["rule_files"]
    (group,) = yaml.safe_load((DOCS / rules_file).read_text())["groups"]
    recorded = {rule["record"] for rule in group["rules"] if "record" in rule}
    documented = {name for name, *_ in ROW.findall((DOCS / "metrics.md").read_text())}
    assert {rule["alert"] for rule in group["rules"] if "alert" in rule}
    for rule in group["rules"]:
        for name in re.findall(r"[a-z]\w*:[\w:]+", rule["expr"]):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {name, base} & (documented | recorded), f"{name} is not exported"


def test_the_notices_of_the_engine_are_those_that_are_counted():
    """By the names under which `midstream.serve.rotation` tells them."""
    metrics, told = Metrics("testbed"), inspect.getsource(rotation)
    before = samples(metrics)
    for kind in ("worker_restarted", "reloaded", "reload_refused"):
        assert f'notice("{kind}"' in told
        metrics.notice(kind, {})
    after = samples(metrics)
    names = [("worker_restarts_total",), ("reloads_total", "done"), ("reloads_total", "refused")]
    assert [after[name] - before[name] for name in names] == [1, 1, 1]


def test_with_keys_only_the_operator_may_scrape():
    keys = Keys({"ada": "a" * 16}, "o" * 16)
    app = create_app(
        ScriptedEngine(Feed()), Feed(), None, [metrics_router(Metrics("m"), keys.check_operator)]
    )

    async def statuses():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [
                (await client.get("/metrics", headers=headers)).status_code
                for headers in ({}, *({"authorization": f"Bearer {16 * c}"} for c in "ao"))
            ]

    assert asyncio.run(statuses()) == [401, 403, 200]
