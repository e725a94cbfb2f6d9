"""Eight processes write to one store at once, some of which are killed, and so is the server.

Each turn is written by two processes. What `write` returned for is there afterwards, each turn
was added once, and each goes on from the record that the store holds of the turn before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kernel_cases import fresh_seed
from ledger_writers import (
    Work,
    check_chains,
    check_prefix,
    conversation_named,
    do,
    do_until_down,
    has_redis_server,
    key_named,
    redis_server,
    shares,
    start,
    wait_until,
)

from midstream.ledger.open import open_ledger

needs_redis = pytest.mark.skipif(not has_redis_server(), reason="needs redis-server")
WRITERS, CONVERSATIONS, TURNS, BATCH = 8, 1000, 20, 50
KILLED = 3  # the first ones: both of no conversation


def check_acknowledged(url: str, work: Sequence[Work], *, in_flight: int) -> None:
    """Nothing acknowledged is lost, and nothing was added twice."""
    lines = [line for one in work for line in one.acknowledged()]
    turns: dict[int, set[int]] = {}
    for name, turn, _ in lines:
        turns.setdefault(name, set()).add(turn)
    ledger = open_ledger(url)
    for index, written in turns.items():
        name = conversation_named(index)
        assert None not in ledger.read(name, [key_named(name, turn) for turn in written])
    ledger.close()
    added = Counter((name, turn) for name, turn, first in lines if first)
    assert set(added.values()) == {1}
    # A writer that was killed between its commit and its log added what nobody knows of.
    unclaimed = sum(len(written) for written in turns.values()) - len(added)
    assert unclaimed <= in_flight * BATCH


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"{tmp_path}/ledger.db"
        return
    with redis_server(tmp_path) as server:
        yield server.url


def test_killed_writers_lose_nothing_and_add_nothing_twice(url: str, tmp_path: Path) -> None:
    work = shares(
        url,
        tmp_path,
        writers=WRITERS,
        conversations=CONVERSATIONS,
        turns=TURNS,
        batch=BATCH,
        seed=fresh_seed(),
    )
    processes = start(do, work)
    for index in range(KILLED):
        wait_until(lambda index=index: work[index].share_acknowledged() > 0.1)
        processes[index].kill()
    for process in processes:
        process.join()
    ends = [process.exitcode for process in processes]
    assert ends[0] == -9
    assert {*ends[1:KILLED]} <= {-9, 0}, "on a busy machine one may be done before it is killed"
    assert ends[KILLED:] == [0] * (WRITERS - KILLED)
    check_acknowledged(url, work, in_flight=KILLED)
    ledger = open_ledger(url)
    check_chains(ledger, CONVERSATIONS, TURNS)
    assert ledger.expire(time.time() + 1) == CONVERSATIONS * TURNS
    ledger.close()


@needs_redis
@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
def test_a_killed_redis_comes_back_with_what_it_promised(appendfsync: str, tmp_path: Path) -> None:
    """With ``always`` all that was acknowledged; else what is there is a beginning, and sound."""
    with redis_server(tmp_path, appendfsync) as server:
        work = shares(
            server.url,
            tmp_path,
            writers=4,
            conversations=CONVERSATIONS,
            turns=TURNS,
            batch=5,
            seed=fresh_seed(),
        )
        processes = start(do_until_down, work)
        wait_until(lambda: any(one.share_acknowledged() > 0.1 for one in work))
        server.kill()
        for process in processes:
            process.join()
        assert any(one.share_acknowledged() < 1 for one in work)
        server.start()
        if appendfsync == "always":
            check_acknowledged(server.url, work, in_flight=len(work))
            ledger = open_ledger(server.url)
        else:
            with pytest.warns(RuntimeWarning, match="appendfsync is everysec"):
                ledger = open_ledger(server.url)
        for index in range(CONVERSATIONS):
            name = conversation_named(index)
            keys = [key_named(name, turn) for turn in range(1, TURNS + 1)]
            check_prefix(ledger.read(name, keys))
        ledger.close()
