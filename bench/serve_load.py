"""What `midstream serve` adds to a token, and whether it holds, under many streams.

    python bench/serve_load.py [--seconds 300] [--streams 200]

Starts the server on the testbed's model, keeps so many streams going from one other process for so
long (one client of 25 leaves in the middle), and prints one JSON object.

``serve_p99_added_ms_200_streams``: for each token, the time from the end of the engine's step that
judged it, taken in the worker once the step's verdicts can be read, to its arrival at the client,
both on the machine's monotonic clock. In it are detokenising and the hold-back's bookkeeping, the
channel from worker to server, events and metrics, HTTP, and waiting for the other streams' tokens
of the same step, which all come at the same moment: the last of 200 waits for 199. It is not in it
that a token waits for its own step to end, which it does without a service, too. Arrival is when
the client's kernel had the bytes. Until the client had read them is ``read_p99_ms``: what the load
of this one client adds to that is its own, and is not counted; but it runs on the same cores, and
what it takes from the server there is counted.

``serve_rss_slope_mb_per_min``: line fitted to the resident memory of the server and the worker,
second by second, after the first third.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import load_client
import numpy as np
import psutil
from load_client import Tally
from load_server import RECORD, key_of
from prometheus_client.parser import text_string_to_metric_families

from midstream import testbed

MAX_TOKENS = 96
WARM_UP = 1 / 3  # of the time; latencies and memory are taken after it
STARTING = 120.0  # seconds, against hanging


class LoadError(RuntimeError):
    """The service did not do what it promises."""


class Service:
    """A server that was started, and what it says and takes.

    Parameters
    ----------
    process : subprocess.Popen
    address : tuple of str and int
    """

    def __init__(self, process: subprocess.Popen[str], address: tuple[str, int]) -> None:
        self.address = address
        self.front = psutil.Process(process.pid)
        self._log: list[str] = []
        assert process.stderr is not None
        self._reading = threading.Thread(target=self._log.extend, args=(process.stderr,))
        self._reading.start()

    def get(self, path: str) -> str:
        """What the server answers."""
        url = f"http://{self.address[0]}:{self.address[1]}{path}"
        with urllib.request.urlopen(url, timeout=STARTING) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Values by name and labels."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                labels = [v for name, v in sorted(sample.labels.items()) if name != "model_name"]
                found[sample.name.removeprefix("midstream:"), *labels] = sample.value
        return found

    @property
    def worker(self) -> psutil.Process:
        """The process of the model."""
        return max(self.front.children(), key=lambda child: int(child.memory_info().rss))

    def complaints(self) -> list[str]:
        """Lines of the log that are no news."""
        return [line for line in self._log if re.search(r" (WARNING|ERROR|CRITICAL) ", line)]


@contextmanager
def served(log: Path, slots: int) -> Iterator[Service]:
    """Start `midstream serve`, wait until it is ready, stop it in the end."""
    script = str(Path(__file__).with_name("load_server.py"))
    options = ["--port", "0", "--slots", str(slots)]
    process = subprocess.Popen(
        [sys.executable, script, str(log), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on http://([\d.]+):(\d+)", line):
                break
        else:
            raise LoadError("the server ended before it listened")
        service = Service(process, (found[1], int(found[2])))
        wait_until(lambda: "ready" in service.get("/ready"), STARTING, "the server is not ready")
        yield service
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def wait_until(true: Any, seconds: float, otherwise: str) -> None:
    """Ask again and again; a connection that is refused is a no."""
    end = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise LoadError(otherwise)
        time.sleep(0.1)


def load(streams: int, seconds: float) -> dict[str, Any]:
    """Serve, put the load on, check everything; return the figures."""
    bodies = [request(seed) for seed in range(512)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps"
        with (
            served(log, streams) as service,
            ProcessPoolExecutor(1, get_context("spawn")) as pool,
        ):
            pool.submit(int).result()  # the process is there before time counts
            front, worker = service.front, service.worker
            before, begun = [cpu(front), cpu(worker)], time.monotonic()
            loaded = pool.submit(load_client.run, service.address, bodies, streams, seconds)
            memory = list(watch(loaded, front, worker))
            tally = loaded.result()
            took = time.monotonic() - begun
            busy = [cpu(front) - before[0], cpu(worker) - before[1]]
            wait_until(
                lambda: idle(service.metrics()), STARTING, "slots leak, or streams never end"
            )
            check(tally, service.metrics(), service)
        ended = steps_of(log.read_bytes())  # the worker has closed it
    settled = begun + seconds * WARM_UP
    arrived, read, steps = added(tally, ended, settled, begun + seconds)
    rss = np.array([row for row in memory if row[0] > settled])
    return {
        f"serve_p99_added_ms_{streams}_streams": percentile(arrived, 99),
        "serve_rss_slope_mb_per_min": sum(slopes := [slope(rss[:, 0], rss[:, n]) for n in (1, 2)]),
        "added_p50_ms": percentile(arrived, 50),
        "read_p50_ms": percentile(read, 50),
        "read_p99_ms": percentile(read, 99),
        "step_p50_ms": percentile(steps, 50),
        "step_p99_ms": percentile(steps, 99),
        "tokens_per_step": len(arrived) / max(1, len(steps) + 1),
        "tokens_per_second": tally.tokens / took,
        "streams_per_second": sum(tally.reasons.values()) / took,
        "front_us_per_token": busy[0] / tally.tokens * 1e6,
        "worker_us_per_token": busy[1] / tally.tokens * 1e6,
        "rss_slope_front_mb_per_min": slopes[0],
        "rss_slope_worker_mb_per_min": slopes[1],
        "rss_mb": [round(n, 1) for n in memory[-1][1:]],
        "seconds": took,
        "streams_finished": tally.reasons,
        "streams_left": tally.left,
        "halts": tally.halts,
        "errors": len(tally.faults),
    }


def request(seed: int) -> bytes:
    """A chat of the testbed, sampled."""
    return json.dumps(
        {
            "model": "testbed",
            "messages": testbed.sample_prompt(seed, 0).messages,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def watch(loaded: Any, *processes: psutil.Process) -> Iterator[tuple[float, ...]]:
    """Time and resident MB of each, once a second while the load lasts."""
    while not loaded.done():
        yield (time.monotonic(), *(p.memory_info().rss / 1e6 for p in processes))
        time.sleep(1.0)


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def idle(metrics: dict[tuple[str, ...], float]) -> bool:
    return not any(
        metrics[name,] for name in ("num_streams", "num_slots_used", "num_requests_waiting")
    )


def check(tally: Tally, metrics: dict[tuple[str, ...], float], service: Service) -> None:
    """Raise where the clients and the server do not agree, or something went wrong.

    Of streams whose client left the server knows more than the client, so that where one of its
    counts is beyond the clients' it is so by these alone.
    """
    counted = {key[1]: n for key, n in metrics.items() if key[0] == "requests_finished_total" and n}
    halts = {key[1]: n for key, n in metrics.items() if key[0] == "halts_total"}
    faults = list(tally.faults[:5])
    if sum(counted.values()) != sum(tally.reasons.values()) + tally.left:
        faults.append(f"ended: the server says {counted}, the clients {tally.reasons}")
    for what, said, seen in (("reasons", counted, tally.reasons), ("halts", halts, tally.halts)):
        for name in set(said) | set(seen) - {"cancelled"}:
            more = said.get(name, 0) - seen.get(name, 0)
            if not 0 <= more <= tally.left:
                faults.append(f"{what}, {name}: the server says {said}, the clients {seen}")
    names = {"tokens_scored_total": tally.scored, "tokens_unscored_total": tally.unscored}
    most = tally.left * MAX_TOKENS + metrics["prompt_tokens_total",] - tally.prompt
    for name, seen_tokens in {**names, "generation_tokens_total": tally.tokens}.items():
        if not 0 <= metrics[name,] - seen_tokens <= most:
            faults.append(f"{name}: the server says {metrics[name,]}, the clients {seen_tokens}")
    for name in ("tokens_delivered_unscored_total", "feed_failures_total", "worker_restarts_total"):
        if metrics[name,]:
            faults.append(f"{name} is {metrics[name,]}")
    if refused := {key for key in metrics if key[0] == "requests_refused_total"}:
        faults.append(f"refused: {refused}")
    faults += service.complaints()[:5]
    if faults:
        raise LoadError("\n".join(faults))


def steps_of(log: bytes) -> dict[bytes, list[float]]:
    """When the steps ended that let a stream's texts go, by stream."""
    ended: dict[bytes, list[float]] = defaultdict(list)
    for key, at in RECORD.iter_unpack(log):
        ended[key].append(at)
    return ended


def added(
    tally: Tally, ended: dict[bytes, list[float]], begin: float, end: float
) -> tuple[Any, Any, Any]:
    """Milliseconds from the end of its step until each token arrived, and was read; of each step.

    Raises
    ------
    LoadError
        When a client did not get as many pieces of text as the worker let go.
    """
    order: list[float] = []
    for stream, pieces in tally.streams:
        at = ended[key_of(stream)]
        if len(at) != pieces:
            raise LoadError(f"{stream}: {len(at)} pieces of text left the worker, {pieces} arrived")
        order += at
    step = np.array(order)
    counts = (step >= begin) & (step < end)
    ends = np.unique(step[counts])
    return (
        1e3 * (np.array(tally.arrived) - step)[counts],
        1e3 * (np.array(tally.read) - step)[counts],
        1e3 * np.diff(ends),
    )


def percentile(values: Any, q: float) -> float:
    return float(np.percentile(values, q))


def slope(at: Any, mb: Any) -> float:
    """MB per minute of the line through the points."""
    return float(np.polyfit(at - at[0], mb, 1)[0] * 60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(load(options.streams, options.seconds)))


if __name__ == "__main__":
    main()
