"""Who competes at a point: our backends, and what one would use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plain
import plain_numpy
import torch
from cases import NORM_EPS, Inputs, Point
from timing import GRAPH_CALLS, Block, captured, loop, nothing, sized
from torch import Tensor
from torch.nn import functional as F

from midstream.kernels import ops

SLOWEST_REFERENCE = 64  # rows: the reference takes milliseconds beyond


def backends(device: str) -> list[str]:
    """Backends that can run on the device's tensors, by the public rule."""
    found = []
    for name, capability in ops.capabilities().items():
        if not capability.available:
            continue
        try:
            ops.resolve(device, name)
        except ops.BackendUnavailableError:
            continue
        found.append(name)
    return found


def contestants(point: Point, device: str) -> list[str]:
    """Names of the rows measured at a point."""
    names = [
        name
        for name in backends(device)
        if name != "reference" or (device == "cpu" and point.rows <= SLOWEST_REFERENCE)
    ]
    names += ["eager", "compile"]
    if point.op != "advance":
        names.append("F.linear")
    if device == "cpu":
        names.append("numpy")
    return names


def block(inputs: Inputs, who: str) -> Block:
    """Return a contestant's block: a loop on the CPU, a graph on a GPU."""
    call, arguments, prepare = _contest(inputs, who)
    if inputs.device == "cuda":
        return captured(call, arguments(GRAPH_CALLS), prepare)
    return sized(lambda calls: loop(call, arguments(calls), prepare))


Arguments = Callable[[int], list[tuple[Any, ...]]]


def _contest(inputs: Inputs, who: str) -> tuple[Callable[..., object], Arguments, Any]:
    op = inputs.point.op
    prepare = inputs.rewind if op in ("advance", "score_advance") else nothing
    if inputs.device == "cuda":
        prepare = inputs.rewind
    if who == "F.linear":
        return _linear(inputs), lambda calls: [(h,) for h in inputs.rotated(calls)], prepare
    if who in backends(inputs.device):
        call = ours(inputs, who)
    elif who == "numpy":
        call = _numpy(inputs)
    else:
        call = _pytorch(inputs, compiled=who == "compile")
    if who == "numpy":
        return _numpy_arguments(inputs, call, prepare)

    def arguments(calls: int) -> list[tuple[Any, ...]]:
        if op == "score":
            return [(hidden, inputs.out) for hidden in inputs.rotated(calls)]
        if op == "add_rms_norm_score":
            return _norm_arguments(inputs, calls)
        logits, slot = inputs.logits, inputs.slot
        if who in ("eager", "compile"):
            slot = slot.long()
            if op == "advance":
                return [(logits, slot)] * calls
            return [(hidden, slot) for hidden in inputs.rotated(calls)]
        if op == "advance":
            return [(*row, inputs.position[i]) for i, row in enumerate(inputs.fresh(calls))]
        return [
            (hidden, logits, slot, inputs.position[i])
            for i, hidden in enumerate(inputs.rotated(calls))
        ]

    return call, arguments, prepare


def _norm_arguments(inputs: Inputs, calls: int) -> list[tuple[Any, ...]]:
    """In place: the values settle near 1, as the norm makes them; gamma is small to that end."""
    dtype = inputs.hidden.dtype
    gamma = torch.full((inputs.point.width,), 1e-3, dtype=dtype, device=inputs.device)
    pairs = [(copy.clone(), copy) for copy in inputs.hidden]
    return [(*pairs[i % len(pairs)], gamma, NORM_EPS, inputs.out) for i in range(calls)]


def ours(inputs: Inputs, backend: str) -> Callable[..., None]:
    """Bind the op of the point."""
    bound = ops.Backend(inputs.device, backend)
    probes = (inputs.weight, inputs.bias)
    match inputs.point.op:
        case "score":
            return bound.bind_score(*probes)
        case "advance":
            return bound.bind_advance(*inputs.tables)
        case "score_advance":
            return bound.bind_score_advance(*probes, *inputs.tables)
        case _:
            return bound.bind_add_rms_norm_score(*probes)


def _linear(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    weight = inputs.weight
    return lambda hidden: F.linear(hidden, weight)


def _pytorch(inputs: Inputs, *, compiled: bool) -> Callable[..., object]:
    """Eager, or compiled in the form and with the setting that were fastest on a CPU."""
    point, weight = inputs.point, inputs.weight
    bias = inputs.bias.to(weight.dtype)

    def score(hidden: Tensor, out: Tensor) -> None:
        out.copy_(F.linear(hidden, weight, bias))

    def norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float, out: Tensor) -> None:
        plain.add_rms_norm_score(x, residual, gamma, eps, weight, bias, out)

    def norm_new(x: Tensor, residual: Tensor, gamma: Tensor, eps: float, out: Tensor) -> Any:
        return plain.add_rms_norm_score_new(x, residual, gamma, eps, weight, bias)

    match point.op:
        case "score":
            call: Callable[..., object] = score
        case "add_rms_norm_score":
            call = norm_new if compiled else norm
        case _:
            step = plain.PlainStep(weight, inputs.bias, *inputs.tables, point.rows)
            if point.op == "advance":
                call = step.direct_advance
            elif compiled:
                call = step.folded_products if point.rows <= 8 else step.folded_whole
            else:
                call = step.folded
    if not compiled:
        return call
    return plain.compiled(call, "cpp_wrapper" if inputs.device == "cpu" else "default")


def _numpy(inputs: Inputs) -> Callable[..., object]:
    weight, bias, out = inputs.weight.float(), inputs.bias, inputs.out.numpy()
    match inputs.point.op:
        case "score":
            return plain_numpy.score(weight, bias, out)
        case "add_rms_norm_score":
            return plain_numpy.add_rms_norm_score(weight, bias, out, NORM_EPS)
        case "advance":
            return plain_numpy.Step(weight, bias, *inputs.tables).advance
        case _:
            return plain_numpy.Step(weight, bias, *inputs.tables).score_advance


def _numpy_arguments(
    inputs: Inputs, call: Callable[..., object], prepare: Any
) -> tuple[Callable[..., object], Arguments, Any]:
    hidden, slot = inputs.hidden[0].float().numpy(), inputs.slot.long().numpy()
    match inputs.point.op:
        case "score":
            row: tuple[Any, ...] = (hidden,)
        case "advance":
            row = (inputs.logits.numpy().copy(), slot)
        case "score_advance":
            row = (hidden, slot)
        case _:
            row = (hidden.copy(), hidden.copy(), np.full(hidden.shape[1], 1e-3, np.float32))
    return call, lambda calls: [row] * calls, prepare
