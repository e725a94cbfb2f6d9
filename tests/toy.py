"""A toy language model and a monitor whose verdicts are known exactly.

The model is a tiny random Llama over 24 words. Its one probe reads the embedding, and says +20 when
a bad word was fed and -20 for every other word; the chain takes it at its word. So a stream must
halt at its first bad word, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import Chain
from midstream.monitor import Monitor
from midstream.policy import Policy, Thresholds
from midstream.taps import Tap

PAD, BOS, EOS, UNK, BAD = range(5)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "bad", *(f"w{i}" for i in range(5, 23)), "abcdef"]
# The last word is one that transformers tries tokenizers with when it is given stop strings.
WINDOW = 64
HORIZON_0 = Thresholds(horizon=0, halt_at=0.5)
EMBEDDING = Tap(0, "resid_pre")

TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} w22{% endif %}"
)


def new_model(**changes: Any) -> LlamaForCausalLM:
    """The same weights on every call; it writes all words about equally often."""
    config = LlamaConfig(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": WINDOW,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model.eval()


@cache
def model() -> LlamaForCausalLM:
    """Shared by the tests that leave no trace on it."""
    return new_model()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(dict(zip(WORDS, range(24), strict=True)), "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def detector(lm: Any, bad: Sequence[int] = (BAD,), **fields: Any) -> Probe:
    """The probe that knows the bad words from the embedding."""
    table = lm.get_input_embeddings().weight.detach().double()
    target = torch.full((len(table), 1), -20.0, dtype=torch.float64)
    target[list(bad)] = 20.0
    weight = torch.linalg.lstsq(table, target).solution[:, 0].float()
    return Probe(
        **{"name": "bad", "hazard": "badness", "tap": EMBEDDING, "weight": weight, **fields}
    )


def trusting_chain(*, reads_prompt: bool = False) -> Chain:
    """Calm or violated; evidence above 5 comes from violated streams."""
    return Chain(
        transition=[[0.99, 0.01], [0.0, 1.0]],
        ending=[0.05, 0.05],
        emission=[[0.999, 0.001], [0.001, 0.999]],
        edges=[5.0],
        prior=[1.0, 0.0],
        prompt_emission=[[0.999, 0.001], [0.001, 0.999]] if reads_prompt else [[1.0], [1.0]],
        prompt_edges=[5.0] if reads_prompt else [],
    )


def expected_risks(logits: Sequence[float]) -> list[float]:
    """Risk of `trusting_chain` at horizon 0 after each response token, in plain arithmetic."""
    violated, risks = 0.0, []
    for z in logits:
        calm, moved = 0.99 * (1 - violated), violated + 0.01 * (1 - violated)
        high = math.log1p(math.exp(-abs(z))) + max(z, 0.0) >= 5.0
        calm, moved = (calm * 0.001, moved * 0.999) if high else (calm * 0.999, moved * 0.001)
        violated = moved / (calm + moved)
        risks.append(violated)
    return risks


def policy(**fields: Any) -> Policy:
    tiers = {"moderate": HORIZON_0}
    return Policy(**{"tiers": tiers, "default_tier": "moderate", **fields})


def bundle(lm: Any = None, tok: Any = None, *, probes: Any = None, **fields: Any) -> Bundle:
    lm = lm or model()
    bank = ProbeBank(probes or [detector(lm)])
    return Bundle(
        bank=bank,
        chain=trusting_chain(reads_prompt=any(probe.reads == "prompt" for probe in bank.probes)),
        policy=policy(**fields),
        fingerprint=Fingerprint.of(lm, tok),
    )


def monitor(
    lm: Any = None, *, slots: int = 8, trace: int = 64, backend: str | None = None, **fields: Any
) -> Monitor:
    """A monitor of the toy; ``fields`` are those of `bundle`."""
    return Monitor(bundle(lm, **fields), slots=slots, rows=64, trace=trace, backend=backend)


def before_end(ids: Sequence[int], ends: Sequence[int] = (EOS,)) -> list[int]:
    """Up to the first id that ends a sequence."""
    ids = list(ids)
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def first_bad(ids: Sequence[int], bad: Sequence[int] = (BAD,)) -> int | None:
    return next((i for i, token in enumerate(ids) if token in bad), None)
