"""What this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from midstream.kernels import ops

_PACKAGES = ("midstream", "torch", "transformers", "triton", "scikit-learn", "matplotlib")


def facts() -> dict[str, Any]:
    """Versions, backends with reasons, and how the extension was built. Never raises."""
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "backends": {
            name: {"available": found.available, "reason": found.reason}
            for name, found in ops.capabilities().items()
        },
        "build": _build(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build() -> str:
    try:
        from midstream.kernels import _build_info
    except ImportError:
        return "not installed: sources on the path"
    if not _build_info.CPU_EXTENSION:
        return f"nothing: {_build_info.REASON}"
    return ", ".join(filter(None, (_build_info.COMPILER, _build_info.CUDA_COMPILER)))
