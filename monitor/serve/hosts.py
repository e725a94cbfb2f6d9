"""By which name a request reaches the server.

Any site can have its own name lead to an address of this machine, and a browser that visits it then
sends and reads here as that site (DNS rebinding). By an address, or as localhost, no site can.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from midstream.serve.errors import ApiError

_ELSEWHERE = frozenset("@/?#\\")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_trusted(host: str, allowed: Collection[str]) -> bool:
    """Whether a ``Host`` header has an address, localhost or an allowed name; the port is any."""
    if not _ELSEWHERE.isdisjoint(host):  # of an address of a page, which a host has none of
        return False
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name in allowed or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class HostCheck:
    """Refuses requests that come by another name.

    Parameters
    ----------
    app : ASGI application
    allowed : collection of str
        Names, in lower case.
    refuse : callable
        Makes the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed: Collection[str],
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._allowed, self._refuse = app, allowed, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer."""
        if scope["type"] == "http":
            request = Request(scope, receive)
            hosts = request.headers.getlist("host")
            if len(hosts) != 1 or not is_trusted(hosts[0], self._allowed):
                answer = await self._refuse(request, _BY_NAME)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


_BY_NAME = ApiError(
    403,
    "this server asks for no key and is reached by its address or as localhost only; have "
    "allowed_hosts in its settings list other names",
    code="host_not_allowed",
)
