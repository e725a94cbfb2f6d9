"""An engine that plays a script, for what lies in front of engines."""

import asyncio

from midstream.serve.engine import Ask, Events, Released
from midstream.serve.feed import EngineStats, Opened
from midstream.streams import Event, StreamReport, Trace

BUNDLE = "b" * 64


def report(ask, *, risks, halted_at=None, reason="stop", prompt_tokens=4):
    """What a stream with these risks, one per token of the response, leaves behind."""
    positions = list(range(prompt_tokens, prompt_tokens + len(risks)))
    verdicts = ["HALT" if p == halted_at else "CONTINUE" for p in positions]
    return StreamReport(
        stream=ask.stream,
        bundle=BUNDLE,
        tier=ask.tier or "moderate",
        prompt_tokens=prompt_tokens,
        scored=len(risks),
        unscored=0,
        verdict="CONTINUE" if halted_at is None else "HALT",
        cause=None if halted_at is None else "sealed",
        halted_at=halted_at,
        risk=risks[-1] if risks else 0.0,
        peak=max(risks, default=0.0),
        finish_reason=reason,
        trace=Trace(
            position=positions,
            risk=list(risks),
            verdict=verdicts,
            scores={"sealed": [10 * r - 5 for r in risks], "temper": [-5.0] * len(risks)},
        ),
    )


class ScriptedEngine:
    """Answers every request with the same pieces of text; halts at ``halt_after`` of them.

    Before piece ``pause_at`` a stream waits until it is told to go on, or cancelled.
    """

    def __init__(
        self, feed, pieces=("The ", "urn ", "is ", "pale."), *, risks=None, halt_after=None,
        pause_at=None, delay=0.0, error=None, models=("testbed",), halt_message=None,
    ):  # fmt: skip
        self.feed = feed
        self.pieces = list(pieces)
        self.risks = risks or [0.1 * (i + 1) for i in range(len(self.pieces))]
        self.halt_after = halt_after
        self.pause_at = pause_at
        self.delay = delay
        self.error = error
        """Message of an ``error`` event in place of the end."""
        self.models = models
        self.halt_message = halt_message
        self.unready = None
        self.asked = []
        self.streams = []

    async def submit(self, ask: Ask):
        self.asked.append(ask)
        stream = ScriptedStream(self, ask)
        self.streams.append(stream)
        self.feed.stats(EngineStats(8, len(self.streams), 0, 1, (0.0001,)))
        return stream

    async def close(self, drain):
        for stream in self.streams:
            stream.cancel()


class ScriptedStream(Events):
    def __init__(self, engine, ask):
        super().__init__()
        self.ask, self.prompt_tokens, self.completion_tokens = ask, 4, 0
        self.halt_message = engine.halt_message
        self.cancelled = False
        self._engine = engine
        self._goes_on = asyncio.Event()
        self._opened = Opened(ask, ask.tier or "moderate", BUNDLE)
        engine.feed.opened(self._opened)
        self._task = asyncio.get_running_loop().create_task(self._play())

    def cancel(self):
        self.cancelled = True
        self._goes_on.set()

    def go_on(self):
        self._goes_on.set()

    def _tell(self, type, **facts):
        event = Event(type=type, stream=self.ask.stream, bundle=BUNDLE, **facts)
        self._engine.feed.event(self._opened, event)
        released = type == "released"
        self.put(Released(event.position, event.risk, event.text) if released else event)

    async def _play(self):
        engine, reason, halted_at = self._engine, "stop", None
        self._tell("admitted", position=0)
        played = 0
        for index, (piece, risk) in enumerate(zip(engine.pieces, engine.risks, strict=True)):
            await asyncio.sleep(engine.delay)
            if index == engine.pause_at:
                await self._goes_on.wait()
            position = self.prompt_tokens + index
            if self.cancelled:
                reason = "cancelled"
                break
            if index >= self.ask.max_tokens:
                reason = "length"
                break
            played += 1
            if index == engine.halt_after:
                reason, halted_at = "content_filter", position
                self._tell("halted", position=position, risk=risk, verdict="HALT", cause="sealed")
                break
            self.completion_tokens += 1
            self._tell("released", position=position, risk=risk, text=piece)
        if engine.error is not None:
            self._tell("error", message=engine.error, **self._delivered())
            return
        done = report(
            self.ask, risks=engine.risks[:played], halted_at=halted_at, reason=reason
        )  # fmt: skip
        facts = {"risk": done.risk, "verdict": done.verdict, "cause": done.cause}
        self._tell("finished", message=reason, report=done, **facts, **self._delivered())

    def _delivered(self):
        return {"delivered": self.completion_tokens, "delivered_unscored": 0}


async def events(stream):
    """What happens to a stream, as events."""
    come, bundle = asyncio.Queue(), BUNDLE
    stream.follow(come.put_nowait)
    while True:
        event = await come.get()
        if isinstance(event, Released):
            facts = {"type": "released", "stream": stream.ask.stream, "bundle": bundle}
            event = Event(**facts, **event._asdict())
        yield event
        bundle = event.bundle
        if event.type in ("finished", "error"):
            return
