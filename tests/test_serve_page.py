"""The live page in a real browser (docs/page.md)."""

import functools
import random
import re
import socket
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from http_service import PATIENCE, wait_for
from live_stage import Stage, TestbedStage, a_bundle, ask, browsing, find_browser
from playwright.sync_api import expect, sync_playwright
from scripted_engine import BUNDLE

from midstream import testbed
from midstream.monitor import Monitor
from midstream.policy import Policy, Thresholds
from midstream.serve.feed import Opened
from midstream.streams import Event, released

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium or google-chrome on the PATH"
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
WORDS = ["The ", "urn ", "is ", "pale ", "and ", "stands ", "on ", "the ", "upper ", "shelf."]
RISING = [0.01, 0.03, 0.04, 0.08, 0.15, 0.22, 0.31, 0.36, 0.44, 0.62]
CALM = [0.01, 0.02] * 5
SCHEMES = ("light", "dark")
expect.set_options(timeout=1000 * PATIENCE)
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture
def stage():
    with Stage() as stage:
        yield stage


@pytest.fixture
def page(browser, stage):
    with browsing(browser) as page:
        page.goto(stage.url)
        expect(page.locator("#connection")).to_have_text("Live")
        yield page


# Resolves when the page has drawn what it was told, and again what depends on its sizes.
DRAWN = """() => new Promise((done) => {
  requestAnimationFrame(() => requestAnimationFrame(done));
})"""


def rows(page):
    return page.locator("#list").get_by_role("option")


def row(page, name):
    return page.locator("#list").get_by_role("option", name=name)


def stat(page, name):
    return page.locator("#stats div", has=page.get_by_text(name, exact=True)).locator("dd")


def choose(page, name):
    row(page, name).click()
    expect(page.locator("#id")).to_have_text(name)


def expect_all_of(page, state):
    """The chosen stream has ended so, and all of it is shown: its row tells of the end before."""
    expect(page.locator("#state")).to_have_text(state)
    expect(page.locator("#facts")).to_contain_text("took")


# ------------------------------------------------------------------ live


def test_a_stream_halts_live_on_the_page(page, stage):
    expect(page.locator("#nothing")).to_be_visible()
    stream = stage.play("first", WORDS, RISING, halt_after=9, pause_at=3)
    expect(row(page, "first")).to_have_class("row writing")
    expect(page.locator("#text")).to_have_text("The urn is")
    expect(page.locator("#state")).to_have_text("▸ writing")
    stage.go_on(stream)
    expect_all_of(page, "■ halted")
    expect(row(page, "first")).to_have_class("row halted ended")
    expect(page.locator("#verdict")).to_have_text(
        "Halted at token 13: sealed. Risk 0.6200; moderate halts at 0.5."
    )
    shown = page.locator("#text").inner_text()
    assert shown == "".join(WORDS[:9]) + "halted at 13"  # the last word has not left
    expect(page.locator("#risk")).to_contain_text("halted at 13")
    expect(page.locator("#risk-title")).to_have_text("Risk: chance of a violation within 24 tokens")
    expect(page.locator("#halts-count")).to_have_text("1 halt of 1 ended")
    expect(page.locator("#halts-causes")).to_have_text("sealed 1")
    expect(page.locator("#announce")).to_have_text("Stream first halted: sealed")
    evidence = page.locator("#evidence figure")
    expect(evidence).to_have_count(2)
    expect(evidence.first).to_have_class("cause")
    expect(evidence.first).to_contain_text("opens the sealed vessel")
    expect(evidence.first).to_contain_text("last 1.2, most 1.2")


def test_tokens_carry_the_colour_of_their_risk(page, stage):
    stage.play("one", WORDS, RISING, halt_after=9)
    expect_all_of(page, "■ halted")
    tokens = page.locator("#text span[data-to]")
    classes = [tokens.nth(i).get_attribute("class") for i in range(9)]
    assert classes == ["r0", "r1", "r1", "r2", "r3", "r4", "r4", "r5", "r5"]


