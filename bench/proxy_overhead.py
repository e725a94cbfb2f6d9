"""What the proxy adds to each token: 50 streams of the testbed's text, direct and through it.

    python bench/proxy_overhead.py

An upstream in a process of its own writes a token of each stream every 50 ms, as APIs do, with the
blank before the word. Its clients read it directly, and through ``midstream proxy`` with the
testbed's model, which judges every token. Prints one JSON object:

proxy_added_ms, proxy_added_p99_ms
    From when the upstream sent the text that completes a token to when the client has the token,
    less the median of the same without the proxy. A word is complete when the blank behind it has
    come: to wait for that is not the proxy's work, and stated apart.
proxy_hold_back_ms
    What a token waits so for the one behind it, in the median: about the upstream's pace.
direct_ms, direct_p99_ms
    From the upstream's sending to the client's having, without the proxy.
front_cpu_us, worker_cpu_us
    Time of a core that each process of the proxy takes for a token: what is left to compare where
    other work has the cores. A worker that is kept waiting feeds more tokens in a pass, so its own
    is less then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil

from midstream import testbed

STREAMS = 50
TOKENS = 40
PACE = 0.05
ROUNDS = 5
_WAIT = 120.0

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

Times = dict[str, list[float]]


def event(text: str, reason: str | None = None) -> bytes:
    """A chunk of the transfer with one event of a chat's stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    data = f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def write(texts: list[list[str]], pace: float, port: multiprocessing.Queue[int]) -> None:
    """Be the upstream. Stream ``i`` of run ``r`` is asked for as user ``r-i``."""
    sent: Times = {}

    async def play(writer: asyncio.StreamWriter, name: str) -> None:
        pieces = texts[int(name.rpartition("-")[2])]
        times = sent[name] = []
        writer.write(_HEAD)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for number, piece in enumerate([*pieces, ""]):
            await asyncio.sleep(max(0.0, begun + pace * number - loop.time()))
            times.append(time.monotonic())
            writer.write(event(piece, None if number < len(pieces) else "stop"))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            length = 0
            while (line := await reader.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line[15:])
            if head.startswith(b"GET"):
                body = json.dumps(sent).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            else:
                await play(writer, json.loads(await reader.readexactly(length))["user"])

    async def listen() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


async def ask(port: int, name: str, messages: Any) -> list[tuple[float, str]]:
    """Read one stream: when each piece came, and the piece."""
    body = {"model": "testbed", "messages": messages, "user": name, "stream": True}
    raw = json.dumps({**body, "max_tokens": 2 * TOKENS}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    head += "content-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    found = []
    while (line := await reader.readline()).strip() != b"data: [DONE]":
        came = time.monotonic()
        if not line:
            raise RuntimeError(f"stream {name} broke off")
        if line.startswith(b"data: "):
            content = json.loads(line[6:])
            if "error" in content:
                raise RuntimeError(f"stream {name}: {content['error']}")
            if text := content["choices"][0]["delta"].get("content"):
                found.append((came, text))
    writer.close()
    return found


async def run(port: int, name: str, chats: list[Any]) -> list[list[tuple[float, str]]]:
    """Read all streams at once, begun evenly over the time between two tokens."""

    async def one(index: int) -> list[tuple[float, str]]:
        await asyncio.sleep(PACE * index / len(chats))
        return await ask(port, f"{name}-{index}", chats[index])

    return await asyncio.gather(*(one(index) for index in range(len(chats))))


async def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    length = 0
    while (line := await reader.readline()).strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line[15:])
    body = await reader.readexactly(length)
    writer.close()
    return status, body


def delays(
    pieces: list[str], sent: list[float], came: list[tuple[float, str]], *, waits: bool
) -> tuple[list[float], list[float]]:
    """Seconds from complete to read, and from sent to complete, for each token.

    ``waits`` is false without the proxy, where a token is complete when it is sent.
    """
    if "".join(text for _, text in came) != "".join(pieces):
        raise RuntimeError("the text is not the upstream's")
    arrivals = [moment for moment, text in came for _ in text]  # of each character
    added, held, end = [], [], 0
    for number, piece in enumerate(pieces):
        end += len(piece)
        later = range(number + 1, len(pieces))
        blank = next((k for k in later if pieces[k][0] == " "), len(pieces))
        complete = sent[blank if waits else number]
        added.append(arrivals[end - 1] - complete)
        held.append(complete - sent[number])
    return added, held


