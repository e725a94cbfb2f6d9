"""The C++ backend for CPU tensors. Its code is in ``csrc/``; this module binds.

Importing it raises :class:`ImportError` where the extension was not built. ``MIDSTREAM_CPU_ISA``
(``generic``, ``avx2``, ``avx512``, ``avx512bf16``, ``amx``) caps the instruction set; a binding
keeps the one it was made with. Weights are copied when they are bound: changed weights need a new
binding. Biases and tables are read at every call. Large calls use up to
:func:`torch.get_num_threads` threads, which changes no bits.

A call is checked in C++, in some 0.2 us; :mod:`.call_checks` only explains what was refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from midstream.kernels import _cpu
from midstream.kernels.call_checks import check_advance_call, check_norm_call, check_score_call
from midstream.kernels.checks import Sizes, check_probes, check_score_advance, check_tables
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def bind_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor], None]:
    """Check and copy the probes of a tap once and return ``score(hidden, out)`` for them."""
    native = _pack(weight, bias, rms_norm, eps).score
    probes, width = weight.shape

    def score(hidden: Tensor, out: Tensor, _alive: Tensor = bias) -> None:
        if not native(hidden, out):
            check_score_call(hidden, out, probes, width, bias.device)
            _refuse("hidden or out")

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
    tables = (slots, evidence, chain, policy)
    sizes, addresses = _addresses(*tables)
    native = addresses.advance
    device = slots.device

    def advance(
        logits: Tensor, slot: Tensor, position: Tensor, _alive: tuple[object, ...] = tables
    ) -> None:
        if not native(logits, slot, position):
            check_advance_call(logits, slot, position, sizes.probes, device)
            _refuse("logits, slot or position")

    return advance


def bind_score_advance(
    weight: Tensor,
    bias: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
    *,
    rms_norm: bool,
    eps: float,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Check all and copy the weights once.

    Returns ``score_advance(hidden, logits, slot, position)``.

    Raises
    ------
    ValueError
        As `bind_advance`.
    """
    check_score_advance(weight, bias, slots)
    tables = (slots, evidence, chain, policy)
    _, addresses = _addresses(*tables)
    native = _pack(weight, bias, rms_norm, eps).score_advance
    probes, width = weight.shape
    device = slots.device

    def score_advance(
        hidden: Tensor,
        logits: Tensor,
        slot: Tensor,
        position: Tensor,
        _alive: tuple[object, ...] = (bias, *tables),
    ) -> None:
        if not native(addresses, hidden, logits, slot, position):
            check_score_call(hidden, logits, probes, width, device)
            check_advance_call(logits, slot, position, probes, device)
            _refuse("hidden, logits, slot or position")

    return score_advance


def bind_add_rms_norm_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor, Tensor, float, Tensor], None]:
    """Check and copy the probes once.

    Returns ``add_rms_norm_score(x, residual, gamma, norm_eps, out)`` for them.
    """
    native = _pack(weight, bias, rms_norm, eps).add_rms_norm_score
    probes, width = weight.shape

    def add_rms_norm_score(
        x: Tensor,
        residual: Tensor,
        gamma: Tensor,
        norm_eps: float,
        out: Tensor,
        _alive: Tensor = bias,
    ) -> None:
        if not native(x, residual, gamma, norm_eps, out):
            check_norm_call(x, residual, gamma, out, probes, width, bias.device)
            _refuse("x, residual, gamma or out")

    return add_rms_norm_score


def _pack(weight: Tensor, bias: Tensor, rms_norm: bool, eps: float) -> _cpu.Probes:
    check_probes(weight, bias)
    probes, width = weight.shape
    code = _DTYPE_CODES[weight.dtype]
    addresses = _address("weight", weight), _address("bias", bias)
    return _cpu.Probes(addresses[0], code, addresses[1], probes, width, rms_norm, eps)


def _addresses(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> tuple[Sizes, _cpu.Tables]:
    sizes = check_tables(slots, evidence, chain, policy)
    if sizes.states > _cpu.MAX_STATES:
        raise ValueError(
            f"the chain has {sizes.states} states, the cpu backend takes {_cpu.MAX_STATES} at "
            f"most; use backend='reference'"
        )
    tables = (slots, evidence, chain, policy)
    addresses = (
        [_address(f"a tensor of {type(table).__name__}", tensor) for tensor in table.tensors()]
        for table in tables
    )
    return sizes, _cpu.Tables(sizes.values(), *addresses)


def _address(name: str, tensor: Tensor) -> int:
    """Where a bound tensor lies; ValueError where the kernels could not read its values there."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the cpu backend needs it on cpu")
    if tensor.is_neg():
        raise ValueError(f"{name} is a negated view; pass {name}.resolve_neg()")
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        _refuse(name)
    return address


def _refuse(names: str) -> NoReturn:
    """All demands are met, and yet there is nothing to read, as in a fake tensor."""
    raise ValueError(f"{names} has no memory that the cpu backend can read")
