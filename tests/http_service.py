"""The service over a scripted engine, in process and on a real socket."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading

import httpx
from scripted_engine import ScriptedEngine

from midstream.serve.app import create_app
from midstream.serve.feed import Feed, Observer
from midstream.serve.run import Server, listen
from midstream.serve.settings import Settings

CHAT = {"model": "testbed", "messages": [{"role": "user", "content": "Is the urn pale?"}]}
TEXT = {"model": "testbed", "prompt": "The urn"}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
PATIENCE = 120.0  # seconds; against hanging, never a measure
LONG_LIVED = {"pieces": ["x"] * 4096, "risks": [0.1] * 4096, "delay": PATIENCE / 2048}
"""An engine whose streams outlast what any test waits for."""
LONG = {"stream": True, "max_tokens": 4096}  # of a request for that


class Draining(ScriptedEngine):
    """Lets streams end for as long as it may."""

    async def close(self, drain):
        self.unready = "the engine is closing"
        await asyncio.wait([stream._task for stream in self.streams], timeout=drain)
        await super().close(drain)


class Watching(Observer):
    def __init__(self):
        self.refusals, self.notices, self.events = [], [], []

    def refused(self, client, status, code):
        self.refusals.append((client, status, code))

    def notice(self, kind, facts):
        self.notices.append(kind)

    def event(self, stream, event):
        self.events.append(event)


class Service:
    """An application and what stands behind it."""

    def __init__(self, *pieces, settings=None, keys=None, routers=(), engine=None, **script):
        self.watching = Watching()
        feed = Feed([self.watching])
        if pieces:
            script["pieces"] = pieces
        self.engine = (engine or ScriptedEngine)(feed, **script)
        settings = Settings(**(settings or {}))
        self.app = create_app(self.engine, feed, settings, routers, keys)
        self.front = self.app.state.front

    def post(self, path, body=None, **options):
        return self.request("POST", path, json=body, **options)

    def request(self, method, path, **options):
        async def send():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.wait_for(client.request(method, path, **options), PATIENCE)

        return asyncio.run(send())

    @contextlib.contextmanager
    def listening(self, drain=5.0):
        """Serve on a real socket; gives its address."""
        sock = listen("127.0.0.1", 0)
        server = Server(self.app, drain=drain)
        thread = threading.Thread(target=lambda: server.run([sock]), daemon=True)
        thread.start()
        try:
            yield Address(*sock.getsockname())
        finally:
            wait_for(lambda: server.started)
            if thread.is_alive():
                with contextlib.suppress(RuntimeError):
                    server._loop.call_soon_threadsafe(server.drain)
                thread.join(PATIENCE)
            assert not thread.is_alive()

    def wait_for_streams(self, count):
        wait_for(lambda: len(self.engine.streams) >= count)

    def settled(self):
        """Wait until nothing is being answered any more."""
        wait_for(lambda: self.front.admission.count == 0)


class Address:
    def __init__(self, host, port):
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"

    def pause(self, seconds):
        """What a slow client does."""
        threading.Event().wait(seconds)

    def get(self, path):
        return httpx.get(self.url + path, timeout=PATIENCE)

    def post(self, body, path=CHATS):
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def connect(self, receive_buffer=None):
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(PATIENCE)
        sock.connect((self.host, self.port))
        return sock

    def send(self, body, path=CHATS, receive_buffer=None):
        """A request on a socket of its own, which is given back unread."""
        raw = json.dumps(body).encode()
        sock = self.connect(receive_buffer)
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return sock


class Child:
    """A server in a process of its own, which logs the port that it listens on."""

    def __init__(self, code, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lines = []
        self._reading = threading.Thread(target=self._lines.extend, args=(self._process.stderr,))
        self._reading.start()

    @property
    def log(self):
        return "".join(self._lines)

    @property
    def address(self):
        listens = re.compile(r"listening on http://([\d.]+):(\d+)")
        wait_for(lambda: listens.search(self.log) or not self._reading.is_alive())
        found = listens.search(self.log)
        assert found, f"it ended before it listened: {self.log}"
        return Address(found[1], int(found[2]))

    def wait_until_ready(self):
        wait_for(lambda: self._process.poll() is not None or self._is_ready())
        assert self._process.poll() is None, self.log

    def _is_ready(self):
        with contextlib.suppress(httpx.HTTPError):
            return self.address.get("/ready").status_code == 200
        return False

    def send_signal(self, sig):
        self._process.send_signal(sig)

    def ended(self):
        """Wait for its end; status, and what it printed."""
        status = self._process.wait(PATIENCE)
        self._reading.join(PATIENCE)
        return status, self._process.stdout.read()

    def close(self):
        self._process.kill()
        self._process.wait()
        self._reading.join()
        self._process.stdout.close()
        self._process.stderr.close()


def read_all(sock):
    """Everything up to the end of the connection, also where it is reset."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def wait_for(condition):
    clock = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        clock.wait(0.01)
    raise AssertionError("it did not come to pass")


def events(response):
    """Data of server-sent events, decoded; checks their form."""
    text = response if isinstance(response, str) else response.text
    assert text.endswith("data: [DONE]\n\n")
    lines = text.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def fault(response, status):
    """The standard error object of a refusal, checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return body["error"]
