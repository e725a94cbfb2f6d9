"""The engine whose text comes from an upstream, and is read along by a local model.

The request goes to the upstream, the upstream's text to a worker in which the model is fed it as it
comes (`midstream.engines.hf.forced`), and what the worker lets go, character by character the
upstream's own, to the client. When the worker halts the stream, or the client leaves, the
connection to the upstream is closed at once.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from midstream.bundle import Bundle
from midstream.serve.channel import Channel
from midstream.serve.engine import Ask
from midstream.serve.feed import Feed
from midstream.serve.local import LocalEngine
from midstream.serve.messages import Plan
from midstream.serve.proxy_feed import TakenFeed
from midstream.serve.proxy_pump import Pump, ReaderServing
from midstream.serve.proxy_request import check_judgeable, upstream_body
from midstream.serve.serving import LocalStream, Main
from midstream.serve.upstream import Upstream
from midstream.serve.watchdog import USUAL, Silence


def read_along(channel: Channel, plan: Plan) -> None:
    """What runs in the worker. Only there transformers is imported."""
    from midstream.serve.forced_worker import main

    main(channel, plan)


class ProxyEngine:
    """Watches an upstream's responses; see `midstream.serve.engine.Engine`.

    Use it as a `LocalEngine`, whose worker it has, with its restarts and reloads.

    Parameters
    ----------
    feed : Feed
        Told of everything.
    upstream : Upstream
        Closed with the engine.
    name : str
        The model's name, for clients.
    upstream_model : str, optional
        Its name at the upstream; the same when not given.
    model, bundle : path, optional
        Of the model that reads along; the testbed's when not given.
    tier : str, optional
        Of requests that ask for none; the policy's own when not given.
    slots : int
        Streams at a time; more are refused with 429.
    cache_tokens, batch_tokens, device, threads
        See `midstream.serve.messages.Plan`.
    main : callable
        What runs in the worker.
    silence : Silence
        See `LocalEngine`.
    """

    def __init__(
        self,
        feed: Feed,
        upstream: Upstream,
        *,
        name: str,
        upstream_model: str | None = None,
        model: str | Path | None = None,
        bundle: str | Path | None = None,
        tier: str | None = None,
        slots: int = 64,
        cache_tokens: int | None = None,
        batch_tokens: int = 512,
        device: str = "cpu",
        threads: int | None = None,
        main: Main = read_along,
        silence: Silence = USUAL,
    ) -> None:
        self._upstream = upstream
        self._upstream_model = upstream_model or name
        self._tasks: set[asyncio.Task[None]] = set()
        self._feed = TakenFeed(feed)
        self._readers = _Readers(
            self._feed,
            model=model,
            bundle=bundle,
            names=(name,),
            tier=tier,
            slots=slots,
            max_waiting=0,  # an upstream that has begun does not wait
            cache_tokens=cache_tokens,
            batch_tokens=batch_tokens,
            device=device,
            threads=threads,
            main=main,
            silence=silence,
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Names under which it answers."""
        return self._readers.models

    @property
    def unready(self) -> str | None:
        """Why it takes no requests now; None when it does."""
        return self._readers.unready

    async def start(self) -> None:
        """Start the worker and wait until it serves; see `LocalEngine.start`."""
        await self._readers.start()

    @property
    def bundle(self) -> Bundle | None:
        """What new streams are judged by; None before it was started."""
        return self._readers.bundle

    @property
    def busy(self) -> str | None:
        """Why another bundle cannot be taken now."""
        return self._readers.busy

    async def reload(self, folder: str | Path | None) -> str:
        """Judge streams from now on by another bundle; see `LocalEngine.reload`."""
        return await self._readers.reload(folder)

    def look_closely(self, stream: str, on: bool) -> None:
        """Tell ``scored`` events of a stream, one per token, or stop doing so."""
        self._readers.look_closely(stream, on)

    async def submit(self, ask: Ask) -> LocalStream:
        """Begin a response: the upstream has taken the request when this returns.

        Raises
        ------
        ApiError
            For what cannot be judged, what the local model cannot be given, and where the upstream
            cannot be had or refuses.
        """
        check_judgeable(ask)
        self._feed.wait(ask.stream)
        try:
            local = await self._begun(ask)
        except Exception:  # which the front tells
            self._feed.refuse(ask.stream)
            raise
        except BaseException:  # cancelled, and so it ends
            self._feed.taken(ask.stream)
            raise
        self._feed.taken(ask.stream)
        return local

    async def _begun(self, ask: Ask) -> LocalStream:
        local = await self._readers.submit(ask)
        pump = Pump(local, self._upstream, upstream_body(ask, self._upstream_model))
        self._tasks.add(pump.task)
        pump.task.add_done_callback(self._tasks.discard)
        assert isinstance(local.serving, ReaderServing)
        local.serving.follow(pump)
        try:
            await asyncio.shield(pump.begun)
        except asyncio.CancelledError:
            local.cancel()
            raise
        return local

    async def close(self, drain: float) -> None:
        """Take no more requests, let the streams end within ``drain`` seconds, cut those left."""
        await self._readers.close(drain)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._upstream.close()


class _Readers(LocalEngine):
    _serve = ReaderServing
