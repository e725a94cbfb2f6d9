"""Limits and habits of the service, as ``midstream serve --settings FILE`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from midstream.validation import named_faults
from midstream.yaml_text import read_mapping

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
HostName = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[A-Za-z0-9._-]+$")]

ANSWERED_HERE = frozenset(
    (
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "stream",
        "stream_options",
        "midstream",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "echo",
        "suffix",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "functions",
        "function_call",
        "audio",
        "modalities",
        "prediction",
        "store",
        "user",
    )
)
"""Fields of a request that no engine is asked for: they are read here, or change the answer's
shape into one that is not served."""


class SettingsError(ValueError):
    """Settings that cannot be obeyed; the message names each key at fault."""


class Settings(BaseModel):
    """Settings of the HTTP front.

    Attributes
    ----------
    max_body_bytes : int
        Of a request.
    max_messages, max_prompt_chars : int
        Of a chat; characters are those of all messages together, or ids of a prompt of ids.
    max_tokens, default_tokens : int
        What a request may ask for, and what it gets when it does not say.
    max_streams, max_streams_per_key : int
        Requests being answered at once; without keys only the first limit holds.
    max_connections : int
        Sockets open at once; further ones are closed at once.
    header_seconds, body_seconds : float
        Within which a request's headers, and then its body, must have come.
    start_seconds : float
        Within which the engine must have begun with a request; longer it does not wait.
    request_seconds : float
        Within which it must have ended.
    slow_reader_seconds : float
        How long a client may leave its socket full before it is cut.
    load_seconds : float
        Within which the model's process must serve.
    hang_seconds : float
        How long nothing may come from it while it has streams; longer than its longest step.
    annotations : bool
        Whether responses carry Azure's annotations when the request does not say.
    allowed_hosts : frozenset of str
        Names, besides addresses and localhost, under which a server without keys may be reached:
        its live page, and where it listens on loopback all of it.
    conversations : bool
        Whether the engine gates turns, so that requests may name their conversation.
    sent_on : frozenset of str
        Further fields of requests that the engine honours; it finds them in ``Ask.body``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_body_bytes: Count = 1 << 20
    max_messages: Count = 1024
    max_prompt_chars: Count = 1 << 18
    max_tokens: Count = 4096
    default_tokens: Count = 256
    max_streams: Count = 512
    max_streams_per_key: Count = 256
    max_connections: Count = 2048
    header_seconds: Seconds = 10.0
    body_seconds: Seconds = 10.0
    start_seconds: Seconds = 60.0
    request_seconds: Seconds = 600.0
    slow_reader_seconds: Seconds = 20.0
    load_seconds: Seconds = 1800.0
    hang_seconds: Seconds = 120.0
    annotations: bool = False
    allowed_hosts: frozenset[HostName] = frozenset()
    conversations: bool = False
    sent_on: frozenset[str] = frozenset()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file; what it does not say keeps its default.

        Raises
        ------
        SettingsError
        """
        content = read_mapping(path.read_text("utf-8"), str(path), SettingsError)
        for key in ("conversations", "sent_on"):
            if key in content:
                raise SettingsError(f"{path}: {key}: follows from the engine, leave it out")
        with named_faults(str(path), SettingsError):
            return cls.model_validate(content)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_tokens > self.max_tokens:
            raise ValueError(
                f"default_tokens ({self.default_tokens}) must not exceed max_tokens "
                f"({self.max_tokens})"
            )
        if clash := self.sent_on & ANSWERED_HERE:
            raise ValueError(f"sent_on: {sorted(clash)} cannot be left to the engine")
        return self
