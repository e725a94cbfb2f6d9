"""``midstream vllm serve``: vLLM's own server, with the monitor in it."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from midstream.commands.options import load_bundle

_OURS = ("--worker-cls", "--scheduler-cls", "--logits-processors")
_CONFIG = "--additional-config"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What `vllm serve` takes: a folder or a hub id.")],
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle made for the model.")],
) -> None:
    """Start `vllm serve MODEL` with the monitor; all other options go to vLLM."""
    from midstream.engines.vllm.settings import SettingsError

    if find_spec("vllm") is None:
        raise SettingsError("vLLM is not installed here; install it beside midstream")
    arguments = serve_arguments(model, bundle, context.args)
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments])


def serve_arguments(model: str, bundle: Path, rest: list[str]) -> list[str]:
    """Return the arguments of ``vllm`` that start a monitored server.

    Raises
    ------
    SettingsError
        Where ``rest`` names a seam that the monitor needs, or a config that cannot be extended, and
        where the environment leaves the plugin out.
    BundleError
        Where there is no whole bundle.
    """
    from midstream.engines.vllm.settings import (
        KEY,
        PROCESSOR,
        SCHEDULER,
        WORKER,
        SettingsError,
    )

    for option in _OURS:
        if any(_names(argument, option) for argument in rest):
            raise SettingsError(
                f"{option} is given: the monitor needs that seam itself. Leave it out, or start "
                "`vllm serve` by hand as docs/vllm.md shows"
            )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and KEY not in plugins.split(","):
        raise SettingsError(
            f"VLLM_PLUGINS={plugins} leaves midstream's plugin out, so clients would not be told "
            "of a halt; unset it, or name midstream in it"
        )
    config, rest = _take_config(rest)
    folder = bundle.resolve()
    config[KEY] = {"bundle": str(folder), "hash": load_bundle(folder).hash}
    seams = zip(_OURS, (WORKER, SCHEDULER, PROCESSOR), strict=True)
    ours = [part for seam in seams for part in seam]
    return ["serve", model, *ours, _CONFIG, json.dumps(config), *rest]


def _names(argument: str, option: str) -> bool:
    return argument.partition("=")[0].replace("_", "-") == option


def _take_config(rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split the user's own ``--additional-config`` off."""
    from midstream.engines.vllm.settings import SettingsError

    for at, argument in enumerate(rest):
        if not _names(argument, _CONFIG):
            continue
        value, after = argument.partition("=")[2], at + 1
        if not value:
            value, after = rest[at + 1] if at + 1 < len(rest) else "", at + 2
        try:
            config = json.loads(value)
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise SettingsError(
                f"{_CONFIG}: expected a JSON object to put the monitor's settings into, "
                f"got {value!r}"
            )
        return config, rest[:at] + rest[after:]
    return {}, rest
