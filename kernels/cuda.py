"""The CUDA backend. Its kernels are in ``csrc/cuda``; this module passes addresses on.

Importing it raises :class:`ImportError` where the extension was not built. Weights are packed when
they are bound, by some ten small kernels on the current stream: changing them needs a new binding,
and ``torch.ops.midstream``, which binds at every call, packs at every call. Tables are read anew by
every call.

Every call launches one kernel on the current stream of the tensors' device, waits for nothing and
allocates nothing, so it can be captured in a CUDA graph. Bind before the capture begins: CUDA loads
a kernel when it is first asked for it, which a capture forbids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.kernels import _cuda
from midstream.kernels.backends import (
    BoundAdvance,
    BoundNormScore,
    BoundScore,
    BoundScoreAdvance,
)
from midstream.kernels.call_checks import check_advance_call, check_norm_call, check_score_call
from midstream.kernels.checks import Sizes, check_probes, check_score_advance, check_tables
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TOP_HALF = -(1 << 16)  # of an int32: the bits that bfloat16 keeps


def _stream(device: torch.device) -> int:
    """Handle of the current stream; 0.1 us where ``torch.cuda.current_stream`` takes 1 us."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


@dataclass(frozen=True)
class _Packed:
    """Copies of the weights for rows of each format, padded with zeros."""

    bfloat16: Tensor
    float16: Tensor | None
    float32: Tensor

    def probes(self, bias: Tensor, width: int, rms_norm: bool, eps: float) -> _cuda.Probes:
        return _cuda.Probes(
            self.bfloat16.data_ptr(),
            len(self.bfloat16),
            0 if self.float16 is None else self.float16.data_ptr(),
            self.float32.data_ptr(),
            bias.data_ptr(),
            len(bias),
            width,
            rms_norm,
            eps,
        )


