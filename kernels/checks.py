"""What the ops demand of what they are bound to, weights and tables: one error per demand.

What comes anew with every call is for `midstream.kernels.call_checks`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from midstream.kernels.tables import (
    GAP_BITS,
    MAX_POSITION,
    ChainTable,
    EvidenceTable,
    PolicyTable,
    SlotTable,
)

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Sizes by letter as in tables.py, with K1 = K + 1 states, X = O - 1 and Y = O' - 1 edges.
_I32, _F32 = torch.int32, torch.float32
_FIELDS: dict[type, dict[str, tuple[torch.dtype, tuple[str, ...]]]] = {
    SlotTable: {
        "position": (_I32, ("S",)),
        "start": (_I32, ("S",)),
        "policy": (_I32, ("S",)),
        "evidence": (_F32, ("S", "P")),
        "folds": (_I32, ("S", "P")),
        "ring": (_F32, ("S", "P", "M")),
        "belief": (_F32, ("S", "K1")),
        "risk": (_F32, ("S",)),
        "peak": (_F32, ("S",)),
        "verdict": (torch.uint8, ("S",)),
        "cause": (torch.int16, ("S",)),
        "halted_at": (_I32, ("S",)),
        "scored": (_I32, ("S",)),
        "unscored": (_I32, ("S",)),
        "trace_position": (_I32, ("S", "L")),
        "trace_risk": (_F32, ("S", "L")),
        "trace_verdict": (torch.uint8, ("S", "L")),
        "trace_logits": (_F32, ("S", "L", "P")),
    },
    EvidenceTable: {
        "rule": (_I32, ("P",)),
        "parameter": (_F32, ("P",)),
        "window": (_I32, ("P",)),
        "center": (_F32, ("P",)),
        "phase": (_I32, ("P",)),
    },
    ChainTable: {
        "step_powers": (_F32, ("G", "K1", "K1")),
        "emission": (_F32, ("K1", "O")),
        "edges": (_F32, ("X",)),
        "prior": (_F32, ("K1",)),
        "prompt_emission": (_F32, ("K1", "O'")),
        "prompt_edges": (_F32, ("Y",)),
    },
    PolicyTable: {
        "ahead": (_F32, ("T", "K1")),
        "halt_at": (_F32, ("T",)),
        "hold_at": (_F32, ("T",)),
        "release_at": (_F32, ("T",)),
        "on_unscored": (_I32, ("T",)),
    },
}


@dataclass(frozen=True)
class Sizes:
    """Sizes shared by all tables of a monitor, in the order that the C++ backend takes them."""

    slots: int
    probes: int
    states: int
    """K + 1: *violated* is among them."""
    bins: int
    prompt_bins: int
    window: int
    trace: int
    policies: int

    def values(self) -> tuple[int, ...]:
        """All sizes in declaration order."""
        return astuple(self)


def check_probes(weight: Tensor, bias: Tensor) -> None:
    """Check the probes of a tap.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If a shape, a stride or a device does not fit.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight is {weight.dtype}, expected float32, float16 or bfloat16")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [P, d] with P, d >= 1")
    if not weight.is_contiguous():
        raise ValueError(f"weight has strides {weight.stride()}, expected it contiguous")
    check_field("bias", bias, _F32, weight.shape[:1], weight.device)


def check_tables(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> Sizes:
    """Check dtype, shape, contiguity and device of every tensor of the tables.

    The values are not looked at: on a GPU that would need a host sync. That every ``window`` is at
    most ``M`` and every ``rule`` and ``phase`` exists is the duty of whoever builds the tables.

    Raises
    ------
    TypeError
        If a dtype is not the one that ``tables.py`` states.
    ValueError
        If a shape, a stride or a device does not fit; the message names the field.
    """
    if (slots.evidence.ndim, slots.ring.ndim, slots.belief.ndim, slots.trace_position.ndim) != (
        2,
        3,
        2,
        2,
    ):
        raise ValueError(
            "slots.evidence, ring, belief and trace_position must have 2, 3, 2 and 2 dimensions"
        )
    if (chain.emission.ndim, chain.prompt_emission.ndim, policy.ahead.ndim) != (2, 2, 2):
        raise ValueError("chain.emission, chain.prompt_emission and policy.ahead must be matrices")
    sizes = Sizes(
        slots=slots.evidence.shape[0],
        probes=slots.evidence.shape[1],
        states=slots.belief.shape[1],
        bins=chain.emission.shape[1],
        prompt_bins=chain.prompt_emission.shape[1],
        window=slots.ring.shape[2],
        trace=slots.trace_position.shape[1],
        policies=policy.ahead.shape[0],
    )
    if 0 in (sizes.probes, sizes.states, sizes.bins, sizes.prompt_bins, sizes.policies):
        raise ValueError(f"tables need at least one probe, state, bin and policy row: {sizes}")
    letters = dict(zip(("S", "P", "K1", "O", "O'", "M", "L", "T"), sizes.values(), strict=True))
    letters |= {"G": GAP_BITS, "X": sizes.bins - 1, "Y": sizes.prompt_bins - 1}
    for name, table in (
        ("slots", slots),
        ("evidence", evidence),
        ("chain", chain),
        ("policy", policy),
    ):
        for field, (dtype, dims) in _FIELDS[type(table)].items():
            shape = torch.Size([letters[dim] for dim in dims])
            check_field(f"{name}.{field}", getattr(table, field), dtype, shape, slots.device)
    return sizes


def check_field(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size, device: torch.device
) -> None:
    """Check one tensor of a table.

    Raises
    ------
    TypeError, ValueError
        As `check_tables`.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_score_advance(weight: Tensor, bias: Tensor, slots: SlotTable) -> None:
    """Check that the probes of the one tap are those of the slot table.

    Raises
    ------
    TypeError, ValueError
        As `check_probes`, and if the slot table is for another number of probes or elsewhere.
    """
    check_probes(weight, bias)
    if weight.device != slots.device:
        raise ValueError(f"weight is on {weight.device}, the slot table is on {slots.device}")
    if slots.evidence.ndim == 2 and slots.evidence.shape[1] != len(weight):
        raise ValueError(
            f"weight is {list(weight.shape)} and the slot table has {slots.evidence.shape[1]} "
            "probes; score_advance is for a bank whose probes all read one tap, use score and "
            "advance"
        )


def check_rows(slot: Tensor, position: Tensor, slots: SlotTable, sizes: Sizes) -> None:
    """Check that slots, their policy rows and positions lie in range. Reads values: syncs a GPU.

    Raises
    ------
    IndexError
        If one does not; the message names the row.
    """
    for row, (s, t) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        if s >= sizes.slots:
            raise IndexError(f"row {row} names slot {s}, the table has {sizes.slots}")
        if s >= 0 and t >= MAX_POSITION:
            raise IndexError(f"row {row} has position {t}, the limit is {MAX_POSITION}")
        if s >= 0 and not 0 <= (tier := int(slots.policy[s])) < sizes.policies:
            raise IndexError(
                f"row {row}, slot {s}, names policy row {tier}, the table has {sizes.policies}"
            )
