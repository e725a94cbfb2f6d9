"""What the page is told, by whom it may be seen, and what it costs (docs/page.md)."""

import asyncio
import gc
import json
import sys
import tracemalloc
from types import SimpleNamespace

import httpx
import observers
import pytest
from fastapi import FastAPI
from http_service import PATIENCE
from live_stage import a_bundle, ask, bundle_of
from scripted_engine import BUNDLE, ScriptedEngine, events

from midstream.serve import halts, live_viewers, operator_session
from midstream.serve.feed import EngineStats, Feed, Opened
from midstream.serve.live import TICK, Live, TooManyViewersError
from midstream.serve.live_routes import live_router
from midstream.serve.operator_session import MOST, SECONDS, OperatorSessions
from midstream.streams import Event

WORDS = ["The ", "urn ", "is ", "pale."]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


def event(stream, type, **facts):
    return Event(type=type, stream=stream.ask.stream, bundle=BUNDLE, **facts)


def opened(live, name="one", **fields):
    stream = Opened(ask(name, **fields), "moderate", BUNDLE)
    live.opened(stream)
    return stream


def tell(live, stream, type, **facts):
    live.event(stream, event(stream, type, **facts))


async def play(live, name="one", pieces=WORDS, **options):
    engine = ScriptedEngine(Feed([live]), pieces, **options)
    return [event async for event in events(await engine.submit(ask(name)))]


