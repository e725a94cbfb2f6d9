r"""Replicas of midstream's service on Ray Serve, with one ledger for the turns of conversations.

    pip install 'midstream[serve,redis]' 'ray[serve]'
    serve run --working-dir . ray_serve_midstream:app \
        ledger=redis://HOST:6379/0 model=FOLDER bundle=FOLDER

Ray sends a request to whichever replica is free. A conversation may therefore come to another one
with its next turn: the ledger is what they share, so that they decide as one process does. The
bundle needs a turn model, which `midstream gate fit` adds; it and the model must be at these paths
on every node. A client names its conversation in each request:

    client.chat.completions.create(..., extra_body={"midstream": {"conversation": "17"}})
"""

from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from midstream.bundle import Bundle
from midstream.ledger.open import open_ledger
from midstream.serve.app import create_app
from midstream.serve.gated import GatedEngine, HeldFeed
from midstream.serve.local import LocalEngine
from midstream.serve.settings import Settings


class Options(BaseModel):
    """What ``serve run`` may be told, as ``name=value``."""

    ledger: str
    model: Path | None = None  # the testbed's
    bundle: Path
    replicas: int = 2
    slots: int = 64


@serve.deployment(health_check_period_s=10, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Midstream:
    """One replica: a model in a process of its own, and the HTTP front in this one."""

    async def __init__(self, options: Options) -> None:
        feed = HeldFeed()  # observers go here: metrics, an audit log in a folder of the replica's
        engine = LocalEngine(feed, model=options.model, bundle=options.bundle, slots=options.slots)
        ledger = open_ledger(options.ledger)
        gated = GatedEngine(engine, feed, Bundle.load(options.bundle), ledger)
        await engine.start()
        self._engine = gated
        self._app = create_app(gated, feed, Settings(conversations=True))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Ray the application."""
        return self._app

    async def check_health(self) -> None:
        """Let Ray replace the replica when its model does not come back."""
        if self._engine.unready is not None:
            raise RuntimeError(self._engine.unready)

    async def __del__(self) -> None:
        """End with the streams that Ray let finish."""
        await self._engine.close(drain=0.0)


def app(options: Options) -> Application:
    """Build what ``serve run`` runs."""
    return Midstream.options(
        num_replicas=options.replicas,
        max_ongoing_requests=2 * options.slots,  # the rest waits inside; Ray's own default is 5
    ).bind(options)
