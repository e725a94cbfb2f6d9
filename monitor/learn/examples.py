"""A labelled text, whatever its labels speak of: characters, sentences, the response, the prompt.

An `Example` is one thing to be fed to a model once. Files become examples in
`midstream.learn.readers`, examples become tokens with labels in `midstream.learn.align`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Hazard = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Strict):
    """One chat message before the response."""

    role: Annotated[str, Field(min_length=1)]
    content: str


class Span(_Strict):
    """Characters ``[start, end)`` of the response that show a hazard."""

    start: Annotated[int, Field(ge=0)]
    end: int
    hazard: Hazard

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"span {self.start}:{self.end} is empty; leave it out")
        return self


class Contrast(_Strict):
    """Place of an example in a contrast pair (CCS), or in a pair of pairs (PA-CCS).

    Attributes
    ----------
    pair : str
        Shared by the two or four examples that belong together.
    negated : bool
        Whether the statement is the opposite one, not-A.
    answer : bool
        Whether the text affirms its statement ("yes") or denies it ("no").
    """

    pair: Annotated[str, Field(min_length=1)]
    negated: bool = False
    answer: bool


class Example(_Strict):
    """A text with what is known about it.

    Attributes
    ----------
    id : str
        Unique in its data set.
    group : str, optional
        Examples of one group never stand on both sides of a split; the prompt's text when not
        given, and the id where there is no prompt.
    messages : tuple of Message
        The conversation before the response; empty for a plain text.
    response : str
        The text whose tokens are labelled. Empty when only the prompt is.
    spans : tuple of Span, optional
        Every part of the response that shows a hazard; None where that is not known.
    labels : mapping of hazard to bool
        Of the response as a whole. Where ``spans`` are given it may be left out: a hazard with a
        span is in the response, one without is not.
    prompt_labels : mapping of hazard to bool
        Of the conversation before the response.
    contrast : Contrast, optional
    columns : mapping of str to str
        Anything to break figures down by, such as severity, sophistication or source.
    """

    id: Annotated[str, Field(min_length=1)]
    group: str | None = None
    messages: tuple[Message, ...] = ()
    response: str = ""
    spans: tuple[Span, ...] | None = None
    labels: dict[Hazard, bool] = {}
    prompt_labels: dict[Hazard, bool] = {}
    contrast: Contrast | None = None
    columns: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.messages and not self.response:
            raise ValueError(f"example {self.id!r}: neither messages nor a response")
        for span in self.spans or ():
            if span.end > len(self.response):
                raise ValueError(
                    f"example {self.id!r}: span {span.start}:{span.end} ends after the response, "
                    f"which has {len(self.response)} characters"
                )
            if self.labels.get(span.hazard) is False:
                raise ValueError(
                    f"example {self.id!r}: a span shows {span.hazard!r}, the label of the response "
                    "says that it is not there"
                )
        return self


def conversation_of(example: Example) -> str:
    """Text of the conversation before the response; empty where only the system has spoken."""
    if all(message.role == "system" for message in example.messages):
        return ""
    return "\n".join(f"{message.role}: {message.content}" for message in example.messages)


def group_of(example: Example) -> str:
    """Group of an example: as given, else the text of its conversation, else its id."""
    return example.group or conversation_of(example) or example.id


Level = Literal["token", "response", "prompt"]
