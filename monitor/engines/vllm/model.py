"""vLLM: where its model classes keep the residual stream, and which model they hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midstream.bundle import Fingerprint
from midstream.engines.vllm.settings import UnsupportedEngineError
from midstream.taps import Tap, decoder_layers

Read = Callable[[Tap, Tensor], None]

# One op, called by all hooks: opaque to torch.compile, which traces the hook around it and calls
# the op in every step. It says it writes to `hidden`, or it would be dead code to the compiler.
_LIBRARY = torch.library.Library("midstream_vllm", "DEF")
_LIBRARY.define("tap(Tensor(a!) hidden, Tensor? residual, int reader) -> ()")
_readers: dict[int, Callable[[Tensor, Tensor | None], None]] = {}
_numbers = itertools.count()


def _read(hidden: Tensor, residual: Tensor | None, reader: int) -> None:
    _readers[reader](hidden, residual)


_LIBRARY.impl("tap", _read, "CompositeExplicitAutograd")


def _trace(hidden: Tensor, residual: Tensor | None, reader: int) -> None:
    return None


torch.library.register_fake("midstream_vllm::tap", _trace, lib=_LIBRARY)


def attach_taps(model: nn.Module, taps: Sequence[Tap], read: Read) -> None:
    """Call ``read(tap, hidden)`` whenever the model computes a tapped tensor.

    vLLM's decoder layers pass on a pair, ``hidden`` and ``residual``, whose sum is the residual
    stream; the next layer's fused norm adds them. It is added once more here, [rows, d] per tap.

    Parameters
    ----------
    model
        As vLLM loaded it, before it is compiled.
    taps
        ``resid_pre`` or ``resid_post``.

    Raises
    ------
    UnsupportedEngineError
        For a class that does not name its residual stream, a layer that is not there, a site that
        vLLM's fused layers do not compute, and for a layer that someone else has hooked.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3

    name = type(model).__name__
    if not supports_eagle3(model):
        raise UnsupportedEngineError(
            f"{name} does not declare SupportsEagle3, vLLM's word for layers that pass on the "
            "residual stream as a pair to be added; serve a model whose class does"
        )
    layers = decoder_layers(model)
    for tap in taps:
        if tap.layer >= len(layers):
            raise UnsupportedEngineError(
                f"no tap {tap}: {name} has {len(layers)} layers, from 0; use the bundle that was "
                "made for this model"
            )
        if tap.site == "resid_mid":
            raise UnsupportedEngineError(
                f"tap {tap}: vLLM adds attention to the stream inside a fused norm, where it "
                "cannot be read; train probes on resid_pre or resid_post"
            )
        layer = layers[tap.layer]
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise UnsupportedEngineError(
                f"layer {tap.layer} of {name} has a hook already: two plugins want the same seam; "
                "leave the other one out"
            )
    for tap in taps:
        number = next(_numbers)
        _readers[number] = _reader(tap, read)
        layer = layers[tap.layer]
        if tap.site == "resid_post":
            layer.register_forward_hook(_output_hook(number))
        else:
            layer.register_forward_pre_hook(_input_hook(number), with_kwargs=True)


def _reader(tap: Tap, read: Read) -> Callable[[Tensor, Tensor | None], None]:
    def reader(hidden: Tensor, residual: Tensor | None) -> None:
        read(tap, hidden if residual is None else hidden + residual)

    return reader


def _output_hook(number: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden, residual = output
        torch.ops.midstream_vllm.tap(hidden, residual, number)

    return hook


def _input_hook(number: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Layers are called with (positions, hidden_states, residual), by place or by name.
        given = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
        torch.ops.midstream_vllm.tap(given["hidden_states"], given["residual"], number)

    return hook


def fingerprint(model: nn.Module, tokenizer: Any = None) -> Fingerprint:
    """Take the fingerprint of a model that vLLM has loaded, sharded over ranks or not.

    Raises
    ------
    UnsupportedEngineError
        Where no input embedding is found.
    """
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            # Ranks hold rows one after the other; the last are padding.
            weight = module.weight.detach()
            if module.tp_size > 1:
                weight = tensor_model_parallel_all_gather(weight.contiguous(), dim=0)
            table = nn.Embedding.from_pretrained(weight[: module.org_vocab_size])
            return Fingerprint.of(_AsTransformers(model, table), tokenizer)
    raise UnsupportedEngineError(
        f"{type(model).__name__} has no input embedding, so it cannot be told from other models; "
        "serve one that has"
    )


class _AsTransformers(nn.Module):
    """What `Fingerprint.of` asks a transformers model for."""

    def __init__(self, model: Any, table: nn.Embedding) -> None:
        super().__init__()
        self.config = model.config
        self._table = table

    def get_input_embeddings(self) -> nn.Embedding:
        return self._table
