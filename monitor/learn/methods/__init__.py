"""Ways to train a read-out, one module each behind the interface in `.method`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midstream.learn.methods.method import Method

METHODS: dict[str, tuple[str, str]] = {
    "logistic": ("logistic", "Logistic"),
    "logistic-joint": ("logistic", "JointLogistic"),
    "mass-mean": ("mass_mean", "MassMean"),
    "mass-mean-iid": ("mass_mean", "MassMeanIID"),
    "lda": ("lda", "LDA"),
    "ccs": ("ccs", "CCS"),
    "pa-ccs": ("ccs", "PolarityAwareCCS"),
    "latent-guard": ("latent_guard", "LatentGuard"),
    "harc": ("harc", "HARC"),
    "scm": ("scm", "SCM"),
    "span-max": ("span_max", "SpanMax"),
    "windowed": ("windowed", "Windowed"),
    "attention": ("attention", "Attention"),
    "rolling-max": ("attention", "RollingMax"),
}
"""Module and class of each method by its name on the command line."""


def method_class(name: str) -> type[Method]:
    """Import the method of this name and return its class.

    Raises
    ------
    ValueError
        When there is none of this name; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    module, attribute = METHODS[name]
    found: type[Method] = getattr(
        importlib.import_module(f"midstream.learn.methods.{module}"), attribute
    )
    return found
