"""The engine whose text comes from an upstream, and is read along by a local model.

The request goes to the upstream, the upstream's text to a worker in which the model is fed it as it
comes (`midstream.engines.hf.forced`), and what the worker lets go, character by character the
upstream's own, to the client. When the worker halts the stream, or the client leaves, the
connection to the upstream is closed at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from midstream.bundle import Bundle
from midstream.serve.channel import Channel
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.forced_messages import Ended, Read, Written
from midstream.serve.local import LocalEngine
from midstream.serve.messages import Cancel, Plan
from midstream.serve.serving import LocalStream, Main, Serving
from midstream.serve.upstream import Upstream, UpstreamError
from midstream.serve.watchdog import USUAL, Silence

_log = logging.getLogger(__name__)

AHEAD = 4096
"""Characters that the upstream may be ahead of the model; then it is not read for a while."""
_PART = 1024  # characters sent to the worker at a time: what one stream may cost the others

SENT_ON = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "metadata",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "verbosity",
    }
)
"""Fields of requests that only the upstream reads: ``sent_on`` of the front's settings."""

# What would make an answer that is not one text, and the values that ask for nothing.
_ONE = (None, 1)
_NOTHING: tuple[Any, ...] = (None, False, [], "", "none")
_UNJUDGEABLE: Mapping[str, tuple[Any, ...]] = {
    "n": _ONE,
    "best_of": _ONE,
    "tools": _NOTHING,
    "functions": _NOTHING,
    "logprobs": _NOTHING,
    "top_logprobs": _NOTHING,
    "audio": _NOTHING,
    "modalities": (None, ["text"]),
    "echo": _NOTHING,
    "suffix": _NOTHING,
    "prediction": _NOTHING,
}
_OURS = ("midstream", "stream", "stream_options", "n", "best_of")


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
        self._readers = _Readers(
            feed,
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
        local = await self._readers.submit(ask)
        pump = _Pump(local, self._upstream, upstream_body(ask, self._upstream_model))
        self._tasks.add(pump.task)
        pump.task.add_done_callback(self._tasks.discard)
        assert isinstance(local.serving, _ReaderServing)
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


class _Pump:
    """Carries the upstream's text to the worker, as fast as the worker takes it."""

    def __init__(self, local: LocalStream, upstream: Upstream, body: dict[str, Any]) -> None:
        self.stream = local.ask.stream
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        """Done when the upstream has taken the request, refused it, or is not needed any more."""
        self._local = local
        self._upstream = upstream
        self._path = "completions" if local.ask.messages is None else "chat/completions"
        self._body = body
        self._sent = self._read = 0
        self._room = asyncio.Event()
        self._complete = False
        self.task = loop.create_task(self._run())

    def stop(self) -> None:
        """Close the connection, unless the response has come to its end."""
        if not self._complete:
            self.task.cancel()
        if not self.begun.done():
            self.begun.set_result(None)

    def read(self, characters: int) -> None:
        """The worker has read so far."""
        self._read = characters
        self._room.set()

    async def _run(self) -> None:
        try:
            async with self._upstream.ask(self._path, self._body) as answer:
                if not self.begun.done():
                    self.begun.set_result(None)
                async for delta in answer.deltas():
                    await self._send(delta.text)
                    if delta.finish_reason is not None:
                        self._complete = True
                        self._local.send(Ended(self.stream, delta.finish_reason, None))
                await answer.drain()
        except ApiError as error:
            self._break_off(f"the upstream did not take the request: {error.code}")
            if not self.begun.done():
                self.begun.set_exception(error)
        except UpstreamError as error:
            _log.error("stream %s: %s", self.stream, error)
            self._break_off(str(error))
        except Exception as error:
            _log.exception("stream %s: the proxy failed", self.stream)
            self._break_off("the proxy failed")
            if not self.begun.done():
                self.begun.set_exception(error)

    async def _send(self, text: str) -> None:
        for begin in range(0, len(text), _PART):
            part = text[begin : begin + _PART]
            self._local.send(Written(self.stream, part))
            self._sent += len(part)
            while self._sent - self._read > AHEAD:
                self._room.clear()
                await self._room.wait()

    def _break_off(self, reason: str) -> None:
        self._local.send(Ended(self.stream, "error", reason))


class _ReaderServing(Serving):
    """A worker that reads along, and who carries it what it reads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pumps: dict[str, _Pump] = {}

    def follow(self, pump: _Pump) -> None:
        """Tell the pump how far its stream was read, and stop it when the stream ends."""
        if pump.stream in self.streams:
            self._pumps[pump.stream] = pump
        else:  # it has ended already: the prompt was enough
            pump.stop()

    def send(self, message: Any) -> None:
        """Send a message about a stream; one that is cancelled loses its upstream at once."""
        if isinstance(message, Cancel):
            self._stop(message.stream)
        super().send(message)

    def _stop(self, stream: str) -> None:
        if pump := self._pumps.pop(stream, None):
            pump.stop()

    def _received(self, message: Any) -> None:
        if not isinstance(message, Read):
            super()._received(message)
        elif pump := self._pumps.get(message.stream):
            pump.read(message.characters)

    def _forget(self, name: str) -> LocalStream:
        self._stop(name)
        return super()._forget(name)


class _Readers(LocalEngine):
    _serve = _ReaderServing


def check_judgeable(ask: Ask) -> None:
    """Refuse what the upstream would answer with more, or other, than one text.

    Raises
    ------
    ApiError
    """
    for name, harmless in _UNJUDGEABLE.items():
        value = ask.body.get(name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
            raise ApiError(
                400,
                f"{name}: this server cannot judge what it asks for; leave it out",
                code="unsupported_parameter",
                param=name,
            )
    if ask.messages is None and not isinstance(ask.prompt, str):
        raise ApiError(
            400,
            "prompt: ids mean different tokens to the upstream and to the model that watches it; "
            "send text",
            code="unsupported_parameter",
            param="prompt",
        )


def upstream_body(ask: Ask, model: str) -> dict[str, Any]:
    """What the upstream is asked: all that the client asked for but what would defeat the monitor.

    Always a stream, and at most ``ask.max_tokens``.
    """
    body = {**ask.sampling, **ask.body}
    if ask.messages is not None:
        body.setdefault("messages", list(ask.messages))
    else:
        body.setdefault("prompt", ask.prompt)
    for name in _OURS:
        body.pop(name, None)
    limits = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name)]
    for name in limits or ["max_tokens"]:
        body[name] = ask.max_tokens
    return {**body, "model": model, "stream": True}
