"""Traces: one OpenTelemetry span per stream, without any text (docs/tracing.md).

Import it only where traces are wanted: it needs ``midstream[otel]``.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from time import monotonic

from midstream.ledger.ledger import conversation_key
from midstream.serve.feed import Observer, Opened
from midstream.streams import Event

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ImportError("traces need OpenTelemetry: pip install 'midstream[otel]'") from error

_log = logging.getLogger(__name__)

FLUSHING = 3.0
"""Seconds that the last spans have to reach the collector when the server ends."""


class Names:
    """All names in the spans.

    ``gen_ai.*`` are those of the semantic conventions for generative AI, which are in development:
    open-telemetry/semantic-conventions-genai. They have none for guards yet (its issue 427), so
    what a monitor says is ``midstream.*``.
    """

    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    REQUEST_MODEL = "gen_ai.request.model"
    MAX_TOKENS = "gen_ai.request.max_tokens"
    REQUEST = "gen_ai.request."
    """And ``temperature``, ``top_p``, ``top_k``."""
    CONVERSATION = "gen_ai.conversation.id"
    RESPONSE_ID = "gen_ai.response.id"
    RESPONSE_MODEL = "gen_ai.response.model"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    ERROR = "error.type"

    CLIENT = "midstream.client"
    TIER = "midstream.tier"
    BUNDLE = "midstream.bundle"
    POSITION = "midstream.position"
    VERDICT = "midstream.verdict"
    CAUSE = "midstream.cause"
    RISK = "midstream.risk"
    PEAK = "midstream.peak_risk"
    HALTED_AT = "midstream.halted_at"
    SCORED = "midstream.tokens.scored"
    UNSCORED = "midstream.tokens.unscored"
    DELIVERED_UNSCORED = "midstream.tokens.delivered_unscored"

    HOLD = "midstream.hold"
    RESUME = "midstream.resume"
    HALT = "midstream.halt"
    FINISH = "midstream.finish"


@dataclass
class _Watched:
    span: Span
    stream: Opened
    released: bool = False

    @property
    def elapsed(self) -> float:
        return monotonic() - self.stream.clock

    @property
    def now(self) -> int:
        """Nanoseconds since the epoch by the clock of the stream's start, whatever jumped since."""
        return int((self.stream.at + self.elapsed) * 1e9)


class Tracing(Observer):
    """Makes a span of each stream.

    The parent is the span that the request names in ``traceparent``.

    Parameters
    ----------
    provider : TracerProvider
        Shut down when the server ends.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("midstream")
        self._parents = TraceContextTextMapPropagator()
        self._streams: dict[str, _Watched] = {}

    @classmethod
    def to_collector(cls, endpoint: str | None = None) -> Tracing:
        """Send the spans to a collector, by OTLP over HTTP, from a thread of its own.

        Spans wait in a queue of 2048 while the collector is away; more are dropped, and logged.

        Parameters
        ----------
        endpoint : str, optional
            As ``http://localhost:4318``; that of ``OTEL_EXPORTER_OTLP_ENDPOINT`` when not given.
            The other variables of OpenTelemetry's SDK are obeyed, too.

        Raises
        ------
        ValueError
        """
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"the collector's address is {endpoint!r}; expected one such as "
                "http://localhost:4318"
            )
        url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
        service = Resource.create({"service.name": "midstream"})
        provider = TracerProvider(
            resource=service.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        return cls(provider)

    def opened(self, stream: Opened) -> None:
        """Begin its span."""
        ask = stream.ask
        operation = "text_completion" if ask.messages is None else "chat"
        attributes: dict[str, str | float] = {
            Names.OPERATION: operation,
            Names.PROVIDER: "midstream",
            Names.REQUEST_MODEL: ask.model,
            Names.MAX_TOKENS: ask.max_tokens,
            Names.RESPONSE_ID: ask.stream,
            Names.TIER: stream.tier,
            Names.BUNDLE: stream.bundle,
            **{Names.REQUEST + name: value for name, value in ask.sampling.items()},
        }
        if ask.client:
            attributes[Names.CLIENT] = ask.client
        if ask.conversation_id is not None:  # clients put names and addresses into their own ids
            attributes[Names.CONVERSATION] = conversation_key(ask.conversation_id)
        span = self._tracer.start_span(
            f"{operation} {ask.model}",
            context=self._parents.extract(ask.trace),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=int(stream.at * 1e9),
        )
        self._streams[ask.stream] = _Watched(span, stream)

    def event(self, stream: Opened, event: Event) -> None:
        """Add holds and halts to it; end it."""
        watched = self._streams[stream.ask.stream]
        if event.type == "released":
            if not watched.released:
                watched.released = True
                watched.span.set_attribute(Names.TO_FIRST_CHUNK, watched.elapsed)
        elif event.type == "verdict":
            self._add(Names.HOLD if event.verdict == "HOLD" else Names.RESUME, watched, event)
        elif event.type == "halted":
            self._add(Names.HALT, watched, event)
        elif event.type in ("finished", "error"):
            self._end(watched, event)

    def close(self) -> None:
        """End the spans that are left, and send what waits, within :data:`FLUSHING` seconds."""
        for watched in self._streams.values():
            watched.span.end(watched.now)
        self._streams.clear()
        # The SDK's own shutdown waits for a collector that is away, 30 seconds and longer.
        flushing = threading.Thread(target=self._flush, daemon=True)
        flushing.start()
        flushing.join(FLUSHING)
        if flushing.is_alive():
            _log.warning("the collector did not take the last spans within %s s", FLUSHING)

    def _flush(self) -> None:
        try:
            self._provider.shutdown()
        except Exception:
            _log.exception("the last spans were not sent")

    def _add(self, name: str, watched: _Watched, event: Event) -> None:
        facts: dict[str, str | float | None] = {
            Names.POSITION: event.position,
            Names.VERDICT: event.verdict,
            Names.CAUSE: event.cause,
            Names.RISK: event.risk,
            Names.BUNDLE: event.bundle,
        }
        known = {name: value for name, value in facts.items() if value is not None}
        watched.span.add_event(name, known, timestamp=watched.now)

    def _end(self, watched: _Watched, event: Event) -> None:
        del self._streams[watched.stream.ask.stream]
        span, report = watched.span, event.report
        failed = event.type == "error"
        self._add(Names.FINISH, watched, event)
        facts: dict[str, str | float | None] = {
            Names.RESPONSE_MODEL: watched.stream.ask.model,
            Names.OUTPUT_TOKENS: event.delivered,
            Names.DELIVERED_UNSCORED: event.delivered_unscored,
        }
        if report is not None:
            facts |= {
                Names.INPUT_TOKENS: report.prompt_tokens,
                Names.SCORED: report.scored,
                Names.UNSCORED: report.unscored,
                Names.VERDICT: report.verdict,
                Names.CAUSE: report.cause,
                Names.PEAK: report.peak,
                Names.HALTED_AT: report.halted_at,
            }
        span.set_attributes({name: value for name, value in facts.items() if value is not None})
        span.set_attribute(
            Names.FINISH_REASONS, ["error" if failed else event.message or "unknown"]
        )
        if failed:
            span.set_attribute(Names.ERROR, "engine_error")
            span.set_status(StatusCode.ERROR, event.message)
        span.end(watched.now)