def test_a_late_page_shows_what_an_early_one_does(browser, page, stage):
    stage.play("slow", WORDS, CALM, pause_at=5)
    stage.play("halts", WORDS, RISING, halt_after=9)
    expect(row(page, "halts")).to_have_class("row halted ended")
    with browsing(browser) as late:
        late.goto(stage.url)
        for each in (page, late):
            expect(row(each, "halts")).to_have_class("row halted ended")
            expect(row(each, "slow")).to_have_class("row writing")
            choose(each, "halts")
            expect_all_of(each, "■ halted")
            each.evaluate(DRAWN)
        texts = [each.locator("#detail").inner_text() for each in (page, late)]
        assert texts[0] == texts[1]
        curves = [each.locator("#risk .curve").get_attribute("d") for each in (page, late)]
        assert curves[0] == curves[1]


def test_streams_that_are_looked_at_closely_are_told_to_the_engine(page, stage):
    stage.play("slow", WORDS, CALM, pause_at=5)
    expect(page.locator("#id")).to_have_text("slow")
    assert stage.closely == [("slow", True)]
    stage.play("other", WORDS, CALM, pause_at=5)
    choose(page, "other")
    expect(page.locator("#text")).to_have_text("The urn is pale and")
    wait_for(lambda: len(stage.closely) == 3)  # the server hears of a page that leaves later
    assert sorted(stage.closely) == [("other", True), ("slow", False), ("slow", True)]


def test_a_stream_that_is_held_and_then_fails(browser):
    """Tokens that waited leave together, on the colour of the worst of them."""
    levels = {"moderate": Thresholds(horizon=0, halt_at=0.9, hold_at=0.3)}
    bundle = a_bundle(tiers=levels, loosest_tier="moderate", hold_back=2)
    with Stage(bundle=bundle) as stage, browsing(browser) as page:
        page.goto(stage.url)
        expect(page.locator("#connection")).to_have_text("Live")
        stream = Opened(ask("one"), "moderate", BUNDLE)

        def tell(*events):
            def now():
                for type, facts in events:
                    told = Event(type=type, stream="one", bundle=BUNDLE, **facts)
                    stage.feed.event(stream, told)

            stage.do(now)

        stage.do(lambda: stage.feed.opened(stream))
        expect(page.locator("#verdict")).to_have_text("Waits for a slot.")
        tell(
            ("admitted", {"position": 0}),
            ("scored", {"position": 4, "risk": 0.01}),
            ("released", {"position": 5, "risk": 0.06, "text": "a "}),  # token 4
            ("verdict", {"position": 6, "risk": 0.4, "verdict": "HOLD"}),
        )
        expect(page.locator("#state")).to_have_text("‖ held")
        expect(stat(page, "held")).to_have_text("1")
        expect(page.locator("#risk")).to_contain_text("holds 0.3")
        expect(page.locator("#risk .hold-span")).to_have_count(1)
        tell(
            ("released", {"position": 8, "risk": 0.02, "text": "b c d "}),  # tokens 5 to 7
            ("verdict", {"position": 8, "risk": 0.02, "verdict": "CONTINUE"}),
        )
        expect(page.locator("#state")).to_have_text("▸ writing")
        tokens = page.locator("#text span[data-to]")
        expect(tokens).to_have_count(2)
        found = tokens.evaluate_all(
            "all => all.map((e) => [e.className, e.dataset.from, e.dataset.to])"
        )
        assert found == [["r0", "4", "4"], ["r5", "5", "7"]]
        tell(("error", {"message": "its process ended"}))
        expect(page.locator("#state")).to_have_text("✕ error")
        expect(page.locator("#verdict")).to_have_text("Ended by an error: its process ended")
        expect(stat(page, "errors")).to_have_text("1")


# ------------------------------------------------------------------ keyboard


