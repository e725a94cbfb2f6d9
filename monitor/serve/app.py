"""The HTTP front: OpenAI's endpoints in front of an engine, with keys, limits and a log."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from midstream.serve import openapi
from midstream.serve.admission import Admission
from midstream.serve.bodies import read_body
from midstream.serve.engine import Ask, Engine, Stream
from midstream.serve.errors import ApiError
from midstream.serve.feed import Feed
from midstream.serve.hosts import HostCheck, is_loopback
from midstream.serve.keys import Keys
from midstream.serve.relay import ClientGoneError, Piece, Relay
from midstream.serve.requests import ChatRequest, CompletionRequest, parse, read_json
from midstream.serve.responses import Json, Writer, refusal
from midstream.serve.settings import Settings
from midstream.serve.sse import EventStream, leave_with_client, until_gone

_log = logging.getLogger(__name__)
_TRACE = ("traceparent", "tracestate")
_POLLED = ("/health", "/ready")
_access = logging.getLogger("midstream.serve.access")


def create_app(
    engine: Engine,
    feed: Feed,
    settings: Settings | None = None,
    routers: Sequence[APIRouter] = (),
    keys: Keys | None = None,
    host: str = "",
) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    engine : Engine
    feed : Feed
        Told of requests that are refused.
    settings : Settings, optional
    routers : sequence of APIRouter
        Further routes: page, metrics, reload.
    keys : Keys, optional
        Everything is open without.
    host : str
        Address that is listened on. On loopback, and without keys, only requests are served that
        name an address, localhost, or a host that the settings allow.

    Returns
    -------
    FastAPI
        ``app.state.front`` is its `Front`.
    """
    front = Front(engine, feed, settings or Settings(), keys or Keys())
    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="midstream", docs_url=None, redoc_url=None)
    app.state.front = front
    app.include_router(front.router())
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, front.refused)
    app.add_exception_handler(HTTPException, front.refused)
    app.add_exception_handler(RequestValidationError, front.refused)
    app.add_exception_handler(ClientGoneError, front.gone)
    app.add_exception_handler(Exception, front.failed)
    if front.keys.open and is_loopback(host):
        allowed = front.settings.allowed_hosts
        app.add_middleware(HostCheck, allowed=allowed, refuse=front.refused)
    app.add_middleware(AccessLog)
    openapi.describe(app, engine.models, front.settings)
    return app


