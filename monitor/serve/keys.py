"""API keys: who a request comes from."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from midstream.serve.errors import ApiError

OPERATOR = "operator"
"""Name of the line that holds the operator's key."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]{16,512}")


class KeyFileError(ValueError):
    """A file of keys that is not taken; the message names the line, never a key."""


class Keys:
    """Keys of clients, and of the operator.

    Kept and compared as SHA-256, so that every comparison takes as long as any other.

    Parameters
    ----------
    clients : mapping of str to str
        Name to key. Empty asks clients for no key.
    operator : str, optional
        Key of the operator's routes. None opens them where there are no clients either, and
        closes them where there are.
    """

    def __init__(
        self, clients: Mapping[str, str] | None = None, operator: str | None = None
    ) -> None:
        self._clients = {name: _digest(key) for name, key in (clients or {}).items()}
        self._operator = None if operator is None else _digest(operator)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``name:key`` lines; ``#`` begins a comment, ``operator`` names the operator's.

        Raises
        ------
        KeyFileError
            For a file that others can read or change, and for lines that are not such.
        """
        keys: dict[str, str] = {}
        for number, line in enumerate(read_private(path).splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, key = (part.strip() for part in line.partition(":"))
            if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
                raise KeyFileError(
                    f"{path}, line {number}: expected name:key, a name of letters, digits and "
                    "._-, a key of 16 or more characters without blanks"
                )
            if name in keys or key in keys.values():
                raise KeyFileError(f"{path}, line {number}: the name or the key is there twice")
            keys[name] = key
        operator = keys.pop(OPERATOR, None)
        if not keys:
            raise KeyFileError(f"{path}: no client's key in it; expected name:key lines")
        return cls(keys, operator)

    @property
    def open(self) -> bool:
        """Whether clients need no key."""
        return not self._clients

    def client(self, authorization: str | None) -> str:
        """Name of the client with this ``Authorization`` header; empty where no key is asked for.

        Raises
        ------
        ApiError
            401 without a key, or with one that is no client's.
        """
        if not self._clients:
            return ""
        presented, found = _digest(_bearer(authorization)), ""
        for name, key in self._clients.items():  # all of them, whichever matches
            if hmac.compare_digest(presented, key):
                found = name
        if not found:
            raise unauthorised()
        return found

    def is_operator(self, key: str | None) -> bool:
        """Whether the key opens the operator's routes."""
        if self._operator is None:
            return not self._clients
        return key is not None and hmac.compare_digest(_digest(key), self._operator)

    def check_operator(self, authorization: str | None) -> None:
        """Let only the operator pass.

        Raises
        ------
        ApiError
            401 without a key, 403 with another.
        """
        key = _bearer(authorization)
        if self.is_operator(key):
            return
        if not key:
            raise unauthorised()
        raise ApiError(403, "this key is not the operator's", code="not_operator")


def read_private(path: Path) -> str:
    """Text of a file that nobody but its owner can read or change.

    Raises
    ------
    KeyFileError
        For any other file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise KeyFileError(
            f"{path}: keys must be in a plain file that only its owner can read; "
            f"its mode is {stat.S_IMODE(mode):04o}, try `chmod 600`"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: expected text in UTF-8") from None


def unauthorised() -> ApiError:
    """Ask for a key."""
    return ApiError(
        401, "give a valid API key as `Authorization: Bearer KEY`", code="invalid_api_key"
    )


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
