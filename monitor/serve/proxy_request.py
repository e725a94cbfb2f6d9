"""What a client may ask a proxy for, and what of it the upstream is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError

SENT_ON = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "metadata",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "verbosity",
    }
)
"""Fields of requests that only the upstream reads: ``sent_on`` of the front's settings."""

# What would make an answer that is not one text, and the values that ask for nothing.
_ONE = (None, 1)
_NOTHING: tuple[Any, ...] = (None, False, [], "", "none")
_UNJUDGEABLE: Mapping[str, tuple[Any, ...]] = {
    "n": _ONE,
    "best_of": _ONE,
    "tools": _NOTHING,
    "functions": _NOTHING,
    "logprobs": _NOTHING,
    "top_logprobs": _NOTHING,
    "audio": _NOTHING,
    "modalities": (None, ["text"]),
    "echo": _NOTHING,
    "suffix": _NOTHING,
    "prediction": _NOTHING,
}
_OURS = ("midstream", "stream", "stream_options", "n", "best_of")


def check_judgeable(ask: Ask) -> None:
    """Refuse what the upstream would answer with more, or other, than one text.

    Raises
    ------
    ApiError
    """
    for name, harmless in _UNJUDGEABLE.items():
        value = ask.body.get(name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
            raise ApiError(
                400,
                f"{name}: this server cannot judge what it asks for; leave it out",
                code="unsupported_parameter",
                param=name,
            )
    if ask.messages is None and not isinstance(ask.prompt, str):
        raise ApiError(
            400,
            "prompt: ids mean different tokens to the upstream and to the model that watches it; "
            "send text",
            code="unsupported_parameter",
            param="prompt",
        )


def upstream_body(ask: Ask, model: str) -> dict[str, Any]:
    """What the upstream is asked: all that the client asked for but what would defeat the monitor.

    Always a stream, and at most ``ask.max_tokens``.
    """
    body = {**ask.sampling, **ask.body}
    if ask.messages is not None:
        body.setdefault("messages", list(ask.messages))
    else:
        body.setdefault("prompt", ask.prompt)
    for name in _OURS:
        body.pop(name, None)
    limits = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name)]
    for name in limits or ["max_tokens"]:
        body[name] = ask.max_tokens
    return {**body, "model": model, "stream": True}