class Front:
    """What stands behind the routes.

    Parameters
    ----------
    engine : Engine
    feed : Feed
    settings : Settings
    keys : Keys
    """

    def __init__(self, engine: Engine, feed: Feed, settings: Settings, keys: Keys) -> None:
        self.engine = engine
        self.feed = feed
        self.settings = settings
        self.keys = keys
        self.admission = Admission(settings, per_client=not keys.open)
        self._since = int(time.time())

    def router(self) -> APIRouter:
        """Routes of clients and of whoever watches over the process."""
        router = APIRouter()
        post: dict[str, Any] = {"methods": ["POST"], "response_class": Json}
        get: dict[str, Any] = {"methods": ["GET"], "response_class": Json}
        router.add_api_route("/v1/chat/completions", self.chat, **post)
        router.add_api_route("/v1/completions", self.completions, **post)
        router.add_api_route("/v1/models", self.models, **get)
        router.add_api_route("/v1/models/{name:path}", self.model, **get)
        router.add_api_route("/health", self.health, **get)
        router.add_api_route("/ready", self.ready, **get)
        return router

    async def chat(self, request: Request) -> Response:
        """Continue a chat."""
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, CompletionRequest)

    async def models(self, request: Request) -> Response:
        """List the models."""
        self._identify(request)
        return Json({"object": "list", "data": [self._card(name) for name in self.engine.models]})

    async def model(self, request: Request, name: str) -> Response:
        """Describe one model."""
        self._identify(request)
        self._check_model(name)
        return Json(self._card(name))

    async def health(self) -> Response:
        """The process lives."""
        return Json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests are taken, and if not, why."""
        reason = self._unready()
        if reason is None:
            return Json({"status": "ready"})
        return Json({"status": "unready", "reason": reason}, 503)

    async def _answer(
        self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        client = self._identify(request)
        with ExitStack() as held:
            held.enter_context(self.admission.take(client))
            if (reason := self._unready()) is not None:
                raise ApiError(503, f"not ready: {reason}", code="not_ready", retry_after=5.0)
            body = read_json(await read_body(request, self.settings))
            asked = parse(kind, body, self.settings)
            self._check_model(asked.model)
            chat = kind is ChatRequest
            stream_id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
            trace = {name: request.headers[name] for name in _TRACE if name in request.headers}
            ask = replace(asked.ask(stream_id, client, body, self.settings), trace=trace)
            stream = await self._submit(ask, request)
            request.state.stream = stream_id
            relay = Relay(stream, asked.stop, self.settings)
            held.enter_context(self.admission.follow(relay))
            writer = Writer(
                stream_id,
                asked.model,
                chat=chat,
                annotates=asked.annotates(self.settings),
                usage=asked.includes_usage,
            )
            if asked.stream:
                return EventStream(relay, writer, self.settings, held.pop_all())
            return await _whole(request, relay, writer)

    async def _submit(self, ask: Ask, request: Request) -> Stream:
        """Have the engine begin, unless its client goes before, or it takes too long."""
        submitting = asyncio.ensure_future(self.engine.submit(ask))
        leaving = asyncio.ensure_future(until_gone(request.receive))
        try:
            await asyncio.wait(
                (submitting, leaving),
                timeout=self.settings.start_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if submitting.done():
                return submitting.result()
            if leaving.done():
                raise ClientGoneError
            raise ApiError(504, "the engine took too long", code="timeout")
        finally:
            leaving.cancel()
            submitting.cancel()

    def _identify(self, request: Request) -> str:
        client = self.keys.client(request.headers.get("authorization"))
        request.state.client = client
        return client

    def _unready(self) -> str | None:
        return "the server is shutting down" if self.admission.draining else self.engine.unready

    def _check_model(self, name: str) -> None:
        if name not in self.engine.models:
            served = ", ".join(self.engine.models)
            raise ApiError(
                404, f"no such model; served: {served}", code="model_not_found", param="model"
            )

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "midstream"}

    async def refused(self, request: Request, error: Exception) -> Response:
        """Answer a request that is refused."""
        if isinstance(error, RequestValidationError):  # FastAPI checks only paths here
            error = HTTPException(404)
        if isinstance(error, HTTPException):
            phrase = {404: "there is nothing here", 405: "this method does nothing here"}
            said = phrase.get(error.status_code, "this request is not served")
            codes = {404: "not_found", 405: "method_not_allowed"}
            headers = error.headers or {}
            error = ApiError(error.status_code, said, code=codes.get(error.status_code, "refused"))
        else:
            headers = {}
        error = cast(ApiError, error)
        self.feed.refused(getattr(request.state, "client", ""), error.status, error.code)
        answer = refusal(error)
        answer.headers.update(headers)
        return answer

    async def gone(self, request: Request, error: Exception) -> Response:
        """Nobody is there to read this; the status is for the log."""
        return Response(status_code=499)

    async def failed(self, request: Request, error: Exception) -> Response:
        """Answer where there is a bug; the log has the traceback."""
        self.feed.refused(getattr(request.state, "client", ""), 500, "internal_error")
        message = "an error inside the server; its log says more"
        return refusal(ApiError(500, message, code="internal_error"))


async def _whole(request: Request, relay: Relay, writer: Writer) -> Response:
    texts: list[str] = []

    def deliver(piece: Piece) -> None:
        texts.append(piece.text)

    watch = asyncio.ensure_future(leave_with_client(relay, request.receive))
    try:
        end = await relay.run(deliver)
    finally:
        watch.cancel()
    if end.error is not None:
        return refusal(end.error)
    return Json(writer.whole("".join(texts), end, relay.stream.prompt_tokens))


class AccessLog:
    """Logs a line per request: who, what, how it ended; never text, nor a path that is not ours.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and log when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 0, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            state, route = scope.get("state", {}), scope.get("route")
            _access.log(
                logging.DEBUG if getattr(route, "path", "") in _POLLED else logging.INFO,
                "client=%s method=%s route=%s status=%d seconds=%.3f stream=%s",
                state.get("client") or "-",
                scope["method"],
                getattr(route, "path", "-"),
                status,
                time.monotonic() - started,
                state.get("stream", "-"),
            )
