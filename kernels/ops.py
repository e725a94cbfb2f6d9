"""The ops ``score`` and ``advance`` on whichever backend the dispatch rule names.

Three ways to the same result:

* :func:`score` and :func:`advance`: plain calls that check everything each time;
* :meth:`Backend.bind_score` and :meth:`Backend.bind_advance`: weights and tables are checked once,
  and a callable comes back whose calls cost a few microseconds: what a monitor keeps;
* ``torch.ops.midstream.score`` and ``torch.ops.midstream.advance``: what ``torch.compile`` sees.
  The other two lead there by themselves while a graph is traced, so that nothing breaks it.

The ops are registered with ``torch.library.Library``: a call through it costs some 2 us, through
``torch.library.custom_op`` 14 us (measured with torch 2.13).

Inductor (seen with torch 2.13; pytorch issue 198031) drops a ``clone()`` of a tensor that an op
changes afterwards. A compiled step that wants logits to survive ``advance`` must not rely on it;
the trace of the slot table keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from midstream.kernels.backends import (
    BackendUnavailableError,
    BoundAdvance,
    BoundScore,
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
    "BoundScore",
    "Capability",
    "advance",
    "capabilities",
    "resolve",
    "score",
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

        Their storage must stay where it is; values may change in place.
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
        _score(hidden, weight, bias, out, rms_norm=rms_norm, eps=eps, backend=backend)


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
        where looking would need a host sync, ``triton`` treats such a row as padding.
    """
    if torch.compiler.is_compiling():
        torch.ops.midstream.advance(
            logits,
            slot,
            position,
            slots.tensors(),
            evidence.tensors(),
            chain.tensors(),
            policy.tensors(),
            backend=backend,
        )
    else:
        bind = load(resolve(logits.device, backend)).bind_advance
        bind(slots, evidence, chain, policy)(logits, slot, position)


_LIBRARY = torch.library.Library("midstream", "DEF")
_LIBRARY.define(
    "score(Tensor hidden, Tensor weight, Tensor bias, Tensor(a!) out, *, bool rms_norm=False, "
    "float eps=1e-6, str? backend=None) -> ()"
)
_LIBRARY.define(
    "advance(Tensor(a!) logits, Tensor slot, Tensor position, Tensor(b!)[] slots, "
    "Tensor[] evidence, Tensor[] chain, Tensor[] policy, *, str? backend=None) -> ()"
)


def _score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    bind = load(resolve(hidden.device, backend)).bind_score
    bind(weight, bias, rms_norm=rms_norm, eps=eps)(hidden, out)


def _advance(
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    slots: Sequence[Tensor],
    evidence: Sequence[Tensor],
    chain: Sequence[Tensor],
    policy: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    bind = load(resolve(logits.device, backend)).bind_advance
    tables = SlotTable(*slots), EvidenceTable(*evidence), ChainTable(*chain), PolicyTable(*policy)
    bind(*tables)(logits, slot, position)


def _nothing(*args: object, **kwargs: object) -> None:
    """Both ops only write into their arguments: without data there is nothing to do."""


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("score", _score, _key)
    _LIBRARY.impl("advance", _advance, _key)
torch.library.register_fake("midstream::score", _nothing, lib=_LIBRARY)
torch.library.register_fake("midstream::advance", _nothing, lib=_LIBRARY)