@torch.no_grad()
def _pack(weight: Tensor) -> _Packed:
    """Pack the weights of a tap, exactly.

    bfloat16 rows meet fp32 weights as three bfloat16 numbers: 24 bits are three times 8, cut off
    instead of rounded so that none overflows. Only bits below 2**-133 are lost.
    """
    probes, width = weight.shape
    shape = (
        -(-probes // _cuda.PACK_PROBES) * _cuda.PACK_PROBES,
        -(-width // _cuda.PACK_WIDTH) * _cuda.PACK_WIDTH,
    )
    padded = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    padded[:probes, :width] = weight
    float32 = padded.float()
    if weight.dtype == torch.bfloat16:
        return _Packed(padded[None], None, float32)
    parts, rest = [], float32
    for _ in range(3):
        part = (rest.view(torch.int32) & _TOP_HALF).view(torch.float32)
        parts.append(part.bfloat16())
        rest = rest - part
    return _Packed(torch.stack(parts), padded if weight.dtype == torch.float16 else None, float32)


_LOADED: set[torch.device] = set()


def _load(device: torch.device) -> None:
    """Load the kernels onto a device, once."""
    if device.type == "cuda" and device not in _LOADED:
        with torch.cuda.device(device):
            if not torch.cuda.is_current_stream_capturing():
                _cuda.load()
                _LOADED.add(device)


def bind_score(weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float) -> BoundScore:
    """Check and pack the probes of a tap once and return ``score(hidden, out)`` for them."""
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device
    packed = _pack(weight)
    native = packed.probes(bias, width, rms_norm, eps).score
    alive = (packed, bias)  # the addresses above stay valid as long as the closure lives
    _load(device)

    def score(hidden: Tensor, out: Tensor, _alive: tuple[object, ...] = alive) -> None:
        rows, stride, out_stride = check_score_call(hidden, out, probes, width, device)
        with torch.cuda.device_of(hidden):
            native(
                hidden.data_ptr(),
                _DTYPE_CODES[hidden.dtype],
                rows,
                stride,
                out.data_ptr(),
                out_stride,
                _stream(device),
            )

    return score


def _bind_tables(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> tuple[Sizes, _cuda.Tables]:
    sizes = check_tables(slots, evidence, chain, policy)
    if not _cuda.fits(sizes.values()):
        raise ValueError(
            f"{sizes.probes} probes and {sizes.states} states do not fit into the shared memory "
            "of a block; use backend='triton' or 'reference'"
        )
    tables = (slots, evidence, chain, policy)
    return sizes, _cuda.Tables(
        sizes.values(), *([tensor.data_ptr() for tensor in table.tensors()] for table in tables)
    )


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> BoundAdvance:
    """Check the tables once and return ``advance(logits, slot, position)`` for them.

    Raises
    ------
    ValueError
        If the state of a stream is too large for shared memory: some 1300 probes.
    """
    sizes, native_tables = _bind_tables(slots, evidence, chain, policy)
    native = native_tables.advance
    probes, device = sizes.probes, slots.device
    alive = (slots, evidence, chain, policy)
    _load(device)

    def advance(
        logits: Tensor, slot: Tensor, position: Tensor, _alive: tuple[object, ...] = alive
    ) -> None:
        rows, stride = check_advance_call(logits, slot, position, probes, device)
        with torch.cuda.device_of(logits):
            native(
                logits.data_ptr(),
                stride,
                slot.data_ptr(),
                position.data_ptr(),
                rows,
                _stream(device),
            )

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
) -> BoundScoreAdvance:
    """Check everything once; return ``score_advance(hidden, logits, slot, position)``.

    A bank too large for one kernel's shared memory gets two launches, with the same result.
    """
    check_score_advance(weight, bias, slots)
    sizes, native_tables = _bind_tables(slots, evidence, chain, policy)
    if not _cuda.fits_score_advance(sizes.values()):
        score_rows = bind_score(weight, bias, rms_norm=rms_norm, eps=eps)
        advance_rows = bind_advance(slots, evidence, chain, policy)

        def in_two(hidden: Tensor, logits: Tensor, slot: Tensor, position: Tensor) -> None:
            score_rows(hidden, logits)
            advance_rows(logits, slot, position)

        return in_two

    probes, width = weight.shape
    device = weight.device
    packed = _pack(weight)
    native = packed.probes(bias, width, rms_norm, eps).score_advance
    alive = (packed, bias, slots, evidence, chain, policy)
    _load(device)

    def score_advance(
        hidden: Tensor,
        logits: Tensor,
        slot: Tensor,
        position: Tensor,
        _alive: tuple[object, ...] = alive,
    ) -> None:
        rows, stride, _ = check_score_call(hidden, logits, probes, width, device)
        _, logits_stride = check_advance_call(logits, slot, position, probes, device)
        with torch.cuda.device_of(hidden):
            native(
                native_tables,
                hidden.data_ptr(),
                _DTYPE_CODES[hidden.dtype],
                rows,
                stride,
                logits.data_ptr(),
                logits_stride,
                slot.data_ptr(),
                position.data_ptr(),
                _stream(device),
            )

    return score_advance


def bind_add_rms_norm_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> BoundNormScore:
    """Check the probes once; return ``add_rms_norm_score(x, residual, gamma, norm_eps, out)``."""
    check_probes(weight, bias)
    probes, width = weight.shape
    device = weight.device
    packed = _pack(weight)
    native = packed.probes(bias, width, rms_norm, eps).add_rms_norm_score
    alive = (packed, bias)
    _load(device)

    def add_rms_norm_score(
        x: Tensor,
        residual: Tensor,
        gamma: Tensor,
        norm_eps: float,
        out: Tensor,
        _alive: tuple[object, ...] = alive,
    ) -> None:
        rows, x_stride, residual_stride, out_stride = check_norm_call(
            x, residual, gamma, out, probes, width, device
        )
        with torch.cuda.device_of(x):
            native(
                x.data_ptr(),
                x_stride,
                residual.data_ptr(),
                residual_stride,
                gamma.data_ptr(),
                _DTYPE_CODES[x.dtype],
                rows,
                norm_eps,
                out.data_ptr(),
                out_stride,
                _stream(device),
            )

    return add_rms_norm_score
