"""Which backends can run here, and the one rule by which one is chosen.

CPU tensors go to ``cpu`` where the C++ extension was built and else to ``reference``. CUDA tensors
go to ``cuda`` where its extension was built and a device is there, else to ``triton`` where that
can run, else to ``reference``. A backend that is asked for by name is used or refused, never
replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

BoundScore = Callable[[Tensor, Tensor], None]
"""``score(hidden, out)`` of one tap."""

BoundAdvance = Callable[[Tensor, Tensor, Tensor], None]
"""``advance(logits, slot, position)`` of one monitor."""

BoundScoreAdvance = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""``score_advance(hidden, logits, slot, position)`` of one monitor with one tap."""

BoundNormScore = Callable[[Tensor, Tensor, Tensor, float, Tensor], None]
"""``add_rms_norm_score(x, residual, gamma, norm_eps, out)`` of one tap."""


@dataclass(frozen=True)
class Capability:
    """Whether a backend can run here, and if not, why and what helps."""

    name: str
    available: bool
    reason: str = ""


@dataclass(frozen=True)
class Bindings:
    """The functions by which every backend offers its ops."""

    bind_score: Callable[..., BoundScore]
    bind_advance: Callable[..., BoundAdvance]
    bind_score_advance: Callable[..., BoundScoreAdvance]
    bind_add_rms_norm_score: Callable[..., BoundNormScore]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that cannot run here, or not on the tensors given."""


def capabilities() -> dict[str, Capability]:
    """Every backend by name, each missing one with its reason. Never raises."""
    found = {}
    for name, missing in _MISSING.items():
        reason = missing()
        if name == "cpu" and not reason:
            reason = _isa_error()
        found[name] = Capability(name, available=not reason, reason=reason)
    return found


def resolve(device: torch.device | str, backend: str | None = None) -> str:
    """Name of the backend that serves tensors on ``device``.

    Raises
    ------
    ValueError
        If there is no backend called ``backend``.
    BackendUnavailableError
        If it is missing here or does not work on such tensors; the message says why and what helps.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if backend is None:
        return next(name for name in _PREFERRED.get(kind, ("reference",)) if not _MISSING[name]())
    if backend not in _MISSING:
        raise ValueError(f"there is no backend {backend!r}; choose from {', '.join(_MISSING)}")
    if reason := _MISSING[backend]():
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: {reason}")
    on_triton = "cpu" if triton_interprets() else "cuda"
    works_on = {"cpu": "cpu", "triton": on_triton, "cuda": "cuda"}.get(backend, kind)
    if kind != works_on:
        raise BackendUnavailableError(
            f"backend {backend!r} works on {works_on} tensors, these are on {kind}; move them, "
            f"or leave the choice to the dispatch rule with backend=None"
        )
    return backend


@cache
def load(name: str) -> Bindings:
    """Import a backend that :func:`resolve` has named."""
    module = importlib.import_module(f"midstream.kernels.{name}")
    return Bindings(*(getattr(module, field.name) for field in fields(Bindings)))


def triton_interprets() -> bool:
    """Whether ``TRITON_INTERPRET`` sends Triton kernels to its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _missing_cpu() -> str:
    try:
        from midstream.kernels import _cpu  # noqa: F401
    except ImportError as error:
        return f"the C++ extension is missing ({_why_not_built('REASON') or error})"
    return ""


def _why_not_built(reason: str) -> str:
    try:
        from midstream.kernels import _build_info
    except ImportError:
        return "sources that were not installed; run `pip install .` in their folder"
    return str(getattr(_build_info, reason))


def _isa_error() -> str:
    """Why the instruction set could not be chosen: a typing error in ``MIDSTREAM_CPU_ISA``."""
    from midstream.kernels import _cpu

    try:
        _cpu.isa()
    except ValueError as error:
        return str(error)
    return ""


@cache
def _missing_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; run `pip install triton`"
    if not torch.cuda.is_available() and not triton_interprets():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on the CPU"
    return ""


@cache
def _missing_cuda() -> str:
    try:
        from midstream.kernels import _cuda  # noqa: F401
    except ImportError as error:
        return f"the CUDA extension is missing ({_why_not_built('CUDA_REASON') or error})"
    if not torch.cuda.is_available():
        return "it was built, and torch sees no CUDA device"
    return ""


_MISSING: dict[str, Callable[[], str]] = {
    "reference": lambda: "",
    "cpu": _missing_cpu,
    "triton": _missing_triton,
    "cuda": _missing_cuda,
}

_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
