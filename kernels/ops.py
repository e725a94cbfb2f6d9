"""The ops on whichever backend the dispatch rule names: score, advance, and the two fused ones.

Three ways to the same result:

* :func:`score`, :func:`advance`, ...: plain calls that check everything each time;
* :meth:`Backend.bind_score`, :meth:`Backend.bind_advance`, ...: weights and tables are checked
  once, and a callable comes back whose calls cost a few microseconds: what a monitor keeps;
* ``torch.ops.midstream.score``, ...: what ``torch.compile`` sees, see :mod:`.library`. The other
  two lead there by themselves while a graph is traced, so that nothing breaks it.

Inductor (seen with torch 2.13; pytorch issue 198031) drops a ``clone()`` of a tensor that an op
changes afterwards. A compiled step that wants logits to survive ``advance`` must not rely on it;
the trace of the slot table keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midstream.kernels import library
from midstream.kernels.backends import (
    BackendUnavailableError,
    BoundAdvance,
    BoundNormScore,
    BoundScore,
    BoundScoreAdvance,
    Capability,
    capabilities,
    load,
    resolve,
)
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "BoundAdvance",
    "BoundNormScore",
    "BoundScore",
    "BoundScoreAdvance",
    "Capability",
    "add_rms_norm_score",
    "advance",
    "capabilities",
    "resolve",
    "score",
    "score_advance",
]


class Backend:
    """The ops of one backend, chosen once.

    Parameters
    ----------
    device
        Where the tensors are.
    name
        A backend by name; by default the dispatch rule chooses.

    Raises
    ------
    ValueError, BackendUnavailableError
        As :func:`~midstream.kernels.backends.resolve`.
    """

    def __init__(self, device: torch.device | str = "cpu", name: str | None = None) -> None:
        self.name = resolve(device, name)
        self._bindings = load(self.name)

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"

    def bind_score(
        self, weight: Tensor, bias: Tensor, *, rms_norm: bool = False, eps: float = 1e-6
    ) -> BoundScore:
        """Check the probes of a tap once; return ``score(hidden, out)`` for them.

        Their storage must stay where it is. A backend may copy the weights: changed weights need a
        new binding. The bias may change in place.
        """
        eager = self._bindings.bind_score(weight, bias, rms_norm=rms_norm, eps=eps)

        def score(hidden: Tensor, out: Tensor) -> None:
            if torch.compiler.is_compiling():
                torch.ops.midstream.score(
                    hidden, weight, bias, out, rms_norm=rms_norm, eps=eps, backend=self.name
                )
            else:
                eager(hidden, out)

        return score

    def bind_advance(
        self,
        slots: SlotTable,
        evidence: EvidenceTable,
        chain: ChainTable,
        policy: PolicyTable,
    ) -> BoundAdvance:
        """Check the tables once; return ``advance(logits, slot, position)`` for them.

        Their storage must stay where it is; values may change in place.
        """
        eager = self._bindings.bind_advance(slots, evidence, chain, policy)
        tables = [table.tensors() for table in (slots, evidence, chain, policy)]

        def advance(logits: Tensor, slot: Tensor, position: Tensor) -> None:
            if torch.compiler.is_compiling():
                torch.ops.midstream.advance(logits, slot, position, *tables, backend=self.name)
            else:
                eager(logits, slot, position)

        return advance

    def bind_score_advance(
        self,
        weight: Tensor,
        bias: Tensor,
        slots: SlotTable,
        evidence: EvidenceTable,
        chain: ChainTable,
        policy: PolicyTable,
        *,
        rms_norm: bool = False,
        eps: float = 1e-6,
    ) -> BoundScoreAdvance:
        """Check all once; return ``score_advance(hidden, logits, slot, position)``.

        For a monitor whose probes all read one tap. ``logits`` is fp32 [N, P] to work in. What may
        change in place is said at :meth:`bind_score` and :meth:`bind_advance`.
        """
        tables = (slots, evidence, chain, policy)
        options = {"rms_norm": rms_norm, "eps": eps}
        eager = self._bindings.bind_score_advance(weight, bias, *tables, **options)
        tensors = [table.tensors() for table in tables]

        def score_advance(hidden: Tensor, logits: Tensor, slot: Tensor, position: Tensor) -> None:
            if torch.compiler.is_compiling():
                rows = (logits, slot, position)
                torch.ops.midstream.score_advance(
                    hidden, weight, bias, *rows, *tensors, **options, backend=self.name
                )
            else:
                eager(hidden, logits, slot, position)

        return score_advance

    def bind_add_rms_norm_score(
        self, weight: Tensor, bias: Tensor, *, rms_norm: bool = False, eps: float = 1e-6
    ) -> BoundNormScore:
        """Check the probes once; return ``add_rms_norm_score(x, residual, gamma, norm_eps, out)``.

        ``rms_norm`` and ``eps`` are those of the probes, ``norm_eps`` is that of the model's norm.
        What may change in place is said at :meth:`bind_score`.
        """
        options = {"rms_norm": rms_norm, "eps": eps}
        eager = self._bindings.bind_add_rms_norm_score(weight, bias, **options)

        def add_rms_norm_score(
            x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, out: Tensor
        ) -> None:
            if torch.compiler.is_compiling():
                torch.ops.midstream.add_rms_norm_score(
                    x, residual, gamma, norm_eps, weight, bias, out, **options, backend=self.name
                )
            else:
                eager(x, residual, gamma, norm_eps, out)

        return add_rms_norm_score


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """Write ``out[n, p] = weight[p] . phi(hidden[n]) + bias[p]``.

    See :func:`midstream.kernels.reference.score`, which defines the result.

    Parameters
    ----------
    hidden : bf16, fp16 or fp32 [N, d]
        Rows may be strided; the last dimension is contiguous. N may be 0.
    weight : bf16, fp16 or fp32 [P, d]
        Contiguous.
    bias : fp32 [P]
    out : fp32 [N, P]
        Rows may be strided: a column slice of a wider buffer is fine. Must not overlap ``hidden``.
    rms_norm, eps
        Whether ``phi`` divides by ``sqrt(mean(hidden[n] ** 2) + eps)``.
    backend
        A backend by name; by default the dispatch rule chooses.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If a shape, a stride or a device does not fit, or there is no such backend.
    BackendUnavailableError
        If the backend asked for cannot run.
    """
    if torch.compiler.is_compiling():
        torch.ops.midstream.score(
            hidden, weight, bias, out, rms_norm=rms_norm, eps=eps, backend=backend
        )
    else:
        library.score(hidden, weight, bias, out, rms_norm=rms_norm, eps=eps, backend=backend)


def advance(
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
    *,
    backend: str | None = None,
) -> None:
    """Fold one row per token into its stream's evidence, belief, risk and verdict.

    See :func:`midstream.kernels.reference.advance`, which defines the result.

    Parameters
    ----------
    logits : fp32 [N, P]
        Rows may be strided. NaN afterwards.
    slot : int32 [N]
        -1 marks padding. Rows of one stream stand side by side.
    position : int32 [N]
        Ascending within a stream.
    slots, evidence, chain, policy
        Tables with the sizes and dtypes of :mod:`midstream.kernels.tables`; ``slots`` is updated.
    backend
        A backend by name; by default the dispatch rule chooses.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As :func:`score`.
    IndexError
        If a slot or its policy row is outside its table, before anything is changed. On a GPU,
        where looking would need a host sync, ``triton`` and ``cuda`` treat such a row as padding.
    """
    tables = (table.tensors() for table in (slots, evidence, chain, policy))
    if torch.compiler.is_compiling():
        torch.ops.midstream.advance(logits, slot, position, *tables, backend=backend)
    else:
        library.advance(logits, slot, position, *tables, backend=backend)


def score_advance(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """Do ``score(hidden, ..., logits)`` and ``advance(logits, ...)`` in one call, to the same bits.

    For a monitor whose probes all read one tap.

    Parameters
    ----------
    logits : fp32 [N, P]
        To work in; rows may be strided. NaN afterwards.
    hidden, weight, bias, rms_norm, eps
        As for :func:`score`.
    slot, position, slots, evidence, chain, policy
        As for :func:`advance`.
    backend
        A backend by name; by default the dispatch rule chooses.

    Raises
    ------
    TypeError, ValueError, IndexError, BackendUnavailableError
        As the two.
    """
    options: dict[str, Any] = {"rms_norm": rms_norm, "eps": eps, "backend": backend}
    rows = (hidden, weight, bias, logits, slot, position)
    tables = (table.tensors() for table in (slots, evidence, chain, policy))
    if torch.compiler.is_compiling():
        torch.ops.midstream.score_advance(*rows, *tables, **options)
    else:
        library.score_advance(*rows, *tables, **options)


def add_rms_norm_score(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    norm_eps: float,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """Add ``x`` to the residual stream, normalise, and score the sum: a drop-in at a tapped layer.

    See :func:`midstream.kernels.reference.add_rms_norm_score`, which defines the result.

    Parameters
    ----------
    x : bf16, fp16 or fp32 [N, d]
        Normed rows afterwards.
    residual : [N, d], the dtype of ``x``
        The sum afterwards.
    gamma : [d], the dtype of ``x``
    norm_eps : float
        Of the model's norm.
    weight, bias, out, rms_norm, eps
        As for :func:`score`, whose ``hidden`` is the sum.
    backend
        A backend by name; by default the dispatch rule chooses.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As :func:`score`.
    """
    options: dict[str, Any] = {"rms_norm": rms_norm, "eps": eps, "backend": backend}
    arguments = (x, residual, gamma, norm_eps, weight, bias, out)
    if torch.compiler.is_compiling():
        torch.ops.midstream.add_rms_norm_score(*arguments, **options)
    else:
        library.add_rms_norm_score(*arguments, **options)
