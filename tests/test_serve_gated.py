"""The turn gate in front of an engine: what leaves, what is written down, what lookers-on see."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import toy
import transformers
from serving import Seen, answer, events_of, run, text_of
from turn_cases import DownLedger, asks, bundle, two_seals

from midstream import testbed
from midstream.bundle import Bundle
from midstream.engines.hf import manager as seams
from midstream.ledger.ledger import TurnRecord
from midstream.ledger.memory import MemoryLedger
from midstream.policy import OnHalt, PolicyError
from midstream.serve.app import create_app
from midstream.serve.engine import Ask, Events, Released
from midstream.serve.errors import ApiError
from midstream.serve.feed import Opened
from midstream.serve.gated import GatedEngine, HeldFeed
from midstream.serve.reloads import ReloadError
from midstream.serve.settings import Settings
from midstream.streams import Event, StreamReport, Trace

PROMPT = 3  # tokens


class Scripted:
    """Answers with the words that the client's last message asks for; a "bad" one is seen.

    "halt" is where the token monitor ends it, "break" where the engine fails, "wait" where it waits
    to be cancelled.
    """

    models, unready = ("toy",), None

    def __init__(self, feed: HeldFeed, bundle: Bundle) -> None:
        self.feed, self.bundle = feed, bundle
        self.asked: list[Ask] = []
        self.streams: list[ScriptedStream] = []

    async def submit(self, ask: Ask) -> ScriptedStream:
        self.asked.append(ask)
        await asyncio.sleep(0)
        self.streams.append(ScriptedStream(self, ask))
        return self.streams[-1]

    async def reload(self, folder: str | Path) -> str:
        self.bundle = Bundle.load(folder)
        return self.bundle.hash

    async def close(self, drain: float) -> None:
        for stream in self.streams:
            stream.cancel()


class ScriptedStream(Events):
    def __init__(self, engine: Scripted, ask: Ask) -> None:
        super().__init__()
        self.ask, self.prompt_tokens, self.completion_tokens = ask, PROMPT, 0
        self.halt_message = engine.bundle.policy.on_halt.message
        self._feed, self._bundle = engine.feed, engine.bundle
        self._opened = Opened(ask, "moderate", self._bundle.hash)
        self._cancelled = asyncio.Event()
        self._feed.opened(self._opened)
        self._task = asyncio.get_running_loop().create_task(self._play())

    def cancel(self) -> None:
        self._cancelled.set()

    def _tell(self, type: str, **facts: Any) -> None:
        event = Event(type=type, stream=self.ask.stream, bundle=self._bundle.hash, **facts)  # type: ignore[arg-type]
        self._feed.event(self._opened, event)
        released = type == "released"
        self.put(Released(event.position, event.risk, event.text or "") if released else event)

    async def _play(self) -> None:
        assert self.ask.messages is not None
        words = self.ask.messages[-1]["content"].split()
        logits: list[float | None] = []
        reason, halted_at = "stop", None
        self._tell("admitted", position=0)
        for position, word in enumerate(words, start=PROMPT):
            await asyncio.sleep(0)
            if word == "wait":
                await self._cancelled.wait()
            if self._cancelled.is_set():
                reason = "cancelled"
                break
            if word == "break":
                self._tell("error", message="the model's process ended")
                return
            logits.append({"bad": 20.0, "unscored": None}.get(word, -20.0))
            if word == "halt":
                reason, halted_at = "content_filter", position
                self._tell("halted", position=position, risk=0.9, verdict="HALT", cause="b")
                break
            self.completion_tokens += 1
            self._tell("released", position=position, risk=0.1, text=f"{word} ")
        report = StreamReport(
            stream=self.ask.stream,
            bundle=self._bundle.hash,
            tier="moderate",
            prompt_tokens=PROMPT,
            scored=sum(logit is not None for logit in logits),
            unscored=logits.count(None),
            verdict="CONTINUE" if halted_at is None else "HALT",
            cause=None,
            halted_at=halted_at,
            risk=0.1,
            peak=0.1,
            finish_reason=reason,
            trace=Trace(
                position=list(range(PROMPT, PROMPT + len(logits))),
                risk=[0.1] * len(logits),
                verdict=["CONTINUE"] * len(logits),
                scores=dict.fromkeys(self._bundle.bank.names, logits),
            ),
        )
        self._tell("finished", message=reason, report=report, risk=0.1, verdict=report.verdict)


class House:
    """A gated engine that plays a script, and who looks on."""

    def __init__(self, ledger: Any = None, *, trace: int = 64, **policy: Any) -> None:
        self.seen = Seen()
        self.feed = HeldFeed([self.seen])
        self.bundle = bundle(**policy)
        self.ledger = ledger or MemoryLedger()
        self.engine = Scripted(self.feed, self.bundle)
        self.gated = GatedEngine(self.engine, self.feed, self.bundle, self.ledger, trace=trace)


def ask(history: Sequence[dict[str, str]], **fields: Any) -> Ask:
    fields = {"max_tokens": 16, "conversation": "c", "client": "ada", **fields}
    name = f"s{next(serving._ids)}"
    return Ask(name, "toy", fields.pop("messages", tuple(history)), None, **fields)


async def talk(engines: Sequence[Any], *said: str, **fields: Any) -> list[list[Event]]:
    """A conversation, whose turns are answered by the engines in turn."""
    history: list[dict[str, str]] = []
    told = []
    for number, words in enumerate(said):
        history.append({"role": "user", "content": words})
        _, events = await answer(engines[number % len(engines)], ask(history, **fields))
        told.append(events)
        history.append({"role": "assistant", "content": text_of(events)})
    return told


def ends(told: list[list[Event]]) -> list[tuple[str, str | None]]:
    return [(text_of(events), events[-1].message) for events in told]


QUIET = "all is well"
OPENS = "a bad word"
SAID = [(f"{QUIET} ", "stop"), (f"{OPENS} ", "stop"), (f"{QUIET} ", "stop")]


def test_the_turn_that_completes_the_harm_is_withheld() -> None:
    house = House()
    told = run(talk([house.gated], QUIET, OPENS, QUIET, OPENS, QUIET))
    assert ends(told) == [*SAID, ("", "content_filter"), (f"{QUIET} ", "stop")]
    delivered, withheld = told[2], told[3]
    assert [e.type for e in delivered] == ["admitted", "verdict", *["released"] * 3, "finished"]
    assert delivered[1].verdict == "CONTINUE"
    assert [e.type for e in withheld] == ["admitted", "halted", "finished"]
    assert withheld[1].verdict == "HALT"
    assert withheld[1].cause == "turn gate: risk"
    assert "the risk is too high" in (withheld[1].message or "")
    report = withheld[2].report
    assert report is not None
    assert (report.verdict, report.cause) == ("HALT", "turn gate: risk")
    assert report.finish_reason == withheld[2].message == "content_filter"


def test_replicas_with_one_ledger_decide_as_one_process_does() -> None:
    said = (QUIET, OPENS, OPENS, QUIET, OPENS)
    alone = House()
    expected = ends(run(talk([alone.gated], *said)))
    first = House()
    second = House(first.ledger)
    assert ends(run(talk([first.gated, second.gated], *said))) == expected
    apart = ends(run(talk([House().gated, House().gated], *said)))
    assert apart != expected


def test_those_who_look_on_see_what_left() -> None:
    house = House()
    told = run(talk([house.gated], OPENS, OPENS))
    assert [*house.seen.streams.values()] == told
    assert house.feed._held == {}
    assert house.gated._streams == set()


class SlowLedger(MemoryLedger):
    """Writes when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write, self.asked = threading.Event(), threading.Event()

    def write(self, records: Sequence[TurnRecord]) -> list[bool]:
        self.asked.set()
        assert self.may_write.wait(serving.PATIENCE)
        return super().write(records)


