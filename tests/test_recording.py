"""Recordings: what is refused, what a file keeps, and how live streams become one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from kernel_cases import fresh_seed
from recordings import random_bundle, random_recording, same

from midstream.bank import Probe, ProbeBank
from midstream.measure import recording_file
from midstream.measure.recording import (
    TIER,
    Recording,
    RecordingError,
    concatenate,
    probes_hash,
)
from midstream.taps import Tap


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 50, 1 << 20])
def test_a_file_gives_back_every_bit(rng, tmp_path, monkeypatch, group):
    monkeypatch.setattr(recording_file, "_TOKENS_PER_GROUP", group)
    recording = random_recording(rng)
    recording.save(tmp_path / "new" / "trace.parquet")
    assert same(Recording.load(tmp_path / "new" / "trace.parquet"), recording)
    assert os.listdir(tmp_path / "new") == ["trace.parquet"]


def test_a_file_may_have_no_texts_columns_labels_or_streams(rng, tmp_path):
    bare = dataclasses.replace(
        random_recording(rng), texts=None, characters=None, columns={}, probes_hash=None
    )
    unlabelled = dataclasses.replace(
        bare,
        hazards=(),
        labels=np.empty((len(bare.position), 0), np.int8),
        response_labels=np.empty((len(bare), 0), np.int8),
    )
    for n, recording in enumerate((bare, unlabelled, unlabelled.part(slice(0, 0)))):
        recording.save(tmp_path / str(n))
        assert same(Recording.load(tmp_path / str(n)), recording)


def test_a_token_takes_less_than_its_logits_and_a_byte(rng, tmp_path):
    many = dataclasses.replace(random_recording(rng, streams=2000), texts=None, characters=None)
    many.save(tmp_path / "many")
    tokens, probes = many.logits.shape
    assert os.path.getsize(tmp_path / "many") < tokens * (4 * probes + 1)


def test_files_are_read_end_to_end(rng, tmp_path):
    whole = random_recording(rng, streams=30)
    for n, (first, last) in enumerate([(0, 7), (7, 7), (7, 30)]):
        whole.part(slice(first, last)).save(tmp_path / str(n))
    assert same(Recording.load(tmp_path / "0", tmp_path / "1", tmp_path / "2"), whole)


def test_nothing_is_overwritten(rng, tmp_path):
    recording = random_recording(rng)
    (tmp_path / "trace").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it"):
        recording.save(tmp_path / "trace")
    assert (tmp_path / "trace").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(rng, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        random_recording(rng).save(tmp_path / "trace")
    assert os.listdir(tmp_path) == []


def test_a_file_cut_short_is_refused(rng, tmp_path):
    random_recording(rng).save(tmp_path / "trace")
    content = (tmp_path / "trace").read_bytes()
    for length in rng.integers(0, len(content), 40):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(RecordingError, match="cut short or changed"):
            Recording.load(tmp_path / "cut")


def test_a_changed_page_is_refused(rng, tmp_path):
    random_recording(rng).save(tmp_path / "trace")
    content = (tmp_path / "trace").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "trace").metadata
    for column in range(metadata.num_columns):
        chunk = metadata.row_group(0).column(column)
        changed = bytearray(content)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        # The end of a column's chunk is data, its beginning the header of a page.
        changed[start + chunk.total_compressed_size - 1] ^= 1 << int(rng.integers(8))
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(RecordingError, match="cut short or changed"):
            Recording.load(tmp_path / "changed")


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recording.load(tmp_path / "none")
    with pytest.raises((IsADirectoryError, PermissionError, RecordingError)):
        Recording.load(tmp_path)
    with pytest.raises(RecordingError, match="no recording given"):
        Recording.load()


def _rewritten(path: Any, header: dict[str, Any] | None = None, table: Any = None) -> Any:
    """Write the file once more, with changes to its header or its table."""
    found = pq.read_table(path) if table is None else table
    content = json.loads(pq.read_schema(path).metadata[b"midstream"])
    metadata = {b"midstream": json.dumps({**content, **(header or {})}).encode()}
    pq.write_table(found.replace_schema_metadata(metadata), path.with_name("other"))
    return path.with_name("other")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema_version": 2}, "schema version is 2.*reads up to 1: upgrade midstream"),
        ({"schema_version": "1"}, "no schema version"),
        ({"bundle": 3}, "bundle: "),
        ({"surprise": 3}, "surprise: unknown key"),
        ({"streams": 19}, "20 streams of .* its header says 19"),
        ({"tokens": 5}, "its header says 20 of 5"),
        ({"probes": ["a.b", "c/d list.element", "rho"]}, "its columns are .*logit/rho"),
        ({"hazards": ["badness"]}, "its columns are"),
        ({"texts": False}, "its columns are"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(rng, tmp_path, header, message):
    path = tmp_path / "trace"
    random_recording(rng).save(path)
    assert same(Recording.load(_rewritten(path)), Recording.load(path))
    with pytest.raises(RecordingError, match=f"^{tmp_path / 'other'}: .*{message}"):
        Recording.load(_rewritten(path, header))


def test_other_tables_are_refused(rng, tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "table")
    with pytest.raises(RecordingError, match="no recording of midstream"):
        Recording.load(tmp_path / "table")
    random_recording(rng).save(tmp_path / "trace")
    table = pq.read_table(tmp_path / "trace")
    at = table.schema.get_field_index("label/other")
    shorter = pa.array([row[:-1] for row in table.column(at).to_pylist()], table.schema.types[at])
    changed = table.set_column(at, table.schema.field(at), shorter)
    with pytest.raises(RecordingError, match="entries in 'label/other' for"):
        Recording.load(_rewritten(tmp_path / "trace", table=changed))
    at = table.schema.get_field_index("prompt_tokens")
    negative = pa.array([-1] * len(table), pa.int32())
    changed = table.set_column(at, table.schema.field(at), negative)
    with pytest.raises(RecordingError, match=r"other: prompt_tokens: must be 0 or more"):
        Recording.load(_rewritten(tmp_path / "trace", table=changed))


# ---- what a recording must be --------------------------------------------------------------------


def _changed(array: np.ndarray, at: int, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"starts": r.starts[:-1]}, r"starts: expected int64 \[21\]"),
        (lambda r: {"starts": _changed(r.starts, 0, 1)}, "starts: must ascend"),
        (lambda r: {"starts": _changed(r.starts, 3, r.starts[-1] + 1)}, "starts: must ascend"),
        (lambda r: {"position": r.position.astype(np.int64)}, "position: expected int32"),
        (lambda r: {"position": np.zeros_like(r.position)}, "positions of a stream must ascend"),
        (lambda r: {"position": _changed(r.position, 0, -1)}, "position: must lie between"),
        (lambda r: {"logits": r.logits[:, :2]}, "logits: expected float32"),
        (lambda r: {"labels": _changed(r.labels, -1, 2)}, "labels: must be 1, 0 or -1"),
        (lambda r: {"labels": np.zeros_like(r.labels)}, "has a label"),
        (lambda r: {"texts": r.texts[1:]}, "texts: 19 entries for 20 streams"),
        (lambda r: {"columns": {"k": ("",)}}, r"columns\['k'\]: 1 entries for 20 streams"),
        (lambda r: {"streams": ("a",) * 20}, "streams: 'a' is there 20 times"),
        (lambda r: {"hazards": ("h", "h")}, "hazards: 'h' is there 2 times"),
        (lambda r: {"characters": r.characters[:, :1]}, "characters: expected int32"),
        (lambda r: {"probes": (), "logits": r.logits[:, :0]}, "probes: there are none"),
    ],
)
def test_what_contradicts_itself_is_refused(rng, change, message):
    recording = random_recording(rng)
    with pytest.raises(RecordingError, match=message):
        dataclasses.replace(recording, **change(recording))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "f" * 64}, "differ in their bundle"),
        ({"probes_hash": None}, "differ in their probes_hash"),
        ({"probes": ("x", "y", "z")}, "differ in their probes"),
        ({"hazards": ("x", "y")}, "differ in their hazards"),
        ({"columns": {}}, "differ in their columns"),
        ({"texts": None}, "some recordings have texts"),
        ({"characters": None}, "some recordings have characters"),
        ({}, "'stream 4' is there 2 times"),
    ],
)
def test_recordings_that_do_not_belong_together_are_refused(rng, change, message):
    whole = random_recording(rng)
    other = dataclasses.replace(whole.part(slice(4, 5)), **change)
    with pytest.raises(RecordingError, match=message):
        concatenate([whole.part(slice(0, 5)), other])


def test_probes_hash_speaks_of_the_head_that_a_part_adds_to():
    def bank(head: str) -> ProbeBank:
        parts = [("a", None), ("b", None), ("part", head)]
        return ProbeBank(
            Probe(name, "h", Tap(0, "resid_post"), torch.ones(3), adds_to=to) for name, to in parts
        )

    assert probes_hash(bank("a")) == probes_hash(bank("a"))
    assert probes_hash(bank("a")) != probes_hash(bank("b"))


def test_probes_hash_speaks_of_what_logits_depend_on(rng):
    bundle = random_bundle(rng)
    bank = bundle.bank
    first, *rest = bank.probes

    def changed(**fields: Any) -> str:
        return probes_hash(type(bank)([dataclasses.replace(first, **fields), *rest]))

    before = probes_hash(bank)
    assert before == probes_hash(type(bank)(bank.probes))
    assert before == changed(hazard="other")  # what it is called changes no logit
    others = [
        changed(name="new"),
        changed(bias=first.bias + 1),
        changed(weight=torch.nextafter(first.weight, torch.tensor(9.0))),
    ]
    assert len({before, *others}) == 4


# ---- live streams --------------------------------------------------------------------------------


def _reports(lengths: list[int], *, trace: int, prompt: int = 3) -> tuple[list[Any], Any]:
    """Reports of toy streams over the words 0, 1, 2 and so on."""
    bundle = toy.bundle()
    monitor = toy.Monitor(bundle, slots=len(lengths), rows=64, trace=trace)
    reports = []
    for n, length in enumerate(lengths):
        slot = monitor.admit(f"s{n}", prompt)
        hidden = toy.model().get_input_embeddings().weight[torch.arange(length) % 24].detach()
        monitor.observe(toy.EMBEDDING, hidden)
        rows = torch.full((length,), slot, dtype=torch.int32)
        monitor.advance(rows, torch.arange(length, dtype=torch.int32))
        reports.append(monitor.retire(slot, "stop" if n % 2 else "length"))
    return reports, bundle


def test_reports_become_a_recording(tmp_path):
    reports, bundle = _reports([12, 4, 0, 9], trace=12)
    recording = Recording.from_reports(reports, bundle)
    assert recording.streams == ("s0", "s1", "s2", "s3")
    assert recording.bundle == bundle.hash
    assert recording.columns == {TIER: ("moderate",) * 4}
    assert recording.hazards == ("badness",)
    assert np.diff(recording.starts).tolist() == [12, 4, 0, 9]
    assert recording.prompt_tokens.tolist() == [3] * 4
    assert (recording.labels == -1).all()
    assert (recording.response_labels == -1).all()
    scores = [report.trace.scores["bad"] for report in reports]
    assert recording.logits[:, 0].tolist() == [z for score in scores for z in score]
    # A halted stream did not end by itself: word 4, the bad one, is the fifth token of s0 and s3.
    assert [report.halted_at for report in reports] == [4, None, None, 4]
    assert recording.ended.tolist() == [False, True, False, False]
    named = Recording.from_reports(reports, bundle, streams=list("abcd"), ended=[True] * 4)
    assert named.streams == ("a", "b", "c", "d")
    assert named.ended.all()
    recording.save(tmp_path / "trace")
    assert same(Recording.load(tmp_path / "trace"), recording)


def test_a_trace_that_is_too_short_says_how_long_it_must_be():
    # The first two prompt tokens, which no probe reads, are not needed; the third is judged.
    for trace in range(10):
        reports, bundle = _reports([12], trace=trace)
        with pytest.raises(RecordingError, match=r"'s0'.*trace=12 or more"):
            Recording.from_reports(reports, bundle)
    reports, bundle = _reports([12], trace=10)
    assert Recording.from_reports(reports, bundle).position.tolist() == list(range(2, 12))
    reports, bundle = _reports([4], trace=3, prompt=0)  # neither a prompt nor a halt to miss
    with pytest.raises(RecordingError, match=r"keeps 3 tokens.*trace=4 or more"):
        Recording.from_reports(reports, bundle)


def test_a_report_of_another_bundle_is_refused():
    reports, _ = _reports([5], trace=8)
    with pytest.raises(RecordingError, match=r"'s0' was judged by bundle"):
        Recording.from_reports(reports, toy.bundle(hold_back=2))
