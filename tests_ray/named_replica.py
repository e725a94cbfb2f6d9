"""The replica of docs/ray_serve_midstream.py, whose answers say which one gave them."""

from __future__ import annotations

from typing import Any

import ray_serve_midstream
from ray import serve


class Naming:
    """An application that puts the replica's name into a header."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", self._name.encode())]
            await send(message)

        await self._app(scope, receive, named)


class NamedReplica(ray_serve_midstream.Midstream.func_or_class):  # type: ignore[misc]
    def __serve_build_asgi_app__(self) -> Any:
        return Naming(super().__serve_build_asgi_app__())
