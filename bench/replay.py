"""Replay at scale: load a recording and sweep 50 thresholds over it.

Logits are random walks under the testbed's probes; the figure asked for is 100,000 streams of 256
tokens in under 60 s on two cores. Prints JSON.

    python bench/replay.py [--streams 100000] [--tokens 256] [--thresholds 50]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from midstream import testbed
from midstream.bundle import Bundle
from midstream.measure.recording import Recording, probes_hash
from midstream.measure.sweep import sweep

PROMPT = 20


def synthetic(bundle: Bundle, streams: int, tokens: int, seed: int) -> Recording:
    """Random walks; every tenth stream violates from a random token on."""
    rng = np.random.default_rng(seed)
    probes, rows = len(bundle.bank.names), streams * tokens
    logits = rng.standard_normal((streams, tokens, probes), dtype=np.float32)
    np.cumsum(logits, axis=1, out=logits)
    logits *= 0.3
    logits -= 4
    position = np.tile(np.arange(tokens, dtype=np.int32), streams)
    first = np.where(rng.random(streams) < 0.1, rng.integers(PROMPT, tokens, streams), tokens)
    labels = (position >= np.repeat(first, tokens)).astype(np.int8)
    labels[position < PROMPT] = -1
    return Recording(
        bundle=bundle.hash,
        probes=bundle.bank.names,
        hazards=tuple(dict.fromkeys(bundle.bank.hazards)),
        streams=tuple(map(str, range(streams))),
        starts=np.arange(streams + 1, dtype=np.int64) * tokens,
        prompt_tokens=np.full(streams, PROMPT, np.int32),
        ended=np.ones(streams, np.bool_),
        position=position,
        logits=logits.reshape(rows, probes),
        labels=labels[:, None],
        response_labels=(first < tokens).astype(np.int8)[:, None],
        characters=None,
        texts=None,
        columns={},
        probes_hash=probes_hash(bundle.bank),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--thresholds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundle = testbed.load_bundle()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        synthetic(bundle, options.streams, options.tokens, options.seed).save(path)
        size = path.stat().st_size
        began = time.perf_counter()
        recording = Recording.load(path)
        loaded = time.perf_counter()
        found = sweep(recording, bundle, np.linspace(0.0, 1.0, options.thresholds))
        swept = time.perf_counter()
    rows = options.streams * options.tokens
    print(
        json.dumps(
            {
                "replay_seconds": round(swept - began, 2),
                "load_seconds": round(loaded - began, 2),
                "sweep_seconds": round(swept - loaded, 2),
                "streams": options.streams,
                "tokens": rows,
                "thresholds": options.thresholds,
                "bytes_per_token": round(size / rows, 2),
                "halted_at_half": int((found.halted_at[0, options.thresholds // 2] >= 0).sum()),
            }
        )
    )


if __name__ == "__main__":
    main()
