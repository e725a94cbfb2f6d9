"""What the ops demand of their arguments: one precise error per demand.

What stays the same between calls (weights, tables) is checked when it is bound. What comes anew
with every call is checked with few attribute reads, and explained only when something is wrong.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NoReturn

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
    _check_field("bias", bias, _F32, weight.shape[:1], weight.device)


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
            _check_field(f"{name}.{field}", getattr(table, field), dtype, shape, slots.device)
    return sizes


def _check_field(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_score_call(
    hidden: Tensor,
    out: Tensor,
    probes: int,
    width: int,
    device: torch.device,
    name: str = "hidden",
) -> tuple[int, int, int]:
    """Check the arguments of one call of ``score``; return rows and the row strides of both."""
    shape, stride, out_stride = hidden.shape, hidden.stride(), out.stride()
    if (
        len(shape) == 2
        and shape[1] == width
        and (stride[1] == 1 or width == 1 or not shape[0])
        and hidden.dtype in FLOAT_DTYPES
        and out.dtype is _F32
        and out.shape == (shape[0], probes)
        and (out_stride[1] == 1 or probes == 1 or not shape[0])
        and (out_stride[0] >= probes or shape[0] <= 1)
        and hidden.device == device
        and out.device == device
    ):
        return shape[0], stride[0], out_stride[0]
    _explain_score_call(hidden, out, probes, width, device, name)


def _explain_score_call(
    hidden: Tensor, out: Tensor, probes: int, width: int, device: torch.device, name: str
) -> NoReturn:
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {hidden.dtype}, expected float32, float16 or bfloat16")
    if out.dtype is not _F32:
        raise TypeError(f"out is {out.dtype}, expected torch.float32")
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(
            f"{name} has shape {list(hidden.shape)}, expected [N, {width}]: "
            f"weight is [{probes}, {width}]"
        )
    if out.shape != (hidden.shape[0], probes):
        raise ValueError(f"out has shape {list(out.shape)}, expected {[hidden.shape[0], probes]}")
    for given, tensor in ((name, hidden), ("out", out)):
        if tensor.device != device:
            raise ValueError(f"{given} is on {tensor.device}, weight is on {device}")
        if tensor.stride(1) != 1:
            raise ValueError(
                f"{given} has strides {tensor.stride()}, expected the last dimension contiguous"
            )
    _check_apart("out", out)
    raise AssertionError("an argument was refused that none of the demands above names")


def _check_apart(name: str, tensor: Tensor) -> None:
    """Refuse a matrix that is written and whose rows share memory, as those of an expanded one."""
    if len(tensor) > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(f"{name} has strides {tensor.stride()}, expected rows that do not overlap")


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


def check_norm_call(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    out: Tensor,
    probes: int,
    width: int,
    device: torch.device,
) -> tuple[int, int, int, int]:
    """Check a call of ``add_rms_norm_score``; return rows and the strides of x, residual, out."""
    rows, stride, out_stride = check_score_call(residual, out, probes, width, device, "residual")
    x_stride = x.stride()
    if (
        x.dtype is residual.dtype
        and gamma.dtype is residual.dtype
        and x.shape == residual.shape
        and gamma.shape == (width,)
        and (x_stride[1] == 1 or width == 1 or not rows)
        and ((x_stride[0] >= width and stride >= width) or rows <= 1)
        and gamma.is_contiguous()
        and x.device == device
        and gamma.device == device
    ):
        return rows, x_stride[0], stride, out_stride
    _explain_norm_call(x, residual, gamma, width, device)


def _explain_norm_call(
    x: Tensor, residual: Tensor, gamma: Tensor, width: int, device: torch.device
) -> NoReturn:
    if x.dtype is not residual.dtype:
        raise TypeError(f"x is {x.dtype}, expected {residual.dtype} as residual is")
    if x.shape != residual.shape:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected {list(residual.shape)} as residual has"
        )
    if x.device != device:
        raise ValueError(f"x is on {x.device}, weight is on {device}")
    if x.stride(1) != 1 and len(x) > 0:
        raise ValueError(f"x has strides {x.stride()}, expected the last dimension contiguous")
    _check_apart("x", x)
    _check_apart("residual", residual)
    _check_field("gamma", gamma, residual.dtype, torch.Size([width]), device)
    raise AssertionError("an argument was refused that none of the demands above names")


def check_advance_call(
    logits: Tensor, slot: Tensor, position: Tensor, probes: int, device: torch.device
) -> tuple[int, int]:
    """Check the arguments of one call of ``advance``; return rows and the stride of ``logits``."""
    shape, stride = logits.shape, logits.stride()
    if (
        len(shape) == 2
        and shape[1] == probes
        and (stride[1] == 1 or probes == 1 or not shape[0])
        and (stride[0] >= probes or shape[0] <= 1)
        and logits.dtype is _F32
        and slot.dtype is _I32
        and position.dtype is _I32
        and slot.shape == shape[:1]
        and position.shape == shape[:1]
        and slot.is_contiguous()
        and position.is_contiguous()
        and logits.device == device
        and slot.device == device
        and position.device == device
    ):
        return shape[0], stride[0]
    _explain_advance_call(logits, slot, position, probes, device)


def _explain_advance_call(
    logits: Tensor, slot: Tensor, position: Tensor, probes: int, device: torch.device
) -> NoReturn:
    if logits.dtype is not _F32:
        raise TypeError(f"logits is {logits.dtype}, expected torch.float32")
    if logits.ndim != 2 or logits.shape[1] != probes:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [N, {probes}]")
    if logits.stride(1) != 1 and len(logits) > 0:
        raise ValueError(
            f"logits has strides {logits.stride()}, expected the last dimension contiguous"
        )
    _check_apart("logits", logits)
    if logits.device != device:
        raise ValueError(f"logits is on {logits.device}, the slot table is on {device}")
    for name, tensor in (("slot", slot), ("position", position)):
        _check_field(name, tensor, _I32, logits.shape[:1], device)
    raise AssertionError("an argument was refused that none of the demands above names")


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
