"""transformers: the prompt of a text that somebody else writes, as the watching model gets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jinja2 import TemplateError

from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.prompts import Prompt


class PromptError(UnsupportedGenerationError):
    """A prompt that the watching model cannot be given."""


class PromptLengthError(PromptError):
    """A prompt that leaves no room in the watching model's window."""


def encode_prompt(
    model: Any, tokenizer: Any, prompt: Prompt | Sequence[int], window: int
) -> tuple[str, list[int]]:
    """Give the prompt's text, as far as it is one, and its ids.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    prompt : str, chat messages, or sequence of int
    window : int
        Tokens of prompt and text together.

    Raises
    ------
    PromptError
        For a prompt that is empty, too long, or that the chat template refuses.
    """
    text, ids = _encoded(model, tokenizer, prompt)
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    if len(ids) >= window:
        raise PromptLengthError(
            f"the prompt has {len(ids)} tokens, the watching model's window is {window}; shorten it"
        )
    return text, ids


def _encoded(model: Any, tokenizer: Any, prompt: Prompt | Sequence[int]) -> tuple[str, list[int]]:
    if not prompt:
        return "", []
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt)["input_ids"]
    if isinstance(prompt[0], int):
        ids = cast(list[int], list(prompt))
        size = model.config.get_text_config().vocab_size
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise PromptError(f"the prompt has ids {wrong[:5]}, expected 0 to {size - 1}")
        return "", ids
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=False
        )
    except (ValueError, TypeError, TemplateError) as error:
        raise PromptError(
            f"the watching model's chat template does not take these messages: {error}"
        ) from error
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]
