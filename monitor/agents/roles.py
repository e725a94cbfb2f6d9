"""What a role may use: tools, their arguments, places. As stored in ``gate.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

EFFECTS = ("read", "write", "delete", "run", "send", "spend", "grant", "unknown")
"""What a call may do. ``unknown`` is for tools whose name and rules say nothing."""


class Strict(BaseModel):
    """Refuses keys that it does not know; cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):  # YAML's off is not 0
        raise ValueError("expected a number, not a truth value")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
Size = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]
Names = tuple[Annotated[str, Field(min_length=1)], ...]
Effect = Literal["read", "write", "delete", "run", "send", "spend", "grant", "unknown"]


class ArgumentLimit(Strict):
    """What one argument of a tool may be; what is not given is not limited.

    Attributes
    ----------
    type : str, optional
        A JSON type. ``number`` takes integers, too; ``integer`` takes no truth value.
    required : bool
    one_of : list, optional
        The only values.
    minimum, maximum : float, optional
        Of a number.
    max_length : int, optional
        Characters of a string, values of an array, keys of an object.
    like : list of str, optional
        Patterns with ``*``, ``?`` and ``[...]``, as file names have; one must match the whole.
    holds : {"host", "path", "recipient"}, optional
        The whole value is to be read as one, even where it does not look like one.
    """

    type: Literal["string", "number", "integer", "boolean", "array", "object", "null"] | None = None
    required: bool = False
    one_of: tuple[str | int | float | bool | None, ...] | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    max_length: Count | None = None
    like: Names | None = None
    holds: Literal["host", "path", "recipient"] | None = None


class ToolScope(Strict):
    """How a role may use a tool.

    Attributes
    ----------
    effects : list of effect names, optional
        What the tool does; guessed from its name when not given.
    calls : int, optional
        Calls of it per task.
    arguments : mapping of argument name to ArgumentLimit
    other_arguments : bool
        Whether there may be arguments beside those.
    """

    effects: tuple[Effect, ...] | None = None
    calls: Count | None = None
    arguments: dict[str, ArgumentLimit] = {}
    other_arguments: bool = True


class Role(Strict):
    """What an agent in this role may do.

    Attributes
    ----------
    tools : mapping of tool name, or pattern with ``*``, to ToolScope
        The first that fits a call's tool counts. A tool that none fits is out of scope.
    about : str
        The role in words: trusted text, and what an encoder compares with.
    hosts, recipients : list of patterns with ``*``, optional
        The only ones that may occur in arguments; any when not given.
    paths : list of str, optional
        Folders; every path in the arguments must lie in one of them.
    calls : int, optional
        Calls per task, of all tools together.
    """

    tools: Annotated[dict[str, ToolScope], Field(min_length=1)]
    about: str = ""
    hosts: Names | None = None
    recipients: Names | None = None
    paths: Names | None = None
    calls: Count | None = None

    @model_validator(mode="after")
    def _paths_absolute(self) -> Role:
        for path in self.paths or ():
            if not path.startswith(("/", "~")):
                raise ValueError(f"paths: expected a path from / or ~, got {path!r}")
        return self
