"""Results as rows of a CSV: one contestant at one point, with what it ran on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from cases import Point
from timing import Quantiles

from midstream.kernels import ops


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on and with."""

    machine: str
    cores: int
    isa: str
    python: str
    torch: str
    midstream: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        """Look."""
        return cls(
            machine=torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            cores=len(os.sched_getaffinity(0)),
            isa=isa(),
            python=platform.python_version(),
            torch=torch.__version__,
            midstream=version("midstream"),
            date=datetime.date.today().isoformat(),
        )


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def isa() -> str:
    """Instruction set of the cpu backend, empty where it is missing."""
    if not ops.capabilities()["cpu"].available:
        return ""
    from midstream.kernels import _cpu

    return str(_cpu.isa())


@dataclass(frozen=True)
class Record:
    """A row of the CSV. Times are microseconds per call, rates 10^9 bytes per second."""

    op: str
    who: str
    device: str
    rows: int
    probes: int
    width: int
    dtype: str
    threads: int
    samples: int
    us_p20: float
    us_median: float
    us_p80: float
    bytes: int
    flops: int
    gbs: float
    ceiling_gbs: float
    share: float
    machine: str
    cores: int
    isa: str
    python: str
    torch: str
    midstream: str
    date: str

    @classmethod
    def of(
        cls,
        point: Point,
        who: str,
        samples: Sequence[float],
        *,
        device: str,
        threads: int,
        ceiling: float,
        machine: Machine,
    ) -> Record:
        """Summarise seconds per call; ``ceiling`` is in bytes per second."""
        taken, work = Quantiles.of(samples), point.work
        rate = work.bytes / taken.median
        return cls(
            point.op,
            who,
            device,
            point.rows,
            point.probes,
            point.width,
            point.dtype,
            threads,
            len(samples),
            *(round(t * 1e6, 4) for t in taken),
            work.bytes,
            work.flops,
            round(rate * 1e-9, 4),
            round(ceiling * 1e-9, 4),
            round(rate / ceiling, 4),
            **asdict(machine),
        )


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a CSV with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def read(path: Path) -> list[Record]:
    """Read what :func:`write` wrote."""
    kinds = {"str": str, "int": int, "float": float}
    names = {field.name: kinds[str(field.type)] for field in fields(Record)}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(names):
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {list(names)}")
        return [Record(**{name: kind(row[name]) for name, kind in names.items()}) for row in reader]
