"""What watching costs on a Llama of 134 M random parameters: 2 tapped layers, 8 probes.

    python bench/overhead.py

Prints one JSON object: median ratio of paired runs, monitored to unmonitored, at batch 1 and 8.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import Chain
from midstream.measure.overhead import overhead
from midstream.monitor import Monitor
from midstream.policy import Policy, Thresholds
from midstream.taps import Tap

TAPS = (Tap(4, "resid_post"), Tap(8, "resid_post"))
PROBES_PER_TAP = 4
NEW_TOKENS = 16
PAIRS = 31


def random_llama() -> LlamaForCausalLM:
    """Return a model whose time per token is that of its size, whatever its weights say."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def quiet_bundle(model: LlamaForCausalLM) -> Bundle:
    """Return a bundle with random probes, a chain of two bins, and a threshold never reached."""
    width = model.config.hidden_size
    probes = [
        Probe(f"probe-{tap}-{n}", "none", tap, torch.randn(width) / width, -1.0)
        for tap in TAPS
        for n in range(PROBES_PER_TAP)
    ]
    chain = Chain(
        transition=[[0.9, 0.09, 0.01], [0.1, 0.88, 0.02], [0.0, 0.0, 1.0]],
        ending=[0.01, 0.01, 0.01],
        emission=[[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]],
        edges=[3.0],
        prior=[0.98, 0.02, 0.0],
        prompt_emission=[[1.0], [1.0], [1.0]],
        prompt_edges=[],
    )
    policy = Policy(
        tiers={"moderate": Thresholds(horizon=16, halt_at=1.0)}, default_tier="moderate"
    )
    return Bundle(
        bank=ProbeBank(probes), chain=chain, policy=policy, fingerprint=Fingerprint.of(model)
    )


def main() -> None:
    """Measure and print."""
    model = random_llama()
    monitor = Monitor(quiet_bundle(model), slots=8)
    result: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    for batch in (1, 8):
        ids = torch.randint(3, 32000, (batch, 16))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        result[f"batch_{batch}"] = overhead(
            model, monitor, inputs, new_tokens=NEW_TOKENS, pairs=PAIRS
        )
        print(f"batch {batch} done", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
