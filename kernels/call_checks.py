"""What the ops demand of the arguments of a call: few attribute reads where all is well.

Only where something is wrong is it explained, with one error per demand. What stays the same
between calls is checked when it is bound, by `midstream.kernels.checks`.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from midstream.kernels.checks import FLOAT_DTYPES, check_field

_I32, _F32 = torch.int32, torch.float32


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
    check_field("gamma", gamma, residual.dtype, torch.Size([width]), device)
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
        check_field(name, tensor, _I32, logits.shape[:1], device)
    raise AssertionError("an argument was refused that none of the demands above names")


def _check_apart(name: str, tensor: Tensor) -> None:
    """Refuse a matrix that is written and whose rows share memory, as those of an expanded one."""
    if len(tensor) > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(f"{name} has strides {tensor.stride()}, expected rows that do not overlap")
