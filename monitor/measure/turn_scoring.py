"""Every response of many conversations through the model once, to its turn's log-hazard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from midstream.bundle import Bundle
from midstream.learn.examples import Example
from midstream.learn.examples import Message as PromptMessage
from midstream.measure.conversations import Conversation
from midstream.measure.record import record
from midstream.measure.rejudge import rejudge
from midstream.turn_evidence import DETECT, log_hazard_of
from midstream.turn_history import ASSISTANT, content_of

Context = Literal["turn", "history"]

_BEFORE_ALL = ("system", "developer")


def turn_hazards(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    bundle: Bundle,
    *,
    context: Context = "history",
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float | None]]:
    """Log-hazard of every response, as `midstream.turn_evidence` would find it when serving.

    One forward pass per response, batched by length. A response without text has 0; one behind the
    end of the model's window None, since none of its tokens has a score.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
        Without a chat template, as with encoders, the model reads each response by itself.
    conversations : sequence of Conversation
    bundle : Bundle
        Made for the model. Its policy and its turn model do not matter.
    context : {"turn", "history"}
        What the model is given before a response: the system's messages and those since the last
        response, or all of them.
    batch_size : int
    progress : callable, optional
        Called as ``progress(responses done, responses in all)``.

    Returns
    -------
    list of list of float or None
        Nats, one per response of each conversation.
    """
    found: list[list[float | None]] = []
    examples: list[Example] = []
    places: list[tuple[int, int]] = []
    for number, conversation in enumerate(conversations):
        found.append([0.0] * len(conversation.responses))
        for turn, index in enumerate(conversation.responses):
            text = content_of(conversation.messages[index])
            if not text.strip():
                continue
            asked: Sequence[PromptMessage] = ()
            if tokenizer.chat_template is not None:
                asked = _prompt(conversation, index, context)
            examples.append(Example(id=f"{number}/{turn}", messages=tuple(asked), response=text))
            places.append((number, turn))
    if not examples:
        return found
    recording = record(model, tokenizer, examples, bundle, batch_size=batch_size, progress=progress)
    risk = rejudge(recording, bundle, policy=DETECT).risk
    begins, ends = recording.starts[:-1], recording.starts[1:]
    for (number, turn), begin, end, prompt in zip(
        places, begins, ends, recording.prompt_tokens, strict=True
    ):
        response = slice(begin + prompt, end)
        scored = np.isfinite(recording.logits[response]).any()
        found[number][turn] = log_hazard_of(float(np.nanmax(risk[response]))) if scored else None
    return found


def _prompt(conversation: Conversation, index: int, context: Context) -> list[PromptMessage]:
    before = conversation.messages[:index]
    if context == "turn":
        last = max((n for n, m in enumerate(before) if m["role"] == ASSISTANT), default=-1)
        general = [m for m in before[: last + 1] if m["role"] in _BEFORE_ALL]
        before = (*general, *before[last + 1 :])
    return [PromptMessage(role=m["role"], content=content_of(m)) for m in before]