def test_streams_are_gone_through_by_keys(page, stage):
    for name in ("a", "b", "c", "d"):
        stage.play(f"stream-{name}", WORDS, RISING if name == "b" else CALM,
                   halt_after=9 if name == "b" else None)  # fmt: skip
    expect(rows(page).and_(page.locator(".ended"))).to_have_count(4)
    page.locator("#list").focus()
    for key, name in [
        ("Home", "d"), ("j", "c"), ("ArrowDown", "b"), ("ArrowUp", "c"), ("k", "d"), ("End", "a"),
        ("k", "b"), ("Home", "d"), ("h", "b"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        expect(page.locator("#id")).to_have_text(f"stream-{name}")
        chosen = row(page, f"stream-{name}")
        expect(chosen).to_have_attribute("aria-selected", "true")
        label = f"{'halted' if name == 'b' else 'finished'}, stream stream-{name}, "
        expect(chosen).to_have_attribute("aria-label", re.compile(f"^{label}"))
        expect(page.locator("#list")).to_have_attribute(
            "aria-activedescendant", chosen.get_attribute("id")
        )


def test_the_keys_work_wherever_the_focus_is(page, stage):
    """Whoever has just chosen a filter or moved the level goes on with the keys."""
    for name in ("a", "b", "c"):
        stage.play(f"stream-{name}", WORDS, CALM if name == "c" else RISING,
                   halt_after=None if name == "c" else 9)  # fmt: skip
    expect(page.locator("#filter input[value=halted] + span b")).to_have_text("2")
    choose(page, "stream-c")
    page.locator("#filter input[value=halted]").focus()
    page.keyboard.press("Space")
    page.keyboard.press("j")
    expect(page.locator("#id")).to_have_text("stream-b")
    for focus in ("#level", "#risk", "#text"):
        page.locator(focus).focus()
        for key, name in (("j", "a"), ("h", "b")):
            page.keyboard.press(key)
            expect(page.locator("#id")).to_have_text(f"stream-{name}")


def test_a_filter_that_nothing_passes_says_so(page, stage):
    stage.play("one", WORDS, CALM)
    expect(page.locator("#state")).to_have_text("✓ finished")
    expect(page.locator("#none")).to_be_hidden()
    page.locator("#filter input[value=halted]").focus()
    page.keyboard.press("Space")
    expect(page.locator("#none")).to_have_text("No stream is like this now.")
    expect(page.locator("#none")).to_be_visible()


def test_a_notice_tells_the_beginning_of_a_hash(page, stage):
    stage.do(lambda: stage.feed.notice("reloaded", {"bundle": "c50e2ca0160f" + "a" * 52}))
    stage.play("one", WORDS, CALM)
    expect(page.locator("#notices")).to_contain_text("reloaded bundle c50e2ca0160f")
    expect(page.locator("#notices")).not_to_contain_text("0160fa")


def test_many_streams_leave_room_for_the_order(browser, stage):
    stage.play("one", WORDS, CALM)
    with browsing(browser, viewport={"width": 390, "height": 844}) as page:
        page.goto(stage.url)
        expect(page.locator("#state")).to_have_text("✓ finished")
        apart = page.evaluate(
            """() => {
              const labels = [...document.querySelectorAll("#filter label")];
              for (const label of labels) label.querySelector("b").textContent = "9999";
              const last = labels.at(-1).getBoundingClientRect();
              const order = document.querySelector("#order").getBoundingClientRect();
              return order.top >= last.bottom || order.left >= last.right;
            }"""
        )
        assert apart


def test_everything_is_reached_by_tab_and_the_focus_is_seen(page, stage):
    stage.play("one", WORDS, RISING, halt_after=9)
    expect_all_of(page, "■ halted")
    page.locator("#level").fill("0.3")  # so that there is a way back to be reached
    page.evaluate("document.activeElement.blur()")
    reached = {}
    for _ in range(16):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const at = document.activeElement;
              const seen = at.type === "radio" ? at.nextElementSibling : at;
              return [at.id || at.name || at.className, getComputedStyle(seen).outlineStyle];
            }"""
        )
        reached[name] = outline
    for name in ("skip", "filter", "order", "list", "text", "risk", "level", "level-reset"):
        assert reached.get(name) == "solid", (name, reached)


def test_the_curve_is_read_out_token_by_token(page, stage):
    stage.play("one", WORDS, RISING, halt_after=9)
    expect_all_of(page, "■ halted")
    page.locator("#risk").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cursor")).to_have_text("token 5, risk 0.0300, “urn ”")
    expect(page.locator("#risk")).to_have_attribute(
        "aria-valuetext", "token 5, risk 0.0300, “urn ”"
    )
    page.keyboard.press("End")
    expect(page.locator("#cursor")).to_have_text("token 13, risk 0.6200")  # which has not left


# ------------------------------------------------------------------ replay


def test_the_slider_replays_a_stream_with_another_level(page, stage):
    stage.play("one", WORDS, RISING, halt_after=9)
    expect_all_of(page, "■ halted")
    result, slider = page.locator("#replay-result"), page.locator("#level")
    slider.fill("0.3")
    expect(result).to_have_text(
        "Would have been halted at token 10. 3 tokens that left would not have left."
    )
    struck = page.locator("#text span.stays")
    assert struck.all_inner_texts() == ["on ", "the ", "upper "]
    expect(page.locator("#risk")).to_contain_text("would halt at 10")
    slider.press("ArrowRight")
    expect(page.locator("#level-value")).to_have_text("0.301")
    slider.fill("0.9")
    expect(result).to_have_text(
        "Would not have been halted by any token it wrote; what it would have written next is "
        "not known. 1 token that stayed would have left."
    )
    page.locator("#level-reset").click()
    expect(struck).to_have_count(0)
    expect(page.locator("#level-value")).to_have_text("0.5")


def test_a_replay_of_a_stream_in_flight_says_that_it_is_so_far(page, stage):
    stream = stage.play("one", [*WORDS, "more "], RISING[:9] + [0.2] * 2, pause_at=10)
    expect(page.locator("#text")).to_contain_text("shelf.")
    page.locator("#level").fill("0.4")
    expect(page.locator("#replay-result")).to_contain_text(
        "So far: would have been halted at token 12."
    )
    stage.cancel([stream])
    expect(page.locator("#replay-result")).to_contain_text("Would have been halted at token 12.")


@functools.cache
def testbed_bundle():
    return testbed.load_bundle()


def judged(policy, logits, prompt, positions):
    """Report of a stream with these logits of the testbed's probes, by the kernels."""
    bundle = testbed_bundle()
    monitor = Monitor(replace(bundle, policy=policy), slots=1, trace=256)
    (tap,) = bundle.bank.taps
    weight, bias = bundle.bank.weight(tap).double(), bundle.bank.bias(tap).double()
    hidden = torch.linalg.pinv(weight) @ (torch.tensor(logits) - bias).T
    slot = monitor.admit("one", prompt)
    rows = torch.tensor(positions)
    monitor.observe(tap, hidden.T[rows].float())
    monitor.advance(torch.zeros(len(rows), dtype=torch.int32) + slot, rows.int())
    return monitor.retire(slot)


def a_policy(random, halt_at, base):
    hold_at = round(halt_at * base["hold"], 3) if base["hold"] else None
    return Policy(
        tiers={
            "moderate": {
                "horizon": base["horizon"],
                "halt_at": halt_at,
                "hold_at": hold_at,
                "release_at": None if hold_at is None else round(hold_at * base["release"], 3),
            }
        },
        default_tier="moderate",
        hold_back=base["hold_back"],
        on_unscored=base["on_unscored"],
    )


def test_replays_are_exact(page):
    """The page's replay against the kernels and the hold-back queue, on streams that they judge."""
    rng = random.Random(7)
    cases, expected = [], []
    for _ in range(150):
        prompt, tokens = rng.randint(1, 5), rng.randint(1, 60)
        base = {
            "hold": rng.choice([0, 0.5, 0.8]),
            "release": rng.choice([0.6, 1.0]),
            "horizon": rng.choice([0, 24]),
            "hold_back": rng.choice([1, 1, 2, 4, "turn"]),
            "on_unscored": rng.choice(["pass", "hold", "halt"]),
        }
        slope = rng.choice([0.15, -0.15])
        drift = np.cumsum([rng.gauss(slope, 1.2) for _ in range(prompt + tokens)]) - 4
        logits = np.stack([np.full_like(drift, -60), drift.clip(-8, 6), np.zeros_like(drift)], 1)
        if rng.random() < 0.5:
            logits[rng.randrange(len(logits))] = np.nan
        positions = [
            at for at in range(prompt + tokens) if at < prompt or rng.random() < 0.97
        ] or [0]  # fmt: skip
        # The risk does not depend on the level: it is taken from a run that none halts.
        free = base | {"on_unscored": "pass", "hold": 0}
        risks = judged(a_policy(rng, 1.0, free), logits, prompt, positions).trace.risk
        known = sorted({r for r in risks if r is not None}) or [0.5]
        # The second is above the risk, and not in single precision, which is what counts.
        risk = rng.choice(known)
        level = rng.choice([risk, min(risk * (1 + 1e-9), 1.0), *rng.choices([0.2, 0.6, 0.95], k=2)])
        policy = a_policy(rng, level, base)
        report = judged(policy, logits, prompt, positions)
        assert report.trace.position == positions
        response = list(range(prompt, positions[-1] + 1))
        unfed = [positions[-1] + 1] * (positions[-1] >= prompt and rng.random() < 0.3)
        left = released(report, response + unfed, policy)
        expected.append([report.trace.verdict, report.halted_at, len(left)])
        tier = policy.tiers["moderate"].model_dump(mode="json")
        cases.append({"positions": positions, "risks": risks, "prompt": prompt, "tier": "moderate",
                      "newest": (response + unfed or [prompt - 1])[-1],
                      "ended": True, "gapsAreUnscored": True, "policy": {
                          "tiers": {"moderate": tier}, "hold_back": base["hold_back"],
                          "on_unscored": base["on_unscored"]}})  # fmt: skip
    found = page.evaluate(
        """async (cases) => {
          const { judge, replay } = await import("/page/replay.js");
          return cases.map((one) => {
            const levels = one.policy.tiers.moderate;
            const verdicts = judge(one, levels, one.policy.on_unscored);
            const { haltedAt, left } = replay(one, one.policy, levels.halt_at);
            return [verdicts, haltedAt, left - one.prompt + 1];
          });
        }""",
        cases,
    )
    first = [case["prompt"] - 1 for case in cases]
    for one, mine, theirs, begin in zip(cases, expected, found, first, strict=True):
        after = [i for i, at in enumerate(one["positions"]) if at >= begin]
        assert [theirs[0][i] for i in after] == [mine[0][i] for i in after], one
        assert theirs[1:] == mine[1:], one
    halted = sum(mine[1] is not None for mine in expected)
    assert 10 < halted < len(cases) - 10  # both kinds are there
    assert any("HOLD" in mine[0] for mine in expected)


# ------------------------------------------------------------------ the engine


def test_streams_of_the_real_engine(browser):
    """What the page makes of events and reports agrees with what the engine did."""
    bundle = testbed_bundle()
    with (
        TestbedStage(bundles={bundle.hash: bundle}.get) as stage,
        browsing(browser) as page,
    ):
        page.goto(stage.url)
        expect(page.locator("#connection")).to_have_text("Live")
        reasons = set()
        for index in range(200):  # about a third of them are halted
            answer = stage.complete(testbed.sample_prompt(3, index), temperature=1.0)
            (choice,) = answer["choices"]
            if choice["finish_reason"] in reasons | {"length"}:
                continue
            reasons.add(choice["finish_reason"])
            choose(page, answer["id"])
            halted = choice["finish_reason"] == "content_filter"
            expect_all_of(page, "■ halted" if halted else "✓ finished")
            text = page.locator("#text")
            assert text.evaluate("e => e.innerText").startswith(choice["text"])
            left = answer["usage"]["completion_tokens"]
            expect(page.locator("#facts")).to_contain_text(f"{left} token")
            # Its own level, replayed: the page's rules give what the engine's gave.
            level = str(bundle.policy.tiers["moderate"].halt_at)
            page.evaluate(
                """(level) => {
                  const slider = document.getElementById("level");
                  slider.step = "any";
                  slider.value = level;
                  slider.dispatchEvent(new Event("input"));
                }""",
                level,
            )
            expect(page.locator("#replay-result")).to_have_text(
                f"Would have been halted at the same token, {answer['midstream']['halted_at']}."
                " The same tokens would have left."
                if halted
                else "Would not have been halted. The same tokens would have left."
            )
            expect(page.locator("#evidence figure")).to_have_count(2)  # those of responses
            if {"content_filter", "stop"} <= reasons:
                break
        assert {"content_filter", "stop"} <= reasons


# ------------------------------------------------------------------ many


def test_two_hundred_streams_at_once(page, stage):
    streams = [
        stage.play(f"many-{i}", WORDS * 400, CALM * 400, delay=0.5) for i in range(200)
    ]  # fmt: skip
    expect(stat(page, "in flight")).to_have_text("200")
    assert rows(page).count() < 60  # only what is seen exists
    page.locator("#list").focus()
    page.keyboard.press("Home")
    expect(page.locator("#id")).to_have_text("many-199")
    for _ in range(30):
        page.keyboard.press("j")
    expect(page.locator("#id")).to_have_text("many-169")
    expect(row(page, "many-169")).to_be_in_viewport()
    expect(page.locator("#text")).to_contain_text("shelf.")
    page.keyboard.press("End")
    expect(page.locator("#id")).to_have_text("many-0")
    page.get_by_label("Order").select_option("risk")
    page.locator("#filter").get_by_text("In flight").click()
    expect(stat(page, "in flight")).to_have_text("200")
    stage.cancel(streams)
    expect(stat(page, "in flight")).to_have_text("0")
    expect(rows(page)).to_have_count(0)
    page.locator("#filter").get_by_text("All").click()
    expect(rows(page).first).to_be_visible()


# ------------------------------------------------------------------ who may see what


def test_without_text_only_lengths_reach_the_page(browser):
    secret = "Xyzzyx"
    with Stage(text=False) as stage, browsing(browser) as page:
        bodies = []
        page.on("response", lambda r: bodies.append(r) if "/live/" not in r.url else None)
        page.goto(stage.url)
        stage.play("one", [secret, " ab"], [0.01, 0.02])
        expect_all_of(page, "✓ finished")
        expect(page.locator("#text")).to_have_text("·" * 6 + "·" * 3)
        expect(page.locator("#text-note")).to_have_text(
            "Text is not shown; each dot is a character."
        )
        assert secret not in page.content()
        record = next(iter(stage.live._numbered.values()))
        assert record.pieces == [(4, 6), (5, 3)]


def test_text_is_never_markup(page, stage):
    nasty = ["<img src=/nowhere onerror=alert(1)>", "</div><script>alert(2)</script>", "\u202etxt"]
    stage.play("<b>bold</b>", nasty, [0.01, 0.02, 0.03], client="<i>me</i>")
    expect_all_of(page, "✓ finished")
    assert page.locator("#text").inner_text() == "".join(nasty)
    assert page.locator("#text img, #text script, #id b, #facts i").count() == 0
    expect(page.locator("#id")).to_have_text("<b>bold</b>")


def test_the_page_asks_for_the_operators_key(browser):
    refused = "401 (Unauthorized)", "/live/session 401"
    with (
        Stage(operator=lambda key: key == "open sesame") as stage,
        browsing(browser, excuse=lambda text: any(map(text.__contains__, refused))) as page,
    ):
        stage.play("one", WORDS, CALM)
        page.goto(stage.url)
        expect(page.locator("#login")).to_be_visible()
        assert rows(page).count() == 0
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-error")).to_have_text("this is not the operator's key")
        page.locator("#key").fill("open sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#id")).to_have_text("one")
        (cookie,) = page.context.cookies(f"{stage.url}live/events")
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        assert "sesame" not in cookie["value"]
        assert page.evaluate("document.cookie") == ""
        page.reload()
        expect(page.locator("#id")).to_have_text("one")  # the session lasts
        page.locator("#sign-out").click()
        expect(page.locator("#login")).to_be_visible()


