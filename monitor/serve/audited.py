"""An engine that takes no requests while the audit log cannot be written (``refuse``)."""

from __future__ import annotations

from midstream.serve.audit import AuditLog
from midstream.serve.engine import Ask, Engine, Stream
from midstream.serve.errors import ApiError

_RETRY_AFTER = 5.0  # seconds


class AuditedEngine:
    """Another engine, as long as its streams can be answered for.

    Streams that are in flight when the log fails go on to their end; their records wait.

    Parameters
    ----------
    engine : Engine
    log : AuditLog
    """

    def __init__(self, engine: Engine, log: AuditLog) -> None:
        self._engine, self._log = engine, log

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the engine."""
        return self._engine.models

    @property
    def unready(self) -> str | None:
        """Why it takes no requests now."""
        return self._engine.unready or self._log.unready

    async def submit(self, ask: Ask) -> Stream:
        """Begin a response; an `ApiError` with status 503 while the log cannot be written."""
        if self._log.unready is not None:
            raise ApiError(
                503,
                "the server cannot record its decisions now and answers nothing until it can; "
                "try again later",
                code="audit_unavailable",
                retry_after=_RETRY_AFTER,
            )
        return await self._engine.submit(ask)

    async def close(self, drain: float) -> None:
        """Close the engine."""
        await self._engine.close(drain)
