"""The ops as ``torch.ops.midstream.*``, with fake implementations: what ``torch.compile`` sees.

They are registered with ``torch.library.Library``: a call through it costs some 2 us, through
``torch.library.custom_op`` 14 us (measured with torch 2.13). Arguments are those of the functions
in :mod:`.ops`; a table is the list of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from midstream.kernels.backends import BoundAdvance, load, resolve
from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable

_SCORE = "bool rms_norm=False, float eps=1e-6, str? backend=None"
_TABLES = "Tensor(b!)[] slots, Tensor[] evidence, Tensor[] chain, Tensor[] policy"

_SCHEMAS = {
    "score": f"(Tensor hidden, Tensor weight, Tensor bias, Tensor(a!) out, *, {_SCORE}) -> ()",
    "advance": f"(Tensor(a!) logits, Tensor slot, Tensor position, {_TABLES}, *, "
    "str? backend=None) -> ()",
    "score_advance": "(Tensor hidden, Tensor weight, Tensor bias, Tensor(a!) logits, Tensor slot, "
    f"Tensor position, {_TABLES}, *, {_SCORE}) -> ()",
    "add_rms_norm_score": "(Tensor(a!) x, Tensor(b!) residual, Tensor gamma, float norm_eps, "
    f"Tensor weight, Tensor bias, Tensor(c!) out, *, {_SCORE}) -> ()",
}


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
    """See :func:`.ops.score`."""
    bind = load(resolve(hidden.device, backend)).bind_score
    bind(weight, bias, rms_norm=rms_norm, eps=eps)(hidden, out)


def advance(
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
    """See :func:`.ops.advance`."""
    name = resolve(logits.device, backend)
    _bound_advance(name, (slots, evidence, chain, policy))(logits, slot, position)


def score_advance(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    slots: Sequence[Tensor],
    evidence: Sequence[Tensor],
    chain: Sequence[Tensor],
    policy: Sequence[Tensor],
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """See :func:`.ops.score_advance`."""
    bind = load(resolve(hidden.device, backend)).bind_score_advance
    tables = _tables(slots, evidence, chain, policy)
    bound = bind(weight, bias, *tables, rms_norm=rms_norm, eps=eps)
    bound(hidden, logits, slot, position)


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
    """See :func:`.ops.add_rms_norm_score`."""
    bind = load(resolve(residual.device, backend)).bind_add_rms_norm_score
    bind(weight, bias, rms_norm=rms_norm, eps=eps)(x, residual, gamma, norm_eps, out)


_Key = tuple[object, ...]
_bound: dict[_Key, BoundAdvance] = {}
_MOST_BOUND = 4


def _bound_advance(backend: str, tables: tuple[Sequence[Tensor], ...]) -> BoundAdvance:
    """Binding of some tables, made once: checking 34 tensors takes 200 us, comparing them 20 us.

    What a binding depends on is the key: where every tensor lies, and as what. A binding is made on
    aliases, which pin that memory, so that no other tensor can come to lie there; the last few are
    kept, and their tables with them. Bindings with weights cannot be kept: they copy values.
    """
    key: _Key = (
        backend,
        *((t.data_ptr(), t.dtype, t.shape, t.stride()) for table in tables for t in table),
    )
    bound = _bound.get(key)
    if bound is None:
        aliases = ([tensor.detach() for tensor in table] for table in tables)
        bound = load(backend).bind_advance(*_tables(*aliases))
        for oldest in list(_bound)[: 1 - _MOST_BOUND]:
            _bound.pop(oldest, None)
        _bound[key] = bound
    return bound


def _tables(
    slots: Sequence[Tensor],
    evidence: Sequence[Tensor],
    chain: Sequence[Tensor],
    policy: Sequence[Tensor],
) -> tuple[SlotTable, EvidenceTable, ChainTable, PolicyTable]:
    return SlotTable(*slots), EvidenceTable(*evidence), ChainTable(*chain), PolicyTable(*policy)


def _nothing(*args: object, **kwargs: object) -> None:
    """All ops only write into their arguments: without data there is nothing to do."""


_LIBRARY = torch.library.Library("midstream", "DEF")
for _op in (score, advance, score_advance, add_rms_norm_score):
    _LIBRARY.define(_op.__name__ + _SCHEMAS[_op.__name__])
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_op.__name__, _op, _key)
    torch.library.register_fake(f"midstream::{_op.__name__}", _nothing, lib=_LIBRARY)
