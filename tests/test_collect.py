"""What is on the disk is what the model computed, whatever came in between."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collecting
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
import toy
from collecting import TAPS, run, texts
from kernel_cases import fresh_seed

from midstream.learn.activations import Activations, InMemory, chunked
from midstream.learn.collect import collect, residuals
from midstream.learn.collection import CollectionError
from midstream.learn.forward import batches
from midstream.learn.live import Live
from midstream.learn.tokens import Source, Tokens, TrainingDataError, gather
from midstream.taps import Tap

UNIT = {"fp32": 2e-6, "fp16": 2**-11, "bf16": 2**-8}  # relative; of fp32 what padding changes
BYTES_PER_TOKEN = len(TAPS) * 32 * 2


def expected(sequence: list[int]) -> dict[Tap, torch.Tensor]:
    """Of the sites that transformers tells itself, from an unpadded pass of its own."""
    with torch.inference_mode():
        states = toy.model()(torch.tensor([sequence]), output_hidden_states=True).hidden_states
    return {TAPS[0]: states[0][0], TAPS[2]: states[1][0]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flat(source: Source, seed: int | None = None) -> dict[Tap, torch.Tensor]:
    """All rows in the order of the tokens, however the chunks come."""
    found = {tap: torch.full((int(source.tokens.starts[-1]), source.width), torch.nan) for tap in
             source.taps}  # fmt: skip
    for chunk in source.chunks(seed):
        for tap, values in chunk.hidden.items():
            assert values.dtype == torch.float32
            found[tap][chunk.rows] = values
    return found


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_disk_holds_output_hidden_states(tmp_path: Path, dtype: Any) -> None:
    sequences, tokens = texts(60, fresh_seed())
    run(tmp_path / "c", sequences, tokens, dtype=dtype)
    source = Activations.open(tmp_path / "c")
    assert source.taps == tuple(TAPS)
    assert source.width == 32
    assert len(source.manifest.shards) > 1
    rows = flat(source)
    for example, sequence in enumerate(sequences):
        begin, end = tokens.starts[example : example + 2]
        for tap, theirs in expected(sequence).items():
            mine = rows[tap][begin:end]
            assert (mine - theirs).abs().max() <= UNIT[dtype] * theirs.abs().max()
        last = toy.model().model.norm(rows[TAPS[3]][begin:end])
        with torch.inference_mode():
            outputs = toy.model().model(torch.tensor([sequence])).last_hidden_state[0]
        assert (last - outputs).abs().max() <= 8 * UNIT[dtype] * outputs.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mamba2", "mixtral", "gemma2"])
def test_padding_changes_no_architecture(name: str) -> None:
    model = tiny_models.tiny(name)
    random = np.random.default_rng(fresh_seed())
    sequences = [random.integers(3, tiny_models.VOCAB, n).tolist() for n in (9, 2, 7, 1, 4)]
    taps = [Tap(0, "resid_pre"), Tap(1, "resid_post"), Tap(2, "resid_post")]
    together = residuals(model, sequences, taps)
    for index, sequence in enumerate(sequences):
        alone = residuals(model, [sequence], taps)
        for tap in taps:
            scale = np.abs(alone[tap][0]).max()
            assert np.abs(together[tap][index] - alone[tap][0]).max() <= 1e-5 * scale


def test_the_three_sources_hold_the_same(tmp_path: Path) -> None:
    seed = fresh_seed()
    sequences, tokens = texts(50, seed)
    run(tmp_path / "c", sequences, tokens, dtype="fp32")
    memory = InMemory(
        tokens,
        {tap: torch.from_numpy(np.concatenate(rows)) for tap, rows in
         residuals(toy.model(), sequences, TAPS).items()},
        chunk_bytes=100_000,
    )  # fmt: skip
    disk = Activations.open(tmp_path / "c", chunk_bytes=100_000)
    live = Live(toy.model(), sequences, tokens, TAPS, batch_tokens=64, chunk_bytes=100_000)
    chosen = np.random.default_rng(seed).permutation(50)[:23]
    reference = flat(memory)
    wanted = tokens.labels[:, 0] == 1
    for source in (memory, disk, live):
        assert source.taps == tuple(TAPS)
        part = source.select(chosen)
        assert part.tokens.ids == tuple(tokens.ids[e] for e in chosen)
        rows = np.concatenate([np.arange(*tokens.starts[e : e + 2]) for e in chosen])
        again = part.select([5, 2])
        for tap in TAPS:
            for values, theirs in (
                (flat(source)[tap], reference[tap]),
                (flat(source, seed)[tap], reference[tap]),
                (gather(source, wanted)[tap], reference[tap][wanted]),
                (flat(part)[tap], reference[tap][rows]),
                (flat(part, seed)[tap], reference[tap][rows]),
                (flat(again)[tap][: again.tokens.starts[1]],
                 reference[tap][slice(*tokens.starts[chosen[5] : chosen[5] + 2])]),
            ):  # fmt: skip
                assert (values - theirs).abs().max() <= UNIT["fp32"] * theirs.abs().max()


@pytest.mark.parametrize("kind", ["memory", "disk", "live"])
def test_chunks_are_whole_examples_each_once(tmp_path: Path, kind: str) -> None:
    seed = fresh_seed()
    sequences, tokens = texts(80, seed)
    limit = 64 * 4 * len(TAPS) * 32  # 64 tokens
    if kind == "disk":
        run(tmp_path / "c", sequences, tokens)
        source: Any = Activations.open(tmp_path / "c", chunk_bytes=limit)
    elif kind == "live":
        source = Live(toy.model(), sequences, tokens, TAPS, chunk_bytes=limit)
    else:
        hidden = torch.zeros(int(tokens.starts[-1]), 32)
        source = InMemory(tokens, dict.fromkeys(TAPS, hidden), chunk_bytes=limit)
    orders = []
    for shuffle in (None, seed, seed, seed + 1):
        chunks = list(source.chunks(shuffle))
        assert len(chunks) > 5
        for chunk in chunks:
            rows = [np.arange(*tokens.starts[e : e + 2]) for e in chunk.examples]
            assert np.array_equal(chunk.rows, np.concatenate(rows))
            assert len(chunk.rows) <= 64
            assert all(values.shape == (len(chunk.rows), 32) for values in chunk.hidden.values())
        orders.append(np.concatenate([chunk.examples for chunk in chunks]).tolist())
    assert orders[0] == list(range(80))
    assert orders[1] == orders[2] != orders[3]
    assert sorted(orders[1]) == sorted(orders[3]) == orders[0] != orders[1]


def test_a_shuffle_mixes_a_set_that_is_sorted_by_its_labels(tmp_path: Path) -> None:
    sequences, tokens = texts(200, fresh_seed())
    run(tmp_path / "c", sequences, tokens)
    source = Activations.open(tmp_path / "c", chunk_bytes=4 * len(TAPS) * 32 * 400)
    assert len(source.manifest.shards) > 5
    for chunk in list(source.chunks(fresh_seed()))[:-1]:
        assert 0.02 < (chunk.examples < 100).mean() < 0.98  # of some 30 examples


def test_a_read_out_can_be_trained_on_what_live_yields() -> None:
    sequences, tokens = texts(4, fresh_seed())
    weight = torch.zeros(32, requires_grad=True)
    for chunk in Live(toy.model(), sequences, tokens, TAPS).chunks():
        (chunk.hidden[TAPS[1]] @ weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_examples_without_tokens_are_kept(tmp_path: Path) -> None:
    sequences: list[list[int]] = [[], [5, 6], [], [7], []]
    tokens = collecting.tokens_of(sequences, np.random.default_rng(0))
    run(tmp_path / "c", sequences, tokens)
    for source in (Activations.open(tmp_path / "c"), Live(toy.model(), sequences, tokens, TAPS)):
        [chunk] = source.chunks()
        assert chunk.examples.tolist() == [0, 1, 2, 3, 4]
        assert chunk.rows.tolist() == [0, 1, 2]


def test_batches_hold_every_sequence_once_and_little_padding() -> None:
    random = np.random.default_rng(fresh_seed())
    lengths = random.integers(0, 300, 2000)
    found = list(batches(lengths, 4096))
    assert sorted(row for batch in found for row in batch) == np.flatnonzero(lengths).tolist()
    sizes = [len(batch) * int(lengths[batch].max()) for batch in found]
    assert max(sizes) <= 4096
    assert sum(sizes) < 1.05 * lengths.sum()
    assert [len(batch) for batch in batches(np.array([50, 3, 50]), 10)] == [1, 1, 1]


def test_selecting_tokens_keeps_what_belongs_to_each_example() -> None:
    random = np.random.default_rng(fresh_seed())
    sequences: list[list[int]] = [[5] * n for n in random.integers(0, 6, 40)]
    tokens = collecting.tokens_of(sequences, random)
    spans = []  # several per example, not sorted by place
    for example in random.permutation(40):
        begin, end = tokens.starts[example : example + 2]
        for _ in range(int(random.integers(0, 4)) if end > begin else 0):
            first = int(random.integers(begin, end))
            spans.append((int(random.integers(2)), first, int(random.integers(first, end)) + 1))
    tokens = dataclasses.replace(tokens, spans=np.array(spans))
    for chosen in (random.permutation(40)[:25], np.array([3, 3, 0]), np.empty(0, dtype=np.int64)):
        part = tokens.select(chosen)
        assert len(part) == len(chosen)
        moved = []
        for index, example in enumerate(chosen):
            begin, end = tokens.starts[example : example + 2]
            mine = slice(*part.starts[index : index + 2])
            assert np.array_equal(part.labels[mine], tokens.labels[begin:end])
            assert part.ids[index] == tokens.ids[example]
            assert np.array_equal(part.contrast[index], tokens.contrast[example])
            shift = part.starts[index] - begin
            moved += [(h, f + shift, e + shift) for h, f, e in spans if begin <= f < end]
        assert part.spans.tolist() == [list(span) for span in moved]
        assert part.spans.shape == (len(moved), 3)


# ---- the folder ----------------------------------------------------------------------------------


def test_tokens_survive_the_disk(tmp_path: Path) -> None:
    sequences, tokens = texts(30, fresh_seed())
    run(tmp_path / "c", sequences, tokens)
    found = Activations.open(tmp_path / "c").tokens
    for field in dataclasses.fields(Tokens):
        mine, theirs = getattr(found, field.name), getattr(tokens, field.name)
        if isinstance(theirs, tuple):
            assert mine == theirs, field.name
        else:
            assert mine.dtype == theirs.dtype, field.name
            assert np.array_equal(mine, theirs), field.name


def test_shards_are_whole_examples_within_their_size_and_read_by_safetensors(
    tmp_path: Path,
) -> None:
    sequences, tokens = texts(120, fresh_seed())
    limit = 40 * BYTES_PER_TOKEN
    run(tmp_path / "c", sequences, tokens, shard_bytes=limit)
    source = Activations.open(tmp_path / "c")
    rows = []
    for index, shard in enumerate(source.manifest.shards):
        stored = safetensors.torch.load_file(tmp_path / "c" / f"shard-{index:05d}.safetensors")
        assert list(stored) == [str(tap) for tap in TAPS]
        for values in stored.values():
            assert values.dtype == torch.bfloat16
            assert len(values) == tokens.starts[shard.end] - tokens.starts[shard.first]
        rows.append(stored[str(TAPS[0])].float())
        assert sum(v.numel() * 2 for v in stored.values()) <= limit
    assert torch.equal(torch.cat(rows), flat(source)[TAPS[0]])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "collection.json",
        *(f"shard-{n:05d}.safetensors" for n in range(len(rows))),
        "tokens.safetensors",
    ]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    sequences, tokens = texts(20, 1)
    total = int(tokens.starts[-1])
    assert run(tmp_path / "c", sequences, tokens)[-1] == total
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    assert run(tmp_path / "c", sequences, tokens) == [total]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()} == before


# ---- kills ---------------------------------------------------------------------------------------

COUNT = 500


def finished(folder: Path) -> dict[str, int]:
    """Inodes of the shards that the manifest calls finished."""
    try:
        shards = json.loads((folder / "collection.json").read_text())["shards"]
    except FileNotFoundError:
        return {}
    names = [f"shard-{n:05d}.safetensors" for n in range(len(shards))]
    return {name: (folder / name).stat().st_ino for name in names}


def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """Kills between and inside of the steps that commit a shard, then at random times."""
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    collecting.process(collecting.collect_texts, tmp_path / "whole", COUNT, seed).join()
    reference = contents(tmp_path / "whole")
    assert len(reference) > 20
    folder = tmp_path / "killed"
    progress = []

    def check_and_count(stays: dict[str, int]) -> None:
        now = finished(folder)
        assert stays.items() <= now.items()  # the same files, not made again
        for name in now:
            assert (folder / name).read_bytes() == reference[name]
        progress.append(len(now))

    # The folder appears with one rename. Then both files of a shard are synced and put in place,
    # and the folder is synced after each.
    for event in ("rename", "fsync", "replace", "fsync", "replace"):
        stays = finished(folder)
        number = 1 if event == "rename" else int(random.integers(1, 10))
        child = collecting.process(collecting.collect_until, folder, COUNT, seed, event, number)
        child.join()
        assert child.exitcode == -9
        check_and_count(stays)
    for _ in range(4):
        stays = finished(folder)
        child = collecting.process(collecting.collect_texts, folder, COUNT, seed)
        deadline = time.monotonic() + 30
        while finished(folder).keys() == stays.keys() and child.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(float(random.uniform(0, 0.05)))
        child.kill()
        child.join()
        check_and_count(stays)
    if progress[-1] < len(reference) - 2:
        with pytest.raises(
            CollectionError, match=r"incomplete, with \d+ of 500 examples; to go on"
        ):
            Activations.open(folder)
    child = collecting.process(collecting.collect_texts, folder, COUNT, seed)
    child.join()
    assert child.exitcode == 0
    assert contents(folder) == reference
    assert progress == sorted(progress)


def test_what_is_finished_is_not_fed_again(tmp_path: Path) -> None:
    sequences, tokens = texts(100, fresh_seed())

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise StopError

    options = {"taps": TAPS, "batch_tokens": 64, "shard_bytes": 1 << 15}
    arguments = (toy.model(), toy.tokenizer(), sequences, tokens)
    with pytest.raises(StopError):
        collect(*arguments, folder=tmp_path / "c", progress=stop, **options)
    done = run(tmp_path / "c", sequences, tokens, **options)
    ends = tokens.starts[[s.end for s in Activations.open(tmp_path / "c").manifest.shards]]
    assert done[0] in ends
    assert done[0] >= 0.3 * done[-1]
    assert done[-1] == tokens.starts[-1]
    run(tmp_path / "whole", sequences, tokens, **options)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the kernel has no /dev/full")
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "collection.json"])
def test_a_full_disk_is_one_error_and_what_is_there_stays(tmp_path: Path, name: str) -> None:
    sequences, tokens = texts(100, fresh_seed())
    options = {"shard_bytes": 1 << 15, "command": "midstream collect --again"}
    folder = tmp_path / "c"

    def plant(done: int, total: int) -> None:  # before anything was written
        if not done:
            (folder / f"{name}.partial").symlink_to("/dev/full")

    with pytest.raises(
        CollectionError,
        match=r"No space left on device; \d+ of 100 examples are on disk and stay; make room for "
        r"\S+ GB and more, then to go on: midstream collect --again",
    ):
        collect(
            toy.model(), toy.tokenizer(), sequences, tokens, TAPS, folder, batch_tokens=64,
            progress=plant, **options,
        )  # fmt: skip
    assert len(finished(folder)) == (2 if name.startswith("shard") else 0)
    assert not list(folder.glob("*.partial"))
    run(folder, sequences, tokens, **options)
    run(tmp_path / "whole", sequences, tokens, **options)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, tokens = texts(50, 1)
    usage = namedtuple("usage", "free")
    needed = int(tokens.starts[-1]) * BYTES_PER_TOKEN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(CollectionError, match=r"too full: \S+ GB are needed and \S+ GB free"):
        run(tmp_path / "c", sequences, tokens)
    assert not finished(tmp_path / "c")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    run(tmp_path / "c", sequences, tokens)


# ---- bad values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_names_example_token_and_tap(
    tmp_path: Path, value: float
) -> None:
    sequences, tokens = texts(60, fresh_seed())
    sequences[41][1:] = [9, 8, 22]
    tokens = collecting.tokens_of(sequences, np.random.default_rng(0))
    model = toy.new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[22, 3] = value
    sequences[:41] = [[min(word, 21) for word in s] for s in sequences[:41]]
    sequences[42:] = [[min(word, 21) for word in s] for s in sequences[42:]]
    position = sequences[41].index(22)
    with pytest.raises(
        TrainingDataError,
        match=rf"example 'text 41', token {position}: the residual at resid_pre.0 is not finite in "
        "the model itself",
    ):
        collect(model, None, sequences, tokens, TAPS, tmp_path / "c", batch_tokens=64)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_fp16_cannot_hold_asks_for_bf16(tmp_path: Path, sign: int) -> None:
    sequences = [[5, 6, 7], [8, 21], [4, 4, 4, 4]]
    tokens = collecting.tokens_of(sequences, np.random.default_rng(0))
    model = toy.new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[21, 3] = 65519.0  # rounds to the largest there is
    collect(model, None, sequences, tokens, TAPS[:1], tmp_path / "fits", dtype="fp16")
    found = flat(Activations.open(tmp_path / "fits"))[TAPS[0]]
    assert found[4, 3] == 65504
    with torch.no_grad():
        model.get_input_embeddings().weight[21, 3] = sign * 65520.0
    arguments = (model, None, sequences, tokens, TAPS[:1])
    with pytest.raises(
        TrainingDataError,
        match=r"example 'text 1', token 1: the residual at resid_pre.0 is too large for "
        r"torch.float16 .up to 65520 .* 65504.: collect as bf16 .--dtype bf16.",
    ):
        collect(*arguments, tmp_path / "c", dtype="fp16")
    collect(*arguments, tmp_path / "d", dtype="bf16")


def test_inputs_that_the_model_cannot_take_are_named(tmp_path: Path) -> None:
    def refused(match: str, sequences: list[list[int]], model: Any = None, **options: Any) -> None:
        tokens = collecting.tokens_of(sequences, np.random.default_rng(0))
        with pytest.raises((TrainingDataError, CollectionError), match=match):
            collect(model or toy.model(), None, sequences, tokens,
                    **{"taps": TAPS, "folder": tmp_path / "c", **options})  # fmt: skip
        assert not (tmp_path / "c").exists()

    refused("example 'text 1' has 65 tokens, the model's window 64", [[5], [5] * 65])
    refused("example 'text 0' has token ids from 24 to 24, the model knows 0 to 23", [[24]])
    refused("token ids from -1 to 5", [[5, -1]])
    refused("in training mode: call model.eval", [[5]], toy.new_model().train())
    refused("no taps", [[5]], taps=[])
    refused(
        "no tap resid_post.2: LlamaForCausalLM has 2 layers", [[5]], taps=[Tap(2, "resid_post")]
    )
    refused("tap resid_pre.0 is given 2 times", [[5]], taps=TAPS[:1] * 2)
    refused("nothing to collect", [[]])
    refused("nothing to collect", [])
    refused("batch_tokens is 0", [[5]], batch_tokens=0)
    tokens = collecting.tokens_of([[5, 6], [7]], np.random.default_rng(0))
    with pytest.raises(CollectionError, match="example 'text 1' has 2 token ids but labels for 1"):
        collect(toy.model(), None, [[5, 6], [7, 8]], tokens, TAPS, tmp_path / "c")
    with pytest.raises(TrainingDataError, match=r"shape \[2, 32\], .* ask for \[3, 32\]"):
        InMemory(tokens, {TAPS[0]: torch.zeros(3, 32), TAPS[1]: torch.zeros(2, 32)})
    with pytest.raises(TrainingDataError, match="no tap"):
        InMemory(tokens, {})


# ---- something else than was begun ---------------------------------------------------------------


def _nudged(layer: bool) -> Any:
    model = toy.new_model()
    with torch.no_grad():
        if layer:
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
        else:
            model.get_input_embeddings().weight.neg_()
    return model


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    r"weights_sha256 is [0-9a-f]{64} but was [0-9a-f]{64}": lambda was: {"model": _nudged(True)},
    r"the model's weights_sha256 is \w+ but was \w+": lambda was: {"model": _nudged(False)},
    r"the model's vocab_size is 30 but was 24": lambda was: {"model": toy.new_model(vocab_size=30)},
    r"the model's tokenizer_sha256 is None but was \w+": lambda was: {"tokenizer": None},
    r"taps is resid_pre.0, resid_post.1 but was resid_pre.0, resid_mid.0, resid_post.0, "
    r"resid_post.1": lambda was: {"taps": [TAPS[0], TAPS[3]]},
    "dtype is fp16 but was bf16": lambda was: {"dtype": "fp16"},
    "shard_bytes is 1000 but was 8192": lambda was: {"shard_bytes": 1000},
    r"data_sha256 is \w+ but was \w+": lambda was: {
        "sequences": [[23, *was["sequences"][0][1:]], *was["sequences"][1:]]
    },
    r"data_sha256 is  ?\w+ but was \w+": lambda was: {
        "tokens": dataclasses.replace(was["tokens"], labels=1 - was["tokens"].labels)
    },
    "hazards is harm but was harm, höhe": lambda was: {
        "tokens": dataclasses.replace(was["tokens"], hazards=("harm",))
    },
    "examples is 39 but was 40": lambda was: {
        "sequences": was["sequences"][:-1],
        "tokens": was["tokens"].select(np.arange(39)),
    },
}


@pytest.mark.parametrize("complete", [True, False])
def test_a_collection_goes_on_only_with_what_it_was_begun_with(
    tmp_path: Path, complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, tokens = texts(40, fresh_seed())
    was: dict[str, Any] = {
        "model": toy.model(), "tokenizer": toy.tokenizer(), "sequences": sequences,
        "tokens": tokens, "taps": TAPS, "folder": tmp_path / "c", "shard_bytes": 8192,
    }  # fmt: skip
    if complete:
        collect(**was)
    else:
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0))
        with pytest.raises(CollectionError, match="too full"):
            collect(**was)
        monkeypatch.undo()
    before = contents(tmp_path / "c")
    for message, change in CHANGES.items():
        with pytest.raises(CollectionError, match=message.replace("  ?", " ")) as caught:
            collect(**{**was, **change(was)})
        assert "holds a collection of something else" in str(caught.value)
        assert contents(tmp_path / "c") == before
    collect(**was)


def test_two_processes_do_not_collect_into_one_folder(tmp_path: Path) -> None:
    sequences, tokens = texts(10, 1)
    run(tmp_path / "c", sequences, tokens)
    other = os.open(tmp_path / "c", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(CollectionError, match="another process is collecting into"):
        run(tmp_path / "c", sequences, tokens)
    os.close(other)
    run(tmp_path / "c", sequences, tokens)


def test_a_folder_that_is_none_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all there is")
    with pytest.raises(CollectionError, match="exists and is no collection"):
        run(tmp_path, *texts(5, 1))
    assert contents(tmp_path) == {"thesis.txt": b"all there is"}
    with pytest.raises(CollectionError, match=r"has no collection\.json; make one"):
        Activations.open(tmp_path)
    with pytest.raises(CollectionError, match="has no collection"):
        Activations.open(tmp_path / "thesis.txt")


def test_changed_files_are_refused_when_they_are_read(tmp_path: Path) -> None:
    sequences, tokens = texts(60, fresh_seed())
    folder = tmp_path / "c"
    run(folder, sequences, tokens, shard_bytes=1 << 15)
    shard = folder / "shard-00001.safetensors"
    content = shard.read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content + b"0"):
        shard.write_bytes(changed)
        source = Activations.open(folder, chunk_bytes=1)
        chunks = source.chunks()
        for _ in range(source.manifest.shards[0].end):
            next(chunks)  # the shard before is whole
        with pytest.raises(CollectionError, match=r"shard-00001\S+ was cut short or changed"):
            next(chunks)
    shard.unlink()
    with pytest.raises(CollectionError, match=r"shard-00001\S+ is missing"):
        list(Activations.open(folder).chunks(3))
    shard.write_bytes(content)
    assert len(list(Activations.open(folder).chunks())) == 1

    labels = folder / "tokens.safetensors"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CollectionError, match=r"tokens.safetensors was cut short or changed"):
        Activations.open(folder)
    labels.write_bytes(content)

    manifest = folder / "collection.json"
    facts = json.loads(manifest.read_text())
    for change, message in (
        ({"schema_version": 2}, "schema version 2, this midstream reads 1"),
        ({"complete": False}, "its shards end at example 60 of 60, but it says .* incomplete"),
        ({"shards": facts["shards"][1:]}, "not one after the other"),
        ({"shards": facts["shards"][:-1]}, "but it says that it is complete"),
        ({"dtype": "int8"}, "dtype: Input should be"),
        ({"taps": ["resid_post"]}, "'resid_post' is not a tap"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ):
        manifest.write_text(json.dumps({**facts, **change}))
        with pytest.raises(CollectionError, match=message):
            Activations.open(folder)
    manifest.write_text("{")
    with pytest.raises(CollectionError, match="no JSON"):
        Activations.open(folder)


# ---- memory --------------------------------------------------------------------------------------


def test_memory_stays_within_the_stated_formula(tmp_path: Path) -> None:
    longest, batch, shard = 60, 1024, 4 << 20
    slack = 32 << 20  # of which some 4 are used: an allocator keeps what it likes
    sequences, tokens = texts(12_000, fresh_seed(), longest)
    taps = [Tap(layer, site) for layer in (0, 1) for site in ("resid_pre", "resid_post")]
    per_token = len(taps) * 32 * 4
    formula = 2 * max(shard, longest * per_token) + max(batch, longest) * (per_token + 8 * 32)
    data = int(tokens.starts[-1]) * per_token
    assert data > 4 * (formula + slack)
    answer = collecting.PROCESSES.Queue()
    options = {"taps": taps, "dtype": "fp32", "batch_tokens": batch, "shard_bytes": shard}
    child = collecting.process(collecting.memory_of, tmp_path, sequences, tokens, options, answer)
    child.join()
    assert child.exitcode == 0
    grown = answer.get(timeout=10)
    labels = 8 * sum(map(len, sequences)) + 3 * len(
        (tmp_path / "all/tokens.safetensors").read_bytes()
    )
    assert grown <= formula + labels + slack


def test_chunked_is_greedy() -> None:
    tokens = collecting.tokens_of([[5] * n for n in (3, 4, 9, 0, 1, 1)], np.random.default_rng(0))
    found = [part.tolist() for part in chunked(tokens, 7)]
    assert found == [[0, 1], [2, 3], [4, 5]] or found == [[0, 1], [2], [3, 4, 5]]
    assert [len(part) for part in chunked(tokens, 0)] == [1] * 6
