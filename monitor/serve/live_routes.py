"""The page at ``/``, its files, its event streams, and who may see them (docs/page.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from midstream.serve.errors import ApiError
from midstream.serve.hosts import is_trusted
from midstream.serve.live import Live, TooManyViewersError
from midstream.serve.live_viewers import Viewer
from midstream.serve.operator_session import SECONDS, OperatorSessions

COOKIE = "midstream_operator"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    # Nothing from elsewhere, nothing inline; and strings never become markup or script.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def live_router(
    live: Live,
    operator: Callable[[str], bool] | None = None,
    allowed_hosts: Collection[str] = (),
) -> APIRouter:
    """Routes of the page.

    Parameters
    ----------
    live : Live
    operator : callable, optional
        Whether a key is the operator's, compared in constant time. Without it everybody who
        reaches the server by an address, as localhost, or by an allowed name may look; why not by
        any name: `midstream.serve.hosts`.
    allowed_hosts : collection of str
        Names, in lower case.
    """
    router = APIRouter(include_in_schema=False)
    sessions = OperatorSessions()
    assets = {
        file.name: _asset(file.name, file.read_bytes())
        for file in files("midstream.serve").joinpath("page").iterdir()
        if PurePath(file.name).suffix in _TYPES
    }

    def refused(request: Request) -> ApiError | None:
        """Why this request may not see the streams."""
        if operator is None:
            host = request.headers.get("host", "")
            return None if is_trusted(host, allowed_hosts) else _BY_NAME
        return None if sessions.is_open(request.cookies.get(COOKIE)) else _NO_KEY

    def asset(name: str, request: Request) -> Response:
        if name not in assets:
            return _refuse(ApiError(404, "no such page", code="not_found"))
        content, headers = assets[name]
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    @router.get("/")
    async def page(request: Request) -> Response:
        return asset("index.html", request)

    @router.get("/page/{name}")
    async def page_file(name: str, request: Request) -> Response:
        return asset(name, request)

    @router.get("/live/session")
    async def session(request: Request) -> Response:
        error = refused(request)
        message = None if error is None else error.message
        return _answer({"keys": operator is not None, "open": error is None, "message": message})

    @router.post("/live/session")
    async def begin(request: Request) -> Response:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if operator is None:
            return _refuse(ApiError(400, "this server asks for no key", code="no_keys"))
        if scheme.lower() != "bearer" or not operator(key.strip()):
            return _refuse(_WRONG_KEY)
        response = _answer({"keys": True, "open": True})
        response.set_cookie(
            COOKIE,
            sessions.begin(),
            max_age=int(SECONDS),
            path="/live",
            secure="https" in (request.url.scheme, _origin_scheme(request)),
            httponly=True,
            samesite="strict",
        )
        return response

    @router.delete("/live/session")
    async def end(request: Request) -> Response:
        sessions.end(request.cookies.get(COOKIE))
        response = _answer({"keys": operator is not None, "open": operator is None})
        response.delete_cookie(COOKIE, path="/live", httponly=True, samesite="strict")
        return response

    @router.get("/live/events")
    async def events(request: Request) -> Response:
        return _stream(live, None, refused(request))

    @router.get("/live/streams/{number}")
    async def stream(number: int, request: Request) -> Response:
        return _stream(live, number, refused(request))

    return router


def _stream(live: Live, number: int | None, error: ApiError | None) -> Response:
    if error is not None:
        return _refuse(error)
    try:
        viewer = live.look() if number is None else live.look_at(number)
    except KeyError:
        return _refuse(ApiError(404, "this stream is not kept any more", code="not_found"))
    except TooManyViewersError:
        message = "too many pages are open; close one, or try again later"
        return _refuse(ApiError(503, message, code="too_many_viewers", retry_after=10))
    return _EventStream(live, viewer, number)


class _EventStream(StreamingResponse):
    """Gives a viewer its messages, and has it leave however the response ends."""

    def __init__(self, live: Live, viewer: Viewer, number: int | None) -> None:
        headers = {**HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(aiter(viewer), headers=headers, media_type="text/event-stream")
        self._leave = partial(live.leave, viewer, number)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


def _asset(name: str, content: bytes) -> tuple[bytes, dict[str, str]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return content, {
        **HEADERS,
        "Content-Type": _TYPES[PurePath(name).suffix],
        "Cache-Control": "no-cache",
        "ETag": etag,
    }


def _answer(content: Mapping[str, bool | str | None]) -> JSONResponse:
    return JSONResponse(content, headers={**HEADERS, "Cache-Control": "no-store"})


def _refuse(error: ApiError) -> JSONResponse:
    headers = {**HEADERS, "Cache-Control": "no-store"}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(round(error.retry_after))
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def _origin_scheme(request: Request) -> str:
    """What the browser sees, also where something in front of the server speaks TLS for it."""
    return request.headers.get("origin", "").partition(":")[0]


_NO_KEY = ApiError(401, "the page asks for the operator's key", code="operator_key_required")
_WRONG_KEY = ApiError(401, "this is not the operator's key", code="invalid_operator_key")
_BY_NAME = ApiError(
    403,
    "without an operator's key the page is shown only to those who reach the server by its IP "
    "address or as localhost; configure a key, or allowed_hosts, to reach it by name",
    code="operator_key_needed_by_name",
)
