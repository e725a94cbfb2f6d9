"""Bundles: what is saved is loaded, and nothing else ever is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, LAYERS, VOCAB, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from midstream.bank import Probe, ProbeBank
from midstream.bundle import (
    Bundle,
    BundleError,
    BundleExistsError,
    CorruptBundleError,
    Fingerprint,
    NewerSchemaError,
    WrongModelError,
)
from midstream.chain import Chain
from midstream.evidence import Ema, Mean
from midstream.policy import Policy
from midstream.taps import Tap

FILES = ["chain.json", "monitor.json", "policy.yaml", "probes.safetensors"]

CHAIN = Chain(
    transition=[[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]],
    ending=[0.1, 0.05, 0.1],
    emission=[[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]],
    edges=[1 / 3],
    prior=[0.9, 0.09, 0.01],
    prompt_emission=[[1.0], [1.0], [1.0]],
    prompt_edges=[],
)
POLICY = Policy.from_yaml(
    "{tiers: {moderate: {horizon: 0, halt_at: 0.5}}, default_tier: moderate}", source="test"
)
BANK = ProbeBank(
    [
        Probe(
            "lies", "deceit", Tap(1, "resid_post"), torch.tensor([1 / 3, -0.0, 1e-40, 3e38]), 0.1
        ),
        Probe(
            "drift",
            "deceit",
            Tap(1, "resid_post"),
            torch.tensor([1.0, 2.0, 3.0, 4.0]),
            evidence=Mean(window=7),
            reads="prompt",
        ),
        Probe(
            "ärger",
            "harm",
            Tap(0, "resid_mid"),
            torch.ones(4),
            norm="rms",
            eps=1e-5,
            evidence=Ema(alpha=1 / 3),
        ),
    ]
)
FINGERPRINT = Fingerprint(
    architecture="LlamaForCausalLM",
    model_type="llama",
    hidden_size=4,
    layers=2,
    vocab_size=67,
    tokenizer_sha256="a" * 64,
    weights_sha256="b" * 64,
)


def bundle(**changes: Any) -> Bundle:
    parts = {"bank": BANK, "chain": CHAIN, "policy": POLICY, "fingerprint": FINGERPRINT}
    return Bundle(**{**parts, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    bundle(notes={"auroc": 0.9}).save(tmp_path / "saved")
    return tmp_path / "saved"


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: tensor.view(torch.int32).flatten().tolist() for key, tensor in tensors.items()}


# ------------------------------------------------------------------------------------ round trip


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    notes = {"data": {"prompts": 3000, "seed": None}, "auroc": [0.1, 1e-300], "who": "Ω"}
    original = bundle(notes=notes, created=date(2026, 2, 28))
    original.save(tmp_path / "deep" / "er")
    loaded = Bundle.load(str(tmp_path / "deep" / "er"))
    assert bits(loaded.bank.tensors()) == bits(BANK.tensors())
    assert loaded.bank.spec() == BANK.spec()
    assert loaded.bank.names == ("ärger", "lies", "drift")
    assert (loaded.chain, loaded.policy, loaded.fingerprint) == (CHAIN, POLICY, FINGERPRINT)
    assert (loaded.notes, loaded.created) == (notes, date(2026, 2, 28))
    assert loaded.midstream == original.midstream
    assert loaded.hash == original.hash


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    bundle().save(tmp_path / "one")
    Bundle.load(tmp_path / "one").save(tmp_path / "other")
    assert sorted(os.listdir(tmp_path / "one")) == FILES
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_the_hash_is_that_of_the_manifest_which_holds_those_of_the_others(saved: Path) -> None:
    def digest(name: str) -> str:
        return hashlib.sha256((saved / name).read_bytes()).hexdigest()

    manifest = json.loads((saved / "monitor.json").read_bytes())
    assert Bundle.load(saved).hash == digest("monitor.json")
    assert manifest["files"] == {name: digest(name) for name in FILES if name != "monitor.json"}


def test_every_part_changes_the_hash() -> None:
    stricter = Policy.from_yaml(POLICY.to_yaml().replace("0.5", "0.4"), source="test")
    variants = [
        bundle(),
        bundle(bank=ProbeBank(BANK.probes[1:])),
        bundle(chain=CHAIN.model_copy(update={"edges": [0.5]})),
        bundle(policy=stricter),
        bundle(fingerprint=FINGERPRINT.model_copy(update={"tokenizer_sha256": None})),
        bundle(notes={"a": 1}),
        bundle(created=date(2026, 1, 1)),
    ]
    assert len({variant.hash for variant in variants}) == len(variants)


def test_a_policy_or_fingerprint_is_replaced_on_purpose(saved: Path, tmp_path: Path) -> None:
    loaded = Bundle.load(saved)
    stricter = Policy.from_yaml(POLICY.to_yaml().replace("0.5", "0.4"), source="test")
    fine_tune = FINGERPRINT.model_copy(update={"weights_sha256": "c" * 64})
    changed = loaded.with_policy(stricter).with_fingerprint(fine_tune)
    changed.save(tmp_path / "changed")
    back = Bundle.load(tmp_path / "changed")
    assert (back.policy, back.fingerprint, back.notes) == (stricter, fine_tune, {"auroc": 0.9})
    assert back.hash == changed.hash != loaded.hash
    assert (loaded.policy, loaded.fingerprint) == (POLICY, FINGERPRINT)


def test_loading_needs_no_pickle(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    Bundle.load(saved)
    for name in ("chain.json", "monitor.json"):
        json.loads((saved / name).read_bytes())
    assert bits(safetensors.torch.load_file(saved / "probes.safetensors")) == bits(BANK.tensors())
    # A pickle starts with the opcode PROTO, a zipped one with PK.
    assert not any((saved / name).read_bytes().startswith((b"\x80", b"PK")) for name in FILES)


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CorruptBundleError, match=f"{name} is missing: copy the whole bundle"):
        Bundle.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(CorruptBundleError, match=f"{name} cannot be read: Is a directory"):
        Bundle.load(saved)


@pytest.mark.parametrize("name", [n for n in FILES if n != "monitor.json"])
def test_a_changed_file_is_refused_with_both_hashes(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[:-1])
    with pytest.raises(CorruptBundleError, match=f"{name} was cut short or changed") as refusal:
        Bundle.load(saved)
    assert hashlib.sha256(whole).hexdigest() in str(refusal.value)
    assert hashlib.sha256(whole[:-1]).hexdigest() in str(refusal.value)


def test_any_damage_to_any_file_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = tmp_path_factory.mktemp("damage") / "saved"
    bundle(notes={"auroc": 0.9}).save(saved)
    contents = {name: (saved / name).read_bytes() for name in FILES}

    @given(name=st.sampled_from(FILES), data=st.data())
    def damage(name: str, data: st.DataObject) -> None:
        whole = contents[name]
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
        damaged = data.draw(
            st.sampled_from(
                [
                    whole[:at],  # cut short
                    whole[:at] + flipped + whole[at + 1 :],
                    whole[:at] + whole[at + 1 :],
                    whole[:at] + b" " + whole[at:],
                    whole + flipped,
                ]
            )
        )
        (saved / name).write_bytes(damaged)
        try:
            with pytest.raises(BundleError, match=name):
                Bundle.load(saved)
        finally:
            (saved / name).write_bytes(whole)

    damage()
    Bundle.load(saved)


def rewrite(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it again, as another version or a careful hand would."""
    payload = json.loads((saved / "monitor.json").read_bytes())
    del payload["sha256"]
    change(payload)
    text = json.dumps(payload, sort_keys=True, indent=2) + "\n"
    payload["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (saved / "monitor.json").write_text(json.dumps(payload, sort_keys=True, indent=2) + "\n")


def test_a_manifest_sealed_again_is_read(saved: Path) -> None:
    rewrite(saved, lambda payload: payload.update(notes={"by": "hand"}))
    assert Bundle.load(saved).notes == {"by": "hand"}


def test_a_loaded_bundle_stays_the_bytes_it_was(saved: Path, tmp_path: Path) -> None:
    """Also where this version would write the same content in other bytes."""
    commented = (saved / "policy.yaml").read_bytes() + b"# tuned in May\n"
    (saved / "policy.yaml").write_bytes(commented)
    digest = hashlib.sha256(commented).hexdigest()
    rewrite(saved, lambda payload: payload["files"].update({"policy.yaml": digest}))
    loaded = Bundle.load(saved)
    assert loaded.hash == hashlib.sha256((saved / "monitor.json").read_bytes()).hexdigest()
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "policy.yaml").read_bytes() == commented
    assert Bundle.load(tmp_path / "copy").hash == loaded.hash


