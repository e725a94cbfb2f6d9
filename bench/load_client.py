"""The clients of bench/serve_load.py: many streams in one event loop, each token's arrival noted.

Arrival is when the kernel had a token's bytes ready for the client (``SO_TIMESTAMPNS``), so that it
does not depend on how busy this process is; beside it, when this process had read them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop

TIMESTAMPNS = 35  # SO_TIMESTAMPNS of Linux, which Python does not name
LEAVES_EVERY = 25  # streams; one of so many clients goes away in the middle
PATIENCE = 300.0  # seconds after which a stream has hung

_EVENT = re.compile(rb"data: (.*)\n\n")
_LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)


@dataclass
class Tally:
    """What the clients saw.

    ``streams`` has the id of each that was read to its end, and how many of the arrivals are its
    tokens'; ``faults`` what was wrong with any, and is asked to be empty.
    """

    streams: list[tuple[str, int]] = field(default_factory=list)
    arrived: array[float] = field(default_factory=lambda: array("d"))
    read: array[float] = field(default_factory=lambda: array("d"))
    reasons: dict[str, int] = field(default_factory=dict)
    prompt: int = 0
    tokens: int = 0
    scored: int = 0
    unscored: int = 0
    halts: dict[str, int] = field(default_factory=dict)
    left: int = 0
    faults: list[str] = field(default_factory=list)


def run(address: tuple[str, int], bodies: Sequence[bytes], streams: int, seconds: float) -> Tally:
    """Keep ``streams`` of them going for so long, each at least once; read all to their ends."""
    os.nice(10)  # clients are elsewhere: on these few cores they are not to come before the server
    return uvloop.run(_load(address, bodies, streams, seconds))


async def _load(
    address: tuple[str, int], bodies: Sequence[bytes], streams: int, seconds: float
) -> Tally:
    tally, end = Tally(), time.monotonic() + seconds
    work = iter(enumerate(bodies * (1 + 100_000 // len(bodies))))

    async def client() -> None:
        connection = _Connection(address)
        while True:
            number, body = next(work)
            leaves = number % LEAVES_EVERY == LEAVES_EVERY - 1
            try:
                whole = await asyncio.wait_for(connection.ask(body, leaves), PATIENCE)
            except (OSError, TimeoutError) as error:
                tally.faults.append(f"{type(error).__name__}: {error}")
                whole = False
            if whole:
                _count(connection, tally)
            elif leaves:
                tally.left += 1
            if time.monotonic() >= end:
                break
            if not whole:
                connection.close()
                connection = _Connection(address)
        connection.close()

    await asyncio.gather(*(client() for _ in range(streams)))
    return tally


class _Connection:
    """One socket, and the response that is coming in on it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._head = f"Host: {address[0]}:{address[1]}\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection(address)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, TIMESTAMPNS, 1)
        self._loop.add_reader(self._socket, self._readable)
        self._ended: asyncio.Future[bool] | None = None

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    async def ask(self, body: bytes, leaves: bool) -> bool:
        """Send a request; return True with the end of the response, False once it left before."""
        self.bytes = bytearray()
        self.marks: list[tuple[int, float, float]] = []  # bytes until then, arrived, read
        self._leaves = leaves
        self._ended = self._loop.create_future()
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        await self._loop.sock_sendall(self._socket, head.encode() + b"\r\n" + body)
        return await self._ended

    def _readable(self) -> None:
        data, ancillary, _, _ = self._socket.recvmsg(1 << 16, 64)
        now, wall = time.monotonic(), time.time()
        if self._ended is None or self._ended.done():
            if not data:  # the server has closed a connection on which nothing was asked
                self._loop.remove_reader(self._socket)
            return
        if not data:
            self._ended.set_exception(ConnectionError("the server hung up"))
            return
        arrived = now  # the first packets may come before the kernel has begun to stamp them
        if ancillary:
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
            arrived += seconds + nanoseconds / 1e9 - wall
        self.bytes += data
        self.marks.append((len(self.bytes), arrived, now))
        if data.endswith(b"0\r\n\r\n") or self._whole_by_length():
            self._ended.set_result(True)
        elif self._leaves and len(self.marks) == 4:
            self._ended.set_result(False)

    def _whole_by_length(self) -> bool:
        head, blank, body = self.bytes.partition(b"\r\n\r\n") if len(self.marks) < 3 else (b"",) * 3
        found = _LENGTH.search(head + b"\r\n") if blank else None
        return found is not None and len(body) >= int(found[1])


def _count(connection: _Connection, tally: Tally) -> None:
    """Take a whole response apart."""
    raw = bytes(connection.bytes)
    events = [(found.end(), found[1]) for found in _EVENT.finditer(raw)]
    if not raw.startswith(b"HTTP/1.1 200 ") or not events or events[-1][1] != b"[DONE]":
        tally.faults.append(raw[-300:].decode(errors="replace"))
        return
    chunks = [(end, json.loads(content)) for end, content in events[:-1]]
    if errors := [chunk for _, chunk in chunks if "error" in chunk]:
        tally.faults.append(json.dumps(errors[0]))
        return
    choices = [(end, choice) for end, chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for _, choice in choices if choice["finish_reason"]]
    if len(reasons) != 1 or "midstream" not in chunks[-2][1] or chunks[-1][1]["usage"] is None:
        tally.faults.append(
            f"{len(reasons)} finish reasons, or no facts, or no usage: {raw[-500:]!r}"
        )
        return
    facts, usage = chunks[-2][1]["midstream"], chunks[-1][1]["usage"]
    ends = [end for end, choice in choices if choice["delta"].get("content")]
    marks = [mark[0] for mark in connection.marks]
    for end in ends:
        _, arrived, read = connection.marks[bisect_left(marks, end)]
        tally.arrived.append(arrived)
        tally.read.append(read)
    tally.streams.append((chunks[0][1]["id"], len(ends)))
    tally.reasons[reasons[0]] = tally.reasons.get(reasons[0], 0) + 1
    tally.prompt += usage["prompt_tokens"]
    tally.tokens += usage["completion_tokens"]
    tally.scored += facts["scored"]
    tally.unscored += facts["unscored"]
    if facts["halted_at"] is not None:
        tally.halts[facts["cause"]] = tally.halts.get(facts["cause"], 0) + 1
