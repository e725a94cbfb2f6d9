"""Types of the fields of requests: what is taken, and the schema that says so."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema


def _integral(value: Any) -> Any:
    """In JSON 3.0 is an integer, too."""
    return int(value) if type(value) is float and value.is_integer() else value


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("expected false")
    return value


Zero = Annotated[float, Field(ge=0, le=0)]
Integral = BeforeValidator(_integral)
Count = Annotated[int, Field(ge=1), Integral]
One = Annotated[int, Field(ge=1, le=1), Integral]
No = Annotated[
    bool, AfterValidator(_refuse_true), WithJsonSchema({"type": "boolean", "const": False})
]  # Literal[False] takes 0
Nothing = Annotated[list[Any], Field(max_length=0)]

MAX_STOPS = 4
_LARGEST_ID = (1 << 31) - 1
_STRINGS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}


def _joined(content: Any) -> str:
    """Text of a message: a string, or parts that are all text, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("expected a string, or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only parts of type 'text' are served")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part has 'type' and 'text', a string, and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt:
        ids = tuple(_integral(token) for token in prompt)
        if all(type(token) is int and 0 <= token <= _LARGEST_ID for token in ids):
            return ids
    raise ValueError("expected one text, or one list of token ids, that is not empty")


def _stops(stop: Any) -> tuple[str, ...]:
    several = [stop] if isinstance(stop, str) else stop
    if several is None:
        return ()
    if not isinstance(several, list) or not 1 <= len(several) <= MAX_STOPS:
        raise ValueError(f"expected a string, or a list of up to {MAX_STOPS}")
    if not all(isinstance(text, str) and text for text in several):
        raise ValueError("expected strings that are not empty")
    return tuple(several)


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(_joined),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
    ),
]
_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": _LARGEST_ID}
PromptText = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": _TOKEN_ID, "minItems": 1},
            ]
        }
    ),
]
Stops = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {**_STRINGS, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