class Reading:
    """What a viewer was told so far, put together as the page does."""

    def __init__(self, viewer):
        self.rows, self.messages, self.viewer = {}, [], viewer

    async def until(self, done):
        async for text in self.viewer:
            if text.startswith(b":"):
                continue
            kind, data = text.decode().strip().split("\n")
            self.take(kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
            if done(self):
                return self
        raise AssertionError("the event stream ended")

    def take(self, kind, content):
        self.messages.append((kind, content))
        for row in content.get("rows", ()):
            known = self.rows.setdefault(row["n"], {"spark": []})
            ends = row.get("ended") and not known.get("ended", True)
            spark = row["spark"] if ends else known["spark"] + row["spark"]
            known |= row | {"spark": spark[-40:]}
        for number in content.get("gone", ()):
            del self.rows[number]

    def states(self):
        return {row["id"]: row["state"] for row in self.rows.values()}


# ------------------------------------------------------------------ what is told


def test_a_viewer_is_told_of_a_stream_from_its_opening_to_its_end():
    async def main():
        live = Live(bundle_of(a_bundle()), text=True)
        reading = Reading(live.look())
        await play(live, halt_after=2, risks=[0.1, 0.2, 0.7, 0.8])
        await reading.until(lambda r: "halted" in r.states().values())
        (row,) = reading.rows.values()
        assert row["ended"]
        assert (row["reason"], row["cause"], row["halted_at"]) == ("content_filter", "sealed", 6)
        assert (row["risk"], row["peak"], row["left"]) == (0.7, 0.7, 2)
        assert row["spark"] == [100, 200, 700]
        assert reading.messages[-1][1]["halts"]["causes"] == [["sealed", 1]]
        kind, snapshot = reading.messages[0]
        assert kind == "snapshot"
        assert (snapshot["rows"], snapshot["text"]) == ([], True)
        live.leave(reading.viewer)

    run(main())


def test_who_comes_late_sees_what_the_others_do():
    async def main():
        live = Live(bundle_of(a_bundle()), streams=5)
        early = Reading(live.look())
        streams = []
        for i in range(12):
            streams.append(opened(live, f"s{i}"))
            for at, stream in enumerate(streams):
                tell(live, stream, "released", position=10 + i, risk=(at + i) / 40, text="x")
            if i % 3 == 2:
                tell(live, streams[i - 1], "finished", message="stop")
            if i % 4 == 1:
                await asyncio.sleep(1.5 * TICK)
        late = Reading(live.look())
        for stream in streams:  # those that are still kept go on
            tell(live, stream, "released", position=30, risk=0.999, text="x")
        done = {row["n"] for row in live._snapshot()["rows"]}
        for reading in (early, late):
            await reading.until(lambda r: set(r.rows) == done and any(
                row["spark"][-1] == 999 for row in r.rows.values()))  # fmt: skip
        assert early.rows == late.rows
        assert {row["n"]: row for row in live._snapshot()["rows"]} == late.rows

    run(main())


def test_a_close_look_is_told_of_text_risks_and_scores_as_they_come():
    async def main():
        looked = []
        live = Live(text=True, look_closely=lambda name, on: looked.append((name, on)))
        stream = opened(live)
        tell(live, stream, "admitted", position=0)
        tell(live, stream, "released", position=4, risk=0.25, text="The ")
        reading = Reading(live.look_at(1))
        tell(live, stream, "released", position=5, risk=0.5, text="urn ")
        tell(live, stream, "scored", position=5, risk=0.5, scores={"a": 1.5, "b": None})
        tell(live, stream, "verdict", position=6, risk=0.75, verdict="HOLD")
        await reading.until(lambda r: r.messages[-1][1]["marks"])
        (_, whole), *news = reading.messages
        assert (whole["positions"], whole["risks"]) == ([4], [0.25])
        assert whole["pieces"] == [[4, "The "]]
        told = {}
        for _, part in news:
            told |= dict(zip(part["positions"], part["risks"], strict=True))
        assert told == {4: 0.25, 5: 0.5, 6: 0.75}
        assert [piece for _, part in news for piece in part["pieces"]] == [[5, "urn "]]
        last = news[-1][1]
        assert dict(zip(last["positions"], last["scores"]["a"], strict=True))[5] == 1.5
        assert last["marks"] == [[6, "HOLD"]]
        assert looked == [("one", True)]
        live.leave(reading.viewer, 1)
        assert looked == [("one", True), ("one", False)]

    run(main())


def test_what_the_monitor_recorded_replaces_what_events_told():
    async def main():
        live = Live(bundle_of(a_bundle()))
        await play(live, risks=[0.125, 0.25, 0.5, 0.75])
        record = live._numbered[1]
        whole = record.whole()
        assert whole["positions"] == [4, 5, 6, 7]
        assert whole["risks"] == [0.125, 0.25, 0.5, 0.75]
        assert set(whole["scores"]) == {"sealed", "temper"}
        assert whole["report"]["prompt_tokens"] == 4
        assert whole["left"] == 4

    run(main())


def test_tokens_that_left_are_counted_with_the_hold_back():
    live = Live(bundle_of(a_bundle(hold_back=3)))
    stream = opened(live)
    for position in (12, 13, 16):  # two waited while the stream was held
        tell(live, stream, "released", position=position, risk=0.1, text="x")
    assert live._numbered[1].changes()["left"] == 5  # 10 to 14


def test_without_text_its_length_is_all_that_is_kept():
    live = Live()
    stream = opened(live)
    tell(live, stream, "released", position=4, risk=0.1, text="secret")
    assert live._numbered[1].pieces == [(4, 6)]
    assert "secret" not in json.dumps(live._numbered[1].whole())


def test_halts_are_counted_over_ten_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(halts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    recent = halts.RecentHalts()
    recent.halted("a")
    recent.ended()
    now[0] += 25
    recent.halted("b")
    recent.halted("a")
    assert recent.counts()["halts"][-3:] == [1, 0, 2]
    assert recent.counts()["causes"] == [("a", 2), ("b", 1)]
    now[0] += 590
    recent.turn()
    assert sum(recent.counts()["halts"]) == 2
    now[0] += 1e7
    recent.turn()
    assert recent.counts()["causes"] == []
    for i in range(100):
        recent.halted(f"turn gate: {i}")
    assert len(recent.counts()["causes"]) == halts.CAUSES + 1


def test_the_server_tells_how_full_it_is_and_what_happened_to_it():
    async def main():
        live = Live()
        reading = Reading(live.look())
        live.stats(EngineStats(8, 3, 1, 10, (0.001,)))
        live.refused("me", 429, "too_many")
        live.notice("reload_refused", {"reason": "no policy.yaml", "object": object()})
        await reading.until(lambda r: r.messages[-1][1].get("engine"))
        news = reading.messages[-1][1]
        assert news["engine"] == {"slots": 8, "used": 3, "waiting": 1}
        assert news["counts"]["refused"] == 1
        assert news["notices"][0]["kind"] == "reload_refused"
        assert news["notices"][0]["facts"] == "reason no policy.yaml"

    run(main())


# ------------------------------------------------------------------ bounds


def test_the_oldest_streams_that_ended_make_room_first():
    live = Live(streams=3)
    streams = [opened(live, f"s{i}") for i in range(3)]
    tell(live, streams[1], "finished", message="stop")
    streams.append(opened(live, "s3"))
    assert [r.opened.ask.stream for r in live._numbered.values()] == ["s0", "s2", "s3"]
    opened(live, "s4")  # none has ended: then the oldest, which is counted
    assert [r.opened.ask.stream for r in live._numbered.values()] == ["s2", "s3", "s4"]
    assert live._counts["not_kept"] == 1
    tell(live, streams[0], "released", position=1, risk=0.1, text="x")  # no harm
    tell(live, streams[0], "finished", message="stop")
    assert live._halts.counts()["ended"][-1] == 2


def test_what_is_kept_stays_within_its_bytes():
    def fill(live, streams):
        for i in range(streams):
            stream = opened(live, f"s{i}")
            for at in range(200):
                tell(live, stream, "released", position=at, risk=0.5, text=f"word{i}-{at} ")
            tell(live, stream, "finished", message="stop")

    live = Live(text=True, streams=10_000, size=2 << 20)
    fill(live, 5)  # what is allocated once
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        fill(live, 300)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 20 < len(live._numbered) < 150
    assert live._bytes <= 2 << 20
    # It counts what it takes: neither a fraction of it nor a multiple.
    assert 0.5 * live._bytes < after - before < 1.3 * live._bytes
    assert live._bytes == sum(record.size for record in live._numbered.values())


def test_a_record_knows_its_size_at_any_time():
    live = Live(text=True)
    stream = opened(live)
    for at in range(50):
        tell(live, stream, "scored", position=at, risk=0.5, scores={"a": 0.0, "b": 1.0})
        tell(live, stream, "released", position=at, risk=0.5, text="word")
        assert live._bytes == live._numbered[1].size
    tell(live, stream, "finished", message="stop")
    assert live._bytes == live._numbered[1].size


def test_an_event_costs_the_same_in_a_long_stream():
    def operations(tokens):
        live, count = Live(text=True), 0
        stream = opened(live)
        for at in range(tokens):
            tell(live, stream, "released", position=at, risk=0.5, text="word")

        def counting(frame, kind, argument):
            nonlocal count
            count += kind in ("call", "line", "c_call")
            frame.f_trace_lines = True
            return counting

        told = event(stream, "released", position=tokens, risk=0.5, text="word")
        gc.disable()  # those who hear of collections in this process would be counted
        sys.settrace(counting)
        try:
            live.event(stream, told)
        finally:
            sys.settrace(None)
            gc.enable()
        return count

    assert operations(10) == operations(5000)


def test_a_viewer_who_does_not_read_is_let_go_and_the_others_are_not():
    async def main():
        live = Live()
        lazy, keen = live.look(), Reading(live.look())
        stream = opened(live)
        for at in range(live_viewers.QUEUE + 5):
            tell(live, stream, "released", position=at, risk=0.5, text="x")
            live._tell()
            # the keen one reads everything as it comes
            await keen.until(lambda r, at=at: r.rows and len(r.messages) > at + 1)
        assert len(live._viewers) == 1
        assert [text async for text in lazy] == []  # ends at once, and holds nothing
        live.leave(lazy)
        live.leave(keen.viewer)

    run(main())


def test_viewers_are_bounded_and_leave_nothing_behind():
    async def main():
        live = Live(viewers=3)
        opened(live)
        viewers = [(live.look(), None), (live.look_at(1), 1), (live.look_at(1), 1)]
        with pytest.raises(TooManyViewersError):
            live.look()
        with pytest.raises(KeyError):
            live.look_at(99)
        assert live._ticker is not None
        for viewer, number in viewers:
            live.leave(viewer, number)
        assert (live._watching, live._ticker, live._close_ups) == (0, None, {})
        assert len(live._viewers) == 0
        live.leave(live.look())  # and may come again

    run(main())


def test_the_end_of_the_server_ends_all_viewers():
    async def main():
        live = Live()
        opened(live)
        viewers = [live.look(), live.look_at(1)]
        live.close()
        for viewer in viewers:
            async for _ in viewer:  # what waits, then the end
                pass
        with pytest.raises(TooManyViewersError):
            live.look()

    run(main())


def test_a_server_that_stops_shows_its_last_streams_and_then_lets_viewers_go():
    async def main():
        live = Live()
        stream = opened(live)
        reading = Reading(live.look())
        live.notice("stopping", {"drain": 30.0})
        await reading.until(lambda r: r.messages[-1][1].get("notices"))
        await asyncio.sleep(3 * TICK)
        tell(live, stream, "finished", message="stop")
        await reading.until(lambda r: r.states() == {"one": "finished"})
        assert [text async for text in reading.viewer] == []

    run(main())


def test_a_bundle_that_was_replaced_is_still_known_to_its_streams():
    known = {BUNDLE: a_bundle()}
    live = Live(known.get)
    opened(live)
    known.clear()
    assert live._snapshot()["bundles"][BUNDLE]["tiers"]["moderate"]["halt_at"] == 0.5


def test_what_the_engine_counted_is_what_left():
    live = Live()
    stream = opened(live)
    tell(live, stream, "released", position=5, risk=0.1, text="x")
    tell(live, stream, "finished", message="stop", delivered=7, delivered_unscored=2)
    assert live._numbered[1].changes()["left"] == 7
    assert live._counts["unscored"] == 2


def test_silence_is_broken_by_comments(monkeypatch):
    async def main():
        monkeypatch.setattr(live_viewers, "KEEP_ALIVE", 0.01)
        viewer = live_viewers.Viewer()
        async for text in viewer:
            assert text == b": \n\n"
            break

    run(main())


def test_what_looking_on_costs_is_measured():
    found = run(observers.main(400, 20, 1000))
    assert {"metrics_us", "audit_us", "page_0_viewers_us", "page_3_viewers_us"} <= set(found)


def test_a_size_below_one_stream_is_refused():
    with pytest.raises(ValueError, match="streams: expected at least 1, got 0"):
        Live(streams=0)


# ------------------------------------------------------------------ who may see


def client(live=None, operator=None, base="http://127.0.0.1:8000"):
    app = FastAPI()
    app.include_router(live_router(live or Live(), operator))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base)


async def get(path, **options):
    async with client(**options) as http:
        return await http.get(path)


def test_the_files_are_there_and_nothing_else():
    async def main():
        async with client() as http:
            page = await http.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert page.headers["x-content-type-options"] == "nosniff"
            same = {"If-None-Match": page.headers["etag"]}
            assert (await http.get("/", headers=same)).status_code == 304
            script = await http.get("/page/main.js")
            assert script.headers["content-type"] == "text/javascript; charset=utf-8"
            for name in ("live.py", "..%2flive.py", "%2e%2e/live.py", "__init__.py", "x.js"):
                assert (await http.get(f"/page/{name}")).status_code == 404

    run(main())


def test_the_page_has_no_script_or_style_inside_and_nothing_from_elsewhere():
    async def main():
        async with client() as http:
            names = ["", "page/style.css", "page/icon.svg"]
            page = (await http.get("/")).text
            assert page.count("<script") == page.count('<script type="module" src="/page/')
            assert "<style" not in page
            assert " style=" not in page
            texts = [page]
            names = {"style.css", "main.js"}
            seen = set()
            while names - seen:
                name = (names - seen).pop()
                seen.add(name)
                texts.append((await http.get(f"/page/{name}")).text)
                for line in texts[-1].splitlines():
                    if line.startswith(("import ", "} from")) and '"./' in line:
                        names.add(line.split('"./')[1].split('"')[0])
            assert len(seen) > 8
            for text in texts:
                clean = text.replace("http://www.w3.org/2000/svg", "")
                assert "http:" not in clean
                assert "https:" not in clean
                for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval("):
                    assert word not in text

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:80", "10.1.2.3"])
def test_without_keys_the_streams_are_shown_to_who_comes_by_address(host):
    async def main():
        async with client() as http:
            answer = await http.get("/live/session", headers={"Host": host})
            assert answer.json() == {"keys": False, "open": True, "message": None}

    run(main())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "a b"])
