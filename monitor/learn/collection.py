"""A collection of residuals on disk: what the files of its folder hold.

- ``collection.json``: what was collected, from which model and data, and the finished shards
- ``tokens.safetensors``: the `Tokens`; strings as UTF-8 bytes, one after the other, with their ends
- ``shard-00000.safetensors`` ...: one tensor [rows, d] per tap, named as the tap

Shard n holds the rows of the examples ``shards[n].first`` up to ``shards[n].end``, in order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from midstream.fingerprint import Fingerprint, Sha256
from midstream.learn.forward import TokenIds
from midstream.learn.tokens import Tokens
from midstream.taps import Tap

SCHEMA_VERSION = 1
MANIFEST = "collection.json"
TOKENS = "tokens.safetensors"

DType = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[DType, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_NAMES: dict[DType, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # of safetensors

_SAMPLED_ROWS = 64


class CollectionError(ValueError):
    """A collection cannot be made or used; the message says what is at fault and what to do."""


class Shard(BaseModel):
    """A finished shard: the examples ``[first, end)``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    first: Annotated[int, Field(ge=0)]
    end: int
    sha256: Sha256


class Manifest(BaseModel):
    """What ``collection.json`` says.

    Attributes
    ----------
    schema_version : int
    fingerprint : Fingerprint
        Of the model and its tokenizer.
    weights_sha256 : str
        Hash of rows of every parameter, so that a fine-tune with the same embedding is told apart.
    taps : tuple of str
    width : int
        ``d``.
    dtype : str
        Of the shards.
    hazards : tuple of str
    examples, tokens : int
    data_sha256 : str
        Hash of the token ids that are fed, and of all that is known about them.
    tokens_sha256 : str
        Hash of ``tokens.safetensors``.
    batch_tokens, shard_bytes : int
        How the work is cut: with another batch the last bits of the values would be others.
    command : str
        What to run to go on where a kill ended it.
    shards : tuple of Shard
        The finished ones, in order.
    complete : bool
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    schema_version: Literal[1] = 1
    fingerprint: Fingerprint
    weights_sha256: Sha256
    taps: tuple[str, ...]
    width: Annotated[int, Field(ge=1)]
    dtype: DType
    hazards: tuple[str, ...]
    examples: int
    tokens: int
    data_sha256: Sha256
    tokens_sha256: Sha256
    batch_tokens: int
    shard_bytes: int
    command: str
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        firsts = [0, *(shard.end for shard in self.shards)]
        if [shard.first for shard in self.shards] != firsts[:-1]:
            raise ValueError("its shards are not one after the other")
        if self.complete != (firsts[-1] == self.examples):
            raise ValueError(
                f"its shards end at example {firsts[-1]} of {self.examples}, but it says that it "
                f"is {'complete' if self.complete else 'incomplete'}"
            )
        for tap in self.taps:
            Tap.parse(tap)
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it from a folder.

        Raises
        ------
        CollectionError
            If there is none, or one of another schema, or one that says what cannot be.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise CollectionError(
                f"{folder} is no collection: it has no {MANIFEST}; make one with midstream collect"
            ) from None
        except ValueError as error:
            raise CollectionError(f"{path} is no JSON: {error}") from None
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise CollectionError(
                f"{path} has schema version {version}, this midstream reads {SCHEMA_VERSION}: "
                "collect again, or use the version that wrote it"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CollectionError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None

    def content(self) -> bytes:
        """Return what the file holds."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def differences(self, now: Manifest) -> list[str]:
        """Say what is collected ``now`` that is not what this collection was begun with."""
        ignored = {"command", "shards", "complete", "tokens_sha256"}
        mine, theirs = (_flat(m.model_dump(mode="json", exclude=ignored)) for m in (self, now))
        return [
            f"{key} is {theirs.get(key)} but was {mine.get(key)}"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        ]


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    fingerprint = content.pop("fingerprint")
    for key in ("taps", "hazards"):
        content[key] = ", ".join(content[key]) or "none"
    return {**{f"the model's {key}": value for key, value in fingerprint.items()}, **content}


def shard_name(index: int) -> str:
    """Name of the file."""
    return f"shard-{index:05d}.safetensors"


def shard_header(taps: Sequence[Tap], rows: int, width: int, dtype: DType) -> bytes:
    """Return what comes before the values of a shard [taps, rows, width].

    The library's own `save_file` copies every tensor once more on the way, in some versions; here
    the values go to the disk from where they were collected. Reading is left to the library, which
    checks all of this.
    """
    size = rows * width * DTYPES[dtype].itemsize
    entries = {
        str(tap): {
            "dtype": _NAMES[dtype],
            "shape": [rows, width],
            "data_offsets": [index * size, (index + 1) * size],
        }
        for index, tap in enumerate(taps)
    }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def open_shard(folder: Path, index: int) -> dict[Tap, Tensor]:
    """Map a shard into memory: one tensor [rows, d] per tap, of which nothing is read yet."""
    with safetensors.safe_open(folder / shard_name(index), framework="pt") as file:
        return {Tap.parse(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def encode_tokens(tokens: Tokens) -> bytes:
    """Return the content of ``tokens.safetensors``."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in _fields(tokens).items():
        if isinstance(value, tuple):
            encoded = [text.encode() for text in value]
            arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{name}.ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        else:
            arrays[name] = np.ascontiguousarray(value)
    return safetensors.numpy.save(arrays)


def read_tokens(folder: Path) -> Tokens:
    """Read the `Tokens` of a collection."""
    arrays = safetensors.numpy.load_file(folder / TOKENS)
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.endswith(".ends"):
            text, name = arrays[name.removesuffix(".ends")].tobytes(), name.removesuffix(".ends")
            bounds = [0, *array.tolist()]
            fields[name] = tuple(
                text[begin:end].decode() for begin, end in itertools.pairwise(bounds)
            )
        else:
            fields.setdefault(name, array)
    return Tokens(**fields)


def hash_data(sequences: Sequence[TokenIds], tokens: Tokens) -> str:
    """Sha256 of what is fed and of all that is known about it."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.asarray(sequence, dtype=np.int64).tobytes())
    for name, value in _fields(tokens).items():
        content = repr(value).encode() if isinstance(value, tuple) else value.tobytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def hash_weights(model: nn.Module) -> str:
    """Sha256 of up to 64 rows of every parameter, bit for bit, with names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta or not parameter.numel():
            continue  # offloaded; the others tell
        rows = parameter.detach().reshape(len(parameter) if parameter.ndim else 1, -1)
        sample = rows[:: -(-len(rows) // _SAMPLED_ROWS)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fields(tokens: Tokens) -> dict[str, Any]:
    return {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
