"""Which store an address names."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from midstream.ledger.ledger import Ledger
from midstream.ledger.memory import MemoryLedger
from midstream.ledger.redis import RedisLedger
from midstream.ledger.sqlite import SQLiteLedger


def open_ledger(url: str, *, timeout: float = 2.0) -> Ledger:
    """Open a store, and make it where it is a file that is not there yet.

    Parameters
    ----------
    url : str
        ``memory:``, a path, ``sqlite:///absolute/path``, or ``redis://host:port/db`` (also
        ``rediss://`` and ``unix:///path/of/socket``).
    timeout : float
        Seconds after which a store that does not answer is down.

    Raises
    ------
    ValueError
        For an address of no store.
    LedgerError
        If the store is down, corrupted or not ours.
    ImportError
        For Redis without redis-py, naming the extra to install.
    """
    if not (scheme := re.match(r"([A-Za-z][\w+.-]*):", url)):
        if not url:
            raise ValueError(f"no ledger at {url!r}; expected {_EXPECTED}")
        return SQLiteLedger(url, timeout=timeout)
    if url == "memory:":
        return MemoryLedger()
    if scheme[1] in ("redis", "rediss", "unix"):
        return RedisLedger(url, timeout=timeout)
    parts = urlsplit(url)
    if scheme[1] == "sqlite" and parts.path.startswith("/") and not parts.netloc:
        return SQLiteLedger(unquote(parts.path), timeout=timeout)
    raise ValueError(f"no ledger at {url!r}; expected {_EXPECTED}")


_EXPECTED = (
    "memory:, a path (./a:b where it has a colon), sqlite:///absolute/path or redis://host:port/db"
)
