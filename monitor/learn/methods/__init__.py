"""Ways to train a read-out, one module each behind the interface in `.method`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midstream.learn.methods.method import Method
    from midstream.learn.tokens import Tokens

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


def methods_for(names: Sequence[str], tokens: Tokens, hazard: str) -> list[Method]:
    """Build methods with the papers' settings, for the labels there are.

    One that can learn from any level learns from the finest that the responses have, tokens or
    whole responses, and where prompts have labels once more from those.

    Raises
    ------
    ValueError, TrainingDataError
        For a method or a hazard that is not there.
    """
    column = tokens.column(hazard)
    levels = ["token" if (tokens.labels[:, column] == 1).any() else "response"]
    if (tokens.prompt_labels[:, column] >= 0).any():
        levels.append("prompt")
    found: list[Method] = []
    for name in names:
        made: Any = method_class(name)
        if "level" in {field.name for field in dataclasses.fields(made)}:
            found += [made(level=level) for level in levels]
        else:
            found.append(made())
    return found
