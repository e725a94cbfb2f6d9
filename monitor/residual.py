"""How the residual stream runs through a layer, found by following one forward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class ResidualTrace(TorchDispatchMode):
    """The additions and module calls of one forward pass, on four tokens.

    Tensors are told apart by identity (which is also what their hash is), never by value: a branch
    that happens to be zero cannot mislead it. Every tensor met is kept alive for that.

    Parameters
    ----------
    model
        Takes ``input_ids [1, 4]``. Should be in eval mode: dropout would draw random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[nn.Module, Any, Any]] = []  # module, input, output
        self._terms: dict[Tensor, list[Tensor]] = {}  # of each sum
        self._normed: dict[Tensor, Tensor] = {}  # output of a norm -> its input
        ids = torch.zeros((1, 4), dtype=torch.long, device=next(model.parameters()).device)
        hooks = [m.register_forward_hook(self._note, with_kwargs=True) for m in model.modules()]
        try:
            with torch.no_grad(), self:
                model(input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor:
            self._terms[out] = [term for term in args if isinstance(term, Tensor)]
        return out

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        self._calls.append((module, given, output))
        if isinstance(given, Tensor) and isinstance(output, Tensor) and output is not given:
            is_leaf = next(module.children(), None) is None
            has_matrix = any(p.dim() > 1 for p in module.parameters(recurse=False))
            if is_leaf and not has_matrix:
                self._normed[output] = given

    def _stream(self, start: Tensor, end: Tensor) -> list[Tensor]:
        """`start`, the stream after each addition, `end`; empty where no one way leads back.

        Where an addition is normed at once (BERT), the stream is what the norm makes of it.
        """
        if end is start:
            return [start]
        if end in self._normed and self._normed[end] is not start:
            way = self._stream(start, self._normed[end])
            return way and [*way[:-1], end]
        ways = [way for term in self._terms.get(end, []) if (way := self._stream(start, term))]
        return [*ways[0], end] if len(ways) == 1 else []

    def mid_reader(self, layer: nn.Module) -> nn.Module | str:
        """Find the submodule that takes the layer's ``resid_mid``, or the reason why none does."""
        runs = Counter(module for module, _, _ in self._calls)
        if runs[layer] != 1:
            return f"runs {runs[layer]} times in one forward pass"
        start, end = next((i, o) for module, i, o in self._calls if module is layer)
        stream = self._stream(start, end) if isinstance(end, Tensor) else []
        if not stream:
            return "does more to the stream than add to it"
        if len(stream) == 2:
            return "adds to the stream once (attention and MLP in parallel, or a mixer alone)"
        if len(stream) != 3:
            return f"adds to the stream {len(stream) - 1} times, not twice"
        readers = [module for module, given, _ in self._calls if given is stream[1]]
        if not readers:
            return "adds attention and MLP in parallel (no submodule takes the sum in between)"
        # The last to return is the outermost: of OLMo-2's MLP and its first matrices, the MLP.
        return readers[-1] if runs[readers[-1]] == 1 else "shares the submodule that takes it"
