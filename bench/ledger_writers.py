"""Turns to write, writers in processes of their own, a Redis server: for tests and the bench."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from midstream.ledger.ledger import ROOT, Ledger, LedgerError, TurnRecord, conversation_key
from midstream.ledger.open import open_ledger
from midstream.ledger.sqlite import SQLiteLedger

BUNDLE = hashlib.sha256(b"bundle").hexdigest()

# One process imports, the others are forks of it: a Python that imports torch takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ledger_writers"])


def conversation_named(index: int) -> str:
    return conversation_key(f"conversation {index}")


def key_named(conversation: str, turn: int) -> str:
    """As `turn_key` would give, at less cost; that of turn 0 is the root."""
    return hashlib.sha256(f"{conversation}/{turn}".encode()).hexdigest() if turn else ROOT


def record(
    conversation: str,
    turn: int = 1,
    *,
    belief: Sequence[float] = (0.7, 0.2, 0.1),
    log_hazard: float = -1.5,
    at: float | None = None,
) -> TurnRecord:
    return TurnRecord(
        conversation=conversation,
        key=key_named(conversation, turn),
        parent=key_named(conversation, turn - 1),
        turn=turn,
        belief=tuple(belief),
        log_hazard=log_hazard,
        delivered=True,
        bundle=BUNDLE,
        at=time.time() if at is None else at,
    )


def advanced(before: float, evidence: float) -> float:
    """What a turn does to the risk here: exact in floating point, and different for each writer."""
    return before / 2 + evidence


@dataclass(frozen=True)
class Work:
    """A share of the turns; writers with the same conversation race for each of its turns."""

    url: str
    conversations: tuple[int, ...]
    turns: int
    batch: int  # conversations that go one turn on in one write
    log: str  # one line per turn that `write` returned for: conversation, turn, whether added
    seed: int

    def share_acknowledged(self) -> float:
        with contextlib.suppress(FileNotFoundError):
            lines = Path(self.log).read_bytes().count(b"\n")
            return lines / (len(self.conversations) * self.turns)
        return 0.0

    def acknowledged(self) -> list[tuple[int, int, bool]]:
        with contextlib.suppress(FileNotFoundError):
            lines = Path(self.log).read_text().splitlines(keepends=True)
            whole = [line.split() for line in lines if line.endswith("\n")]
            return [(int(name), int(turn), added == "1") for name, turn, added in whole]
        return []


def do(work: Work) -> None:
    """Write the share, each turn from what the store holds of the turn before."""
    ledger = open_ledger(work.url, timeout=20)
    rng = random.Random(work.seed)
    descriptor = os.open(work.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for begin in range(0, len(work.conversations), work.batch):
        names = work.conversations[begin : begin + work.batch]
        risk = dict.fromkeys(names, 0.0)
        for turn in range(1, work.turns + 1):
            records = []
            for name in names:
                evidence = rng.random()
                risk[name] = advanced(risk[name], evidence)
                records.append(
                    record(
                        conversation_named(name), turn, belief=(risk[name],), log_hazard=evidence
                    )
                )
            added = ledger.write(records)
            pairs = list(zip(names, added, strict=True))
            os.write(descriptor, "".join(f"{n} {turn} {a:d}\n" for n, a in pairs).encode())
            for written, (name, first) in zip(records, pairs, strict=True):
                if not first:  # somebody was faster: what he wrote is the turn
                    (stored,) = ledger.read(written.conversation, [written.key])
                    assert stored is not None
                    risk[name] = stored.belief[0]
    ledger.close()


def do_until_down(work: Work) -> None:
    """Write until the store is down."""
    with contextlib.suppress(LedgerError):
        do(work)


def write_with_a_quota(path: Path, answers: str) -> None:
    ledger = SQLiteLedger(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    written = 0
    try:
        while True:
            ledger.write([record(conversation_named(0), written + 1)])
            written += 1
    except LedgerError as error:
        Path(answers).write_text(f"{written}\n{error}")


def write_as_nobody(path: Path, answers: str) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    lines = []
    for file in (path, path.with_name("new.db"), path.parent / "no folder" / "new.db"):
        try:
            SQLiteLedger(file).write([record(conversation_named(1))])
        except LedgerError as error:
            lines.append(str(error))
    Path(answers).write_text("\n".join(lines))


def shares(
    url: str, folder: Path, *, writers: int, conversations: int, turns: int, batch: int, seed: int
) -> list[Work]:
    """Give each conversation to two writers, in another order each."""
    shared: list[Work] = []
    for index in range(writers):
        mine = [
            name for name in range(conversations) if (index - name) % writers in (0, writers // 2)
        ]
        random.Random(seed + index).shuffle(mine)
        log = str(folder / f"writer-{index}.log")
        shared.append(Work(url, tuple(mine), turns, batch, log, seed + index))
    return shared


def start(target: Callable[..., None], arguments: Sequence[Any]) -> list[BaseProcess]:
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=target, args=(one,), daemon=True) for one in arguments
    ]
    for process in processes:
        process.start()
    return processes


def wait_until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {seconds} s")
        time.sleep(0.01)


def check_chains(ledger: Ledger, conversations: int, turns: int) -> None:
    """Every turn is there, and each goes on from the one that the store holds before it."""
    for index in range(conversations):
        name = conversation_named(index)
        found = ledger.read(name, [key_named(name, turn) for turn in range(1, turns + 1)])
        check_prefix(found)
        assert None not in found


def check_prefix(found: Sequence[TurnRecord | None]) -> None:
    risk = 0.0
    for turn, stored in enumerate(found, start=1):
        if stored is None:
            assert not any(found[turn:]), "a turn without the one before it"
            return
        assert stored.turn == turn
        risk = advanced(risk, stored.log_hazard)
        assert stored.belief == (risk,)


@dataclass
class RedisServer:
    """Debian's redis-server on a socket in a folder of its own."""

    folder: Path
    appendfsync: str = "always"
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/redis.socket"

    def start(self, *extra: str) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", f"{self.folder}/redis.socket"]
        command += ["--dir", str(self.folder), "--save", "", "--appendonly", "yes"]
        command += ["--appendfsync", self.appendfsync, *extra]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers)

    def kill(self) -> None:
        """Kill -9, and wait for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        import redis

        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "server.log").read_text())
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.ConnectionError, redis.ResponseError):
            return False


def has_redis_server() -> bool:
    return shutil.which("redis-server") is not None


@contextlib.contextmanager
def redis_server(folder: Path, appendfsync: str = "always") -> Iterator[RedisServer]:
    server = RedisServer(folder, appendfsync)
    server.start()
    try:
        yield server
    finally:
        server.kill()