def test_without_keys_a_name_that_leads_here_shows_nothing(host):
    async def main():
        live = Live()
        opened(live)
        async with client(live) as http:
            for path in ("/live/events", "/live/streams/1"):
                answer = await http.get(path, headers={"Host": host})
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "operator_key_needed_by_name"
            assert not (await http.get("/live/session", headers={"Host": host})).json()["open"]
            begun = await http.post("/live/session", headers={"Host": host})
            assert begun.status_code == 400
        assert live._watching == 0

    run(main())


def test_with_keys_nothing_is_shown_without_a_session():
    async def main():
        live = Live()
        opened(live)
        async with client(live, lambda key: key == "op") as http:
            for path in ("/live/events", "/live/streams/1", "/live/streams/2"):
                for cookie in ("", "midstream_operator=", "midstream_operator=op", "x=\udcff"):
                    answer = await http.get(path, headers=[(b"cookie", cookie.encode("utf-8", "surrogateescape"))])  # fmt: skip # noqa: E501
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
            for wrong in ("", "Bearer", "Bearer no", "Basic op", "op"):
                answer = await http.post("/live/session", headers={"Authorization": wrong})
                assert answer.status_code == 401
                assert "set-cookie" not in answer.headers
            answer = await http.post("/live/session", headers={"Authorization": "Bearer op"})
            cookie = answer.headers["set-cookie"]
            for part in ("HttpOnly", "SameSite=strict", "Path=/live", "Max-Age=43200"):
                assert part in cookie
            assert "Secure" not in cookie
            assert (await http.get("/live/session")).json()["open"]
            assert (await http.get("/live/streams/2")).status_code == 404
            kept = http.cookies["midstream_operator"]
            await http.delete("/live/session")
            http.cookies.set("midstream_operator", kept)  # the server has forgotten it, too
            assert not (await http.get("/live/session")).json()["open"]
        async with client(live, lambda key: True, "https://watch.example") as http:
            answer = await http.post("/live/session", headers={"Authorization": "Bearer op"})
            assert "Secure" in answer.headers["set-cookie"]

    run(main())


def test_sessions_end_and_are_bounded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(operator_session, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sessions = OperatorSessions()
    first = sessions.begin()
    assert sessions.is_open(first)
    now[0] = SECONDS + 1
    assert not sessions.is_open(first)
    tokens = [sessions.begin() for _ in range(MOST + 1)]
    assert [sessions.is_open(token) for token in tokens] == [False] + [True] * MOST
    assert len(set(tokens)) == MOST + 1


def test_too_many_pages_are_told_to_come_later():
    async def main():
        live = Live(viewers=1)
        live.look()
        answer = await get("/live/events", live=live)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "10"
        assert answer.json()["error"]["code"] == "too_many_viewers"

    run(main())
