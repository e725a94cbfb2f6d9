"""By which names a server without keys is reached; and what its page's cookie is marked with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_service import CHAT, CHATS
from scripted_engine import ScriptedEngine

from midstream.serve.assemble import Watch, assemble
from midstream.serve.feed import Feed
from midstream.serve.hosts import is_loopback
from midstream.serve.keys import Keys
from midstream.serve.settings import Settings, SettingsError

KEY = "operator-key-0123456789"
PATHS = ["/v1/models", "/metrics", "/openapi.json", "/", "/live/session", "/ready", "/nothing"]


class Engine(ScriptedEngine):
    bundle = None

    def look_closely(self, stream: str, on: bool) -> None:
        pass


def app(
    host: str = "127.0.0.1", keys: Keys | None = None, feed: Feed | None = None, **settings: Any
) -> Any:
    feed = feed or Feed()
    limits = Settings(**settings)
    return assemble(
        Engine(feed), feed, settings=limits, keys=keys or Keys(), watch=Watch(), host=host
    )


def ask(application: Any, *requests: tuple[Any, ...], host: str, **headers: str) -> list[Any]:
    async def send() -> list[Any]:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [
                await client.request(
                    method, path, headers={"Host": host, **headers}, json=body[0] if body else None
                )
                for method, path, *body in requests
            ]

    return asyncio.run(send())


REQUESTS = [("POST", CHATS, CHAT), *(("GET", path) for path in PATHS)]


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "127.0.0.1.evil.example", "", "[::1", "a b", "localhost."),
        *("evil.example@127.0.0.1", "127.0.0.1/.evil.example", "127.0.0.1#evil.example"),
    ],
)
def test_on_loopback_and_without_keys_a_name_that_leads_here_reaches_nothing(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused = []

    class Watching(Feed):
        def refused(self, client: str, status: int, code: str) -> None:
            refused.append((client, status, code))

    caplog.set_level("INFO", "midstream.serve.access")
    application = app(feed=Watching())
    for answer in ask(application, *REQUESTS, host=host):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"
    assert refused == [("", 403, "host_not_allowed")] * len(REQUESTS)
    assert caplog.text.count("status=403") == len(REQUESTS)
    assert not application.state.front.engine.asked


@pytest.mark.parametrize(
    "hosts",
    [[], ["localhost", "evil.example"], ["evil.example", "localhost"], ["localhost", "localhost"]],
)
def test_a_request_has_one_name_and_no_other_header_is_one(hosts: list[str]) -> None:
    """A client that names none is no browser, but none that has to be served either."""
    headers = [(b"host", host.encode()) for host in hosts]
    headers += [(b"x-forwarded-host", b"localhost"), (b"forwarded", b"host=localhost")]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}
    scope |= {"http_version": "1.0", "query_string": b"", "scheme": "http"}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app()(scope, receive, send))
    assert sent[0]["status"] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "LocalHost", "[::1]:80", "10.1.2.3", "box:80"])
def test_by_an_address_as_localhost_and_by_allowed_names_it_is_reached(host: str) -> None:
    application = app(allowed_hosts=["Box"])
    answers = ask(application, *REQUESTS[:-1], host=host)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert answers[PATHS.index("/live/session") + 1].json()["open"]
    (answer,) = ask(application, REQUESTS[-1], host=host)
    assert answer.status_code == 404


def test_with_keys_and_beyond_loopback_names_are_not_looked_at() -> None:
    request = ("POST", CHATS, CHAT)
    (answer,) = ask(app("0.0.0.0"), request, host="box.example")
    assert answer.status_code == 200
    keys = Keys({"ada": KEY})
    (answer,) = ask(app(keys=keys), request, host="box.example", Authorization=f"Bearer {KEY}")
    assert answer.status_code == 200


def test_which_addresses_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "box.example", ""]))


@pytest.mark.parametrize("name", ["http://box", "box:80", "*", ""])
def test_names_are_names(name: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"allowed_hosts: ['{name}']\n")
    with pytest.raises(SettingsError, match="allowed_hosts"):
        Settings.load(file)
    file.write_text("allowed_hosts: [Box.Example]\n")
    assert Settings.load(file).allowed_hosts == {"box.example"}


@pytest.mark.parametrize(
    ("origin", "secure"),
    [("https://watch.example", True), ("http://127.0.0.1:8000", False), ("null", False)],
)
def test_the_pages_cookie_is_secure_where_the_browser_sees_https(origin: str, secure: bool) -> None:
    """Something in front speaks TLS, and plain HTTP with the server."""
    application = app(keys=Keys({"ada": KEY}, KEY + "x"))
    request = ("POST", "/live/session")
    bearer = f"Bearer {KEY}x"
    (answer,) = ask(application, request, host="watch.example", Authorization=bearer, Origin=origin)
    assert answer.status_code == 200
    assert ("Secure" in answer.headers["set-cookie"]) == secure
