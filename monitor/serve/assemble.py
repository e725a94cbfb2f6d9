"""Putting the service together: an engine, those who look on, and the HTTP front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fastapi import APIRouter, FastAPI

from midstream.bundle import Bundle
from midstream.serve.app import create_app
from midstream.serve.engine import Engine
from midstream.serve.feed import Feed
from midstream.serve.keys import Keys
from midstream.serve.live import Live
from midstream.serve.live_routes import live_router
from midstream.serve.metrics import Metrics, metrics_router
from midstream.serve.settings import Settings

if TYPE_CHECKING:
    from midstream.serve.audit_file import Sync

Page = Literal["off", "scores", "text"]


class LocallyJudged(Engine, Protocol):
    """An engine whose streams a bundle on this machine judges."""

    def look_closely(self, stream: str, on: bool) -> None:
        """Tell ``scored`` events of a stream, or stop doing so."""

    @property
    def bundle(self) -> Bundle | None:
        """What new streams are judged by; None before it was started."""


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    Attributes
    ----------
    page : {"off", "scores", "text"}
        The live page: not served, without text, with it.
    audit : path, optional
        Folder of the audit log; none is kept without.
    audit_text : bool
    audit_sync : {"always", "every-second", "never"}
    audit_on_failure : {"serve", "refuse"}
        See `midstream.serve.audit.AuditLog`.
    otel : str, optional
        Address of a collector of OpenTelemetry; no traces without.
    """

    page: Page = "scores"
    audit: Path | None = None
    audit_text: bool = False
    audit_sync: Sync = "every-second"
    audit_on_failure: Literal["serve", "refuse"] = "serve"
    otel: str | None = None


def assemble(
    engine: LocallyJudged,
    feed: Feed,
    *,
    settings: Settings,
    keys: Keys,
    watch: Watch,
    host: str = "",
) -> FastAPI:
    """Build the application around an engine that was not started yet.

    Parameters
    ----------
    engine : LocallyJudged
    feed : Feed
        What the engine tells; those who look on are added.
    settings, keys, watch
    host : str
        Address that is listened on; see `create_app`.

    Raises
    ------
    AuditError
        For a folder that cannot be written, or that another process holds.
    """
    metrics = Metrics(engine.models[0])
    metrics.watch(feed)
    feed.add(metrics)
    routers: list[APIRouter] = [metrics_router(metrics, keys.check_operator)]
    if watch.page != "off":

        def bundle_of(digest: str) -> Bundle | None:
            bundle = engine.bundle
            return bundle if bundle is not None and bundle.hash == digest else None

        live = Live(bundle_of, text=watch.page == "text", look_closely=engine.look_closely)
        feed.add(live)
        operator = None if keys.open else keys.is_operator
        routers.append(live_router(live, operator, settings.allowed_hosts))
    if watch.otel is not None:
        from midstream.serve.tracing import Tracing

        feed.add(Tracing.to_collector(watch.otel))
    served: Engine = engine
    if watch.audit is not None:
        from midstream.serve.audit import AuditLog
        from midstream.serve.audited import AuditedEngine

        log = AuditLog(
            watch.audit,
            text=watch.audit_text,
            sync=watch.audit_sync,
            on_failure=watch.audit_on_failure,
        )
        feed.add(log)
        metrics.watch_audit(log)
        served = AuditedEngine(engine, log)
    return create_app(served, feed, settings, routers=routers, keys=keys, host=host)
