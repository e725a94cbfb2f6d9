"""``midstream proxy``: watch the streams of any OpenAI-compatible API from beside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midstream.commands.options import BundleOption, Model, Tier
from midstream.commands.serve import (
    ApiKeys,
    Audit,
    AuditSync,
    AuditText,
    Drain,
    Host,
    LedgerAddress,
    OnAuditFailure,
    Otel,
    Page,
    Port,
    SettingsFile,
    behind_gate,
    check_audit,
    check_options,
    log_to_stderr,
    need_libraries,
    read_settings,
)


def proxy(
    context: typer.Context,
    upstream: Annotated[
        str, typer.Option(help="Address of the API up to and with /v1.", show_default=False)
    ],
    upstream_model: Annotated[
        str, typer.Option(help="Name of the model at the upstream.", show_default=False)
    ],
    upstream_key: Annotated[
        Path | None, typer.Option(help="File with the API's key, that only its owner can read.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; the upstream's when not given.")
    ] = None,
    model: Model = None,
    bundle: BundleOption = None,
    tier: Tier = None,
    slots: Annotated[int, typer.Option(min=1, help="Streams at a time.")] = 64,
    connect_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds the upstream has to take a connection,")
    ] = 5.0,
    first_seconds: Annotated[float, typer.Option(min=0.1, help="then to begin its answer,")] = 60.0,
    between_seconds: Annotated[
        float, typer.Option(min=0.1, help="then from one part of it to the next.")
    ] = 30.0,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_keys: ApiKeys = None,
    drain: Drain = 30.0,
    settings: SettingsFile = None,
    page: Page = "scores",
    audit: Audit = None,
    audit_text: AuditText = False,
    audit_sync: AuditSync = "every-second",
    on_audit_failure: OnAuditFailure = "serve",
    otel: Otel = None,
    ledger: LedgerAddress = None,
) -> None:
    """Stand between clients and an OpenAI-compatible API; cut streams that a local model halts.

    The model and its bundle, or the testbed's, read along what the API writes. At SIGHUP the bundle
    is read again; at SIGTERM streams may end before the server does.
    """
    check_options(model, bundle, ledger)
    check_audit(audit, audit_text, audit_sync, on_audit_failure)
    need_libraries()
    from midstream.serve.reloads import Reloads

    reloads = context.with_resource(Reloads())  # what follows takes seconds
    from midstream.serve.assemble import Watch, assemble
    from midstream.serve.gated import HeldFeed
    from midstream.serve.keys import Keys, read_private
    from midstream.serve.proxy import ProxyEngine
    from midstream.serve.proxy_request import SENT_ON
    from midstream.serve.run import run
    from midstream.serve.upstream import Patience, Upstream
    from midstream.serve.watchdog import Silence

    limits = read_settings(settings).model_copy(update={"sent_on": SENT_ON})
    keys = Keys() if api_keys is None else Keys.load(api_keys)
    log_to_stderr()

    feed = HeldFeed()
    engine = ProxyEngine(
        feed,
        Upstream(
            upstream,
            key=None if upstream_key is None else read_private(upstream_key).strip(),
            patience=Patience(connect_seconds, first_seconds, between_seconds),
            connections=slots,
        ),
        name=name or upstream_model,
        upstream_model=upstream_model,
        model=model,
        bundle=bundle,
        tier=tier,
        slots=slots,
        silence=Silence(limits.load_seconds, limits.hang_seconds),
    )
    watch = Watch(
        page=page,
        audit=audit,
        audit_text=audit_text,
        audit_sync=audit_sync,
        audit_on_failure=on_audit_failure,
        otel=otel,
    )
    with behind_gate(engine, feed, bundle, ledger, limits) as (served, reload, limits):
        reloads.use(reload, engine)
        app = assemble(served, feed, settings=limits, keys=keys, watch=watch, host=host)
        run(app, host=host, port=port, drain=drain, start=engine.start, reloads=reloads)
