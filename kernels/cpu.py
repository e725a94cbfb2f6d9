"""The C++ backend for CPU tensors. Its code is in ``csrc/``; this module passes addresses on.

Importing it raises :class:`ImportError` where the extension was not built. ``MIDSTREAM_CPU_ISA``
(``generic``, ``avx2``, ``avx512``) caps the instruction set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from midstream.kernels import _cpu
from midstream.kernels.checks import (
    check_advance_call,
    check_probes,
    check_score_call,
    check_tables,
)
from midstream.kernels.reference import (  # noqa: F401
    bind_add_rms_norm_score,
    bind_score_advance,
)
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def bind_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor], None]:
    """Check the probes of a tap once and return ``score(hidden, out)`` for them."""
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device
    native = _cpu.Probes(
        weight.data_ptr(),
        _DTYPE_CODES[weight.dtype],
        bias.data_ptr(),
        probes,
        width,
        rms_norm,
        eps,
    ).score
    alive = (weight, bias)  # the addresses above stay valid as long as the closure lives

    def score(hidden: Tensor, out: Tensor, _alive: tuple[Tensor, ...] = alive) -> None:
        rows, stride, out_stride = check_score_call(hidden, out, probes, width, device)
        native(
            hidden.data_ptr(), _DTYPE_CODES[hidden.dtype], rows, stride, out.data_ptr(), out_stride
        )

    return score


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Check the tables once and return ``advance(logits, slot, position)`` for them.

    Raises
    ------
    ValueError
        If the chain has more states than the extension was compiled for.
    """
    sizes = check_tables(slots, evidence, chain, policy)
    if sizes.states > _cpu.MAX_STATES:
        raise ValueError(
            f"the chain has {sizes.states} states, the cpu backend takes {_cpu.MAX_STATES} at "
            f"most; use backend='reference'"
        )
    tables = (slots, evidence, chain, policy)
    native = _cpu.Tables(
        sizes.values(), *([tensor.data_ptr() for tensor in table.tensors()] for table in tables)
    ).advance
    probes, device = sizes.probes, slots.device

    def advance(
        logits: Tensor,
        slot: Tensor,
        position: Tensor,
        _alive: tuple[object, ...] = tables,
    ) -> None:
        rows, stride = check_advance_call(logits, slot, position, probes, device)
        native(logits.data_ptr(), stride, slot.data_ptr(), position.data_ptr(), rows)

    return advance
