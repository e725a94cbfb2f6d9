"""What watching costs inside vLLM's server: a random Llama of 134 M, 2 tapped layers, 8 probes.

    .venv-vllm/bin/python bench/vllm_overhead.py [--pairs 9] [--tokens 64] [--prompt 256]

Three servers run on the same model: vLLM alone, vLLM with the monitor, and vLLM with eager hooks
that copy activations to Python, as other tools do. They are asked in turn, in alternating order;
those that are not asked are stopped (SIGSTOP), so that none takes another's processor. Prints one
JSON object with the medians of paired ratios:

- ``vllm_tpot_ratio_1``, ``vllm_tpot_ratio_16``: time per token, 1 and 16 streams at a time
- ``vllm_ttft_ratio``: time to the first token that a client gets, 1 stream. The monitor holds each
  token back until it was judged, one step later; ``vllm_ttft_ratio_less_one_step`` is the same with
  that step (the stream's own time per token) taken off.
- ``naive_*``: the same for the eager hooks
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from overhead import quiet_bundle, random_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests_vllm"))
from serving import NAME, VLLM, Server  # noqa: E402

STREAMS = (1, 16)
OPTIONS = (
    *("--dtype", "bfloat16", "--max-num-seqs", "16", "--max-model-len", "1024"),
    *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", "1G"),
    *("--served-model-name", NAME, "--host", "127.0.0.1"),
)


class Measured(Server):
    """A server that stands still while it is not asked."""

    def __init__(self, folder: Path, *start: str) -> None:
        folder.mkdir()
        super().__init__(folder, environment={"VLLM_CPU_OMP_THREADS_BIND": "auto"})
        self._command = [*start, *OPTIONS, "--port", str(self.port)]

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Any:
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        super().__exit__(*error)


def save_model(folder: Path) -> None:
    """Write the model, a tokenizer of as many words, and the bundle."""
    model = random_llama()
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), unk_token="w0"
    )
    quiet_bundle(model).save(folder / "bundle")
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def measure(server: Measured, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Mean time to the first token, and per token, of streams asked at the same time."""

    async def one(client: Any, prompt: list[int]) -> tuple[float, list[float]]:
        start = time.perf_counter()
        stream = await client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        times: list[float] = []
        async for part in stream:
            now = time.perf_counter()
            times += [now] * len(part.choices[0].token_ids or ())
        assert len(times) == tokens, f"{len(times)} of {tokens} tokens: a stream was halted"
        return start, times

    async def run() -> list[tuple[float, list[float]]]:
        async with server.async_client() as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    with server.awake():
        streams = asyncio.run(run())
    first = statistics.fmean(times[0] - start for start, times in streams)
    return first, time_per_token([times for _, times in streams])


def time_per_token(streams: list[list[float]]) -> float:
    """Mean time per token from when every stream has begun: before, prompts are computed beside."""
    begun = max(times[0] for times in streams)
    each = []
    for times in streams:
        late = [time for time in times if time >= begun]
        assert len(late) > 1, "streams were not written at the same time; ask for more --tokens"
        each.append((late[-1] - late[0]) / (len(late) - 1))
    return statistics.fmean(each)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    save_model(folder)
    model, bundle = str(folder / "model"), str(folder / "bundle")
    os.environ["PYTHONPATH"] = str(HERE)  # where the naive worker is
    midstream = str(Path(sys.executable).with_name("midstream"))
    starts = {
        "alone": [*VLLM, model],
        "vllm": [midstream, "vllm", "serve", model, "--bundle", bundle],
        "naive": [*VLLM, model, "--enforce-eager", "--worker-cls", "naive_worker.NaiveWorker"],
    }
    ratios: dict[str, list[float]] = {}
    with ExitStack() as stack:
        servers = {}
        for name, start in starts.items():
            servers[name] = stack.enter_context(Measured(folder / name, *start))
            servers[name].stop()
            print(f"{name} is up", file=sys.stderr)
        draw = torch.Generator().manual_seed(0)
        for pair in range(given.pairs + 1):
            for streams in STREAMS:
                prompts = torch.randint(3, 32000, (streams, given.prompt), generator=draw).tolist()
                order = list(servers)[:: 1 if pair % 2 else -1]
                took = {n: measure(servers[n], prompts, given.tokens) for n in order}
                if pair == 0:
                    continue  # not counted
                first, each = took["alone"]
                for name in ("vllm", "naive"):
                    own_first, own_each = took[name]
                    found = {f"{name}_tpot_ratio_{streams}": own_each / each}
                    if streams == 1:
                        found[f"{name}_ttft_ratio"] = own_first / first
                    if streams == 1 and name == "vllm":
                        found["vllm_ttft_ratio_less_one_step"] = (own_first - own_each) / first
                    for key, ratio in found.items():
                        ratios.setdefault(key, []).append(ratio)
                print(pair, streams, took, file=sys.stderr)
    print(json.dumps({key: round(statistics.median(found), 4) for key, found in ratios.items()}))


if __name__ == "__main__":
    main()
