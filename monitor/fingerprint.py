"""What tells one model from another, so that probes never read a model they were not made for.

Probes are directions in one model's residual stream; on another model of the same size they give
numbers that look right and mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_SAMPLED_ROWS = 64
_FP16_TINY = torch.finfo(torch.float16).tiny


class BundleError(ValueError):
    """A bundle cannot be used or made; the message names the thing at fault and the remedy."""


class WrongModelError(BundleError):
    """A bundle made for one model was given another."""


class Fingerprint(BaseModel):
    """Identity of a model and its tokenizer.

    Attributes
    ----------
    architecture
        Class of the model, as its checkpoint names it.
    model_type, hidden_size, layers, vocab_size
        Of its language model, where it is one part of several.
    tokenizer_sha256
        Hash of the tokenizer's content; None where none was given, and then it is not compared.
    weights_sha256
        Hash of sampled rows of the input embedding, rounded so that a model has the same in fp32
        and bf16 (one stored in bf16 also in fp16). It tells separately trained models apart, but
        not a fine-tune that left the embedding alone, as most LoRAs do.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),  # pydantic before 2.10 warns of every field named model_*
    )

    architecture: str
    model_type: str
    hidden_size: int
    layers: int
    vocab_size: int
    tokenizer_sha256: Sha256 | None
    weights_sha256: Sha256

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any = None) -> Fingerprint:
        """Take the fingerprint of a transformers model.

        Parameters
        ----------
        model
            Its config names the sizes; its input embedding is a floating tensor that is loaded.
        tokenizer
            A tokenizer of transformers or `tokenizers`.

        Raises
        ------
        BundleError
            If a size is not in the config, or the input embedding cannot be read.
        """
        config: Any = model.config
        text = config.get_text_config()
        sizes: dict[str, Any] = {}
        for field, key in (
            ("hidden_size", "hidden_size"),
            ("layers", "num_hidden_layers"),
            ("vocab_size", "vocab_size"),
        ):
            sizes[field] = getattr(text, key, None)
            if not isinstance(sizes[field], int):
                name = type(config).__name__
                raise BundleError(f"no fingerprint: {name}.{key} is {sizes[field]}, not a number")
        return cls(
            architecture=(config.architectures or [type(model).__name__])[0],
            model_type=text.model_type,
            tokenizer_sha256=None if tokenizer is None else _hash_tokenizer(tokenizer),
            weights_sha256=_hash_embedding(model),
            **sizes,
        )

    def check(self, other: Fingerprint) -> None:
        """Compare with the fingerprint of the model at hand; a tokenizer only where both have one.

        Raises
        ------
        WrongModelError
            Naming every field that differs, with both values.
        """
        mine, theirs = self.model_dump(), other.model_dump()
        if None in (self.tokenizer_sha256, other.tokenizer_sha256):
            del mine["tokenizer_sha256"]
        differing = [
            f"{field} is {theirs[field]} but the bundle was made for {value}"
            for field, value in mine.items()
            if value != theirs[field]
        ]
        if differing:
            raise WrongModelError(
                f"wrong model: {'; '.join(differing)}. Load the model (and tokenizer) that the "
                "bundle was made for, or make a bundle for this one; if this is a fine-tune on "
                "which its probes were checked, re-stamp the bundle with Bundle.with_fingerprint"
            )


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        # What the last call asked for, no part of the language.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_embedding(model: nn.Module) -> str:
    try:
        embedding: Any = model
        weight: Tensor = embedding.get_input_embeddings().weight.detach()
        stride = -(-len(weight) // _SAMPLED_ROWS)
        rows = weight[::stride].to("cpu", torch.float32)
    except (AttributeError, NotImplementedError) as error:
        raise BundleError(
            f"no fingerprint: the input embedding of {type(model).__name__} cannot be read: {error}"
        ) from error
    # Below its smallest normal number fp16 cannot hold what bf16 can.
    rows = torch.where(rows.abs() < _FP16_TINY, 0.0, rows).to(torch.bfloat16)
    return hashlib.sha256(rows.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
