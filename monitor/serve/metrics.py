"""What Prometheus scrapes: an observer that counts, and ``/metrics`` (docs/metrics.md).

Names keep to vLLM's habits: a prefix, base units, ``_total``, the label ``model_name``. No label
takes a value that clients choose freely.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from midstream.serve.feed import EngineStats, Feed, Observer, Opened
from midstream.streams import Event

if TYPE_CHECKING:
    from midstream.serve.audit import AuditLog

MOST_LABELS = 64
"""Values that the labels of one counter may take; what comes later is counted as ``other``."""

_PREFIX = "midstream:"
_MODEL = ("model_name",)

_TEXT = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FIRST_TOKEN = (*_LATENCY[2:], 25.0, 50.0, 100.0)
_JUDGING = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_RISK = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics(Observer):
    """Counts what the feed tells.

    Parameters
    ----------
    model_name : str
        Label of all metrics: the first of the names that the engine answers under.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = _Registry()
        self._model = model_name
        self._released: dict[str, float | None] = {}  # streams in flight, and their last release
        self._bundle: str | None = None
        self._tokens = {
            "scored": self._counter("tokens_scored", "Tokens of ended streams with a score."),
            "unscored": self._counter("tokens_unscored", "Tokens of ended streams without one."),
            "delivered": self._counter("generation_tokens", "Tokens that left."),
            "delivered_unscored": self._counter(
                "tokens_delivered_unscored",
                "Tokens that left without a score, because the policy lets them pass.",
            ),
            "prompt": self._counter("prompt_tokens", "Tokens of the prompts of ended streams."),
        }
        self._finished = self._labelled(
            "requests_finished", "Streams that ended, by finish reason.", "finished_reason"
        )
        self._finished.begin("stop", "length", "cancelled", "error")
        self._refused = self._labelled(
            "requests_refused", "Requests that never became a stream.", "status", "code"
        )
        self._halts = self._labelled("halts", "Streams that were halted, by probe.", "cause")
        self._holds = self._labelled("holds", "Times a stream was held, by probe.", "cause")
        self._notices = self._labelled("notices", "What happened to the server.", "kind")
        self._reloads = self._labelled("reloads", "Bundles that were to be swapped.", "outcome")
        self._reloads.begin("done", "refused")
        self._restarts = self._counter("worker_restarts", "Workers that were started again.")
        self._judged = self._counter(
            "rows_judged", "Rows the monitor folded, of prompts, failed streams and all others."
        )
        self._peak = self._histogram("stream_peak_risk", "Largest risk of each stream.", _RISK)
        self._judging = self._histogram(
            "judge_step_seconds", "Host time to judge the rows of one step.", _JUDGING
        )
        self._to_first = self._histogram(
            "time_to_first_token_seconds",
            "From taking a request in to the first release.",
            _FIRST_TOKEN,
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two releases of a stream, holds too.", _LATENCY
        )
        self._streams = self._gauge("num_streams", "Streams in flight, waiting ones included.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a slot.")
        self._slots = self._gauge("num_slots", "Slots of the monitor.")
        self._slots_used = self._gauge("num_slots_used", "Slots that a stream has.")
        self._build = Gauge(
            _PREFIX + "build_info",
            "What runs; the bundle is that of new streams.",
            (*_MODEL, "version", "bundle"),
            registry=self.registry,
        )

    def opened(self, stream: Opened) -> None:
        """Count it in."""
        self._released[stream.ask.stream] = None
        self._streams.set(len(self._released))
        if self._bundle is None:
            self._runs(stream.bundle)

    def event(self, stream: Opened, event: Event) -> None:
        """Count it."""
        if event.type == "released":
            self._release(stream)
        elif event.type == "halted":
            self._halts.add(event.cause or "unknown")
        elif event.type == "verdict" and event.verdict == "HOLD":
            self._holds.add(event.cause or "unknown")
        elif event.type in ("finished", "error"):
            self._end(stream, event)

    def refused(self, client: str, status: int, code: str) -> None:
        """Count it; by whom is no label."""
        self._refused.add(str(status), code)

    def notice(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Count it, and note the bundle that new streams get."""
        self._notices.add(kind)
        if kind in ("reloaded", "reload_refused"):
            self._reloads.add("done" if kind == "reloaded" else "refused")
        if kind == "worker_restarted":
            self._restarts.inc()
        if "bundle" in facts and kind in ("started", "reloaded"):
            self._runs(str(facts["bundle"]))

    def stats(self, stats: EngineStats) -> None:
        """Show how full the engine is."""
        self._slots.set(stats.slots)
        self._slots_used.set(stats.slots_used)
        self._waiting.set(stats.waiting)
        self._judged.inc(stats.judged_rows)
        for seconds in stats.judge_seconds:
            self._judging.observe(seconds)

    def watch(self, feed: Feed) -> None:
        """Export how often an observer of ``feed`` failed."""
        self.registry.register(_Failures(feed, self._model))

    def watch_audit(self, log: AuditLog) -> None:
        """Export whether the audit log is written, what waits, and what is missing in it."""
        self.registry.register(_Audit(log, self._model))

    def _release(self, stream: Opened) -> None:
        now, name = time.monotonic(), stream.ask.stream
        last = self._released[name]
        if last is None:
            self._to_first.observe(now - stream.clock)
        else:
            self._between.observe(now - last)
        self._released[name] = now

    def _end(self, stream: Opened, event: Event) -> None:
        del self._released[stream.ask.stream]
        self._streams.set(len(self._released))
        reason = "error" if event.type == "error" else event.message
        self._finished.add(reason or "unknown")
        self._tokens["delivered"].inc(event.delivered or 0)
        self._tokens["delivered_unscored"].inc(event.delivered_unscored or 0)
        if (report := event.report) is not None:
            self._tokens["scored"].inc(report.scored)
            self._tokens["unscored"].inc(report.unscored)
            self._tokens["prompt"].inc(report.prompt_tokens)
            self._peak.observe(report.peak)

    def _runs(self, bundle: str) -> None:
        self._bundle = bundle
        self._build.clear()  # one series, not one per bundle that ever ran
        self._build.labels(self._model, version("midstream"), bundle).set(1)

    def _counter(self, name: str, help: str) -> Counter:
        metric = Counter(_PREFIX + name, help, _MODEL, registry=self.registry)
        return metric.labels(self._model)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(_PREFIX + name, help, _MODEL, registry=self.registry).labels(self._model)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(_PREFIX + name, help, _MODEL, buckets=buckets, registry=self.registry)
        return metric.labels(self._model)

    def _labelled(self, name: str, help: str, *labels: str) -> _Labelled:
        metric = Counter(_PREFIX + name, help, (*_MODEL, *labels), registry=self.registry)
        return _Labelled(metric, self._model)


class _Registry(CollectorRegistry):
    """Leaves out when each counter began, which the text format makes a series of its own."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class _Labelled:
    """A counter by labels of which nobody can make more than :data:`MOST_LABELS`."""

    def __init__(self, counter: Counter, model: str) -> None:
        self._counter = counter
        self._model = model
        self._seen: set[tuple[str, ...]] = set()

    def begin(self, *values: str) -> None:
        """Show these as 0: without a value before it, the first one is no increase."""
        for value in values:
            self._counter.labels(self._model, value)
            self._seen.add((value,))

    def add(self, *values: str) -> None:
        if values not in self._seen:
            if len(self._seen) < MOST_LABELS:
                self._seen.add(values)
            else:
                values = ("other",) * len(values)
        self._counter.labels(self._model, *values).inc()


class _Failures(Collector):
    """What a feed counts itself."""

    def __init__(self, feed: Feed, model: str) -> None:
        self._feed = feed
        self._model = model

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            _PREFIX + "feed_failures",
            "Calls that an observer (metrics, audit log, page, traces) did not take.",
            labels=_MODEL,
        )
        family.add_metric((self._model,), self._feed.failures)
        yield family