def test_nothing_leaves_before_the_ledger_knows_of_it() -> None:
    ledger = SlowLedger()
    house = House(ledger)

    async def read() -> list[Event]:
        stream = await house.gated.submit(ask(asks(QUIET)))
        reading = asyncio.ensure_future(events_of(stream))
        await asyncio.to_thread(ledger.asked.wait, serving.PATIENCE)
        assert [e.type for e in house.seen.streams[stream.ask.stream]] == ["admitted"]
        assert stream.completion_tokens == 0
        ledger.may_write.set()
        events = await reading
        assert stream.completion_tokens == 3
        return events

    assert text_of(run(read())) == f"{QUIET} "


def test_a_response_that_is_judged_when_nobody_waits_for_the_end_any_more_ends_once() -> None:
    ledger = SlowLedger()
    house = House(ledger)

    async def give_up() -> list[Event]:
        stream = await house.gated.submit(ask(asks(QUIET)))
        await asyncio.to_thread(ledger.asked.wait, serving.PATIENCE)
        closing = asyncio.ensure_future(house.gated.close(0.0))
        for _ in range(3):
            await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        ledger.may_write.set()
        events = await events_of(stream)
        await house.gated.close(0.0)
        return events

    events = run(give_up())
    assert (text_of(events), events[-1].message) == (f"{QUIET} ", "stop")
    assert [*house.seen.streams.values()] == [events]
    assert house.feed.failures == 0  # as it would be with a second end
    assert house.gated._streams == set()


