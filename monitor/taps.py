"""Where the residual stream is read, for any decoder or encoder in transformers.

A tap is a layer and one of three sites, named as TransformerLens names them::

    resid_pre -> + attention -> resid_mid -> + MLP -> resid_post

Nothing here knows a model by name. The layers are the one `ModuleList` as long as the config says
the model is deep, and ``resid_mid`` is found by following the additions of one short forward pass
from a layer's input to its output. A model that does not fit is refused with the reason: a monitor
that reads the wrong tensor is worse than none.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from midstream.residual import ResidualTrace

Site = Literal["resid_pre", "resid_mid", "resid_post"]
SITES: tuple[Site, ...] = get_args(Site)  # in the order in which a layer computes them
Read = Callable[["Tap", Tensor], None]

# The hooks of all taps in force, so that a trace can keep its own tokens from them.
_tap_hooks: WeakSet[Callable[..., None]] = WeakSet()


class UnreadableModelError(ValueError):
    """The model's residual stream cannot be read; the message says why and what to do."""


@functools.total_ordering
@dataclass(frozen=True)
class Tap:
    """A place where the residual stream is read. Taps sort in the order of computation.

    Parameters
    ----------
    layer
        Index of the layer, from 0.
    site
        ``resid_pre`` (the layer's input), ``resid_mid`` (with attention or mixer added, before the
        MLP) or ``resid_post`` (the layer's output; of the last layer, before the final norm).

    Raises
    ------
    ValueError
        If the layer is negative or the site is not one of the three.
    """

    layer: int
    site: Site

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"unknown tap site {self.site!r}: use one of {', '.join(SITES)}")
        if self.layer < 0:
            raise ValueError(f"tap layer {self.layer} is negative: layers are counted from 0")

    def __str__(self) -> str:
        return f"{self.site}.{self.layer}"

    def __lt__(self, other: Tap) -> bool:
        return (self.layer, SITES.index(self.site)) < (other.layer, SITES.index(other.site))

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read a tap from its string form, such as ``resid_post.3``; ValueError if it is none."""
        site, _, layer = text.partition(".")
        if site not in SITES or not (layer.isascii() and layer.isdigit()):
            raise ValueError(
                f"{text!r} is not a tap: write one such as {', '.join(SITES)} + .LAYER"
            )
        return cls(int(layer), site)


class TapHandles:
    """Taps in force; a context manager that takes them off, also when its body raises."""

    def __init__(self, hooks: Sequence[RemovableHandle]) -> None:
        self._hooks = list(hooks)

    def remove(self) -> None:
        """Take every tap off the model; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def attach_taps(model: nn.Module, taps: Sequence[Tap], read: Read) -> TapHandles:
    """Call ``read(tap, hidden)`` whenever the model computes a tapped tensor, until removed.

    Parameters
    ----------
    model
        A transformers decoder or encoder, wrapped (PEFT, multimodal) or not. For ``resid_mid`` it
        runs once on four tokens; random state, other taps and the model stay as they were.
    taps
        Distinct taps.
    read
        Gets the tensor itself, ``hidden [batch, tokens, d]``: no copy, and with its graph where
        gradients are on. The model goes on with this tensor, so `read` must not write to it.

    Raises
    ------
    ValueError
        If a tap is given twice or lies on a layer that is not there.
    UnreadableModelError
        If the layers or a layer's ``resid_mid`` cannot be found, or compiled code would skip taps.
    """
    path, layers = _find_layers(model)
    for tap, count in Counter(taps).items():
        if tap.layer >= len(layers):
            raise ValueError(f"no tap {tap}: {_name(model)} has {len(layers)} layers, from 0")
        if count > 1:
            raise ValueError(f"tap {tap} is given {count} times: give each tap once")
        _refuse_compiled(model, f"{path}.{tap.layer}")
    middles = _find_middles(model, layers, [tap for tap in taps if tap.site == "resid_mid"])
    hooks = []
    for tap in taps:
        module = middles.get(tap, layers[tap.layer])
        if tap.site == "resid_post":
            hooks.append(module.register_forward_hook(_output_hook(tap, read)))
        else:
            hook = _input_hook(tap, read)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return TapHandles(hooks)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Find the layers that carry the residual stream, in order.

    They are the outermost `ModuleList` of ``num_hidden_layers`` entries in the part of the model
    that the text config describes (a vision tower of the same depth is another part).

    Raises
    ------
    UnreadableModelError
        For an encoder-decoder, and where no list or more than one fits.
    """
    return _find_layers(model)[1]


def hidden_size(model: nn.Module) -> int:
    """Width ``d`` of the residual stream; UnreadableModelError if no config tells it."""
    size = getattr(_text_config(model), "hidden_size", None)
    if not isinstance(size, int):
        raise UnreadableModelError(f"the config of {_name(model)} has no hidden_size")
    return size


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _text_config(model: nn.Module) -> Any:
    # A wrapper may have no config, or a plain dict, so the outermost real one counts.
    configs = (getattr(module, "config", None) for module in model.modules())
    config: Any = next((config for config in configs if hasattr(config, "get_text_config")), None)
    if config is None:
        raise UnreadableModelError(f"{_name(model)} has no config: pass a transformers model")
    if not getattr(config, "is_encoder_decoder", False):
        try:
            config = config.get_text_config()
        except ValueError as error:  # more than one part of it is about text
            raise UnreadableModelError(f"{_name(model)}: {error}") from None
    if any(getattr(config, key, False) for key in ("is_encoder_decoder", "add_cross_attention")):
        raise UnreadableModelError(
            f"{_name(model)} is an encoder-decoder or half of one: use a decoder-only model, or an "
            "encoder-only one to score text"
        )
    return config


def _find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found: dict[str, nn.ModuleList] = {}
    for path, modules in lists.items():  # outer ones first
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if len(modules) == depth and not nested and _is_text(model, path, config):
            found[path] = modules
    if len(found) != 1:
        shown = [f"{path} with {len(lists[path])}" for path in list(found or lists)[:8]]
        raise UnreadableModelError(
            f"{_name(model)} should keep {depth} layers in one ModuleList, but {len(found)} fit "
            f"(found {', '.join(shown) or 'none'}): pass the submodule with the text layers alone"
        )
    return next(iter(found.items()))


def _is_text(model: nn.Module, path: str, text_config: Any) -> bool:
    # The nearest config above a list says whose layers these are.
    while path:
        path = path.rpartition(".")[0]
        config: Any = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "get_text_config"):
            return type(config.get_text_config()) is type(text_config)
    return True


def _refuse_compiled(model: nn.Module, path: str) -> None:
    # Compiled code neither runs nor checks for hooks that came later (skip_nnmodule_hook_guards in
    # torch._dynamo.config): the stream would pass unread.
    names = path.split(".")
    for depth in range(len(names) + 1):
        module = model.get_submodule(".".join(names[:depth]))
        if (
            # torch.compile(module), or of its forward; module.compile(); generate, which compiles
            # decoding with a static cache on accelerators
            hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            or module._compiled_call_impl is not None
            or hasattr(module, "_compiled_call")
        ):
            raise UnreadableModelError(
                f"{_name(module)} is compiled, and compiled code skips taps: pass the model as it "
                "was before torch.compile (if generate compiled it: del model._compiled_call, "
                "torch._dynamo.reset(), and from then on disable_compile=True)"
            )


def _input_hook(tap: Tap, read: Read) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(tap, args[0] if args else kwargs["hidden_states"])

    _tap_hooks.add(hook)
    return hook


def _output_hook(tap: Tap, read: Read) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(tap, output if isinstance(output, Tensor) else output[0])

    _tap_hooks.add(hook)
    return hook


def _find_middles(model: nn.Module, layers: nn.ModuleList, taps: list[Tap]) -> dict[Tap, nn.Module]:
    if not taps:
        return {}
    try:
        with _set_aside(model):
            trace = ResidualTrace(model)
    except Exception as error:
        raise UnreadableModelError(
            f"resid_mid is looked for with a run on four tokens, in which {_name(model)} failed "
            f"({error}): use resid_pre or resid_post"
        ) from error
    middles = {}
    for tap in taps:
        found = trace.mid_reader(layers[tap.layer])
        if isinstance(found, str):
            raise UnreadableModelError(
                f"{_name(model)} has no {tap} to read, because {_name(layers[tap.layer])} {found}: "
                "use resid_pre or resid_post"
            )
        middles[tap] = found
    return middles


@contextmanager
def _set_aside(model: nn.Module) -> Iterator[None]:
    # Training mode would draw random numbers, and a monitor that is attached already must not see
    # the trace's tokens. All other hooks stay: the model may need them (sharding, offloading).
    training = [module for module in model.modules() if module.training]
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks) if t]
    hooks = [dict(table) for table in tables]
    try:
        model.eval()
        for table in tables:
            for key in [key for key, hook in table.items() if hook in _tap_hooks]:
                del table[key]
        yield
    finally:
        for table, before in zip(tables, hooks, strict=True):
            merged = {**before, **table}  # the old order, then what the model hooked meanwhile
            table.clear()
            table.update(merged)
        for module in training:
            module.training = True
