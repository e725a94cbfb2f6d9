"""``midstream serve``: an OpenAI-compatible endpoint whose streams are watched."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from midstream.commands.options import BundleOption, Model, Tier, load_bundle

if TYPE_CHECKING:
    from midstream.ledger.ledger import Ledger
    from midstream.serve.assemble import LocallyJudged
    from midstream.serve.gated import HeldFeed
    from midstream.serve.local import LocalEngine
    from midstream.serve.proxy import ProxyEngine
    from midstream.serve.settings import Settings

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
ApiKeys = Annotated[
    Path | None,
    typer.Option(help="File of name:key lines that only its owner can read; open when not given."),
]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that streams have to end on SIGTERM.")]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", help="YAML file of limits; docs/serve.md has the list."),
]
Name = Annotated[
    list[str] | None,
    typer.Option(help="Name that clients ask for; the folder's when not given. Repeatable."),
]
Slots = Annotated[int, typer.Option(min=1, help="Streams written at a time.")]
Page = Annotated[
    Literal["off", "scores", "text"],
    typer.Option("--page", help="The live page at /: none, without text, with it."),
]
Audit = Annotated[
    Path | None, typer.Option(help="Folder of the audit log; none is kept when not given.")
]
AuditText = Annotated[bool, typer.Option("--audit-text", help="Log prompts and responses, too.")]
AuditSync = Annotated[
    Literal["always", "every-second", "never"],
    typer.Option(help="When the disk is made to take the log: docs/audit.md."),
]
OnAuditFailure = Annotated[
    Literal["serve", "refuse"], typer.Option(help="What to do while the log cannot be written.")
]
LedgerAddress = Annotated[
    str | None,
    typer.Option(
        help="Gate the turns of conversations, with this ledger: memory:, a file of SQLite, or "
        "redis://host:port/db for several servers. The bundle needs a turn model."
    ),
]
Otel = Annotated[
    str | None, typer.Option(help="Collector of OpenTelemetry, as http://localhost:4318.")
]


def serve(
    context: typer.Context,
    model: Model = None,
    bundle: BundleOption = None,
    name: Name = None,
    tier: Tier = None,
    slots: Slots = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that wait for a slot.")] = 256,
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
    """Serve a model and its bundle, or the testbed's, as OpenAI's API.

    At SIGHUP the bundle is read again; at SIGTERM streams may end before the server does.
    """
    check_options(model, bundle, ledger)
    need_libraries()
    from midstream.serve.reloads import Reloads

    reloads = context.with_resource(Reloads())  # what follows takes seconds
    from midstream.serve.assemble import Watch, assemble
    from midstream.serve.gated import HeldFeed
    from midstream.serve.keys import Keys
    from midstream.serve.local import LocalEngine
    from midstream.serve.run import run
    from midstream.serve.watchdog import Silence

    limits = read_settings(settings)
    keys = Keys() if api_keys is None else Keys.load(api_keys)
    log_to_stderr()

    feed = HeldFeed()
    engine = LocalEngine(
        feed,
        model=model,
        bundle=bundle,
        names=tuple(name or ()),
        tier=tier,
        slots=slots,
        max_waiting=max_waiting,
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


@contextmanager
def behind_gate(
    engine: LocalEngine | ProxyEngine,
    feed: HeldFeed,
    bundle: Path | None,
    ledger: str | None,
    limits: Settings,
) -> Iterator[tuple[LocallyJudged, Callable[[], Awaitable[object]], Settings]]:
    """Put the turn gate before an engine, where there is a ledger.

    Gives what is served, how its bundle is read again, and the settings.
    """
    if ledger is None or bundle is None:
        yield engine, partial(engine.reload, bundle), limits
        return
    from midstream.serve.gated import GatedEngine

    with closing(_open(ledger)) as store:
        gated = GatedEngine(engine, feed, load_bundle(bundle), store)
        limits = limits.model_copy(update={"conversations": True})
        yield gated, partial(gated.reload, bundle), limits


def check_options(model: str | None, bundle: Path | None, ledger: str | None) -> None:
    """Refuse options that need another."""
    if model is not None and bundle is None:
        raise typer.BadParameter("a model needs the bundle that was made for it: give --bundle")
    if ledger is not None and bundle is None:
        raise typer.BadParameter("--ledger: the testbed's bundle has no turn model: give --bundle")


def _open(ledger: str) -> Ledger:
    from midstream.ledger.open import open_ledger

    try:
        return open_ledger(ledger)
    except ValueError as error:
        raise typer.BadParameter(f"--ledger: {error}") from error


def need_libraries() -> None:
    """Refuse where what a server needs is not installed.

    Raises
    ------
    ImportError
        Naming all that is missing.
    """
    needed = ("aiohttp", "fastapi", "httptools", "prometheus_client", "uvicorn")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(f"serving needs {', '.join(missing)}: pip install 'midstream[serve]'")


def read_settings(path: Path | None) -> Settings:
    """Limits from a file, or the defaults.

    Raises
    ------
    SettingsError
        Naming each key at fault.
    """
    from midstream.serve.settings import Settings

    return Settings() if path is None else Settings.load(path)


def log_to_stderr() -> None:
    """Log to standard error, a line each; of other libraries only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("midstream").setLevel(logging.INFO)
