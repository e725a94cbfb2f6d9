"""transformers: the token ids of a prompt, as the model is to be fed them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from midstream.engines.hf.checks import UnsupportedGenerationError

Prompt = str | Sequence[Mapping[str, str]]


def encode(model: Any, tokenizer: Any, prompt: Prompt) -> Tensor:
    """Return the ids [1, T] of a prompt: text, or chat messages through the tokenizer's template.

    Raises
    ------
    UnsupportedGenerationError
        When there is no token in it.
    """
    empty = UnsupportedGenerationError("the prompt is empty; give at least one token")
    if not prompt:
        raise empty
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.shape[1] == 0:
        raise empty
    return torch.as_tensor(ids, dtype=torch.long, device=model.device)


def token_ids(model: Any, tokenizer: Any, prompt: Prompt | Sequence[int]) -> list[int]:
    """Return the ids of a prompt: text, chat messages, or ids already.

    Raises
    ------
    UnsupportedGenerationError
        When there is no token in it, for ids that the model does not have, and for a text without a
        tokenizer.
    """
    if len(prompt) == 0:
        raise UnsupportedGenerationError("the prompt is empty; give at least one token")
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        if tokenizer is None:
            raise UnsupportedGenerationError(
                "a prompt that is no list of ids needs the tokenizer; pass it to attach_batching"
            )
        return encode(model, tokenizer, cast(Prompt, prompt))[0].tolist()
    try:
        ids = [operator.index(cast(int, token)) for token in prompt]
    except TypeError as error:
        raise UnsupportedGenerationError(
            f"the prompt is neither a text, nor chat messages, nor token ids: {error}"
        ) from error
    size = model.config.get_text_config().vocab_size
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise UnsupportedGenerationError(
            f"the prompt has ids {wrong[:5]}, expected 0 to {size - 1}"
        )
    return ids
