"""transformers: which calls of ``generate`` can be watched, and a clear refusal of the others."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

_UNWATCHABLE = {
    "custom_generate": "replaces the decoding loop",
    "prefill_chunk_size": "splits the prompt",
    "token_healing": "changes the prompt",
    "inputs_embeds": "hides which tokens are fed",
}


class UnsupportedGenerationError(ValueError):
    """A way to generate in which a stream would pass unwatched, or rows cannot be told apart."""


def check_generation(model: Any, inputs: Any, options: dict[str, Any]) -> GenerationConfig:
    """Refuse what cannot be watched; return the generation config that is in force.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    inputs : int64 [B, tokens]
        The prompts.
    options : dict
        Keyword arguments of ``generate``.

    Raises
    ------
    UnsupportedGenerationError
        With the reason and the remedy.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 2:
        _refuse("generate needs input_ids [B, tokens] here", "pass the tokenizer's output")
    if inputs.shape[1] == 0:
        _refuse("the prompt is empty", "give at least one token, for instance the BOS token")
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    given = options.get("generation_config")
    if given is not None:
        config.update(**{k: v for k, v in given.to_dict().items() if v is not None})
    config.update(**options)
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        _refuse(
            f"{mode.value} moves streams between rows or feeds tokens that are thrown away, "
            "so a row has no history of its own",
            "use greedy search or sampling (num_beams=1)",
        )
    for option, reason in _UNWATCHABLE.items():
        given = options.get(option, getattr(config, option, None))
        if given is not None and given is not False:
            _refuse(f"{option} {reason}", "leave it out")
    if config.guidance_scale not in (None, 1):
        _refuse("guidance_scale runs the model on a second prompt", "leave it out")
    if config.cache_implementation == "paged":
        _refuse("cache_implementation='paged' decodes in another loop", "use another cache")
    if options.get("streamer") is not None:
        _refuse(
            "a streamer sees each token before it is judged",
            "use midstream.engines.hf.stream",
        )
    if config.eos_token_id is None:
        _refuse("no eos_token_id, which halted rows are given", "pass eos_token_id to generate")
    stops_early = options.get("stopping_criteria") or config.stop_strings
    if stops_early and config.pad_token_id not in (None, *end_tokens(config)):
        # A row that ended without an end token goes on with pads, which the model may also sample.
        _refuse(
            "stopping criteria end rows with a pad id that does not end a sequence, so the end of "
            "such a row cannot be seen",
            "pass pad_token_id=eos_token_id",
        )
    check_window(model, inputs.shape[1])
    return config


def end_tokens(config: GenerationConfig) -> list[int]:
    """Ids that end a sequence; the first is the one that halted rows are given."""
    eos: Any = config.eos_token_id
    return [eos] if isinstance(eos, int) else [int(token) for token in eos]


def set_option(options: dict[str, Any], name: str, value: Any) -> None:
    """Set a generation option: in a copy of the ``generation_config``, where one is given."""
    config = options.get("generation_config")
    if config is None:
        options[name] = value
        return
    options.pop(name, None)
    options["generation_config"] = config = copy.deepcopy(config)
    setattr(config, name, value)


def check_supported(model: Any) -> None:
    """Refuse a model that does not write.

    Raises
    ------
    UnsupportedGenerationError
    """
    if not hasattr(model, "generate"):
        _refuse(
            f"{type(model).__name__} has no generate",
            "load the checkpoint with its language-model head, or score given texts",
        )


def check_mask(mask: Tensor) -> None:
    """Refuse an attention mask [B, T] that is not padding on the left and then ones.

    Raises
    ------
    UnsupportedGenerationError
    """
    if mask.dim() != 2:
        _refuse(f"an attention mask of shape {list(mask.shape)}", "pass one of shape [B, tokens]")
    ones = mask.bool()
    if empty := (~ones.any(dim=1)).nonzero().flatten().tolist():
        _refuse(f"the prompts of rows {empty} are empty", "give each at least one token")
    if not bool(ones[:, -1].all()) or bool((ones[:, :-1] & ~ones[:, 1:]).any()):
        _refuse(
            "the prompts are masked elsewhere than at their left end, by the mask given or by pad "
            "ids inside them",
            "pad on the left, and pass the attention_mask",
        )


def check_unwatched(model: Any) -> None:
    """Refuse a model that has an attachment already: each would see the other's rows.

    Raises
    ------
    UnsupportedGenerationError
    """
    if "generate" in vars(model):
        _refuse(
            "the model is being watched already, or its generate was replaced",
            "leave the other attachment, stream or replacement first, or use a copy of the model",
        )


def check_window(model: Any, tokens: int) -> None:
    """Refuse a prompt that leaves no room in the model's window.

    Raises
    ------
    UnsupportedGenerationError
    """
    room = window(model)
    if room is not None and tokens >= room:
        _refuse(f"the prompt has {tokens} tokens, the model's window is {room}", "shorten it")


def window(model: Any) -> int | None:
    """Most tokens that the model's positions allow for; None where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _refuse(what: str, remedy: str) -> None:
    raise UnsupportedGenerationError(f"{what}; {remedy}")