@pytest.mark.parametrize("value", ["1e999", "NaN", "-Infinity", "[" * 300 + "]" * 300])
def test_notes_that_are_no_canonical_json_are_refused(saved: Path, value: str) -> None:
    text = (saved / "monitor.json").read_text()
    assert "0.9" in text
    (saved / "monitor.json").write_text(text.replace("0.9", value))
    with pytest.raises(CorruptBundleError, match=r"monitor\.json"):
        Bundle.load(saved)


def test_a_newer_schema_names_both_versions_and_the_remedy(saved: Path) -> None:
    rewrite(saved, lambda payload: payload.update(schema_version=2, hitherto="unknown"))
    with pytest.raises(NewerSchemaError, match=r"schema version 2.*up to 1: upgrade midstream"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m["model"].update(heads=3), "model.heads: Extra inputs"),
        (lambda m: m["bank"]["taps"][0]["probes"][0].update(alpha=1), r"taps.0.probes.0.alpha: Ex"),
        (lambda m: m["bank"]["taps"][0].update(tap="mlp_out.3"), r"bank.taps.0.tap: .*mlp_out.3"),
        (lambda m: m["bank"]["taps"][0]["probes"][0]["evidence"].update(alpha=2), "alpha: .*less"),
        (lambda m: m.pop("model"), "model: Field required"),
        (lambda m: m.pop("schema_version"), "schema_version: no number found"),
        (lambda m: m.update(schema_version="1"), "schema_version: no number found"),
        (lambda m: m.update(schema_version=True), "schema_version: no number found"),
        (lambda m: m.update(schema_version=0), "schema_version: 0 never existed"),
        (lambda m: m["model"].update(layers="2"), "model.layers: .*valid integer"),
        (lambda m: m["files"].pop("chain.json"), "files: .*are not those of a bundle"),
        (lambda m: m["files"].update({"../secret": "a" * 64}), "files: .*not those of a bundle"),
        (lambda m: m["files"].update({"chain.json": "A"}), "files.chain.json: .*pattern"),
        (lambda m: m["bank"].update(hidden_size=5), r"probes.safetensors: .*\[1, 4\], the bank"),
        (lambda m: m["bank"]["taps"].pop(), "probes.safetensors: tensors are .*the bank needs"),
        (lambda m: m["model"].update(hidden_size=5), "hidden_size: the probes read 4, Llama.* 5"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused_by_its_key(
    saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(BundleError, match=message) as refusal:
        Bundle.load(saved)
    assert not isinstance(refusal.value, NewerSchemaError)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\ufeff{}", "[" * 100_000, "\x80\x04."])
def test_a_manifest_that_is_no_manifest_is_refused(saved: Path, text: str) -> None:
    (saved / "monitor.json").write_text(text, encoding="latin-1" if text[:1] == "\x80" else "utf-8")
    with pytest.raises(CorruptBundleError, match=r"monitor\.json"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy.yaml", b"tires: {}", "tires"),
        ("policy.yaml", b"!!python/object/apply:os.getcwd []", "python/object"),
        ("chain.json", b"{}", "transition"),
        ("chain.json", b"\xff", "utf-8"),
        (
            "probes.safetensors",
            pickle.dumps({"resid_post.1.weight": [1.0]}),
            "probes.safetensors: ",
        ),
        (
            "probes.safetensors",
            safetensors.torch.save(
                {key: torch.full_like(tensor, math.nan) for key, tensor in BANK.tensors().items()}
            ),
            "weight: 4 of 4 values are not finite",
        ),
    ],
)
def test_bad_content_is_refused_even_when_sealed(
    saved: Path, name: str, content: bytes, message: str
) -> None:
    (saved / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(saved, lambda payload: payload["files"].update({name: digest}))
    with pytest.raises(CorruptBundleError, match=message) as refusal:
        Bundle.load(saved)
    assert str(refusal.value).startswith(f"{saved / name}: ")
    assert str(refusal.value).count(name) == 1


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(CorruptBundleError, match=f"no bundle at .*{name}"):
            Bundle.load(tmp_path / name)


def test_a_bank_that_does_not_fit_its_model_is_refused() -> None:
    with pytest.raises(BundleError, match="hidden_size: the probes read 4, LlamaForCausalLM has 8"):
        bundle(fingerprint=FINGERPRINT.model_copy(update={"hidden_size": 8}))
    with pytest.raises(
        BundleError, match=r"tap resid_post\.1: LlamaForCausalLM has 1 layers, 0 to 0"
    ):
        bundle(fingerprint=FINGERPRINT.model_copy(update={"layers": 1}))


# ---------------------------------------------------------------------------------------- saving


def test_an_existing_target_is_refused_and_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    for target in (saved, tmp_path / "file", tmp_path / "empty", tmp_path / "dangling"):
        with pytest.raises(BundleExistsError, match=f"{target.name} exists: choose a new folder"):
            bundle(notes={"other": True}).save(target)
    assert issubclass(BundleExistsError, FileExistsError)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == "mine"
    assert Bundle.load(saved).notes == {"auroc": 0.9}


def test_of_two_that_save_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        bundle(notes={"first": True}).save(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(BundleExistsError):
        bundle(notes={"first": False}).save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]
    assert Bundle.load(tmp_path / "new").notes == {"first": True}


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        bundle().save(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_notes_that_json_cannot_hold_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    for note in (math.nan, object(), "\ud800"):
        with pytest.raises(BundleError, match="cannot be written"):
            bundle(notes={"auroc": note}).save(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_all_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition("-")[0])

    def logged_rename(source: Path, target: Path) -> None:
        rename(source, target)
        log.append("rename")

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    bundle().save(tmp_path / "new")
    assert sorted(log[:4]) == FILES
    assert log[4:] == [".new.partial", "rename", tmp_path.name]


# Loads a bundle and saves it again and again, each time in a child that dies one line later.
KILLED = """
import os, signal, sys
from pathlib import Path
import midstream.atomic
from midstream.bundle import Bundle

template, folder = Bundle.load(sys.argv[1]), Path(sys.argv[2])

def dies_at(nth):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != midstream.atomic.__file__:
            return None
        lines += event == "line"
        if lines == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

nth, status = 0, None
while status != 0:
    nth += 1
    (folder / str(nth)).mkdir()
    child = os.fork()
    if child == 0:
        sys.settrace(dies_at(nth))
        template.save(folder / str(nth) / "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
print(nth - 1)
"""


def test_a_save_killed_at_any_line_leaves_all_or_nothing(saved: Path, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    run = [sys.executable, "-c", KILLED, str(saved), str(attempts)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected, whole, partial = Bundle.load(saved).hash, 0, 0
    assert (attempts / "10" / "new").exists() is False
    Bundle.load(saved).save(attempts / "10" / "new")  # left-overs are in nobody's way
    for attempt in attempts.iterdir():
        for entry in attempt.iterdir():
            if entry.name == "new":
                assert Bundle.load(entry).hash == expected
                whole += 1
            else:
                assert entry.name.startswith(".new.partial-")
                partial += 1
    kills = int(done.stdout)
    assert kills > 20
    assert partial > 10  # died while writing
    assert 1 < whole < kills  # died before the rename and after it


# --------------------------------------------------------------------------------- fingerprints


def tokenizer(words: str = "the cat sat") -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *words.split()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_fingerprint(name: str) -> None:
    model = tiny(name)
    print_ = Fingerprint.of(model)
    assert print_.architecture == type(model).__name__
    assert print_.model_type == name
    assert (print_.layers, print_.vocab_size) == (LAYERS, VOCAB)
    assert print_.hidden_size == model.get_input_embeddings().weight.shape[1]
    assert print_.tokenizer_sha256 is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_has_one_fingerprint_in_any_precision_it_is_loaded_in(
    tmp_path: Path, stored: torch.dtype
) -> None:
    model = tiny("llama", vocab_size=1000, hidden_size=96).to(stored)
    with torch.no_grad():  # among the values some that fp16 cannot hold
        model.get_input_embeddings().weight[0] *= 1e-5
    original = Fingerprint.of(model, tokenizer())
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    precisions = [torch.float32, torch.bfloat16]
    if stored == torch.bfloat16:
        precisions.append(torch.float16)
    for precision in precisions:
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=precision)
        assert Fingerprint.of(reloaded, reloaded_tokenizer) == original
        assert Fingerprint.of(reloaded.model, reloaded_tokenizer) == original


def test_the_language_model_of_a_multimodal_one_is_read() -> None:
    text = tiny("llama").config.to_dict()
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **vision}
    )
    found = Fingerprint.of(LlavaForConditionalGeneration(config))
    assert found.architecture == "LlavaForConditionalGeneration"
    assert (found.model_type, found.hidden_size, found.layers) == ("llama", 36, LAYERS)


def test_calling_a_tokenizer_does_not_change_its_hash() -> None:
    model, called = tiny("llama"), tokenizer()
    before = Fingerprint.of(model, called)
    called(["the cat", "sat"], padding=True, truncation=True, max_length=2)
    assert Fingerprint.of(model, called) == before
    assert Fingerprint.of(model, called.backend_tokenizer) == before


def test_a_tokenizer_without_a_backend_is_known_by_its_vocabulary() -> None:
    class Slow:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.get_vocab = lambda: vocabulary

    model = tiny("llama")
    one = Fingerprint.of(model, Slow({"a": 0, "b": 1}))
    assert Fingerprint.of(model, Slow({"b": 1, "a": 0})) == one
    assert Fingerprint.of(model, Slow({"b": 0, "a": 1})) != one


def other_weights() -> Any:
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.01
    return model


@pytest.mark.parametrize(
    ("model", "words", "fields"),
    [
        (lambda: tiny("llama"), "the dog sat", {"tokenizer_sha256"}),
        (lambda: tiny("llama", num_hidden_layers=2), "the cat sat", {"layers"}),
        (lambda: tiny("llama", hidden_size=48), "the cat sat", {"hidden_size", "weights_sha256"}),
        (lambda: tiny("llama", vocab_size=68), "the cat sat", {"vocab_size", "weights_sha256"}),
        (lambda: tiny("qwen2"), "the cat sat", {"architecture", "model_type"}),
        (other_weights, "the cat sat", {"weights_sha256"}),
        (
            lambda: tiny("gpt2", vocab_size=68),
            "a",
            {
                "architecture",
                "model_type",
                "hidden_size",
                "vocab_size",
                "weights_sha256",
                "tokenizer_sha256",
            },
        ),
    ],
)
def test_another_model_is_refused_naming_what_differs(
    model: Callable[[], Any], words: str, fields: set[str]
) -> None:
    made_for = Fingerprint.of(tiny("llama"), tokenizer())
    given_model = Fingerprint.of(model(), tokenizer(words))
    with pytest.raises(WrongModelError, match="Load the model") as refusal:
        made_for.check(given_model)
    assert isinstance(refusal.value, BundleError)
    for field in type(made_for).model_fields:
        mine, theirs = getattr(made_for, field), getattr(given_model, field)
        clause = f"{field} is {theirs} but the bundle was made for {mine}"
        # Tied to the seed, weights of equal shape are equal in different architectures.
        if field in fields:
            assert clause in str(refusal.value)
        elif field != "weights_sha256":
            assert f"{field} is" not in str(refusal.value)


def test_the_right_model_passes_and_a_tokenizer_is_compared_only_where_both_have_one() -> None:
    model = tiny("llama")
    bare, full = Fingerprint.of(model), Fingerprint.of(model, tokenizer())
    for one in (bare, full):
        for other in (bare, full):
            one.check(other)


def test_a_model_that_cannot_be_read_is_refused_with_the_reason() -> None:
    with torch.device("meta"):
        unloaded = AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(BundleError, match="no fingerprint: the input embedding of LlamaFor"):
        Fingerprint.of(unloaded)

    class Config:
        hidden_size = 4

        def get_text_config(self) -> Config:
            return self

    depthless = torch.nn.Module()
    depthless.config = Config()
    with pytest.raises(BundleError, match=r"no fingerprint: Config\.num_hidden_layers is None"):
        Fingerprint.of(depthless)
