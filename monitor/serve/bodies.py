"""Bodies of requests: read whole, within a size and a time, before anything is done with them."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from midstream.serve.errors import ApiError
from midstream.serve.relay import ClientGoneError
from midstream.serve.settings import Settings


async def read_body(request: Request, settings: Settings) -> bytes:
    """Body of a request that says it is JSON.

    Other types are refused because a browser sends those across sites without asking first.

    Raises
    ------
    ApiError
        408, 413 or 415.
    ClientGoneError
        When the client goes before it was whole.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "send the body as Content-Type: application/json", code="unsupported_media_type"
        )
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body_bytes:
                    raise ApiError(
                        413,
                        f"the body is larger than {settings.max_body_bytes} bytes",
                        code="body_too_large",
                    )
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)
