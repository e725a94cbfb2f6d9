"""Tiny random models of many architectures: the structure of the real ones, none of the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

LAYERS = 3
VOCAB = 67

# Widths that are no power of two; odd where heads allow it, multiples of four where experts are
# fused (torch._grouped_mm wants rows of whole 16 bytes).
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

_SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 5},
    "mixtral": {**_LLAMA_LIKE, **_MOE},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],  # one dense layer among the mixtures
    },
    "gemma2": {**_LLAMA_LIKE, "sliding_window": 5, "layer_types": _LAYER_TYPES},
    "gemma3_text": {**_LLAMA_LIKE, "sliding_window": 5, "layer_types": _LAYER_TYPES},
    "phi3": _LLAMA_LIKE,
    "gpt2": {"n_embd": 35, "n_head": 5, "n_positions": 64},
    "gpt_neox": {"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 5},
    "olmo2": _LLAMA_LIKE,
    "falcon": {"hidden_size": 36, "num_attention_heads": 6},
    "stablelm": {
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "gpt_oss": {**_LLAMA_LIKE, **_MOE, "sliding_window": 5, "layer_types": _LAYER_TYPES},
    "deepseek_v3": {
        "hidden_size": 36,
        "intermediate_size": 52,
        "moe_intermediate_size": 20,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 14,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "mamba2": {"hidden_size": 36, "num_heads": 6, "head_dim": 12, "state_size": 8, "n_groups": 2},
    "bert": {"hidden_size": 35, "intermediate_size": 52, "num_attention_heads": 5},
}

ARCHITECTURES = sorted(_SIZES)


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """Build a tiny random model, in eval mode and the same on every call.

    Parameters
    ----------
    name
        One of `ARCHITECTURES` (the ``model_type`` of its config).
    changes
        Config entries that differ from the usual tiny ones.
    """
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, **_SIZES[name], **changes}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **sizes, **special)
    family = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Fresh models have unit norms, zero biases and branches that hardly change the stream,
            # which would hide a tap on the wrong side of any of them.
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()
