"""The engine whose model runs on this machine, in a process of its own (see `worker`)."""

from __future__ import annotations

from pathlib import Path

from midstream.policy import PolicyError
from midstream.serve.channel import Channel
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.messages import Look, Plan
from midstream.serve.rotation import Rotation
from midstream.serve.serving import LocalStream, Main, unavailable
from midstream.serve.watchdog import USUAL, Silence

__all__ = ["LocalEngine", "serve_model"]


def serve_model(channel: Channel, plan: Plan) -> None:
    """What runs in the worker. Only there transformers is imported."""
    from midstream.serve.worker import main

    main(channel, plan)


class LocalEngine(Rotation):
    """Serves one model and its bundle; see `midstream.serve.engine.Engine`.

    Start it in the event loop that it is used in::

        engine = LocalEngine(feed, model="folder", bundle="folder")
        await engine.start()
        stream = await engine.submit(ask)

    Parameters
    ----------
    feed : Feed
        Told of everything.
    model : path, optional
        Folder of the model; the testbed's when not given.
    bundle : path, optional
        Made for the model; the testbed's when not given.
    names : sequence of str, optional
        Under which the model is asked for; the folder's name when not given.
    tier : str, optional
        The loosest that may be asked for, and that of requests that ask for none; the policy's own
        when not given.
    slots : int
        Streams that are written at a time.
    max_waiting : int
        Requests that wait for a slot; more are refused with 429.
    cache_tokens, batch_tokens, device, threads
        See `midstream.serve.messages.Plan`.
    main : callable
        What runs in the worker.
    silence : Silence
        How long nothing may come from the worker; then it is killed, and another started.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        model: str | Path | None = None,
        bundle: str | Path | None = None,
        names: tuple[str, ...] = (),
        tier: str | None = None,
        slots: int = 64,
        max_waiting: int = 256,
        cache_tokens: int | None = None,
        batch_tokens: int = 512,
        device: str = "cpu",
        threads: int | None = None,
        main: Main = serve_model,
        silence: Silence = USUAL,
    ) -> None:
        if model is not None and bundle is None:
            raise ValueError("a model needs the bundle that was made for it: give one")
        plan = {
            "model": None if model is None else str(model),
            "slots": slots,
            "cache_tokens": cache_tokens,
            "batch_tokens": batch_tokens,
            "tier": tier,
            "device": device,
            "threads": threads,
        }
        super().__init__(feed, bundle, plan, main, silence)
        self._names = names or (("testbed",) if model is None else (Path(model).resolve().name,))
        self._max_waiting = max_waiting

    @property
    def models(self) -> tuple[str, ...]:
        """Names under which it answers."""
        return self._names

    async def submit(self, ask: Ask) -> LocalStream:
        """Begin a response.

        Raises
        ------
        ApiError
            For what cannot be served, with what to tell the client.
        """
        serving = self._serving
        if self._unready is not None or serving is None or serving.ready is None:
            raise unavailable(self._retry_after)
        if ask.model not in self._names:
            raise ApiError(
                404,
                f"the model {ask.model!r} does not exist here; there is {', '.join(self._names)}",
                code="model_not_found",
                param="model",
            )
        try:
            server = None if self._plan["tier"] is None else serving.ready.tier
            serving.ready.policy.tier_for(ask.tier, server)
        except PolicyError as error:
            raise ApiError(400, str(error), code="invalid_tier", param="midstream.tier") from error
        if ask.stream in serving.streams:
            raise ValueError(f"stream {ask.stream!r} is there already; ids are for one stream each")
        if len(serving.streams) >= self._slots + self._max_waiting:
            raise ApiError(
                429,
                f"{self._slots} responses are being written and {self._max_waiting} wait; try "
                "again later",
                code="too_many_requests",
                retry_after=1.0,
            )
        return await serving.submit(ask)

    def look_closely(self, stream: str, on: bool) -> None:
        """Tell ``scored`` events of a stream, one per token, or stop doing so.

        Without effect on a stream that has ended.
        """
        for serving in self._live:
            if stream in serving.streams:
                serving.worker.send(Look(stream, on))
