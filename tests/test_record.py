"""Labelled examples to recordings: the scores of live runs, the labels of the alignment."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import toy
from kernel_cases import fresh_seed
from recordings import same

from midstream import testbed
from midstream.bundle import WrongModelError
from midstream.engines.hf import score
from midstream.learn.align import encode
from midstream.learn.examples import Example, Message, Span
from midstream.measure.record import record, record_file
from midstream.measure.recording import TIER, Recording, RecordingError
from midstream.measure.rejudge import rejudge
from midstream.monitor import Monitor

WORDS = [word for word in toy.WORDS[4:] if word != "abcdef"]


def _examples(rng: np.random.Generator, count: int) -> list[Example]:
    """Toy conversations and plain texts, of which each "bad" is a labelled span."""
    examples = []
    for n in range(count):
        response = " ".join(rng.choice(WORDS, rng.integers(1, 20)))
        starts = [at for at in range(len(response)) if response.startswith("bad", at)]
        prompt = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
        examples.append(
            Example(
                id=f"e{n}",
                messages=(Message(role="user", content=prompt),) if n % 2 else (),
                response=response,
                spans=tuple(Span(start=s, end=s + 3, hazard="badness") for s in starts),
                columns={"half": "a"} if n < count // 2 else {},
            )
        )
    return examples


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_rows_are_those_of_the_alignment_and_of_the_probe(batch_size):
    examples = _examples(np.random.default_rng(fresh_seed()), 13)
    bundle, calls = toy.bundle(), []
    recording = record(
        toy.model(),
        toy.tokenizer(),
        examples,
        bundle,
        batch_size=batch_size,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert recording.streams == tuple(example.id for example in examples)
    assert recording.texts == tuple(example.response for example in examples)
    assert recording.columns == {"half": ("a",) * 6 + ("",) * 7}
    assert recording.bundle == bundle.hash
    assert recording.ended.all()
    assert calls[-1] == (13, 13)
    for e, example in enumerate(examples):
        one = encode(example, toy.tokenizer(), ["badness"])
        rows = slice(recording.starts[e], recording.starts[e + 1])
        kept = ~one.special
        assert (recording.labels[rows] == one.labels[kept]).all()
        assert (recording.characters[rows] == one.characters[kept]).all()
        assert (recording.response_labels[e] == one.response_labels).all()
        assert recording.position[rows].tolist() == list(range(kept.sum()))
        # Serving never scores the special tokens around a plain text, and a prompt's it does.
        assert recording.prompt_tokens[e] == (one.prompt_tokens if example.messages else 0)
        found = recording.logits[rows, 0]
        assert found == pytest.approx(np.where(one.ids[kept] == toy.BAD, 20, -20), abs=1e-3)


def test_plain_texts_are_recorded_as_score_scores_them():
    rng = np.random.default_rng(fresh_seed())
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(9)]
    bundle = toy.bundle()
    monitor = Monitor(bundle, slots=4, trace=64)
    scores = list(score(toy.model(), toy.tokenizer(), texts, monitor, batch_size=4))
    examples = [Example(id=str(n), response=text) for n, text in enumerate(texts)]
    recording = record(toy.model(), toy.tokenizer(), examples, bundle, batch_size=4)
    judged = rejudge(recording, bundle)
    for e, scored in enumerate(scores):
        rows = slice(recording.starts[e], recording.starts[e + 1])
        assert recording.logits[rows, 0] == pytest.approx(
            scored.report.trace.scores["bad"], abs=1e-4
        )
        halted_at = scored.report.halted_at
        assert judged.halted_at[e] == (-1 if halted_at is None else halted_at)
        assert [tuple(span) for span in recording.characters[rows].tolist()] == scored.offsets
    assert (recording.labels == -1).all()


def test_a_recorded_response_is_scored_as_it_was_when_it_was_generated():
    model, tokenizer = testbed.load()
    bundle, seed = testbed.load_bundle(), fresh_seed()
    prompts = [testbed.sample_prompt(seed, n).messages for n in range(6)]
    monitor = Monitor(bundle, slots=6, trace=192)
    torch.manual_seed(seed)
    inputs = tokenizer.apply_chat_template(
        [list(prompt) for prompt in prompts],
        add_generation_prompt=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_dict=True,
    )
    with monitor.attach(model, tokenizer, enforce=False) as attached:
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=60)
        responses = attached.responses(sequences)
    live = Recording.from_reports(attached.reports, bundle)
    examples = [
        Example(
            id=f"stream-{n}",
            messages=tuple(Message(**message) for message in prompt),
            response=tokenizer.decode(response),
        )
        for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    recorded = record(model, tokenizer, examples, bundle)
    assert (recorded.prompt_tokens == live.prompt_tokens).all()
    for e in range(6):
        ours = recorded.logits[recorded.starts[e] : recorded.starts[e + 1]]
        theirs = live.logits[live.starts[e] : live.starts[e + 1]]
        # The last token of a stream that was cut off is never fed when it is generated.
        assert len(ours) - len(theirs) in (0, 1)
        np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=2e-3)


def test_a_response_beyond_the_window_counts_as_cut_off():
    long = Example(id="long", response=" ".join(["w5"] * (toy.WINDOW + 9)), spans=())
    recording = record(toy.model(), toy.tokenizer(), [long], toy.bundle())
    assert not recording.ended[0]
    assert len(recording.position) == toy.WINDOW - 1  # one is <bos>


def test_what_cannot_be_recorded_is_refused():
    one = Example(id="one", response="w5")
    with pytest.raises(RecordingError, match="no examples"):
        record(toy.model(), toy.tokenizer(), [], toy.bundle())
    with pytest.raises(RecordingError, match="'one' is there 2 times"):
        record(toy.model(), toy.tokenizer(), [one, one], toy.bundle())
    tiered = Example(id="two", response="w5", columns={TIER: "x"})
    with pytest.raises(RecordingError, match="column 'tier' is kept"):
        record(toy.model(), toy.tokenizer(), [tiered], toy.bundle())
    with pytest.raises(WrongModelError):
        record(toy.new_model(num_hidden_layers=1), toy.tokenizer(), [one], toy.bundle())


def test_labels_of_other_hazards_alone_are_refused(tmp_path):
    """Complete spans of another hazard would make every token free of ours."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "w5 bad w6", "spans": [[3, 6]]}))
    arguments = (toy.model(), toy.tokenizer(), toy.bundle())
    with pytest.raises(RecordingError, match=r"labels of 'worse', and the bundle .* 'badness'"):
        record_file(tmp_path / "data.jsonl", tmp_path / "trace", *arguments, hazard="worse")
    assert not (tmp_path / "trace").exists()
    span = Span(start=3, end=6, hazard="worse")
    ours = Example(id="a", response="w5 bad", spans=(span,), labels={"badness": False})
    assert record(*arguments[:2], [ours], arguments[2]).response_labels.tolist() == [[0]]


def test_the_command_records_a_file(tmp_path):
    rows = [
        {"id": "a", "text": "w5 bad w6", "spans": [[3, 6]], "source": "x"},
        {"id": "b", "text": "w7", "label": 0, "source": "y"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (toy.model(), toy.tokenizer(), toy.bundle())
    told = record_file(
        tmp_path / "data.jsonl",
        tmp_path / "trace",
        *arguments,
        hazard="badness",
        columns=["source"],
    )
    found = Recording.load(tmp_path / "trace")
    assert told == {"streams": 2, "tokens": 4, "bytes": (tmp_path / "trace").stat().st_size}
    assert found.labels[:, 0].tolist() == [0, 1, 0, 0]
    assert found.response_labels[:, 0].tolist() == [1, 0]
    assert found.columns == {"source": ("x", "y")}
    assert same(found, dataclasses.replace(found))
    with pytest.raises(FileExistsError):
        record_file(tmp_path / "none.jsonl", tmp_path / "trace", *arguments)
