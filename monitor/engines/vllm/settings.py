"""vLLM: what the plugin is told, and what every one of its processes reads it from."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from midstream.bundle import Bundle

KEY = "midstream"
"""Key of ``--additional-config`` under which the settings stand."""

WORKER = "midstream.engines.vllm.worker.MonitoredWorker"
SCHEDULER = "midstream.engines.vllm.scheduler.MonitoredScheduler"
PROCESSOR = "midstream.engines.vllm.halting:HaltingProcessor"

ANY_VERSION = "MIDSTREAM_ANY_VLLM"
"""Environment variable: 1 runs on versions of vLLM that the plugin was not tried with."""

TIER = "midstream_tier"
"""Key of a request's ``vllm_xargs``: the tier it asks for."""


class UnsupportedEngineError(ValueError):
    """A way to run vLLM in which tokens would pass unwatched, or rows cannot be told apart."""


class SettingsError(ValueError):
    """The plugin's settings are missing or do not fit together."""


def settings(vllm_config: Any) -> dict[str, str]:
    """Return the plugin's part of ``--additional-config``.

    Raises
    ------
    SettingsError
        Where there is none.
    """
    extra = vllm_config.additional_config
    ours = extra.get(KEY) if isinstance(extra, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("bundle"), str):
        raise SettingsError(
            f"--additional-config names no bundle under {KEY!r}; start the server with "
            "`midstream vllm serve MODEL --bundle FOLDER`, or pass "
            f'--additional-config \'{{"{KEY}": {{"bundle": "FOLDER"}}}}\''
        )
    return ours


def bundle_of(vllm_config: Any) -> Bundle:
    """Load the bundle that the settings name; once per process.

    The bundle's hash goes into the settings, and with them into the key of vLLM's compile cache:
    code that was compiled for other taps is not loaded again.

    Raises
    ------
    SettingsError
        Where the folder holds another bundle than the hash in the settings.
    BundleError
        Where it holds no whole bundle.
    """
    ours = settings(vllm_config)
    bundle = _load(ours["bundle"])
    if ours.setdefault("hash", bundle.hash) != bundle.hash:
        raise SettingsError(
            f"the bundle in {ours['bundle']} has hash {bundle.hash}, the server was started for "
            f"{ours['hash']}: it was replaced meanwhile. Start the server again"
        )
    return bundle


def runs_any_version() -> bool:
    """Whether versions of vLLM that the plugin was not tried with are to be run all the same."""
    return os.environ.get(ANY_VERSION) == "1"


@cache
def _load(folder: str) -> Bundle:
    return Bundle.load(folder)
