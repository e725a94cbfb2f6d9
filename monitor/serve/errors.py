"""Errors as clients of OpenAI's API expect them: an HTTP status and one JSON object."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """Refuses a request.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
        For the client: what was wrong, what was expected, what to do. Nothing of the server's
        insides.
    code : str
        For programs, such as ``context_length_exceeded``.
    param : str, optional
        The field at fault.
    retry_after : float, optional
        Seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The standard error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }
