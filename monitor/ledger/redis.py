"""A ledger in Redis: for replicas on several machines.

A conversation is a hash of turns, and one sorted set has the time of each conversation's newest
turn, by the server's clock. Needs Redis 6.2, one server (replicas for standby), no cluster.

What `write` returned for is as durable as the server is told to be, and `RedisLedger` warns when it
opens if that is less than the disk:

=================================  ============================================================
``appendonly yes``,                synced before the answer: survives loss of power
``appendfsync always``
``appendonly yes``, ``everysec``   loss of power takes up to the last second or two, kill -9 of
                                   the server at worst what waited for a slow sync
``appendonly no``                  a restart takes all since the last snapshot
a fail-over to a replica           takes what had not reached it: replication is asynchronous
``maxmemory-policy`` not           conversations vanish when memory is short, and their risk
``noeviction``                     begins anew
=================================  ============================================================

A turn of six states takes about 0.5 kB of the server's memory, all included. `read` and
`write` are one round trip each and cost the turns that are asked for or given. `expire` costs what
it forgets, in steps of 256 conversations.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from midstream.ledger.clock import age, expiry_age
from midstream.ledger.encoding import CorruptedTurn, decode, encode
from midstream.ledger.ledger import LedgerError, TurnRecord

if TYPE_CHECKING:
    import redis

_PREFIX = "midstream:ledger:1:"  # the version of what is below
_AGES = _PREFIX + "ages"

# KEYS: the set of ages, then the hash of each record. ARGV: field, value and age of each record.
# Scripts are not rolled back: where the age cannot be set there must be no turn, which would never
# expire.
_WRITE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local added = {}
for i = 1, #KEYS - 1 do
    added[i] = 1 - redis.call('HEXISTS', KEYS[i + 1], ARGV[3 * i - 2])
    if added[i] == 1 then
        redis.call('ZADD', KEYS[1], 'GT', now - ARGV[3 * i], KEYS[i + 1])
        redis.call('HSET', KEYS[i + 1], ARGV[3 * i - 2], ARGV[3 * i - 1])
    end
end
return added
"""

# KEYS: the set of ages. ARGV: the age from which conversations go. Gives conversations and turns.
_EXPIRE = """
local clock = redis.call('TIME')
local oldest = string.format('(%.17g', clock[1] + clock[2] / 1e6 - ARGV[1])
local old = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', oldest, 'LIMIT', 0, 256)
local turns = 0
for _, conversation in ipairs(old) do
    turns = turns + redis.call('HLEN', conversation)
    redis.call('UNLINK', conversation)
    redis.call('ZREM', KEYS[1], conversation)
end
return {#old, turns}
"""

# By the class of redis-py's error, or by the server's code where it has no class of its own.
_REMEDIES = {
    "WRONGTYPE": "another program writes keys that begin like the ledger's: remove them, and give "
    "the ledger a database of its own",
    "MISCONF": "the server cannot write to its disk: see its log, and free space",
    "OutOfMemoryError": "raise the server's maxmemory, or expire old conversations",
    "ReadOnlyError": "give the address of the primary, not of a replica",
    "AuthenticationError": "give user and password: redis://USER:PASSWORD@host:port/db",
    "NoPermissionError": "allow this user EVALSHA, EVAL's commands, SCRIPT, INFO and HMGET",
    "BusyLoadingError": "the server reads its data from disk: try again soon",
}
_OTHERWISE = "see that the server runs, can be reached, and what its log says"


class RedisLedger:
    """Turns in a Redis server.

    Parameters
    ----------
    url : str
        ``redis://host:port/db``, ``rediss://`` (TLS) or ``unix:///path/of/socket``.
    timeout : float
        Seconds to wait for a connection, and for each answer. A server that hangs costs two of
        them; looking up a host's name is up to the system.

    Raises
    ------
    LedgerError
        If the server cannot be reached or used.
    ValueError
        For a database that is no number.
    ImportError
        Without redis-py, naming the extra to install.

    Warns
    -----
    RuntimeWarning
        If the server promises less than the disk for what it acknowledges.
    """

    def __init__(self, url: str, *, timeout: float = 2.0) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ImportError(
                "a ledger in Redis needs redis-py: pip install 'midstream[redis]'"
            ) from error
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}, expected seconds above 0")
        database = urlsplit(url).path.strip("/")
        if database and not database.isdecimal() and not url.startswith("unix:"):
            # redis-py would take database 0, which may be another ledger's
            raise ValueError(f"no database {database!r}, expected a number: redis://host:port/1")
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # The pool finds connections that a restart has closed; to send twice what timed out
            # would only wait twice.
            retry=Retry(NoBackoff(), 0),
        )
        self._name = _without_password(self._client)
        self._closed = False
        self._write = self._client.register_script(_WRITE)
        self._expire = self._client.register_script(_EXPIRE)
        with self._failures("open"):
            for doubt in self._doubts():
                warnings.warn(f"ledger {self._name}: {doubt}", RuntimeWarning, stacklevel=3)

    def read(self, conversation: str, keys: Sequence[str]) -> list[TurnRecord | None]:
        """See `Ledger.read`."""
        with self._failures("read"):
            if not keys:
                return []
            values: Any = self._client.hmget(_PREFIX + conversation, keys)
            return [
                None if value is None else decode(conversation, key, value)
                for key, value in zip(keys, values, strict=True)
            ]

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        """See `Ledger.write`; after a failure some may be stored, and are when written again."""
        with self._failures("write"):
            added: Any = self._write(
                keys=[_AGES, *(_PREFIX + record.conversation for record in records)],
                args=[
                    part
                    for record in records
                    for part in (record.key, encode(record), repr(age(record.at)))
                ],
            )
            return [bool(one) for one in added]

    def expire(self, before: float) -> int:
        """See `Ledger.expire`."""
        oldest_age = expiry_age(before)
        forgotten = 0
        with self._failures("expire"):
            while True:
                result: Any = self._expire(keys=[_AGES], args=[repr(oldest_age)])
                conversations, turns = result
                if not conversations:
                    return forgotten
                forgotten += turns

    def close(self) -> None:
        """See `Ledger.close`."""
        self._closed = True
        self._client.close()

    def _doubts(self) -> Iterator[str]:
        """Refuse a server that cannot serve; yield what it does not promise."""
        import redis

        info: Any = self._client.info()
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise redis.ResponseError(f"it is Redis {version}, and 6.2 or newer is needed")
        if info["role"] != "master":
            raise redis.ReadOnlyError("it is a replica")
        settings: Any = {}
        for name in ("appendfsync", "maxmemory-policy"):
            try:
                settings |= self._client.config_get(name)
            except redis.ResponseError:  # servers for hire keep their settings to themselves
                yield f"cannot see its {name}; midstream.ledger.redis says what to ask for"
        if not info["aof_enabled"]:
            yield (
                "a restart loses turns it has acknowledged, and their risk: set appendonly yes and "
                "appendfsync always"
            )
        elif settings.get("appendfsync", "always") != "always":
            yield (
                f"appendfsync is {settings['appendfsync']}: loss of power takes turns it has "
                "acknowledged, and their risk; set appendfsync always"
            )
        if (policy := settings.get("maxmemory-policy", "noeviction")) != "noeviction":
            yield (
                f"maxmemory-policy is {policy}: conversations vanish when memory is short, and "
                "their risk begins anew; set noeviction"
            )

    @contextlib.contextmanager
    def _failures(self, operation: str) -> Iterator[None]:
        import redis

        if self._closed:
            raise self._error(operation, "it was closed", "open another")
        try:
            yield
        except CorruptedTurn as error:
            raise self._error(
                operation,
                error,
                "do not trust this conversation: remove its hash, and see what else writes here",
            ) from error
        except (redis.RedisError, OSError) as error:
            symptom = f"{type(error).__name__} {error}"
            known = (remedy for name, remedy in _REMEDIES.items() if name in symptom)
            raise self._error(operation, error, next(known, _OTHERWISE)) from error

    def _error(self, operation: str, cause: object, remedy: str) -> LedgerError:
        return LedgerError(f"ledger {self._name}: cannot {operation}: {cause}; {remedy}")


def _without_password(client: redis.Redis) -> str:
    found = client.connection_pool.connection_kwargs
    where = found.get("path") or f"{found.get('host', 'localhost')}:{found.get('port', 6379)}"
    return f"redis {where} db {found.get('db', 0)}"
