"""Start a server, ask it through the official client; the Hugging Face engine for comparison."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import openai
import torch
from environment import LIMIT

from midstream import testbed
from midstream.engines.hf import encode
from midstream.monitor import Monitor

MIDSTREAM = Path(sys.executable).with_name("midstream")
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
NAME = "testbed"
ROOM = "64M"  # for keys and values; by default vLLM takes most of the machine's memory


def command(*options: str, bundle: Path | None = testbed.BUNDLE_DIR) -> list[str]:
    """The command line of a server; without a bundle that of vLLM alone."""
    model = str(testbed.MODEL_DIR)
    if bundle is None:
        return [*VLLM, model, *options]
    return [str(MIDSTREAM), "vllm", "serve", model, "--bundle", str(bundle), *options]


class Server:
    """A server process on the testbed's model; a context manager that waits until it answers."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        bundle: Path | None = testbed.BUNDLE_DIR,
        eager: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:
        # Bound and not listening, it keeps the port from everyone who does not say REUSEADDR.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = self._reserved.getsockname()[1]
        self.log = folder / "server.log"
        self._command = command(
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", NAME),
            *("--dtype", "float32", "--max-num-seqs", "16", "--kv-cache-memory-bytes", ROOM),
            *["--enforce-eager"] * eager,
            *options,
            bundle=bundle,
        )
        self._folder = folder
        self._environment = os.environ | (environment or {})

    def __enter__(self) -> Self:
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + LIMIT
        while True:
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = self.log.read_text()[-4000:]
                raise RuntimeError(f"the server {'ended' if ended else 'hangs'} at start:\n{tail}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self._url("/health"), timeout=LIMIT).close()
                return
            time.sleep(0.5)

    def __exit__(self, *error: object) -> None:
        """End the server and the processes it started, whichever of them are left."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reserved.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self._url("/v1"), api_key="none", max_retries=0, timeout=LIMIT
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self._url("/v1"), api_key="none", max_retries=0, timeout=LIMIT
        )

    def statuses(self) -> list[dict[str, int]]:
        """What the plugin's workers count, one per rank."""
        request = urllib.request.Request(
            self._url("/collective_rpc"),
            json.dumps({"method": "midstream_status"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as reply:
            return json.load(reply)["results"]

    def status(self) -> dict[str, int]:
        return self.statuses()[0]

    def idle_status(self) -> dict[str, int]:
        """The same once every stream has left; fails when one never does."""
        deadline = time.monotonic() + LIMIT
        while (status := self.status())["streams"]:
            assert time.monotonic() < deadline, f"streams stay: {status}"
            time.sleep(0.1)
        assert status["free"] == status["slots"]
        return status

    def logged(self, type: str) -> list[dict[str, Any]]:
        """Events of one type in the log."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line[line.index("{") :]) for line in lines if f'"type":"{type}"' in line]

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face engine says of one greedy response."""

    messages: list[dict[str, str]]
    prompt: list[int]
    max_tokens: int
    response: list[int]
    halted_after: int | None
    """Response tokens before the one that was flagged."""

    @property
    def delivered(self) -> list[int]:
        return self.response[: self.halted_after]

    @property
    def finish_reason(self) -> str:
        if self.halted_after is not None:
            return "content_filter"
        return "length" if len(self.response) == self.max_tokens else "stop"


@cache
def references(count: int, lengths: tuple[int, ...] = (16, 40, 80, 120)) -> list[Reference]:
    """Judge greedy responses to the testbed's prompts with the Hugging Face engine."""
    torch.set_num_threads(1)
    model, tokenizer = testbed.load()
    found = []
    for number in range(count):
        monitor = Monitor(testbed.load_bundle(), slots=1)
        messages = testbed.sample_prompt(7, number).messages
        ids = encode(model, tokenizer, messages)
        limit = lengths[number % len(lengths)]
        with monitor.attach(model, tokenizer) as attached:
            # One more, so that the last token asked for is fed and judged as in vLLM.
            sequences = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=limit + 1,
                logits_processor=[attached.halting()],
            )
        report = attached.reports[0]
        halted = None if report.halted_at is None else report.halted_at - ids.shape[1]
        found.append(
            Reference(
                messages,
                ids[0].tolist(),
                limit,
                attached.responses(sequences)[0][:limit],
                halted,
            )
        )
    return found


@dataclass
class Answer:
    """What a client got."""

    text: str
    finish_reason: str | None
    tokens: int


async def ask(
    client: openai.AsyncOpenAI, reference: Reference, *, chat: bool, stream: bool, **options: Any
) -> Answer:
    """Ask for one reference's response by one of the two endpoints."""
    options = {"model": NAME, "temperature": 0, "max_tokens": reference.max_tokens, **options}
    if chat:
        create, options["messages"] = client.chat.completions.create, reference.messages
    else:
        create, options["prompt"] = client.completions.create, reference.prompt
    if not stream:
        reply = await create(**options)
        choice = reply.choices[0]
        text = choice.message.content if chat else choice.text
        return Answer(text or "", choice.finish_reason, reply.usage.completion_tokens)
    answer = Answer("", None, 0)
    async for part in await create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            answer.text += (choice.delta.content if chat else choice.text) or ""
            answer.finish_reason = choice.finish_reason or answer.finish_reason
        if part.usage is not None:
            answer.tokens = part.usage.completion_tokens
    return answer


def ask_all(server: Server, asked: list[Reference], at_once: int = 16) -> list[Answer]:
    """Ask for all, ``at_once`` at the same time, by all four ways in turn."""

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(at_once)
        async with server.async_client() as client:

            async def one(number: int, reference: Reference) -> Answer:
                async with gate:
                    return await ask(
                        client, reference, chat=number % 2 == 0, stream=number // 2 % 2 == 0
                    )

            return await asyncio.gather(*(one(n, r) for n, r in enumerate(asked)))

    return asyncio.run(run())


def assert_as_reference(asked: list[Reference], answers: list[Answer]) -> None:
    """Same tokens, same halts, same reasons as in the Hugging Face engine."""
    _, tokenizer = testbed.load()
    wrong = [
        (number, answer, reference.finish_reason, len(reference.delivered))
        for number, (reference, answer) in enumerate(zip(asked, answers, strict=True))
        if answer.text.strip() != tokenizer.decode(reference.delivered).strip()
        or answer.finish_reason != reference.finish_reason
        or answer.tokens - (reference.finish_reason == "stop") != len(reference.delivered)
    ]
    assert not wrong, wrong
