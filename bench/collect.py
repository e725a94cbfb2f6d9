"""What collecting costs over the bare forward pass, on the testbed's model at four taps.

    python bench/collect.py [--tokens 1000000] [--pairs 9] [--folder DIR]

Prints one JSON object. The bare pass feeds the same batches to the model's body and keeps nothing;
collecting writes bf16 shards to the disk, with hashes and fsync, from the call to the open folder.
``collect_vs_forward`` is the median ratio of paired runs on a tenth of the tokens.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from midstream import testbed
from midstream.learn.activations import chunked
from midstream.learn.collect import SHARD_BYTES, collect
from midstream.learn.forward import BATCH_TOKENS, batches, padded
from midstream.learn.tokens import Tokens
from midstream.taps import Tap

TAPS = [Tap(layer, "resid_post") for layer in range(4)]


def data(count: int, window: int, seed: int = 0) -> tuple[list[tuple[int, ...]], Tokens]:
    """Dialogues of the grammar with ``count`` tokens or a few more, nothing known about them."""
    sequences: list[tuple[int, ...]] = []
    total = index = 0
    while total < count:
        dialogue = testbed.sample_dialogue(seed, index)
        sequences.append((*dialogue.prompt.ids, *dialogue.response)[:window])
        total += len(sequences[-1])
        index += 1
    names = tuple(map(str, range(len(sequences))))
    unknown = np.full((len(sequences), 1), -1, dtype=np.int8)
    tokens = Tokens(
        hazards=("harm",),
        ids=names,
        groups=names,
        starts=np.cumsum([0, *map(len, sequences)]),
        prompt_tokens=np.zeros(len(sequences), dtype=np.int32),
        instruction_end=np.full(len(sequences), -1, dtype=np.int32),
        special=np.zeros(total, dtype=bool),
        labels=np.full((total, 1), -1, dtype=np.int8),
        response_labels=unknown,
        prompt_labels=unknown,
        spans=np.empty((0, 3), dtype=np.int64),
        contrast=np.full((len(sequences), 3), -1, dtype=np.int32),
    )
    return sequences, tokens


@torch.inference_mode()
def forward(model: Any, sequences: Sequence[Sequence[int]], tokens: Tokens) -> None:
    """Feed the batches that `collect` feeds, and look at nothing."""
    bytes_per_token = len(TAPS) * model.config.hidden_size * 2
    for part in chunked(tokens, SHARD_BYTES // bytes_per_token):
        lengths = np.diff(tokens.starts)[part]
        for batch in batches(lengths, BATCH_TOKENS):
            ids, mask = padded([np.asarray(sequences[part[row]]) for row in batch])
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the long run.")] = 1_000_000,
    pairs: Annotated[int, typer.Option(help="Paired runs.")] = 9,
    folder: Annotated[Path | None, typer.Option(help="Where to write; a disk, not memory.")] = None,
) -> None:
    """Measure and print."""
    model, tokenizer = testbed.load()

    def seconds(call: Any, *arguments: Any) -> float:
        begin = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - begin

    def collected(*what: Any) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return seconds(collect, model, tokenizer, *what, TAPS, Path(out) / "collection")

    window = model.config.max_position_embeddings
    short = data(tokens // 10, window)
    forward(model, *short)  # warms up
    samples = [(collected(*short), seconds(forward, model, *short)) for _ in range(pairs)]
    ratios = [a / b for a, b in samples]
    sequences, labels = data(tokens, window)
    took = collected(sequences, labels)
    count = int(labels.starts[-1])
    result = {
        "collect_vs_forward": statistics.median(ratios),
        "collect_vs_forward_range": [min(ratios), max(ratios)],
        "tokens_per_second": count / took,
        "forward_tokens_per_second": int(short[1].starts[-1])
        / statistics.median(bare for _, bare in samples),
        "tokens": count,
        "seconds_1m_tokens_4_taps": took * 1e6 / count,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