@pytest.mark.parametrize("fails", ["reads", "writes"])
@pytest.mark.parametrize("on_store_down", ["closed", "open"])
def test_a_ledger_that_is_down(fails: str, on_store_down: str) -> None:
    house = House(
        DownLedger(reads=fails == "reads", writes=fails == "writes"), on_store_down=on_store_down
    )
    (events,) = run(talk([house.gated], QUIET))
    if on_store_down == "closed":
        assert (text_of(events), events[-1].message) == ("", "content_filter")
        assert events[-1].cause == "turn gate: store"
    else:
        assert (text_of(events), events[-1].message) == (f"{QUIET} ", "stop")
        assert "the ledger is down" in (events[1].message or "")


def test_what_the_gate_withholds_is_told_in_the_policys_words() -> None:
    house = House(on_halt=OnHalt(message="I will not."))
    stream, _ = run(answer(house.gated, ask(asks(QUIET))))
    assert stream.halt_message == "I will not."


def test_what_the_token_monitor_halts_is_withheld_whole() -> None:
    house = House()
    (events,) = run(talk([house.gated], "well well halt"))
    assert [e.type for e in events] == ["admitted", "halted", "finished"]
    assert (events[1].cause, events[-1].message) == ("b", "content_filter")
    history = asks("well well halt", "", "and now?")
    turn = house.gated._gate.open("ada:c", history)
    assert (turn.unseen, turn.number) == (0, 2)  # it is written down as withheld


def test_a_response_without_a_score_is_withheld() -> None:
    (events,) = run(talk([House().gated], "unscored unscored"))
    assert (text_of(events), events[-1].cause) == ("", "turn gate: unscored")


@pytest.mark.parametrize("words", ["well break", "bad break"])
def test_nothing_of_a_response_that_breaks_off_leaves(words: str) -> None:
    house = House()
    (events,) = run(talk([house.gated], words))
    assert [e.type for e in events] == ["admitted", "error"]
    assert house.gated._gate.open("ada:c", asks(words, "", "x")).unseen == 1


def test_a_client_that_leaves() -> None:
    house = House()

    async def leave() -> list[Event]:
        stream = await house.gated.submit(ask(asks("well wait well")))
        stream.cancel()
        return await events_of(stream)

    events = run(leave())
    assert [e.type for e in events] == ["admitted", "finished"]
    assert events[-1].message == "cancelled"
    assert house.feed._held == {}


