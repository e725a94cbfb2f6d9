"""The example of docs/ray_serve_midstream.py: replicas decide about a conversation as one does."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import serving
from ledger_writers import has_redis_server, redis_server
from turn_cases import two_seals

from midstream import testbed
from midstream.bundle import Bundle
from midstream.ledger.ledger import conversation_key
from midstream.ledger.memory import MemoryLedger
from midstream.ledger.open import open_ledger
from midstream.policy import Policy, Thresholds
from midstream.serve.engine import Ask
from midstream.serve.gated import GatedEngine, HeldFeed
from midstream.serve.local import LocalEngine
from midstream.turn_history import History
from midstream.turn_policy import TurnPolicy

ray = pytest.importorskip("ray", reason="needs ray: pip install 'ray[serve]'")
serve = pytest.importorskip("ray.serve", reason="needs ray: pip install 'ray[serve]'")
import ray_serve_midstream  # noqa: E402
from named_replica import NamedReplica  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402

needs_redis = pytest.mark.skipif(not has_redis_server(), reason="needs redis-server")

MAX_TOKENS = 64
# Prompts of the testbed. To greedy answers its probes give next to no risk; of the turn model here
# that of the second, third and fifth, 7e-5 nats and more, is an opening, and that of the others,
# 3e-6 and less, is not.
TURNS = (1, 0, 9, 6, 2)
EDGE = 1e-5


def messages_of(index: int, history: list[dict[str, str]]) -> list[dict[str, str]]:
    """What is sent: the instructions of this turn's prompt, the history, what is asked now."""
    system, user = testbed.sample_prompt(0, index).messages
    return [system, *history, user]


def going_on(history: list[dict[str, str]], index: int, text: str) -> list[dict[str, str]]:
    user = testbed.sample_prompt(0, index).messages[1]
    return [*history, user, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiers = {"moderate": Thresholds(horizon=0, halt_at=1.0)}
    policy = Policy(tiers=tiers, default_tier="moderate", turns=TurnPolicy(block_at=0.5))
    chain = {"edges": [EDGE]}
    made = testbed.load_bundle().with_policy(policy).with_turns(two_seals(chain=chain))
    folder = tmp_path_factory.mktemp("ray") / "bundle"
    made.save(folder)
    return folder


def in_one_process(bundle: Path) -> tuple[list[tuple[str, str]], list[Any]]:
    """What is answered, and what the ledger then has."""

    async def talk() -> list[tuple[str, str]]:
        feed = HeldFeed()
        engine = LocalEngine(feed, bundle=bundle, slots=4)
        await engine.start()
        gated = GatedEngine(engine, feed, engine_bundle, ledger)
        history: list[dict[str, str]] = []
        said = []
        for index in TURNS:
            asked = Ask(
                f"s{index}",
                "testbed",
                tuple(messages_of(index, history)),
                None,
                MAX_TOKENS,
                sampling={"temperature": 0.0},
                conversation="c",
            )
            _, events = await serving.answer(gated, asked)
            said.append((serving.text_of(events), str(events[-1].message)))
            history = going_on(history, index, said[-1][0])
        histories.append(history)
        await gated.close(1.0)
        return said

    ledger, histories = MemoryLedger(), []
    engine_bundle = Bundle.load(bundle)
    said = asyncio.run(asyncio.wait_for(talk(), serving.PATIENCE))
    return said, ledger.read(conversation_key(":c"), History.of(histories[0]).keys)


class Client:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def ask(self, messages: list[dict[str, str]], conversation: str) -> tuple[str, str, str]:
        """Text, finish reason, and the replica that answered."""
        body = {
            "model": "testbed",
            "messages": messages,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "midstream": {"conversation": conversation},
        }
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=serving.PATIENCE) as answer:
            (choice,) = json.load(answer)["choices"]
            replica = answer.headers["x-replica"]
        return choice["message"]["content"], choice["finish_reason"], replica


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(bundle: Path, ledger: str) -> Iterator[Client]:
    """Replicas that take turns, on a port that nothing else can get."""
    with ExitStack() as stack:
        # not below pytest's folder: the paths of Ray's sockets must be short
        folder = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxy has it
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]

        stack.callback(ray.shutdown)
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=folder
        )
        stack.callback(serve.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = ray_serve_midstream.Options(ledger=ledger, bundle=bundle, slots=4)
        replicas = ray_serve_midstream.Midstream.options(
            func_or_class=NamedReplica,
            num_replicas=options.replicas,
            health_check_timeout_s=serving.PATIENCE,
            request_router_config=RequestRouterConfig(
                request_router_class="ray.serve.experimental.round_robin_router:RoundRobinRouter"
            ),
        )
        serve.run(replicas.bind(options))
        yield Client(port)


def test_arguments_of_serve_run_are_checked() -> None:
    """Ray reads the annotation itself, so it must not be a string."""
    (options,) = inspect.signature(ray_serve_midstream.app).parameters.values()
    assert options.annotation is ray_serve_midstream.Options


@needs_redis
def test_replicas_decide_as_one_process_does(client: Client, bundle: Path, ledger: str) -> None:
    expected, known = in_one_process(bundle)
    filtered = [reason == "content_filter" for _, reason in expected]
    assert filtered == [False, False, True, False, True]
    history: list[dict[str, str]] = []
    said, replicas = [], []
    for index in TURNS:
        text, reason, replica = client.ask(messages_of(index, history), "c")
        said.append((text, reason))
        replicas.append(replica)
        history = going_on(history, index, text)
    assert said == expected
    found = open_ledger(ledger).read(conversation_key(":c"), History.of(history).keys)
    for one, other in zip(found, known, strict=True):
        assert one is not None
        assert (one.turn, one.delivered) == (other.turn, other.delivered)
        assert one.belief == pytest.approx(other.belief, abs=1e-6)
    # The one that withholds the third answer has not seen the opening, which is in the second.
    assert all(one != other for one, other in pairwise(replicas))
