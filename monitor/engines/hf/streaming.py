"""transformers: one watched stream, as an iterator of events with the text that may leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from midstream.engines.hf.attachment import Attachment
from midstream.engines.hf.checks import (
    UnsupportedGenerationError,
    check_window,
    set_option,
    window,
)
from midstream.engines.hf.prompts import Prompt, encode
from midstream.engines.hf.releasing import ReaderGone, ReleasingProcessor, open_turn
from midstream.monitor import Monitor
from midstream.streams import Event
from midstream.turns import TurnGate


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    monitor: Monitor,
    *,
    max_new_tokens: int = 256,
    tier: str | None = None,
    enforce: bool = True,
    gate: TurnGate | None = None,
    conversation: str | None = None,
    **generate_options: Any,
) -> Iterator[Event]:
    """Generate a response and yield its events as they happen.

    ``released`` events carry the text that may leave, in order; a halted stream ends with
    ``halted`` and ``finished``, every other with ``finished``, whose ``report`` is the stream's.
    Where plain ``generate`` would stop at ``max_new_tokens`` the last token is fed once more, so
    that it is scored like all others; only a stopping criterion leaves its last token unscored.

    The model writes in a thread of its own, at most some events ahead of the reader. Closing the
    iterator stops it and frees its slot. A model and a monitor serve one stream at a time; a second
    one is refused.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    prompt : str or list of chat messages
    monitor : Monitor
        Needs one free slot.
    max_new_tokens : int
        Fewer where the model's window ends before.
    tier : str, optional
    enforce : bool
        False only observes: the text leaves as if every verdict were CONTINUE.
    gate : TurnGate, optional
        Of the monitor's bundle. The response, or the tail that its policy names, waits until the
        gate has passed it and its ledger knows of it; a ``verdict`` event says so. A response that
        is withheld ends with ``halted``, whose message is the gate's explanation. What has left
        before, where only the tail waits, is written down as the turn that it is, also when the
        reader closes the iterator or generation fails.
    conversation : str, optional
        Its id, with a gate; the prompt is its history, as chat messages, then.
    generate_options
        Passed on to ``model.generate``: do_sample, temperature, top_p, ... More logits processors
        come before the monitor's own.

    Yields
    ------
    Event

    Raises
    ------
    UnsupportedGenerationError
        For an empty prompt, or options that cannot be watched.
    WrongModelError
        When the monitor's bundle was made for another model.
    MonitorInUseError
        When the monitor serves another stream.
    HistoryError
        With a gate, for messages that are no history.
    """
    if max_new_tokens < 1:
        raise UnsupportedGenerationError(
            f"max_new_tokens: expected at least 1, got {max_new_tokens}"
        )
    input_ids = encode(model, tokenizer, prompt)
    check_window(model, input_ids.shape[1])
    room = window(model)
    if room is not None:
        max_new_tokens = min(max_new_tokens, room - input_ids.shape[1])
    gated = open_turn(gate, conversation, prompt, monitor, input_ids.shape[1], max_new_tokens)
    prior = gated.turn.token_prior if gated else None
    attachment = Attachment(
        monitor,
        model,
        tokenizer,
        tier=tier,
        enforce=enforce,
        prior=None if prior is None else prior.tolist(),
    )
    releasing = ReleasingProcessor(
        attachment, tokenizer, input_ids.shape[1] + max_new_tokens, gated
    )
    generate_options["logits_processor"] = [
        *generate_options.get("logits_processor", ()),
        releasing,
    ]
    # one step more than asked for, in which the last token is fed and scored
    set_option(generate_options, "max_new_tokens", max_new_tokens + 1)

    def generate() -> None:
        try:
            with attachment:
                output = model.generate(
                    input_ids, attention_mask=torch.ones_like(input_ids), **generate_options
                )
            releasing.finish(output if isinstance(output, Tensor) else output.sequences)
        except ReaderGone:
            pass
        except BaseException as error:  # the reader's thread raises it
            with suppress(ReaderGone):
                releasing.fail(error)

    worker = threading.Thread(target=generate, name="midstream-generate", daemon=True)
    worker.start()
    given: list[str] = []
    try:
        while (item := releasing.events.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            given.append(item.text or "")
            yield item
    finally:
        releasing.reader_gone.set()
        worker.join()
        releasing.abandon("".join(given))