def test_a_response_that_cannot_be_judged_does_not_leave(caplog: pytest.LogCaptureFixture) -> None:
    house = House()

    def judge(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault")

    house.gated._gate.judge = judge  # type: ignore[method-assign]
    (events,) = run(talk([house.gated], QUIET))
    assert [e.type for e in events] == ["admitted", "error"]
    assert "a fault" not in (events[-1].message or "")
    assert "a fault" in caplog.text


def test_conversations_are_those_of_a_client() -> None:
    house = House()

    async def two() -> list[list[Event]]:
        await talk([house.gated], OPENS)
        history = asks(OPENS, f"{OPENS} ", OPENS)
        mine = await answer(house.gated, ask(history))
        others = await answer(house.gated, ask(history, client="eve"))
        return [mine[1], others[1]]

    mine, others = run(two())
    assert mine[-1].message == "content_filter"
    assert others[-1].message == "stop"  # its past is unseen, as the policy allows


def test_other_requests_are_not_held() -> None:
    house = House()
    _, events = run(answer(house.gated, ask(asks(OPENS), conversation=None)))
    assert [e.type for e in events] == ["admitted", *["released"] * 3, "finished"]
    assert [*house.seen.streams.values()] == [events]
    assert house.engine.asked[0].prior is None


def test_the_belief_is_carried_into_the_response() -> None:
    house = House(model=two_seals(carry=[[0.9, 0.1], [0.3, 0.7], [0.3, 0.7], [0.3, 0.7]]))
    run(talk([house.gated], OPENS, QUIET))
    first, second = house.engine.asked
    assert first.prior == pytest.approx((0.9, 0.1))
    assert second.prior is not None
    assert second.prior[1] > 0.5


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "prompt": ({"messages": None}, "midstream.conversation", "is made of messages"),
    "stop": ({"body": {"stop": ["x"]}}, "stop", "leave stop out"),
    "tokens": ({"max_tokens": 64}, "max_tokens", "must be below 64"),
    "history": ({"messages": ({"role": "user", "content": 3},)}, "messages", "expected a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_is_refused(name: str) -> None:
    fields, param, message = REFUSED[name]
    house = House()
    with pytest.raises(ApiError, match=message) as refusal:
        run(house.gated.submit(ask(asks(QUIET), **fields)))
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert house.engine.asked == []


def test_a_bundle_that_reads_prompts_bounds_both_together() -> None:
    house = House(trace=18)
    house.bundle.chain.prompt_edges.append(0.5)
    with pytest.raises(ApiError, match="together must be below 18 tokens, not 19"):
        run(house.gated.submit(ask(asks("wait"))))
    assert house.engine.streams[0]._cancelled.is_set()
    assert house.feed._held == {}


def test_a_bundle_without_a_gate_is_refused() -> None:
    feed = HeldFeed()
    with pytest.raises(PolicyError, match="midstream gate fit"):
        GatedEngine(Scripted(feed, toy.bundle()), feed, toy.bundle(), MemoryLedger())


def test_reload(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    other = bundle(block_at=0.0)
    other.save(tmp_path / "strict")
    toy.bundle().save(tmp_path / "gateless")

    async def reload() -> None:
        with pytest.raises(ReloadError, match="has no turn model"):
            await house.gated.reload(tmp_path / "gateless")
        assert house.seen.kinds() == ["reload_refused"]
        assert ends(await talk([house.gated], QUIET)) == [(f"{QUIET} ", "stop")]
        old = await house.gated.submit(ask(asks(f"{QUIET} wait"), conversation="d"))
        assert await house.gated.reload(tmp_path / "strict") == other.hash
        old.cancel()
        assert (await events_of(old))[-1].bundle == house.bundle.hash
        assert ends(await talk([house.gated], QUIET)) == [("", "content_filter")]

    run(reload())
    assert "has no turn model" in caplog.text


def test_a_reload_while_a_request_comes_in(tmp_path: Path) -> None:
    """It would be judged by one bundle, and its turn by another."""
    house = House()
    other = bundle(block_at=0.9)
    other.save(tmp_path / "other")

    async def ask_meanwhile() -> None:
        house.engine.bundle = other
        with pytest.raises(ApiError, match="try again") as refusal:
            await house.gated.submit(ask(asks("wait")))
        assert (refusal.value.status, refusal.value.code) == (503, "reloading")

    run(ask_meanwhile())
    assert house.feed._held == {}


def test_closing_waits_for_what_has_ended() -> None:
    house = House()

    async def close() -> list[Event]:
        stream = await house.gated.submit(ask(asks("well wait")))
        await house.gated.close(0.0)
        assert house.gated._streams == set()
        return await events_of(stream)

    assert run(close())[-1].message == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_over_http(stream: bool) -> None:
    house = House()
    app = create_app(house.gated, house.feed, Settings(conversations=True))

    async def ask_over_http(history: list[dict[str, str]]) -> list[dict[str, Any]]:
        body = {
            "model": "toy",
            "messages": history,
            "max_tokens": 16,
            "stream": stream,
            "midstream": {"conversation": "c"},
        }
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://midstream"
        ) as client:
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        if not stream:
            return [answer.json()]
        *chunks, done = [line[6:] for line in answer.text.split("\n") if line]
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    async def two() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        first = await ask_over_http(asks(OPENS))
        return first, await ask_over_http(asks(OPENS, f"{OPENS} ", OPENS))

    def said(chunks: list[dict[str, Any]]) -> str:
        choices = [chunk["choices"][0] for chunk in chunks]
        return "".join(
            (c.get("delta") or c.get("message") or {}).get("content", "") for c in choices
        )

    delivered, withheld = run(two())
    assert said(delivered) == f"{OPENS} "
    assert said(withheld) == ""
    assert withheld[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert withheld[-1]["midstream"]["cause"] == "turn gate: risk"


needs_batching = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{seams.VERSION}."),
    reason=f"continuous batching is watched in transformers {seams.VERSION} only",
)


@needs_batching
def test_the_local_engine_starts_from_the_prior() -> None:
    chain = testbed.load_bundle().chain
    certain = tuple(float(state == chain.states) for state in range(chain.states + 1))
    with serving.house() as house:
        options = {"sampling": {"temperature": 0.0}, "max_tokens": 4}
        _, plain = house.run(answer(house.engine, serving.ask(1, **options)))
        _, carried = house.run(answer(house.engine, serving.ask(1, prior=certain, **options)))
    assert plain[-1].message == "length"
    assert carried[-1].message == "content_filter"


class Late(HeldFeed):
    """Told some turns of the loop after whoever reads the stream, as by the local engine."""

    def event(self, stream: Opened, event: Event) -> None:
        tell = partial(super().event, stream, event)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, loop.call_soon, tell)


@pytest.mark.parametrize("words", ["well break", "well wait", "well halt", "well well"])
def test_an_engine_that_tells_its_feed_late_tells_nothing_twice(words: str) -> None:
    house = House()
    house.feed = Late([house.seen])
    house.engine.feed = house.gated._feed = house.feed

    async def ask_and_leave() -> list[Event]:
        stream = await house.gated.submit(ask(asks(words)))
        if "wait" in words:
            stream.cancel()
        events = await events_of(stream)
        for _ in range(9):
            await asyncio.sleep(0)
        return events

    events = run(ask_and_leave())
    assert [*house.seen.streams.values()] == [events]
    assert house.feed.failures == 0
    assert house.feed._held == {}
    if words != "well well":
        assert text_of(events) == ""
        assert (events[-1].delivered, events[-1].delivered_unscored) == (0, 0)


def test_a_stream_that_the_gate_refuses_ends_for_those_who_look_on() -> None:
    house = House()
    house.engine.bundle = bundle(hold_back=3)  # as while a reload is under way

    async def refused() -> None:
        with pytest.raises(ApiError, match="just changed"):
            await house.gated.submit(ask(asks("well wait")))
        while house.feed._held:
            await asyncio.sleep(0)

    run(refused())
    ((*_, last),) = house.seen.streams.values()
    assert (last.message, last.delivered) == ("cancelled", 0)
