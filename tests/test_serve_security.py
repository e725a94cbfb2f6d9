"""The HTTP front under abuse: nonsense, keys, limits, and what answers give away."""

import asyncio
import contextlib
import hmac
import json
import os
import re
import socket

import httpx
import pytest
import schemathesis
from fastapi import APIRouter, Request
from http_service import (
    CHAT,
    CHATS,
    LONG,
    LONG_LIVED,
    PATIENCE,
    TEXT,
    TEXTS,
    Service,
    fault,
    read_all,
    wait_for,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks

from midstream.serve import keys as keys_module
from midstream.serve.errors import ApiError
from midstream.serve.keys import KeyFileError, Keys

LEAKS = re.compile(r'Traceback|File "|\.py\b|site-packages|midstream[./]serve|line \d+')
ADA, BOB, OPERATOR = "ada-key-0123456789", "bob-key-0123456789", "operator-key-0123456789"

# Fuzzing. One service each, made once: it keeps nothing between requests but what the engine saw.

FUZZED = Service("a", "b", risks=[0.1, 0.2])
load_all_checks()
schema = schemathesis.openapi.from_asgi("/openapi.json", FUZZED.app)


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_document_is_honest(case):
    """Whatever it allows is served, whatever it forbids refused, and as it says."""
    response = case.call()
    case.validate_response(response)
    assert not LEAKS.search(response.text)


KEYS = Keys({"ada": ADA})
LOCKED = Service(keys=KEYS)


def send(service, method, path, **options):
    response = service.request(method, path, **options)
    assert not LEAKS.search(response.text)
    return response


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [*CHAT, "prompt", "stream", "stop", "max_tokens", "midstream", "stream_options", "n", "tools"]
)


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from([CHATS, TEXTS]),
    raw=st.binary(max_size=200)
    | st.dictionaries(FIELDS | st.text(max_size=5), JSON, max_size=5).map(
        lambda body: json.dumps(body).encode("utf-8", "surrogatepass")
    ),
)
def test_any_body_gets_an_answer_or_the_error_object(path, raw):
    response = send(FUZZED, "POST", path, content=raw, headers={"Content-Type": "application/json"})
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        fault(response, response.status_code)


