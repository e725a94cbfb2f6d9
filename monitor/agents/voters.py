"""Who is asked when rules alone do not decide: a forecast of the risk, a sentence encoder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from midstream.agents.forecast import FLAG_AT, AgentModel, AgentMonitor
from midstream.agents.rules import Rules
from midstream.agents.state import Level, State
from midstream.agents.steps import Step, ToolCall

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to embeddings [n, d]."""

_LONGEST_TEXT = 2000  # characters an encoder is shown: more than its 256 tokens


class Stance(Enum):
    """How a voter stands to a call."""

    FOR = 1
    ABSTAINS = 0
    AGAINST = -1


class Vote(NamedTuple):
    """A voter's stance, and why."""

    voter: str
    stance: Stance
    reason: str


class Situation(NamedTuple):
    """What voters are shown.

    Attributes
    ----------
    task, role : str
        What the user asked for; the role in words.
    history : tuple of Step
        Calls that ran before.
    call : ToolCall
    action : str
        The call in words.
    """

    task: str
    role: str
    history: tuple[Step, ...]
    call: ToolCall
    action: str


class Voter(Protocol):
    """One opinion about a call; a function of the situation alone."""

    name: str

    def vote(self, situation: Situation) -> Vote:
        """Say how it stands to the call, and why."""
        ...


class ForecastVoter:
    """Against a call after which a violation is likely.

    Parameters
    ----------
    forecast : callable
        Steps so far, the call in question last, to the probability of violation within some steps.
    threshold : float
        Against from here on; for below half of it; abstains between.
    """

    name = "forecast"

    def __init__(
        self,
        forecast: Callable[[Sequence[Step]], float],
        threshold: float = FLAG_AT,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected above 0 and at most 1, got {threshold}")
        self._forecast, self._threshold = forecast, threshold

    def vote(self, situation: Situation) -> Vote:
        """Forecast from the history with this call appended."""
        risk = float(self._forecast((*situation.history, Step(call=situation.call))))
        if not 0 <= risk <= 1:  # NaN, too
            raise ValueError(f"forecast: expected a probability, got {risk}")
        if risk >= self._threshold:
            stance = Stance.AGAINST
        else:
            stance = Stance.FOR if risk < self._threshold / 2 else Stance.ABSTAINS
        return Vote(self.name, stance, f"violation ahead with probability {risk:.2f}")


def chain_forecast(
    rules: Rules, model: AgentModel, category: str = ""
) -> Callable[[Sequence[Step]], float]:
    """P(violated within 5 steps) by SafetyDrift's chain, for `ForecastVoter`.

    The call in question has no observation yet, so its level is that of its tool and arguments.
    A function of its input alone. It remembers what each step is as long as somebody holds the
    step, so that a decision reads what is new and then takes O(steps) look-ups.

    Raises
    ------
    AgentError
        For a model that was fitted with other rules.
    """
    monitor = AgentMonitor(rules, model, category)
    known: dict[int, State] = {}

    def alone(step: Step) -> State:
        state = known.get(id(step))
        if state is None:
            state = known[id(step)] = rules.read(step)[0]
            weakref.finalize(step, known.pop, id(step), None).atexit = False
        return state

    def forecast(steps: Sequence[Step]) -> float:
        state, violated = State(), False
        for step in steps:
            state = state.after(alone(step))
            violated = violated or state.level is Level.VIOLATED
        return monitor.risk(Level.VIOLATED if violated else state.level)

    return forecast


class EncoderVoter:
    """Compares a call with task and role in a sentence encoder's space.

    Of the action a, the task t and the role r (the task where it is empty), ``irs = cos(r, a)`` and
    ``svrf = (cos(r, t) + cos(t, a)) / 2``: ILION's quantities, with the role in words in place of
    its identity vector (methods.md section 9).

    Parameters
    ----------
    encoder : Encoder
    for_at : float
        For a call when both quantities reach this.
    against_below : float
        Against it when the cosine of task and action is below this.
    """

    name = "encoder"

    def __init__(self, encoder: Encoder, for_at: float = 0.45, against_below: float = 0.05) -> None:
        if not -1 <= against_below <= for_at <= 1:
            raise ValueError(
                f"against_below ({against_below}) must not exceed for_at ({for_at}), and both are "
                "cosines"
            )
        self._for_at, self._against_below = for_at, against_below

        def unit(text: str) -> NDArray[np.float64]:
            found = np.asarray(encoder([text]), dtype=np.float64)
            if found.ndim != 2 or len(found) != 1 or not np.isfinite(found).all():
                raise ValueError(f"encoder: expected one finite row, got shape {found.shape}")
            norm = float(np.linalg.norm(found))
            return np.asarray(found[0] / norm if norm > 0 else found[0])

        self._unit = lru_cache(maxsize=256)(unit)

    def vote(self, situation: Situation) -> Vote:
        """Encode the action; task and role are remembered."""
        if not situation.task:
            return Vote(self.name, Stance.ABSTAINS, "no task to compare with")
        action = self._unit(situation.action[:_LONGEST_TEXT])
        task = self._unit(situation.task[:_LONGEST_TEXT])
        role = self._unit((situation.role or situation.task)[:_LONGEST_TEXT])
        to_task = float(task @ action)
        irs, svrf = float(role @ action), (float(role @ task) + to_task) / 2
        if to_task < self._against_below:
            stance = Stance.AGAINST
        else:
            stance = Stance.FOR if min(irs, svrf) >= self._for_at else Stance.ABSTAINS
        return Vote(self.name, stance, f"task {to_task:.2f}, irs {irs:.2f}, svrf {svrf:.2f}")


def sentence_encoder(folder: Path) -> Encoder:
    """Load a BERT-like sentence encoder, such as all-MiniLM-L6-v2: mean of the last layer's tokens.

    Parameters
    ----------
    folder : Path
        With the model, as transformers saves it. Nothing is downloaded.

    Raises
    ------
    OSError
        For a folder without a model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        rows = tokenizer(
            list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**rows).last_hidden_state
            mask = rows["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            return np.asarray(torch.nn.functional.normalize(mean).numpy(), dtype=np.float32)

    return encode