class _Audit(Collector):
    """How the audit log is doing; it is asked when somebody scrapes."""

    def __init__(self, log: AuditLog, model: str) -> None:
        self._log = log
        self._model = model

    def collect(self) -> Iterator[Metric]:
        log = self._log
        for kind, name, help, value in (
            (
                GaugeMetricFamily,
                "failing",
                "1 while the log cannot be written.",
                log.failing is not None,
            ),
            (GaugeMetricFamily, "waiting_bytes", "What waits to be written.", log.waiting_bytes),
            (CounterMetricFamily, "records_missing", "Records without room.", log.missing),
        ):
            family = kind(f"{_PREFIX}audit_{name}", help, labels=_MODEL)
            family.add_metric((self._model,), value)
            yield family


def metrics_router(
    metrics: Metrics, check: Callable[[str | None], None] = lambda authorization: None
) -> APIRouter:
    """Serve ``/metrics``, always in the text format of Prometheus.

    ``check`` is given the header ``Authorization``, and raises where it is not to be served.

    OpenMetrics is not offered: prometheus-client 0.26 writes the colon of a sample's name as an
    underscore there, so that names would depend on who asks.
    """
    router = APIRouter()

    @router.get("/metrics", include_in_schema=False)
    async def scrape(request: Request) -> Response:
        check(request.headers.get("authorization"))
        # In the event loop on purpose: a thread would hold the interpreter for as long, and in
        # slices of 5 ms (sys.getswitchinterval), where this takes 1 or 2.
        return Response(generate_latest(metrics.registry), media_type=_TEXT)

    return router
