"""A bundle: a folder with all that a monitor needs, whole or not there, never changed unnoticed.

- ``monitor.json``: schema version, model fingerprint, layout of the bank, sha256 of the other files
  and of its own content
- ``probes.safetensors``: weights and biases, see `midstream.bank.ProbeBank.tensors`
- ``chain.json``: the absorbing chain
- ``policy.yaml``: the policy
- ``turns.json``, optional: the chain at the clock of turns

Nothing in it can run code: the files are read as JSON, YAML (its safe part) and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from midstream.atomic import write_folder
from midstream.bank import BankSpec, ProbeBank
from midstream.chain import Chain
from midstream.fingerprint import BundleError, Fingerprint, Sha256, WrongModelError
from midstream.policy import Policy
from midstream.turn_model import TurnModel

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "BundleExistsError",
    "CorruptBundleError",
    "Fingerprint",
    "NewerSchemaError",
    "WrongModelError",
]

SCHEMA_VERSION = 1

MANIFEST, PROBES, CHAIN, POLICY = "monitor.json", "probes.safetensors", "chain.json", "policy.yaml"
TURNS = "turns.json"


class BundleExistsError(BundleError, FileExistsError):
    """Something is already there where a bundle should be saved."""


class CorruptBundleError(BundleError):
    """A file of the bundle is missing, unreadable, cut short, changed or not what it should be."""


class NewerSchemaError(BundleError):
    """The bundle was made by a newer midstream than this one."""


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: int
    midstream: str
    created: date | None
    notes: dict[str, JsonValue]
    model: Fingerprint
    bank: BankSpec
    files: dict[str, Sha256]


def _own_version() -> str:
    return version("midstream")


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything a monitor needs.

    Parameters
    ----------
    bank, chain, policy
        What `Monitor` is made of.
    fingerprint
        Of the model whose residual stream the probes read.
    turns
        What a `midstream.turns.TurnGate` needs beside; None where there is none.
    notes
        Anything JSON can hold: where the data came from, how the probes did.
    created
        Given by the caller, so that the same content is always the same bundle.
    midstream
        Version that made it.

    Raises
    ------
    BundleError
        If the bank does not fit the model: another width, or a tap on a layer that is not there;
        or if ``turns`` carries belief to a token chain of another size.
    """

    bank: ProbeBank
    chain: Chain
    policy: Policy
    fingerprint: Fingerprint
    notes: Mapping[str, JsonValue] = field(default_factory=dict)
    created: date | None = None
    turns: TurnModel | None = None
    midstream: str = field(default_factory=_own_version)

    def __post_init__(self) -> None:
        model = self.fingerprint
        if self.bank.hidden_size != model.hidden_size:
            raise BundleError(
                f"hidden_size: the probes read {self.bank.hidden_size}, "
                f"{model.architecture} has {model.hidden_size}"
            )
        reads_prompt = any(probe.reads == "prompt" for probe in self.bank.heads)
        if self.chain.prompt_edges and not reads_prompt:
            raise BundleError(
                "prompt_edges: the chain bins prompt evidence, but no probe reads prompts; add "
                "such a probe, or fit the chain without prompt_edges"
            )
        carry = self.turns.carry if self.turns else None
        if carry is not None and len(carry[0]) != self.chain.states + 1:
            raise BundleError(
                f"turns.carry: rows over {len(carry[0])} token states, the chain has "
                f"{self.chain.states + 1}; fit the turn model for this bundle"
            )
        for tap in self.bank.taps:
            if tap.layer >= model.layers:
                raise BundleError(
                    f"tap {tap}: {model.architecture} has {model.layers} layers, "
                    f"0 to {model.layers - 1}"
                )

    @cached_property
    def hash(self) -> str:
        """Sha256 of ``monitor.json``, and so of the content of every file; events carry it."""
        return _sha256(self._files[MANIFEST])

    def with_policy(self, policy: Policy) -> Self:
        """Return the same monitor with another policy, to be saved under another name."""
        return replace(self, policy=policy, midstream=_own_version())

    def with_turns(self, turns: TurnModel | None) -> Self:
        """Return the same monitor with another turn model."""
        return replace(self, turns=turns, midstream=_own_version())

    def with_fingerprint(self, fingerprint: Fingerprint) -> Self:
        """Return the bundle re-stamped for another model, on which its probes were checked."""
        return replace(self, fingerprint=fingerprint, midstream=_own_version())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bundle to a new folder, which appears whole or not at all.

        See `midstream.atomic.write_folder` for what a killed process can leave beside it.

        Raises
        ------
        BundleExistsError
            If there is anything at ``path``, were it an empty folder.
        BundleError
            If the notes cannot be written as JSON.
        OSError
            If the disk refuses; nothing is left behind then.
        """
        try:
            write_folder(path, self._files)
        except FileExistsError as error:
            raise BundleExistsError(
                f"{error.filename} exists: choose a new folder or remove this one"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check a bundle; what is checked are the very bytes that are used.

        Raises
        ------
        CorruptBundleError
            If a file is missing, unreadable, cut short or changed (naming both hashes), has an
            unknown key, or does not hold what ``monitor.json`` says.
        NewerSchemaError
            If its schema is newer than `SCHEMA_VERSION`.
        BundleError
            If its bank does not fit the model it names.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CorruptBundleError(f"no bundle at {folder}: that is no folder")
        raw = _read(folder, MANIFEST)
        manifest = _parse_manifest(raw, folder / MANIFEST)
        contents = {name: _read(folder, name) for name in sorted(manifest.files)}
        for name, content in contents.items():
            found, recorded = _sha256(content), manifest.files[name]
            if found != recorded:
                raise CorruptBundleError(
                    f"{folder / name} was cut short or changed: its sha256 is {found}, "
                    f"{MANIFEST} says {recorded}. Copy the bundle again; to change its policy on "
                    "purpose, save Bundle.load(...).with_policy(...) under another name"
                )
        try:
            source = PROBES
            tensors = safetensors.torch.load(contents[PROBES])
            bank = ProbeBank.from_parts(manifest.bank, tensors)
            source = CHAIN
            chain = Chain.from_json(contents[CHAIN].decode(), CHAIN)
            source = POLICY
            policy = Policy.from_yaml(contents[POLICY].decode(), POLICY)
            source = TURNS
            turns = TurnModel.from_json(contents[TURNS].decode()) if TURNS in contents else None
        except (ValueError, safetensors.SafetensorError) as error:
            problem = str(error).removeprefix(f"{source}: ")
            raise CorruptBundleError(f"{folder / source}: {problem}") from error
        bundle = cls(
            bank=bank,
            chain=chain,
            policy=policy,
            fingerprint=manifest.model,
            notes=manifest.notes,
            created=manifest.created,
            midstream=manifest.midstream,
            turns=turns,
        )
        # The bytes read stay, and so the hash: another version may write the same in other bytes.
        bundle.__dict__["_files"] = {**contents, MANIFEST: raw}
        return bundle

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """Content of every file; of a loaded bundle as it was read."""
        files = {
            PROBES: safetensors.torch.save(self.bank.tensors()),
            CHAIN: self.chain.to_json().encode(),
            POLICY: self.policy.to_yaml().encode(),
        }
        if self.turns is not None:
            files[TURNS] = self.turns.to_json().encode()
        try:
            manifest = _Manifest(
                schema_version=SCHEMA_VERSION,
                midstream=self.midstream,
                created=self.created,
                notes=dict(self.notes),
                model=self.fingerprint,
                bank=self.bank.spec(),
                files={name: _sha256(content) for name, content in files.items()},
            )
            payload = manifest.model_dump(mode="json")
            files[MANIFEST] = _canonical({**payload, "sha256": _sha256(_canonical(payload))})
            # What is refused on reading is not written; JSON has no lone surrogates, for one.
            _parse_manifest(files[MANIFEST], Path(MANIFEST))
        except ValueError as error:
            raise BundleError(f"{MANIFEST} cannot be written: {error}") from error
        return files


def _parse_manifest(raw: bytes, where: Path) -> _Manifest:
    try:
        payload = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptBundleError(f"{where} is not JSON, cut short or changed: {error}") from error
    if not isinstance(payload, dict) or type(payload.get("schema_version")) is not int:
        raise CorruptBundleError(f"{where}: schema_version: no number found; this is no bundle")
    found = payload["schema_version"]
    if found > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{where} has schema version {found}, this midstream ({_own_version()}) reads up to "
            f"{SCHEMA_VERSION}: upgrade midstream"
        )
    if found < 1:
        raise CorruptBundleError(f"{where}: schema_version: {found} never existed")
    recorded = payload.pop("sha256", None)
    try:
        manifest = _Manifest.model_validate_json(json.dumps(payload))
        actual = _sha256(_canonical(payload))
    except ValidationError as error:
        raise CorruptBundleError(f"{where}: {_faults(error)}") from error
    except (ValueError, RecursionError) as error:  # 1e999, or nested too deep
        raise CorruptBundleError(f"{where}: {error}") from error
    if manifest.files.keys() - {TURNS} != {PROBES, CHAIN, POLICY}:
        raise CorruptBundleError(
            f"{where}: files: {sorted(manifest.files)} are not those of a bundle"
        )
    if recorded != actual or raw != _canonical({**payload, "sha256": recorded}):
        raise CorruptBundleError(
            f"{where} was changed: its content has sha256 {actual}, it says {recorded}. Copy the "
            "bundle again, or make it anew with Bundle.save"
        )
    return manifest


def _faults(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
    )


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise CorruptBundleError(
            f"{folder / name} is missing: copy the whole bundle, or make it anew with Bundle.save"
        ) from None
    except OSError as error:
        raise CorruptBundleError(f"{folder / name} cannot be read: {error.strerror}") from error


def _canonical(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, indent=2, allow_nan=False)
    return text.encode() + b"\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
