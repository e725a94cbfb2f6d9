"""Requests as OpenAI's API has them, as far as they are served; all else is refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from midstream.policy import TierName
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.request_fields import (
    Content,
    Count,
    Integral,
    No,
    Nothing,
    One,
    PromptText,
    Stops,
    Zero,
)
from midstream.serve.settings import Settings


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class Message(_Strict):
    """One message of a chat. ``developer`` is another name of ``system``, as at OpenAI."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(_Strict):
    """``include_usage`` adds a last chunk with the counts; a whole response always has them."""

    include_usage: bool | None = None


class Midstream(_Strict):
    """What a request may say to the monitor.

    Attributes
    ----------
    tier : str, optional
        Strictness; a looser one than the server allows is refused.
    conversation : str, optional
        What the turn gate knows the conversation by, where the server has one.
    annotations : bool, optional
        Azure's annotations.
    """

    tier: TierName | None = None
    conversation: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    annotations: bool | None = None


class PlainText(_Strict):
    """The only format served."""

    type: Literal["text"]


# Parameters of OpenAI's API that are not served are declared with the values that ask for nothing,
# since many clients send those. Any fault in one of them is `unsupported_parameter`.
class _Unserved(_Strict):
    n: One | None = None
    seed: None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class _UnservedOfChat(_Strict):
    logprobs: No | None = None
    top_logprobs: None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none"] | None = None
    response_format: PlainText | None = None
    audio: None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    prediction: None = None
    reasoning_effort: None = None
    store: No | None = None
    web_search_options: None = None


class _UnservedOfText(_Strict):
    best_of: One | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: None = None


class _Request(_Unserved):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20), Integral] | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    midstream: Midstream | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @property
    def options(self) -> Midstream:
        """What it says to the monitor."""
        return self.midstream or Midstream()

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def annotates(self, settings: Settings) -> bool:
        """Whether the response carries Azure's annotations."""
        asked = self.options.annotations
        return settings.annotations if asked is None else asked

    def _limit(self) -> int | None:
        return self.max_tokens

    def _asked(self, settings: Settings) -> dict[str, Any]:
        limit = self._limit()
        if limit is not None and limit > settings.max_tokens:
            raise _bad("max_tokens", f"at most {settings.max_tokens} are served")
        if self.options.conversation is not None and not settings.conversations:
            raise unsupported("midstream.conversation", "this server has no turn gate")
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "model": self.model,
            "max_tokens": settings.default_tokens if limit is None else limit,
            "tier": self.options.tier,
            "sampling": {name: value for name, value in sampling.items() if value is not None},
            "conversation": self.options.conversation,
        }


class ChatRequest(_Request, _UnservedOfChat):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    def _limit(self) -> int | None:
        # Both say "at most", so that the smaller one honours both.
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(given, default=None)

    def ask(self, stream: str, client: str, body: Mapping[str, Any], settings: Settings) -> Ask:
        """What the engine is asked for; raises `ApiError` where a limit is passed."""
        if len(self.messages) > settings.max_messages:
            raise _bad("messages", f"at most {settings.max_messages} are served")
        if sum(len(m.content) for m in self.messages) > settings.max_prompt_chars:
            raise _too_long("messages", settings)
        messages = tuple(
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in self.messages
        )
        return Ask(
            stream=stream,
            messages=messages,
            prompt=None,
            client=client,
            body=body,
            **self._asked(settings),
        )


class CompletionRequest(_Request, _UnservedOfText):
    """Body of ``/v1/completions``."""

    prompt: PromptText

    def ask(self, stream: str, client: str, body: Mapping[str, Any], settings: Settings) -> Ask:
        """What the engine is asked for; raises `ApiError` where a limit is passed."""
        if len(self.prompt) > settings.max_prompt_chars:
            raise _too_long("prompt", settings)
        return Ask(
            stream=stream,
            messages=None,
            prompt=self.prompt,
            client=client,
            body=body,
            **self._asked(settings),
        )


UNSERVED = frozenset(
    {*_Unserved.model_fields, *_UnservedOfChat.model_fields, *_UnservedOfText.model_fields}
)

R = TypeVar("R", bound=BaseModel)


def read_json(raw: bytes) -> dict[str, Any]:
    """Body as an object; UTF-8 and JSON by the letter."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError:  # its message quotes the body
        raise ApiError(
            400, "the body is not valid JSON in UTF-8; send one JSON object", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is JSON, but not an object; send one", code="invalid_json")
    return body


def parse(kind: type[R], body: Mapping[str, Any], settings: Settings) -> R:
    """Check a request, but for the fields that the engine answers for.

    Raises
    ------
    ApiError
        Naming the first field at fault.
    """
    try:
        return kind.model_validate({k: v for k, v in body.items() if k not in settings.sent_on})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise _refusal(fault["type"], fault["loc"], fault["msg"]) from None


def _refusal(kind: str, where: tuple[int | str, ...], message: str) -> ApiError:
    param = ""
    for part in where:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if kind == "extra_forbidden" and where[0] not in UNSERVED:
        # The name comes from the client: short, and of plain characters.
        return unsupported(ascii(param)[1:-1][:100], "this server does not know it")
    if where[0] in UNSERVED:
        return unsupported(str(where[0]), "this server does not serve it")
    if kind == "missing":
        return ApiError(400, f"{param}: it is missing", code="missing_parameter", param=param)
    text = message.removeprefix("Value error, ")
    return _bad(param, text[:1].lower() + text[1:])


def unsupported(param: str, why: str) -> ApiError:
    """A parameter that cannot be honoured, and so is not ignored either."""
    message = f"{param}: {why}; leave it out"
    return ApiError(400, message, code="unsupported_parameter", param=param)


def _bad(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", code="invalid_value", param=param)


def _too_long(param: str, settings: Settings) -> ApiError:
    return ApiError(
        400,
        f"{param}: too long; at most {settings.max_prompt_chars} characters or ids are read",
        code="context_length_exceeded",
        param=param,
    )
