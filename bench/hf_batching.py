"""What watching costs in continuous batching: a Llama of 134 M parameters, 2 layers, 8 probes.

    python bench/hf_batching.py

Prints one JSON object: median ratio of paired runs, monitored to unmonitored, of the time per
token, with 1 and with 16 requests at a time. A run is timed from the end of its first step to the
end of the step that samples its last token, so that neither the prompts count nor the making of the
manager and its cache; nor the step that a watched request takes to have its last token scored.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from overhead import quiet_bundle, random_llama
from transformers import ContinuousBatchingConfig, GenerationConfig

from midstream.engines.hf import BatchingAttachment
from midstream.measure.overhead import UnequalRunsError
from midstream.monitor import Monitor

PROMPT = 16
NEW_TOKENS = 24
PAIRS = 21
NAMES = {1: "hf_batching_tpot_ratio_1", 16: "hf_batching_tpot_ratio"}

Run = tuple[float, list[list[int]]]


class _Timed(BatchingAttachment):
    """Notes when its steps end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[float] = []

    def after_step(self) -> None:
        super().after_step()
        self.ends.append(time.perf_counter())


def ratio(model: Any, monitor: Monitor, requests: int, *, new_tokens: int, pairs: int) -> float:
    """Median of ``pairs`` ratios, after one that is not counted."""
    generator = torch.Generator().manual_seed(requests)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (requests, PROMPT), generator=generator).tolist()
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=model.config.eos_token_id,
    )

    def batching() -> ContinuousBatchingConfig:
        pages = -(-(PROMPT + new_tokens) // 32) + 1
        return ContinuousBatchingConfig(
            page_size=32,
            num_blocks=pages * requests * 2,
            max_batch_tokens=PROMPT * requests,
            allow_block_sharing=False,
        )

    def plain() -> Run:
        outputs = model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=batching(),
            record_timestamps=True,
        ).values()
        ends = next(iter(outputs)).timestamps
        return ends[-1] - ends[0], [output.generated_tokens for output in outputs]

    def watched() -> Run:
        with _Timed(monitor, model, batching=batching(), generation_config=config) as m:
            responses = m.generate_batch(prompts)
        return m.ends[new_tokens - 1] - m.ends[0], [response.tokens for response in responses]

    ratios = []
    for pair in range(pairs + 1):
        if pair % 2:
            bare, with_monitor = plain(), watched()
        else:
            with_monitor, bare = watched(), plain()
        if bare[1] != with_monitor[1] or any(len(ids) != new_tokens for ids in bare[1]):
            raise UnequalRunsError("a request ended early, or the monitor changed what was written")
        ratios.append(with_monitor[0] / bare[0])
    return float(np.median(ratios[1:]))


def main() -> None:
    """Measure and print."""
    model = random_llama()
    monitor = Monitor(quiet_bundle(model), slots=max(NAMES))
    result: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    for requests, name in NAMES.items():
        result[name] = ratio(model, monitor, requests, new_tokens=NEW_TOKENS, pairs=PAIRS)
        print(f"{requests} requests done", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
