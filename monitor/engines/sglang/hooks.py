"""SGLang: the hook factories that ``--forward-hooks`` names, around one `Watch` per process.

SGLang calls ``factory(config)`` for each of them once the model is loaded. ``begin`` and ``end``
surround the decoder stack, the layers' hooks read the taps, and ``after_logits`` ends requests that
came in without what a watched request carries.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from midstream.bundle import Bundle, Fingerprint
from midstream.engines.ranks import Agreement
from midstream.engines.sglang.arguments import (
    UnsupportedEngineError,
    check_policy,
    check_server,
)
from midstream.engines.sglang.watch import Watch
from midstream.monitor import Monitor
from midstream.streams import StreamReport
from midstream.taps import Tap

_log = logging.getLogger(__name__)
_watch: Watch | None = None


def watch() -> Watch:
    """Return this process's watch.

    Raises
    ------
    UnsupportedEngineError
        Where the server was started without the hooks.
    """
    if _watch is None:
        raise UnsupportedEngineError(
            "a request asks to be watched and the server was started without the monitor's hooks; "
            "start it with the arguments of midstream.engines.sglang.server_arguments"
        )
    return _watch


def begin(config: dict[str, Any]) -> Callable[..., None]:
    """Hook before the decoder stack; the factory checks the server and builds the monitor."""
    global _watch
    args = _server_args()
    check_server(args)
    bundle = Bundle.load(config["bundle"])
    check_policy(bundle.policy)
    monitor = Monitor(bundle, slots=2 * args.max_running_requests, device=args.device)
    monitor.recognise_segments(_tokenizer(args) if bundle.policy.segments else None)
    agree = Agreement(monitor.slots, _ranks()) if args.tp_size > 1 else None
    _watch = Watch(monitor, config["stop_id"], report=_tell, agree=agree)
    checked = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal checked
        if not checked:
            check_model(module, bundle)
            checked = True
        watch().begin(_named(module, args, kwargs)["forward_batch"])

    return hook


def end(config: dict[str, Any]) -> Callable[..., None]:
    """Hook after the decoder stack, before any logits are computed."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch().end()

    return hook


def before_layer(config: dict[str, Any]) -> Callable[..., None]:
    """Hook for ``resid_pre``."""
    tap = Tap.parse(config["tap"])

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        watch().observe(tap, given["hidden_states"], given.get("residual"))

    return hook


def after_layer(config: dict[str, Any]) -> Callable[..., None]:
    """Hook for ``resid_post``: layers return the stream, or two parts of it, to be added."""
    tap = Tap.parse(config["tap"])

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden, residual = (output, None) if isinstance(output, Tensor) else output[:2]
        watch().observe(tap, hidden, residual)

    return hook


def after_logits(config: dict[str, Any]) -> Callable[..., None]:
    """Hook on the logits of a step, before they are sampled."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch().turn_away(output.next_token_logits)

    return hook


def check_model(decoder: nn.Module, bundle: Bundle) -> None:
    """Refuse another model than the bundle's; ``decoder`` is the module named ``model``.

    Raises
    ------
    WrongModelError
    """
    bundle.fingerprint.check(Fingerprint.of(_AsTransformers(decoder)))


class _AsTransformers(nn.Module):
    """What `Fingerprint.of` asks a transformers model for."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.config = decoder.config
        # Ranks hold rows one after the other; the last are padding.
        weight = decoder.embed_tokens.weight.detach()
        if len(weight) < self.config.vocab_size:
            weight = _gather(weight)
        self._table: nn.Embedding = nn.Embedding.from_pretrained(weight[: self.config.vocab_size])

    def get_input_embeddings(self) -> nn.Embedding:
        return self._table


def _gather(weight: Tensor) -> Tensor:
    import torch

    parts = [torch.empty_like(weight) for _ in range(torch.distributed.get_world_size(_ranks()))]
    torch.distributed.all_gather(parts, weight.contiguous(), group=_ranks())
    return torch.cat(parts)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call their names: models pass them by place, or by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _tell(report: StreamReport) -> None:
    _log.info("finished %s", report.model_dump_json(exclude={"trace"}))


def _tokenizer(args: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(args.tokenizer_path or args.model_path)


def _ranks() -> Any:
    from sglang.srt.distributed import get_tp_group

    return get_tp_group().device_group


def _server_args() -> Any:
    try:  # where newer versions keep it; the older accessor raises there
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        from sglang.srt.server_args import get_global_server_args as get_server_args
    return get_server_args()
