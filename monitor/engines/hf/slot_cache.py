"""transformers: keys and values of many streams of different lengths, in one preallocated cache.

Each stream has a row per layer, ``[heads, window, width]``, and a forward pass over any of them
writes at ``[slot, position]`` and attends to what the row holds. So a token costs one step of the
model, whatever came before it, and rows are neither moved nor padded when streams come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.checks import window as window_of
from midstream.taps import Tap, attach_taps

SHORTEST = 8
"""Least window: as many tokens try a model out."""
_PARTS = ((5, 3), (1, 3), (2, 2))
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, ``[slots, heads, window + 1, width]``."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, window = self._cache.slots, self._cache.window
        self.keys, self.values = (
            states.new_zeros(slots, states.shape[1], window + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        found = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held[cache.slot[:, None], :, cache.column] = states.transpose(1, 2)
            found.append(held[:, :, : cache.length].index_select(0, cache.slot))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length, 0

    def get_seq_length(self) -> int:
        return 0  # there is no one length; positions and masks are always given

    def get_max_length(self) -> int:
        return self._cache.window


class SlotCache(Cache):
    """Keys and values of up to ``slots`` streams of up to ``window`` tokens each.

    Memory: ``slots * (window + 1) * bytes_per_token``, allocated in the first pass and never again.
    The one column more takes the padding of passes in which rows have different numbers of tokens.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the text model.
    slots : int
    window : int

    Raises
    ------
    UnsupportedGenerationError
        For layers that attend in a way that is not known here.
    """

    def __init__(self, config: Any, slots: int, window: int) -> None:
        self._rows = [_SlotLayer(self) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=[*self._rows])
        self.slots = slots
        self.window = window
        self._sliding: int | None = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        self._types = None if types is None else sorted(set(types))
        known = {"full_attention", "sliding_attention"}
        if unknown := sorted(set(types or ()) - known):
            raise UnsupportedGenerationError(
                f"layers of type {', '.join(unknown)} keep more of a text than keys and values; "
                "give a model whose layers are full or sliding attention"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held; 0 before the first pass."""
        made = [layer for layer in self._rows if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in made)

    @torch.inference_mode()  # as the passes that made the tensors
    def clear(self, slot: int, tokens: int) -> None:
        """Forget the first ``tokens`` of a row: a NaN, masked or not, would reach its next user."""
        for layer in self._rows:
            if layer.is_initialized:
                layer.keys[slot, :, :tokens] = 0
                layer.values[slot, :, :tokens] = 0

    def run(self, body: Any, ids: Tensor, slot: Tensor, position: Tensor, present: Tensor) -> None:
        """Feed tokens of some streams to a model in one pass.

        Parameters
        ----------
        body : transformers.PreTrainedModel
            Without its head.
        ids, position : int64 [B, T]
        slot : int64 [B]
            Row of each stream.
        present : bool [B, T]
            False where a row is padded, on the right.
        """
        device = body.device
        self.length = int(position.max()) + 1
        self.slot = slot.to(device)
        self.column = torch.where(present, position, self.window).to(device)
        body(
            input_ids=ids.to(device),
            attention_mask=self._masks(position.to(device), body.dtype),
            position_ids=position.to(device),
            past_key_values=self,
            use_cache=True,
        )

    def _masks(self, position: Tensor, dtype: torch.dtype) -> Any:
        """What is added to the attention's scores, ``[B, 1, T, length]``; per type of layer."""
        key = torch.arange(self.length, device=position.device)
        query = position[:, None, :, None]  # padding is at 0, where there is a token
        causal = key <= query
        near = causal if self._sliding is None else causal & (key > query - self._sliding)
        if self._types is None:
            return _additive(near, dtype)
        masks = {"full_attention": causal, "sliding_attention": near}
        return {name: _additive(masks[name], dtype) for name in self._types}


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


@torch.inference_mode()
def check_cache(model: Any, taps: Sequence[Tap], cache: SlotCache) -> None:
    """Refuse a model that reads otherwise bit by bit than it reads a whole text.

    It is fed two texts both ways: no list of models would be as sure as that.

    Raises
    ------
    UnsupportedGenerationError
    """
    body = getattr(model, model.base_model_prefix, model)
    slot = torch.arange(cache.slots)[-2:].flip(0)
    ids = torch.arange(2 * SHORTEST).reshape(2, -1)[: len(slot)]
    ids %= model.config.get_text_config().vocab_size
    read: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    fed = torch.zeros(2, dtype=torch.int64)[: len(slot)]
    try:
        with attach_taps(model, taps, lambda tap, hidden: read[tap].append(hidden.float().cpu())):
            body(input_ids=ids.to(body.device), use_cache=False)
            for lengths in _PARTS:
                count = torch.tensor(lengths)[: len(slot)]
                step = torch.arange(max(lengths)).expand(len(slot), -1)
                present = step < count[:, None]
                position = torch.where(present, fed[:, None] + step, 0)
                cache.run(body, ids.gather(1, position), slot, position, present)
                fed = fed + count
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UnsupportedGenerationError(
            f"{type(model).__name__} cannot be fed text as it comes: {type(error).__name__}: "
            f"{error}; give a decoder with full or sliding attention"
        ) from error
    for tap, (whole, *parts) in read.items():
        for row in range(len(slot)):
            pieces = [part[row, : n[row]] for part, n in zip(parts, _PARTS, strict=True)]
            off = float((torch.cat(pieces) - whole[row]).abs().max() / whole[row].abs().max())
            if not off <= _TOLERANCE.get(body.dtype, 0.0):
                raise UnsupportedGenerationError(
                    f"{type(model).__name__} reads a text otherwise when it comes in parts: "
                    f"{off:.2g} of the largest value off at {tap}; give a decoder with full or "
                    "sliding attention"
                )
    for index in slot.tolist():
        cache.clear(index, SHORTEST)


def window_for(model: Any, wanted: int | None) -> int:
    """Tokens of a stream that fit: as many as wanted, or the model's own limit.

    Raises
    ------
    UnsupportedGenerationError
    """
    limit = window_of(model)
    if wanted is None:
        if limit is None:
            raise UnsupportedGenerationError("the model's config names no limit; pass window")
        return limit
    if wanted < SHORTEST or (limit is not None and wanted > limit):
        raise UnsupportedGenerationError(
            f"window: expected {SHORTEST} to {limit or 'any number'}, got {wanted}"
        )
    return wanted
