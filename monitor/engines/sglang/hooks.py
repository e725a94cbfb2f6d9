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
    _watch = Watch(monitor, config["stop_id"], report=_tell)
    checked = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal checked
        if not checked:
            bundle.fingerprint.check(Fingerprint.of(_AsTransformers(module)))
            checked = True
        watch().begin(_named(module, args, kwargs)["forward_batch"])

    return hook


def end(config: dict[str, Any]) -> Callable[..., None]:
    """Hook after the decoder stack, before any logits are computed."""
    return lambda module, args, output: watch().end()


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
    return lambda module, args, output: watch().turn_away(output.next_token_logits)


class _AsTransformers(nn.Module):
    """What `Fingerprint.of` asks a transformers model for, of the module named ``model``."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.config = decoder.config
        weight = decoder.embed_tokens.weight.detach()[: self.config.vocab_size]  # then padding
        self._table: nn.Embedding = nn.Embedding.from_pretrained(weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self._table


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call their names: models pass them by place, or by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _tell(report: StreamReport) -> None:
    _log.info("finished %s", report.model_dump_json(exclude={"trace"}))


def _server_args() -> Any:
    try:  # where newer versions keep it; the older accessor raises there
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        from sglang.srt.server_args import get_global_server_args as get_server_args
    return get_server_args()
