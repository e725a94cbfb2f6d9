"""Reading the audit log back: its records, and whether its chain holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from midstream.serve.audit_file import AuditError, Chain, beginning, files_in, parse

Record = dict[str, Any]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Files of a log, given by themselves or by their folder, oldest first.

    Raises
    ------
    AuditError
        For a folder without any.
    """
    files: list[Path] = []
    for path in paths:
        found = files_in(path) if path.is_dir() else [path]
        if not found:
            raise AuditError(f"{path}: no audit log here; expected files audit-*.jsonl")
        files += found
    return sorted(files, key=lambda file: file.name)


def read(files: Sequence[Path]) -> Iterator[Record]:
    """Records in their order; the line that a writer has not finished yet is left out.

    Raises
    ------
    AuditError
        For any other line that is no record.
    """
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and file == files[-1]:
                    return
                yield _parsed(file, number, line)


def follow(folder: Path, idle: Callable[[], None] = lambda: time.sleep(0.2)) -> Iterator[Record]:
    """Records in their order, and those that are still to come; never ends by itself.

    Parameters
    ----------
    folder : Path
    idle : callable
        Called when there is nothing new.
    """
    (file, *_) = files_of([folder])
    while True:
        with open(file, "rb") as lines:
            number, newer = 0, None
            while True:
                begin = lines.tell()
                if (line := lines.readline()).endswith(b"\n"):
                    number += 1
                    yield _parsed(file, number, line)
                    continue
                lines.seek(begin)  # of a line that is not finished nothing may stay
                if newer is not None:
                    break
                newer = next((f for f in files_in(folder) if f.name > file.name), None)
                if newer is None:
                    idle()  # else the file is whole now: read it to its end
        file = newer


@dataclass
class Verdict:
    """What `verify` found.

    Attributes
    ----------
    files, records : int
    first, last : int, optional
        Numbers of the first and the last record.
    head : str
        Hash of the last record. Kept elsewhere, it shows later whether the end was cut off.
    missing : int
        Records that found no room when they should have been written, as ``gap`` records say.
    unsynced : int
        Records that a disk failed to take, as ``unsynced`` records say; they may be missing.
    kills : int
        Starts after a writer that did not close the log.
    torn_bytes : int
        Of a last line that is not finished: its writer was killed, or is writing it now.
    unended : tuple of str
        Streams that were opened, and of whose end nothing is known.
    problems : list of str
        Where the chain does not hold.
    """

    files: int = 0
    records: int = 0
    first: int | None = None
    last: int | None = None
    head: str = ""
    missing: int = 0
    unsynced: int = 0
    kills: int = 0
    torn_bytes: int = 0
    unended: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing was altered, removed or put in between first and last."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """All of it, and whether it holds."""
        return {"holds": self.holds, **asdict(self)}


def verify(files: Sequence[Path], contains: str | None = None) -> Verdict:
    """Check the chain through files that follow one another.

    Parameters
    ----------
    files : sequence of Path
        As `files_of` gives them.
    contains : str, optional
        Hash of a record that has to be among them, such as an older head.
    """
    verdict = Verdict(files=len(files))
    open_streams: dict[str, None] = {}
    chain: Chain | None = None
    is_there = contains is None
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if file == files[-1] and not line.endswith(b"\n"):
                    verdict.torn_bytes = len(line)
                    break
                where = f"{file.name}, line {number}"
                try:
                    if number == 1:
                        chain = _joined(chain, beginning(line))
                    record, chain = (chain or Chain()).check(line)
                except AuditError as error:
                    verdict.problems.append(f"{where}: {error}")
                    try:
                        record = parse(line)
                    except AuditError:
                        continue
                    chain = Chain(record["seq"] + 1, record["sha256"])  # one problem, not all after
                _count(verdict, record, open_streams)
                is_there = is_there or record["sha256"] == contains
                verdict.head = record["sha256"]
    if not is_there:
        verdict.problems.append(f"there is no record with the hash {contains}: the log was cut")
    verdict.unended = tuple(open_streams)
    return verdict


def _joined(before: Chain | None, after: Chain) -> Chain:
    """Where a file begins, if that is where the one before it ended."""
    if before is not None and before != after:
        missing = f"records {before.seq} to {after.seq - 1} are missing"
        raise AuditError(
            missing if after.seq > before.seq else "it does not follow the file before it"
        )
    return after


def _count(verdict: Verdict, record: Record, open_streams: dict[str, None]) -> None:
    verdict.records += 1
    verdict.first = record["seq"] if verdict.first is None else verdict.first
    verdict.last = record["seq"]
    match record["kind"]:
        case "opened":
            open_streams[record["stream"]] = None
        case "finished" | "error":
            open_streams.pop(record["stream"], None)
        case "gap":
            verdict.missing += record["missing"]
        case "unsynced":
            verdict.unsynced += record["last"] + 1 - record["first"]
        case "start" if not record["after_stop"]:
            verdict.kills += 1


def _parsed(file: Path, number: int, line: bytes) -> Record:
    try:
        return parse(line)
    except AuditError as error:
        raise AuditError(f"{file}, line {number}: {error}; see `midstream audit verify`") from error
