"""What is measured: points of the grid and their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import model
import numpy as np
import torch
from timing import GRAPH_CALLS, MOST_CALLS
from torch import Tensor

from midstream.kernels.tables import (
    GAP_BITS,
    ChainTable,
    EvidenceTable,
    OnUnscored,
    Phase,
    PolicyTable,
    Rule,
    SlotTable,
)

OPS = ("score", "advance", "score_advance", "add_rms_norm_score")
STATES, BINS = 5, 12
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORM_EPS = 1e-6


class Point(NamedTuple):
    """One cell of the grid."""

    op: str
    rows: int
    probes: int = 8
    width: int = 4096
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.op}-N{self.rows}-P{self.probes}-d{self.width}-{self.dtype}"

    @property
    def work(self) -> model.Work:
        """Bytes and flops of one call."""
        element = DTYPES[self.dtype].itemsize
        if self.op == "advance":
            return model.advance(self.rows, self.probes, STATES, BINS)
        sizes = (self.rows, self.probes, self.width, element)
        if self.op == "score_advance":
            return model.score_advance(*sizes, STATES, BINS)
        return getattr(model, self.op)(*sizes)


def grid() -> list[Point]:
    """One axis at a time around N=8, P=8, d=4096, bf16; then corners. ``advance`` has no d."""
    points: list[Point] = []
    for op in OPS:
        points += [Point(op, rows) for rows in (1, 8, 64, 512, 4096, 16384)]
        points += [Point(op, 8, probes) for probes in (1, 16, 64)]
        if op == "advance":
            points += [Point(op, 64, 64)]
            continue
        points += [Point(op, 8, 8, width) for width in (2048, 8192)]
        points += [Point(op, 8, 8, 4096, dtype) for dtype in ("fp16", "fp32")]
        if op == "score":
            points += [Point(op, 1, 1, 2048), Point(op, 1, 64, 8192), Point(op, 512, 64)]
            points += [Point(op, 16384, 1, 2048), Point(op, 16384, 16)]
    return points


class Tables(NamedTuple):
    """All tables of a monitor."""

    slots: SlotTable
    evidence: EvidenceTable
    chain: ChainTable
    policy: PolicyTable


def make_tables(slots: int, probes: int, device: str) -> Tables:
    """Random tables of usual size: every probe an EMA, K=5, no window, no trace."""
    rng = np.random.default_rng(0)
    size = STATES + 1

    def floats(values: object) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float32, device=device)

    def ints(value: int, count: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    evidence = EvidenceTable(
        rule=ints(Rule.EMA, probes),
        parameter=floats(rng.uniform(0.1, 0.5, probes)),
        window=ints(1, probes),
        center=floats(rng.uniform(1.0, 4.0, probes)),
        phase=ints(Phase.RESPONSE, probes),
    )
    # Sticky, as risk is, yet with a way back: beliefs that fade out become denormal numbers, which
    # slow arithmetic down.
    move = rng.dirichlet(np.ones(size), size) + 0.1 + 4 * np.eye(size)
    step = 0.95 * move / move.sum(axis=1, keepdims=True)
    powers = []
    for _ in range(GAP_BITS):
        step = step / step.max()
        powers.append(step)
        step = step @ step
    lam = 0.2 * probes  # about the cumulative hazard of usual logits
    chain = ChainTable(
        step_powers=floats(np.stack(powers)),
        emission=floats(rng.dirichlet(np.ones(BINS), size) + 0.01),
        edges=floats(np.linspace(0.3 * lam, 3 * lam, BINS - 1)),
        prior=floats(rng.dirichlet(np.ones(size))),
        prompt_emission=floats(np.ones((size, 1))),
        prompt_edges=floats(np.zeros(0)),
    )
    ahead = np.sort(rng.uniform(0, 1, (1, size)), axis=1)
    ahead[:, -1] = 1.0
    policy = PolicyTable(
        ahead=floats(ahead),
        halt_at=floats([0.9]),
        hold_at=floats([0.7]),
        release_at=floats([0.0]),
        on_unscored=ints(OnUnscored.PASS, 1),
    )
    table = SlotTable.allocate(slots, probes, STATES, device=device)
    table.belief.copy_(chain.prior.expand(slots, -1))
    table.cause.fill_(-1)
    table.halted_at.fill_(-1)
    return Tables(table, evidence, chain, policy)


@cache
def cold_bytes(device: str) -> int:
    """Three times the GPU's L2; nothing is rotated on a CPU, where a model's rows are warm."""
    if device != "cuda":
        return 0
    return 3 * int(torch.cuda.get_device_properties(0).L2_cache_size)


@dataclass
class Inputs:
    """Tensors of a point. Call ``i`` takes ``hidden[i % copies]`` and ``position[i]``."""

    point: Point
    device: str
    hidden: Tensor  # [copies, N, d]
    weight: Tensor
    bias: Tensor
    out: Tensor
    logits: Tensor
    slot: Tensor
    position: Tensor  # [calls, N]
    tables: Tables
    eaten: Tensor | None = None  # [calls, N, P]: the logits that calls of advance leave as NaN

    @classmethod
    def of(cls, point: Point, device: str) -> Inputs:
        """Draw them from a fixed seed."""
        torch.manual_seed(0)
        rows, probes, dtype = point.rows, point.probes, DTYPES[point.dtype]
        width = 1 if point.op == "advance" else point.width
        copies = 1
        if device == "cuda":
            per_copy = rows * width * dtype.itemsize
            copies = min(GRAPH_CALLS, max(4, -(-cold_bytes(device) // per_copy)))
        hidden = torch.randn(rows, width, device=device).to(dtype)
        calls = torch.arange(MOST_CALLS, dtype=torch.int32, device=device)
        return cls(
            point,
            device,
            hidden.expand(copies, -1, -1).contiguous(),
            (torch.randn(probes, width, device=device) / width**0.5).to(dtype),
            torch.randn(probes, device=device),
            torch.empty(rows, probes, device=device),
            torch.zeros(rows, probes, device=device),
            torch.arange(rows, dtype=torch.int32, device=device),
            calls[:, None].expand(-1, rows).contiguous(),
            make_tables(rows, probes, device),
        )

    def rotated(self, calls: int) -> list[Tensor]:
        """Hidden rows of the calls, in turn."""
        return [self.hidden[i % len(self.hidden)] for i in range(calls)]

    def fresh(self, calls: int) -> list[tuple[Tensor, Tensor]]:
        """Logits and slots of the calls: NaN ones would be unscored tokens, a shorter path."""
        self.eaten = self.logits.repeat(calls, 1, 1)
        return [(logits, self.slot) for logits in self.eaten]

    def rewind(self) -> None:
        """Let positions begin again and refill the logits; on a GPU also empty the L2."""
        self.tables.slots.position.zero_()
        if self.eaten is not None:
            self.eaten.zero_()
        if self.device == "cuda":
            _flush_buffer().zero_()


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(cold_bytes("cuda"), dtype=torch.int8, device="cuda")
