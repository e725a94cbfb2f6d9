"""transformers: a model and its tokenizer from a folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class ModelLoadError(ValueError):
    """A folder or id from which no model can be loaded; says why."""


def load(path: str | Path) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its tokenizer.

    A checkpoint whose architecture has a language-model head is loaded with it; any other, an
    encoder for instance, as its body.

    Parameters
    ----------
    path : str or Path
        A folder, or an id that transformers resolves through its cache or the hub.

    Raises
    ------
    ModelLoadError
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path)
        generates = any(
            "CausalLM" in name or "LMHead" in name for name in config.architectures or ()
        )
        model = (AutoModelForCausalLM if generates else AutoModel).from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelLoadError(
            f"no model at {str(path)!r}: {reason}; give a folder with config.json and weights"
        ) from error
    return model.eval(), tokenizer