def test_a_page_comes_back_when_the_server_does(browser):
    with (
        socket.socket() as held,  # so that nobody takes the port meanwhile
        browsing(browser, excuse=lambda text: "ERR_" in text) as page,
    ):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        with Stage(port=held.getsockname()[1]) as stage:
            stage.play("before", WORDS, CALM)
            page.goto(stage.url)
            expect(page.locator("#id")).to_have_text("before")
        expect(page.locator("#connection")).to_have_text("No connection, trying again")
        with Stage(port=stage.port) as again:
            again.play("after", WORDS, CALM)
            expect(page.locator("#connection")).to_have_text("Live")
            expect(page.locator("#id")).to_have_text("after")


# ------------------------------------------------------------------ how it looks

CONTRAST = """(pairs) => {
  const rgb = (colour) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => {
    const [r, g, b] = rgb(colour).map((v) => v / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const root = getComputedStyle(document.documentElement);
  const value = (name) => light(root.getPropertyValue(name));
  return {
    ratios: pairs.map(([a, b]) => {
      const [low, high] = [value(a), value(b)].sort((x, y) => x - y);
      return (high + 0.05) / (low + 0.05);
    }),
    scale: [0, 1, 2, 3, 4, 5, 6, 7].map((i) => value(`--r${i}`)),
  };
}"""
ON = ["low", "low", "low", "low", "low", "mid", "high", "high"]
TEXT = [
    *((f"--{ink}", f"--{ground}") for ink in ("ink", "soft") for ground in ("panel", "ground")),
    *((f"--{ink}", "--panel") for ink in ("accent", "halt", "hold")),
    *((ink, "--accent-ground") for ink in ("--ink", "--soft", "--halt", "--hold")),
    ("--hold", "--hold-ground"),
    *((f"--r{i}", f"--on-{on}") for i, on in enumerate(ON)),
]
LINES = [(f"--{line}", "--panel") for line in ("curve", "edge", "halt", "hold", "accent")]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_can_be_read(browser, stage, scheme):
    with browsing(browser, color_scheme=scheme) as page:
        page.goto(stage.url)
        found = page.evaluate(CONTRAST, TEXT + LINES)
    ratios = dict(zip(TEXT + LINES, found["ratios"], strict=True))
    # WCAG 2.2, 1.4.3 and 1.4.11
    assert {pair: r for pair, r in ratios.items() if r < (4.5 if pair in TEXT else 3)} == {}
    scale = found["scale"] if scheme == "dark" else found["scale"][::-1]
    steps = [(b + 0.05) / (a + 0.05) for a, b in pairwise(scale)]
    assert min(steps) > 1.07, steps  # told apart by lightness alone, in the order of the risk


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_in_place(browser, stage, scheme, size):
    """Nothing is cut off or wider than the window; a picture of it is kept in results/."""
    width, height = SIZES[size]
    rng = random.Random(5)
    for i in range(40):
        risks = [min(0.99, max(0.001, r * rng.uniform(0.2, 1.6))) for r in (RISING + CALM) * 6]
        halt = next((at for at, risk in enumerate(risks) if risk >= 0.5), None)
        stage.play(f"chatcmpl-{rng.getrandbits(64):016x}", (WORDS * 12), risks,
                   halt_after=halt if i % 3 else None, pause_at=None if i % 4 else 60,
                   client="web")  # fmt: skip
    stage.do(lambda: stage.feed.notice("reloaded", {"bundle": "c50e2ca0160f"}))
    with browsing(
        browser, color_scheme=scheme, viewport={"width": width, "height": height}
    ) as page:
        page.goto(stage.url)
        page.wait_for_selector(".row.halted.ended")
        page.keyboard.press("h")
        expect_all_of(page, "■ halted")
        page.locator("#level").fill("0.3")
        expect(page.locator("#replay-result")).to_contain_text("Would have been halted")
        RESULTS.mkdir(exist_ok=True)
        page.screenshot(path=RESULTS / f"page-{size}-{scheme}.png", full_page=size == "narrow")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        outside = page.evaluate(
            """() => [...document.querySelectorAll(
              "header *, .tools *, .columns *, #detail h2, #detail h3, #detail dd, button, select")]
              .filter((node) => node.checkVisibility() && !node.closest(".away, .skip, svg"))
              .filter((node) => {
                const { left, right } = node.getBoundingClientRect();
                const cut = node.scrollWidth > node.clientWidth + 1;
                return right > innerWidth + 1 || left < -1 || cut
                  && getComputedStyle(node).display !== "inline"
                  && getComputedStyle(node).textOverflow !== "ellipsis";
              }).map((node) => `${node.tagName} ${node.id} ${node.textContent.slice(0, 30)}`)"""
        )
        assert outside == []
