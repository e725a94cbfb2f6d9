"""Traces of agents: the calls an agent makes, one after another, and what is known of them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ToolCall(_Frozen):
    """A call as the agent wants it made.

    Attributes
    ----------
    tool : str
        Name of the tool.
    arguments : dict
        Parsed arguments; empty where the tool takes none.
    """

    tool: str = Field(min_length=1)
    arguments: dict[str, Any] = {}


class Step(_Frozen):
    """One step of an agent.

    Attributes
    ----------
    call : ToolCall, optional
        None where the agent only spoke.
    said : str
        What it thought or said beside the call.
    observed : str
        What the call gave back.
    """

    call: ToolCall | None = None
    said: str = ""
    observed: str = ""


class AgentTrace(_Frozen):
    """One task of an agent from its start.

    Attributes
    ----------
    id, category : str
        Traces of one category share a chain.
    task : str
        What the user asked for.
    steps : tuple of Step
        At least one.
    violates : bool, optional
        Trace-level label.
    violating_step : int, optional
        Index of the step that violates, where it is known.
    ended : bool
        False where the trace was cut off.
    """

    id: str
    category: str = ""
    task: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)
    violates: bool | None = None
    violating_step: int | None = None
    ended: bool = True

    @model_validator(mode="after")
    def _labels_agree(self) -> AgentTrace:
        if self.violating_step is not None:
            if not 0 <= self.violating_step < len(self.steps):
                raise ValueError(
                    f"violating_step: expected 0 to {len(self.steps) - 1}, "
                    f"got {self.violating_step}"
                )
            if not self.violates:
                raise ValueError("violating_step: given for a trace that is not said to violate")
        return self
