"""Workers without a model that say what they are asked to; run in place of a worker's main."""

from __future__ import annotations

import os
import pickle
import signal
import time
from contextlib import nullcontext
from typing import Any

from midstream.serve.channel import Channel
from midstream.serve.messages import Accepted, Cancel, Look, Ping, Pong, Ready, Step, Submit
from midstream.streams import Event


def obeying(channel: Channel, plan: Any) -> None:
    """Takes every request; tells a step when somebody looks closely; lets pings be.

    For good it stands still at the prompt "hang".
    """
    _serve(channel, plan, pongs=False)


def answering(channel: Channel, plan: Any) -> None:
    """The same, but answers pings."""
    _serve(channel, plan, pongs=True)


def stuck(channel: Channel, plan: Any) -> None:
    """Never comes to serve."""
    time.sleep(10_000)


def _serve(channel: Channel, plan: Any, *, pongs: bool) -> None:
    bundle = pickle.loads(plan.bundle)
    channel.send(Ready(bundle.hash, bundle.policy, bundle.policy.default_tier, plan.slots))
    for message in channel:
        match message:
            case Submit(stream, prompt="hang"):
                stuck(channel, plan)
            case Submit(stream):
                channel.send(Accepted(stream, 1))
            case Look(stream):
                channel.send(Step(time.monotonic(), 1, 0.001, plan.slots, []))
            case Cancel(stream):
                end = Event(type="finished", stream=stream, bundle=bundle.hash, message="cancelled")
                channel.send(Step(time.monotonic(), 0, None, plan.slots, [end]))
            case Ping() if pongs:
                channel.send(Pong())


def hung_up(channel: Channel, plan: Any) -> None:
    """Serves, when a SIGHUP has reached it, too."""
    from midstream.serve import worker

    def build(channel: Channel, plan: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return nullcontext()

    worker.run(channel, plan, build, lambda channel, serving: obeying(channel, plan))
