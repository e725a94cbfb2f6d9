"""Turns written per second to each store of the ledger, durably, and what a write takes.

    python bench/ledger.py [--turns 8000] [--folder FOLDER]

Each writer opens the store, keeps conversations of 20 turns of its own, and writes turn by turn, as
a gate does: one record per call, the next when that one is on the disk. What is batched is batched
by the store. The figure is the rate with 8 processes of 8 threads on SQLite; beside it are fewer
writers, 8 processes that give a turn of 20 conversations in each call, and the same with Redis
(appendonly, appendfsync always: the same promise). Beside each rate is what a sync of 4 kB cost on
this disk just before and after, the mean of both medians: it bounds what one writer alone can
reach, and disks that are shared differ tenfold from one minute to the next. Seconds run from the
moment at which all writers are ready to the last answer.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import redis
import typer
from ledger_writers import (
    CONTEXT,
    conversation_named,
    has_redis_server,
    key_named,
    record,
    redis_server,
)
from numpy.typing import NDArray

from midstream.ledger.open import open_ledger

TURNS_EACH = 20
BELIEF = (0.7, 0.2, 0.05, 0.03, 0.015, 0.005)
WRITERS = ((1, 1, 1), (1, 8, 1), (8, 1, 1), (8, 1, 20), (8, 8, 1))  # processes, threads, batch


def quantiles(seconds: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e6
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def sync_seconds(folder: Path, times: int = 100) -> list[float]:
    """What it takes to append 4 kB and to sync it."""
    taken = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(times):
            begin = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begin)
    return taken


def write_turns(
    url: str, process: int, threads: int, batch: int, turns: int, ready: Any, results: Any
) -> None:
    """One process of writers; its answer is the time of each call, and when the last one ended."""
    ledger = open_ledger(url, timeout=60)
    taken: list[list[float]] = [[] for _ in range(threads)]

    def write(thread: int) -> None:
        for call in range(turns // batch):
            first = (process * threads + thread) * turns + call // TURNS_EACH * batch
            records = [
                record(conversation_named(first + i), call % TURNS_EACH + 1, belief=BELIEF)
                for i in range(batch)
            ]
            begin = time.perf_counter()
            added = ledger.write(records)
            taken[thread].append(time.perf_counter() - begin)
            assert all(added)

    workers = [threading.Thread(target=write, args=(thread,)) for thread in range(threads)]
    ready.wait()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results.put((time.monotonic(), [one for thread in taken for one in thread]))
    ledger.close()


def measured(
    url: str, folder: Path, processes: int, threads: int, batch: int, turns: int
) -> dict[str, float]:
    """Write about so many turns in all, each once."""
    each = turns // (processes * threads * batch) * batch
    ready, results = CONTEXT.Barrier(processes + 1), CONTEXT.Queue()
    writers = [
        CONTEXT.Process(target=write_turns, args=(url, index, threads, batch, each, ready, results))
        for index in range(processes)
    ]
    for writer in writers:
        writer.start()
    syncs = [np.median(sync_seconds(folder))]
    ready.wait()
    begin = time.monotonic()  # one clock for all processes
    answers = [results.get() for _ in writers]
    for writer in writers:
        writer.join()
    seconds = max(end for end, _ in answers) - begin
    syncs.append(np.median(sync_seconds(folder)))
    rate = each * processes * threads / seconds
    calls = quantiles(np.concatenate([taken for _, taken in answers]))
    return {"per_second": round(rate, 1), "sync_us": round(float(np.mean(syncs)) * 1e6, 1)} | calls


def read_seconds(url: str, times: int = 500) -> list[float]:
    """What it takes to read all turns of one conversation."""
    ledger = open_ledger(url)
    name = conversation_named(10**9)
    turns = [record(name, turn, belief=BELIEF) for turn in range(1, TURNS_EACH + 1)]
    ledger.write(turns)
    keys = [key_named(name, turn.turn) for turn in turns]
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        found = ledger.read(name, keys)
        taken.append(time.perf_counter() - begin)
        assert found == turns
    ledger.close()
    return taken


def measured_store(url_of: Callable[[int], str], folder: Path, turns: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for index, (processes, threads, batch) in enumerate(WRITERS):
        url = url_of(index)
        name = f"{processes}_processes_x_{threads}_threads" + f"_x_{batch}_turns" * (batch > 1)
        result[name] = measured(url, folder, processes, threads, batch, turns)
    return result | {"read_20_turns": quantiles(read_seconds(url))}


def main(
    turns: Annotated[int, typer.Option(help="To write, for each number of writers.")] = 8000,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; that of temporary files.")
    ] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        result: dict[str, Any] = {"turns": turns}
        result["sqlite"] = measured_store(lambda index: f"{place}/{index}.db", place, turns)
        begin = time.perf_counter()
        last = place / f"{len(WRITERS) - 1}.db"
        open_ledger(str(last)).close()
        result["sqlite"]["open_ms"] = round((time.perf_counter() - begin) * 1e3, 2)
        result["sqlite"]["bytes_per_turn"] = round(last.stat().st_size / turns, 1)
        result["redis"] = "needs redis-server"
        if has_redis_server():
            with redis_server(place) as server:
                with redis.Redis.from_url(server.url) as client:
                    before = client.info("memory")["used_memory"]
                    result["redis"] = measured_store(
                        lambda db: f"{server.url}?db={db}", place, turns
                    )
                    used = client.info("memory")["used_memory"] - before
                result["redis"]["bytes_per_turn"] = round(used / turns / len(WRITERS), 1)
    result["ledger_updates_per_second"] = result["sqlite"]["8_processes_x_8_threads"]["per_second"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
