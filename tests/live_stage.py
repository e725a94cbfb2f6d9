"""A server with the live page whose streams a test plays, and a browser to look at it."""

import asyncio
import shutil
import socket
import threading
from contextlib import contextmanager

import httpx
import toy
import uvicorn
from fastapi import FastAPI
from http_service import PATIENCE
from scripted_engine import BUNDLE, ScriptedEngine

from midstream.policy import Thresholds
from midstream.serve.app import create_app
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed
from midstream.serve.live import Live
from midstream.serve.live_routes import live_router
from midstream.serve.local import LocalEngine
from midstream.serve.settings import Settings

LEVELS = {
    "strict": Thresholds(horizon=24, halt_at=0.25),
    "moderate": Thresholds(horizon=24, halt_at=0.5),
}


def a_bundle(**fields):
    """One whose probes are those of the scripted engine."""
    lm = toy.model()
    probes = [
        toy.detector(lm, name="sealed", hazard="opens the sealed vessel"),
        toy.detector(lm, name="temper", hazard="loses its temper"),
    ]
    return toy.bundle(lm, probes=probes, **{"tiers": LEVELS, "loosest_tier": "moderate", **fields})


def bundle_of(bundle):
    return lambda digest: bundle if digest == BUNDLE else None


def ask(name, **fields):
    facts = {"messages": None, "prompt": "x", "max_tokens": 10_000, **fields}
    return Ask(name, "testbed", **facts)


class Stage:
    """Runs a server in a thread. Use as a context manager."""

    def __init__(self, *, operator=None, bundle=None, bundles=None, port=0, **options):
        self.closely = []
        self.live = Live(
            bundle_of(bundle or a_bundle()) if bundles is None else bundles,
            look_closely=lambda stream, on: self.closely.append((stream, on)),
            **{"text": True, **options},
        )
        self.feed = Feed([self.live])
        self._engines = []
        app = self.app(live_router(self.live, operator))
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        )
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def app(self, router):
        app = FastAPI()
        app.include_router(router)
        return app

    def __enter__(self):
        ready = threading.Event()

        async def serve():
            self.loop = asyncio.get_running_loop()
            ready.set()
            await self._server.serve(sockets=[self._socket])

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        assert ready.wait(PATIENCE)
        return self

    def __exit__(self, *error):
        async def stop():
            for engine in self._engines:
                await engine.close(0)
            self.live.close()
            self._server.should_exit = True

        self._in_loop(stop())
        self._thread.join(PATIENCE)
        self._socket.close()
        assert not self._thread.is_alive()

    def play(self, name, pieces, risks, *, halt_after=None, pause_at=None, delay=0.0, **fields):
        """Begin a stream that plays this; returns it."""
        engine = ScriptedEngine(
            self.feed, pieces, risks=list(risks), halt_after=halt_after, pause_at=pause_at,
            delay=delay,
        )  # fmt: skip
        self._engines.append(engine)
        return self._in_loop(engine.submit(ask(name, **fields)))

    def go_on(self, stream):
        self.do(stream.go_on)

    def cancel(self, streams):
        self.do(lambda: [stream.cancel() for stream in streams])

    def do(self, call):
        """Call something in the server's loop."""

        async def now():
            return call()

        return self._in_loop(now())

    def _in_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)


class TestbedStage(Stage):
    """Serves the testbed's model, as ``midstream serve`` does."""

    __test__ = False

    def app(self, router):
        self.engine = LocalEngine(self.feed, slots=4)
        self._engines = [self.engine]
        self.live.look_closely = self.engine.look_closely
        return create_app(self.engine, self.feed, Settings(), routers=[router])

    def __enter__(self):
        super().__enter__()
        self._in_loop(self.engine.start())
        return self

    def complete(self, prompt, **fields):
        """Ask for a response, and wait for it."""
        body = {"model": "testbed", "prompt": list(prompt.ids), "max_tokens": 120, **fields}
        answer = httpx.post(f"{self.url}v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return answer.json()


def find_browser():
    """Path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browsing(browser, *, excuse=lambda text: False, **options):
    """A page in which nothing may go wrong: no error in the console, no request that fails."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    wrong = []

    def console(message):
        if message.type in ("error", "warning"):
            wrong.append(f"console: {message.text}")

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # the page itself closes event streams
            wrong.append(f"request: {request.url} {request.failure}")

    def answered(response):
        if response.status >= 400:
            wrong.append(f"response: {response.url} {response.status}")

    page.on("console", console)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("requestfailed", failed)
    page.on("response", answered)
    try:
        yield page
    finally:
        context.close()
    assert [text for text in wrong if not excuse(text)] == []