@settings(max_examples=100, deadline=None)
@given(
    fields=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3),
    chat=st.booleans(),
)
def test_a_valid_body_with_wild_fields_does_too(fields, chat):
    path, body = (CHATS, CHAT) if chat else (TEXTS, TEXT)
    raw = json.dumps(body | fields).encode("utf-8", "surrogatepass")
    response = send(FUZZED, "POST", path, content=raw, headers={"Content-Type": "application/json"})
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        fault(response, response.status_code)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(
        [b"authorization", b"content-type", b"content-length", b"accept", b"host"]
    ),
    value=st.binary(max_size=60),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"]),
    path=st.sampled_from([CHATS, "/v1/models", "/v1/models/%ff%00", "/ready", "/../etc"]),
)
def test_any_header_does_too(name, value, method, path):
    """Straight into the application: a server in front may pass on what a client sent."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def collect(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": value,
        "headers": [(name, value)],
        "client": None,
        "server": None,
        "scheme": "http",
    }
    asyncio.run(LOCKED.app(scope, receive, collect))
    assert sent[0]["status"] in (200, 401, 404, 405)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    assert not LEAKS.search(body.decode())


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(min_size=1, max_size=300))
def test_any_bytes_on_the_socket_leave_the_server_alive(impatient, raw):
    sock = impatient.connect()
    with contextlib.suppress(ConnectionError):
        sock.sendall(raw + b"\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
    answer = read_all(sock)
    sock.close()
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert not LEAKS.search(answer.decode("latin-1"))


@pytest.fixture(scope="module")
def listening():
    service = Service(settings={"header_seconds": PATIENCE})
    with service.listening() as address:
        yield address
        assert address.get("/health").status_code == 200


@pytest.fixture(scope="module")
def impatient():
    """A short time for heads, so that half a request ends soon; perhaps a whole one, too."""
    service = Service(settings={"header_seconds": 0.3})
    with service.listening() as address:
        yield address
        wait_for(lambda: address.get("/health").status_code == 200)


def test_what_is_not_http_gets_the_error_object(listening):
    sock = listening.connect()
    sock.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "Content-Length: 4\r\nContent-Length: 0\r\n\r\n",
        "Content-Length: +4\r\n\r\n",
        "Content-Length : 4\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        "X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        "X: a\0b\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_no_second_request_is_smuggled_in(listening, fields):
    """What a proxy in front could read in another way is refused, and the connection closed."""
    sock = listening.connect()
    head = f"POST {CHATS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    sock.sendall((head + fields + "GET /health HTTP/1.1\r\nHost: t\r\n\r\n").encode())
    answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


# Abuse of the socket


def test_heads_that_do_not_come_are_not_waited_for(impatient):
    """Slow senders lose their sockets, also those that never fall silent."""
    silent, slow, blank = (impatient.connect() for _ in range(3))
    slow.sendall(f"POST {CHATS} HTTP/1.1\r\nHost: ".encode())
    for sock in (slow, blank):
        with contextlib.suppress(ConnectionError):
            for _ in range(8):
                sock.sendall(b"\r\n" if sock is blank else b"x")
                impatient.pause(0.1)
    assert [b" 408 " in read_all(sock) for sock in (silent, slow, blank)] == [True] * 3


def test_a_second_request_on_a_socket_has_its_time_too(impatient):
    def first():
        nonlocal sock
        sock = impatient.connect()
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        return b" 200 " in sock.recv(1000)  # or it did not come in time, either

    sock = None
    wait_for(first)
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: ")
    assert b" 408 " in read_all(sock)


@pytest.mark.parametrize("head", [b"X-Long: ", b"X-Short: a\r\n"])
def test_giant_heads_are_refused(listening, head):
    sock = listening.connect()
    with contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n")
        for _ in range(100):
            sock.sendall(head * 1000)
    answer = read_all(sock)
    assert (
        not answer or b" 431 " in answer
    )  # the answer is lost where the rest meets a closed socket
    assert listening.get("/health").status_code == 200


def test_connections_at_once_are_limited():
    service = Service(settings={"max_connections": 10, "header_seconds": PATIENCE})
    with service.listening() as address:
        socks = [address.connect() for _ in range(10)]
        for _ in range(20):
            with address.connect() as sock:
                assert read_all(sock) == b""
        for sock in socks:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        assert all(b" 200 " in read_all(sock) for sock in socks)
        assert address.get("/health").status_code == 200


def test_many_giant_bodies_are_refused_and_not_kept():
    service = Service(settings={"max_body_bytes": 10_000})
    with service.listening() as address:
        for chunked in (True, False):
            for _ in range(10):
                sock = address.connect()
                length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 40}"
                sock.sendall(
                    f"POST {CHATS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                    f"{length}\r\n\r\n".encode()
                )
                with contextlib.suppress(ConnectionError):
                    for _ in range(100):
                        sock.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
                with contextlib.suppress(ConnectionError):
                    assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")
                sock.close()
        service.settled()
        assert address.post(CHAT).status_code == 200
        assert service.watching.refusals.count(("", 413, "body_too_large")) == 20


def test_a_client_that_reads_nothing_does_not_make_the_server_grow(caplog):
    """Every stream of a flood of readers that do not read is cancelled, and its socket dropped."""
    pieces = ["x" * 65536] * 4096
    service = Service(
        pieces=pieces,
        risks=[0.1] * len(pieces),
        delay=0.001,
        settings={"slow_reader_seconds": 0.3},
    )
    with service.listening() as address:
        socks = [address.send(CHAT | LONG, receive_buffer=4096) for _ in range(5)]
        service.wait_for_streams(5)
        service.settled()
        assert all(stream.cancelled for stream in service.engine.streams)
        assert not any(b"[DONE]" in read_all(sock) for sock in socks)
    assert caplog.text.count("its client did not read; cut") == 5


# Keys


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": ADA},
        {"Authorization": f"Basic {ADA}"},
        {"Authorization": "Bearer"},
        bearer("wrong"),
        bearer(ADA[:-1]),
        bearer(ADA + "x"),
        bearer(OPERATOR),
        {"X-Api-Key": ADA},
    ],
)
def test_without_a_clients_key_nothing_is_served(headers):
    service = Service(keys=Keys({"ada": ADA, "bob": BOB}, OPERATOR))
    for method, path in (("POST", CHATS), ("POST", TEXTS), ("GET", "/v1/models")):
        response = service.request(method, path, headers=headers)
        assert fault(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert service.watching.refusals == [("", 401, "invalid_api_key")] * 3
    assert service.request("GET", "/health").status_code == 200
    assert service.request("GET", "/ready").status_code == 200


def test_a_key_is_asked_for_before_the_body_is_read():
    raw = b"x" * 10_000
    assert Service(keys=KEYS).request("POST", CHATS, content=raw).status_code == 401


def test_each_key_is_a_client_with_a_limit_of_its_own():
    service = Service(
        keys=Keys({"ada": ADA, "bob": BOB}), settings={"max_streams_per_key": 1}, **LONG_LIVED
    )
    with (
        service.listening() as address,
        httpx.Client(base_url=address.url, timeout=PATIENCE) as http,
    ):
        with http.stream("POST", CHATS, json=CHAT | LONG, headers=bearer(ADA)) as first:
            reading = first.iter_bytes()  # closes the response when it is dropped
            assert next(reading)
            refused = http.post(CHATS, json=CHAT, headers=bearer(ADA))
            assert fault(refused, 429)["type"] == "rate_limit_error"
            assert "retry-after" in refused.headers
            short = CHAT | {"max_tokens": 1}
            assert http.post(CHATS, json=short, headers=bearer(BOB)).status_code == 200
        service.settled()
        assert http.post(CHATS, json=short, headers=bearer(ADA)).status_code == 200
    assert [ask.client for ask in service.engine.asked] == ["ada", "bob", "ada"]
    assert service.watching.refusals == [("ada", 429, "rate_limit_exceeded")]


def test_every_key_is_compared_and_in_constant_time(monkeypatch):
    compared, original = [], hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    keys = Keys({"ada": ADA, "bob": BOB})
    assert keys.client(f"Bearer {ADA}") == "ada"
    assert keys.client(f"bearer  {BOB} ") == "bob"
    with pytest.raises(ApiError):
        keys.client("Bearer x")
    assert compared == [(32, 32)] * 6


def test_the_operators_routes():
    router = APIRouter()
    keys = Keys({"ada": ADA}, OPERATOR)

    @router.get("/operate")
    async def operate(request: Request):
        keys.check_operator(request.headers.get("authorization"))
        return {}

    service = Service(keys=keys, routers=[router])
    assert fault(service.request("GET", "/operate"), 401)
    response = service.request("GET", "/operate", headers=bearer(ADA))
    assert fault(response, 403)["type"] == "permission_error"
    assert service.request("GET", "/operate", headers=bearer(OPERATOR)).status_code == 200
    assert Keys().is_operator(None)  # all is open without keys
    assert not Keys({"ada": ADA}).is_operator(ADA)  # and closed where only clients have one


def test_keys_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# clients\nada: {ADA}\n\nbob:{BOB}\noperator:{OPERATOR}\n")
    file.chmod(0o600)
    keys = Keys.load(file)
    assert keys.client(f"Bearer {BOB}") == "bob"
    assert keys.is_operator(OPERATOR)
    assert ADA not in repr(vars(keys))
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            Keys.load(file)
    file.chmod(0o600)
    for text, message in [
        ("ada\n", "line 1: expected name:key"),
        ("ada:short\n", "line 1: expected name:key"),
        (f"a da:{ADA}\n", "line 1: expected name:key"),
        (f"ada:{ADA}\nada:{BOB}\n", "line 2: .*twice"),
        (f"ada:{ADA}\nbob:{ADA}\n", "line 2: .*twice"),
        (f"operator:{OPERATOR}\n", "no client's key"),
    ]:
        file.write_text(text)
        with pytest.raises(KeyFileError, match=message) as refused:
            Keys.load(file)
        assert ADA not in str(refused.value)
    with pytest.raises(KeyFileError, match="plain file"):
        Keys.load(tmp_path)


def test_a_key_file_that_is_not_text(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(os.urandom(64) + b"\xff")
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="UTF-8"):
        Keys.load(file)
