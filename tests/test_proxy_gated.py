"""The proxy behind the turn gate: an upstream's turns leave whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reading_toys
from fake_upstream import Connection, FakeUpstream
from serving import Seen, events_of, run, text_of
from turn_cases import bundle
from typer.testing import CliRunner

from midstream.cli import app as cli
from midstream.engines.hf.forced import CHUNK
from midstream.ledger.memory import MemoryLedger
from midstream.serve.engine import Ask
from midstream.serve.errors import ApiError
from midstream.serve.gated import GatedEngine, HeldFeed
from midstream.serve.proxy import ProxyEngine
from midstream.serve.upstream import Upstream
from midstream.streams import Event

QUIET, OPENS = "w7 w8", "w7 bad w8"


async def echo(connection: Connection) -> None:
    """Say what was said last."""
    await connection.say(*connection.body["messages"][-1]["content"].partition(" "))


async def conversation(folder: Path) -> tuple[list[list[Event]], Seen, HeldFeed]:
    """Four turns, of which the second and the last open a seal; then one that is refused."""
    seen, upstream = Seen(), FakeUpstream()
    feed = HeldFeed([seen])
    upstream.play = echo
    await upstream.start()
    judged = bundle()
    judged.save(folder)
    engine = ProxyEngine(
        feed, Upstream(upstream.url), name="watched", bundle=folder, slots=2,
        main=reading_toys.main_of_bundle,
    )  # fmt: skip
    await engine.start()
    gated = GatedEngine(engine, feed, judged, MemoryLedger(), trace=CHUNK)
    history: list[dict[str, Any]] = []
    told = []
    try:
        for number, words in enumerate((QUIET, OPENS, QUIET, OPENS)):
            history.append({"role": "user", "content": words})
            asked = Ask(f"s{number}", "watched", tuple(history), None, 16, conversation="c")
            told.append(await events_of(await gated.submit(asked)))
            history.append({"role": "assistant", "content": text_of(told[-1])})
        upstream.play = lambda connection: connection.answer("500 Oh", b"")
        with pytest.raises(ApiError):
            await gated.submit(
                Ask("refused", "watched", tuple(history[:1]), None, 16, conversation="d")
            )
    finally:
        await gated.close(5.0)
        await upstream.close()
    return told, seen, feed


def test_the_turn_that_completes_the_harm_is_withheld(tmp_path: Path) -> None:
    told, seen, feed = run(conversation(tmp_path / "bundle"))
    assert [(text_of(events), events[-1].message) for events in told] == [
        (QUIET, "stop"),
        (OPENS, "stop"),
        (QUIET, "stop"),
        ("", "content_filter"),
    ]
    assert told[-1][-1].cause == "turn gate: risk"
    assert [*seen.streams.values()] == told
    assert feed._held == {}


def test_the_command_puts_the_gate_before_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle().save(tmp_path / "bundle")
    ran: list[Any] = []
    monkeypatch.setattr("midstream.serve.run.run", lambda app, **_: ran.append(app))
    options = ["proxy", "--upstream", "http://host/v1", "--upstream-model", "theirs"]
    options += ["--model", "m", "--bundle", str(tmp_path / "bundle"), "--page", "off"]
    for extra in ([], ["--ledger", "memory:"]):
        result = CliRunner().invoke(cli, [*options, *extra])
        assert result.exit_code == 0, result.output
    plain, gated = (app.state.front for app in ran)
    assert isinstance(plain.engine, ProxyEngine)
    assert not plain.settings.conversations
    assert isinstance(gated.engine, GatedEngine)
    assert gated.settings.conversations


def test_a_ledger_needs_a_bundle() -> None:
    options = ["--upstream", "http://host/v1", "--upstream-model", "theirs", "--ledger", "memory:"]
    result = CliRunner().invoke(cli, ["proxy", *options])
    assert result.exit_code != 0
    assert "has no turn model" in " ".join(result.output.replace("│", " ").split())
