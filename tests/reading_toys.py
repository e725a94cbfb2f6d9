"""A worker that reads along with the toy model, and has words that it cannot bear.

It halts at ``bad``, fails at ``w18``, and takes its time over ``w19``.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

import toy

from midstream.engines.hf.forced import CHUNK
from midstream.monitor import Monitor
from midstream.serve.channel import Channel
from midstream.serve.forced_worker import Reading, answer
from midstream.serve.messages import Plan
from midstream.serve.worker import run

WINDOW = 4096


class _Touchy(Reading):
    def _forward(self, batch: Any, taken: Any) -> None:
        words = {piece.text.strip() for pieces in taken for piece in pieces}
        if "w18" in words:
            raise RuntimeError("of the model's insides")
        if "w19" in words:
            time.sleep(0.2)
        super()._forward(batch, taken)


def main(channel: Channel, plan: Plan) -> None:
    run(channel, plan, _build, answer)


def _build(channel: Channel, plan: Plan) -> Reading:
    model = toy.new_model(max_position_embeddings=WINDOW)
    monitor = toy.monitor(model, slots=plan.slots, trace=CHUNK)
    return _Touchy(channel, monitor, model, toy.tokenizer(), window=WINDOW, tier=plan.tier)


def main_of_bundle(channel: Channel, plan: Plan) -> None:
    """As `main`, with the bundle that the server gives, and the toy's own window."""

    def build(channel: Channel, plan: Plan) -> Reading:
        monitor = Monitor(pickle.loads(plan.bundle), slots=plan.slots, trace=CHUNK)
        model, tokenizer = toy.new_model(), toy.tokenizer()
        return Reading(channel, monitor, model, tokenizer, window=toy.WINDOW, tier=plan.tier)

    run(channel, plan, build, answer)
