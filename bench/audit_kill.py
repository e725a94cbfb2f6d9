"""Records of the audit log that are missing after their writer was killed.

    python bench/audit_kill.py [--rounds 50] [--folder FOLDER]

A writer process fills an audit log from four threads, as fast as the log takes records, and tells
in shared memory how many it has acknowledged and how many the operating system has. At a random
moment it gets SIGKILL; the next writer goes on in the same folder. After each kill the chain is
checked, and at the end that no thread of a writer lacks a record between two others.

`audit_lost_records_after_kill` counts acknowledged records that are missing, over all policies.
`lost_of_written` counts those that only the operating system had: a kill takes the process, not the
system, so there are none under any policy. `unacknowledged` is the most that was found beyond what
had been acknowledged at a kill: with `every-second` what a power failure may cost. `torn` counts
last lines that a kill left unfinished. Rates are over the lives of the writers, their start
included, on this disk.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from midstream.serve.audit import AuditLog
from midstream.serve.audit_file import Sync, files_in
from midstream.serve.audit_read import files_of, read, verify

# One process imports, the others are forks of it. Of what is not installed, such as this file,
# Python 3.11 preloads nothing, without a word.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["midstream.serve.audit"])

THREADS = 4
MAX_BYTES = 1 << 20  # so that some are killed between two files
FILLER = "x" * 200


def fill(folder: str, sync: Sync, writer: int, told: Any) -> None:
    """Write until killed."""
    told[2] = 1
    log = AuditLog(folder, sync=sync, max_bytes=MAX_BYTES, queue_bytes=1 << 20)

    def write(thread: int) -> None:
        number = 0
        while True:
            # A server whose queue is full counts what finds no room; here all is to find some.
            while log.waiting_bytes > 1 << 18:
                time.sleep(1e-4)
            log.notice("n", {"writer": f"{writer}/{thread}", "number": number, "x": FILLER})
            number += 1

    for thread in range(THREADS):
        threading.Thread(target=write, args=(thread,), daemon=True).start()
    while True:
        told[:2] = log.acknowledged, log.written
        time.sleep(2e-4)


def killed(folder: Path, sync: Sync, writer: int, seconds: float) -> tuple[int, int]:
    """Let a writer live for so long; return what it had acknowledged, and written."""
    told = CONTEXT.RawArray("q", 3)  # outlives a process that is killed
    process = CONTEXT.Process(target=fill, args=(str(folder), sync, writer, told))
    process.start()
    while not told[2] and process.is_alive():
        time.sleep(1e-3)
    time.sleep(seconds)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"writer {writer} ended by itself: {process.exitcode}")
    return told[0], told[1]


def check_numbers(files: list[Path]) -> int:
    """Of each thread of each writer the records are there from the first to some last one."""
    following: Counter[str] = Counter()
    for record in read(files):
        if record["kind"] == "notice":
            facts = record["facts"]
            if facts["number"] != following[facts["writer"]]:
                raise RuntimeError(f"{facts['writer']} skips to {facts['number']}")
            following[facts["writer"]] += 1
    return sum(following.values())


def measured(
    folder: Path, sync: Sync, rounds: int, seed: int, longest: float = 0.6
) -> dict[str, Any]:
    rng = random.Random(seed)
    seconds, lost, lost_of_written, beyond, torn = 0.0, 0, 0, 0, 0
    already = 0  # files that no writer touches any more
    for writer in range(rounds):
        life = rng.uniform(0.0, longest)
        acknowledged, written = killed(folder, sync, writer, life)
        files = files_in(folder)[already:]
        found = verify(files)
        if not found.holds:
            raise RuntimeError(f"round {writer}: {found.problems}")
        there = 0 if found.last is None else found.last + 1
        lost += max(0, acknowledged - there)
        lost_of_written += max(0, written - there)
        if acknowledged:  # else it was killed before it told
            beyond = max(beyond, there - acknowledged)
        torn += found.torn_bytes > 0
        seconds += life
        already += len(files) - 1
    AuditLog(folder, sync=sync).close()
    files = files_of([folder])
    found = verify(files)
    if not found.holds or found.missing:
        raise RuntimeError(f"{found.missing} missing, {found.problems}")
    records = check_numbers(files)
    return {
        "lost": lost,
        "lost_of_written": lost_of_written,
        "kills": found.kills,
        "torn": torn,
        "unacknowledged": beyond,
        "records": records,
        "per_second": round(records / seconds),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Kills, for each policy.")] = 50,
    seed: int = 1,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; that of temporary files.")
    ] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        result: dict[str, Any] = {"rounds": rounds}
        for sync in get_args(Sync):
            result[sync] = measured(Path(name) / sync, sync, rounds, seed)
    result["audit_lost_records_after_kill"] = sum(result[sync]["lost"] for sync in get_args(Sync))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