def scripts(count: int, tokens: int) -> tuple[list[Any], list[list[str]]]:
    """Chats of the testbed, and responses that its model wrote and its bundle lets pass."""
    import torch

    from midstream.engines.hf.scoring import GivenTokens, feed
    from midstream.monitor import Monitor

    torch.set_num_threads(1)
    model, _ = testbed.load()
    monitor = Monitor(testbed.load_bundle(), slots=1, trace=512)
    prompts = [testbed.sample_prompt(7, index) for index in range(5 * count)]
    chats, texts = [], []
    for prompt, ids in zip(
        prompts, testbed.generate_responses(model, prompts, seed=7), strict=True
    ):
        every = [*prompt.ids, *ids[:tokens]]
        given = GivenTokens("x", every, [True] * len(every), prompt_tokens=len(prompt.ids))
        if len(ids) > tokens and feed(model, [given], monitor)[0].verdict == "CONTINUE":
            text = testbed.text_of(ids[:tokens])
            chats.append(prompt.messages)
            texts.append(re.findall(r" ?[^ .,?]+|[.,?]", text))
    if len(chats) < count:
        raise RuntimeError(f"{len(chats)} responses pass, {count} are needed")
    return chats[:count], texts[:count]


def seconds_of(process: psutil.Process) -> float:
    """Time of a core that it has taken."""
    taken = process.cpu_times()
    return float(taken.user + taken.system)


async def measure(
    upstream: int, proxy: int, process: psutil.Process, chats: list[Any], texts: list[list[str]]
) -> Any:
    """Alternate direct runs and runs through the proxy."""
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            if (await get(proxy, "/ready"))[0] == 200:
                break
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("the proxy did not come up")
        await asyncio.sleep(0.2)
    await run(proxy, "warm", chats)
    came = {}
    worker = max(process.children(), key=lambda child: int(child.memory_info().rss))
    before = [seconds_of(one) for one in (process, worker)]
    for number in range(ROUNDS):
        for kind, port in (("direct", upstream), ("proxied", proxy)):
            came[f"{kind}{number}"] = await run(port, f"{kind}{number}", chats)
            print(f"{kind} {number} done", file=sys.stderr)
    taken = [seconds_of(one) - begun for one, begun in zip((process, worker), before, strict=True)]
    sent: Times = json.loads((await get(upstream, "/"))[1])
    found: dict[str, list[float]] = {"direct": [], "proxied": [], "held": []}
    for name, streams in came.items():
        kind = name.rstrip("0123456789")
        for index, stream in enumerate(streams):
            times = sent[f"{name}-{index}"]
            added, held = delays(texts[index], times, stream, waits=kind == "proxied")
            found[kind] += added
            found["held"] += held if kind == "proxied" else []
    return found, [round(1e6 * seconds / len(found["proxied"]), 1) for seconds in taken]


def percentile(values: list[float], share: int) -> float:
    """In milliseconds."""
    return round(1e3 * statistics.quantiles(values, n=100)[share - 1], 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=STREAMS)
    streams = parser.parse_args().streams
    chats, texts = scripts(streams, TOKENS)
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    writing = multiprocessing.Process(target=write, args=(texts, PACE, ports), daemon=True)
    writing.start()
    upstream = ports.get(timeout=_WAIT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from midstream.cli import main; main()", "proxy"]
    options = ["--upstream", f"http://127.0.0.1:{upstream}/v1", "--upstream-model", "testbed"]
    options += ["--port", str(port), "--slots", str(streams), "--page", "off"]
    proxy = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    try:
        watched = psutil.Process(proxy.pid)
        found, (front, worker) = asyncio.run(measure(upstream, port, watched, chats, texts))
    finally:
        proxy.terminate()
        proxy.wait()
        writing.terminate()
    direct = percentile(found["direct"], 50)
    result = {
        "streams": streams,
        "tokens": len(found["proxied"]),
        "pace_ms": 1e3 * PACE,
        "proxy_added_ms": round(percentile(found["proxied"], 50) - direct, 3),
        "proxy_added_p99_ms": round(percentile(found["proxied"], 99) - direct, 3),
        "proxy_hold_back_ms": percentile(found["held"], 50),
        "direct_ms": direct,
        "direct_p99_ms": percentile(found["direct"], 99),
        "front_cpu_us": front,
        "worker_cpu_us": worker,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
