"""``midstream collect``: from a file of labelled texts to a folder of residuals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import toy
import typer
from typer.testing import CliRunner

from midstream import testbed
from midstream.commands import collect as command
from midstream.learn.activations import Activations
from midstream.learn.collection import CollectionError
from midstream.learn.tokens import TrainingDataError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command.collect)

ROWS = [
    {"prompt": "w5 w6", "response": "w7 bad w9", "spans": [[3, 6, "harm"]]},
    {"prompt": "w5 w6 w7", "response": "w7 w8", "spans": [], "labels": {"refusal": True}},
    {"text": "w9 w9 w9 w9 bad", "labels": {"harm": True}},
]


@pytest.fixture
def model(tmp_path: Path) -> str:
    toy.new_model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def collected(*arguments: Any) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_texts_become_residuals_with_their_labels(tmp_path: Path, model: str, data: str) -> None:
    out = tmp_path / "out"
    told = collected("--data", data, "--model", model, "--out", out, "--dtype", "fp32")
    source = Activations.open(out)
    tokens = source.tokens
    assert told["hazards"] == ["harm", "refusal"] == list(tokens.hazards)
    assert told["taps"] == ["resid_post.0", "resid_post.1"]
    assert told["examples"] == 3 == len(tokens)
    assert told["tokens"] == told["collected_tokens"] == int(tokens.starts[-1])
    assert told["tokens_per_second"] == pytest.approx(told["tokens"] / told["seconds"])
    assert told["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert told["cut"] is None
    # <bos> w5 w6 w22 | w7 bad w9
    assert tokens.labels[:7, 0].tolist() == [-1, -1, -1, -1, 0, 1, 0]
    assert tokens.response_labels.tolist() == [[1, 0], [0, 1], [1, -1]]
    fed = torch.tensor([[toy.BOS, 5, 6, 22, 7, toy.BAD, 9]])
    with torch.inference_mode():
        states = toy.model()(fed, output_hidden_states=True).hidden_states
    [chunk] = source.chunks()
    assert (chunk.hidden[source.taps[0]][:7] - states[1][0]).abs().max() < 1e-5

    again = collected("--data", data, "--model", model, "--out", out, "--dtype", "fp32")
    assert again["collected_tokens"] == 0
    assert again["tokens_per_second"] is None


def test_options_choose_taps_hazards_and_dtype(tmp_path: Path, model: str, data: str) -> None:
    told = collected(
        *("--data", data, "--model", model, "--out", tmp_path / "out", "--dtype", "fp16"),
        *("--taps", "resid_post.1, resid_mid.0", "--hazard", "refusal"),
    )
    assert told["taps"] == ["resid_mid.0", "resid_post.1"]
    assert told["hazards"] == ["refusal"]
    assert told["dtype"] == Activations.open(tmp_path / "out").manifest.dtype == "fp16"


def test_people_read_a_summary(tmp_path: Path, model: str) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "w9 " * 100, "label": True}) + "\n")
    arguments = ("--data", data, "--model", model, "--out", tmp_path / "out", "--hazard", "harm")
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "1 examples, 64 tokens, labels of harm; 2 taps in bf16" in result.stdout
    assert "collected 64 tokens in" in result.stdout
    assert "tokens/s" in result.stdout
    assert "1 of 1 responses go on behind the end of the window" in result.stderr
    again = invoke(*arguments)
    assert "collected nothing; 64 were there already" in again.stdout


def test_an_incomplete_collection_names_the_command_that_goes_on(
    tmp_path: Path, model: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        result = invoke("--data", data, "--model", model, "--out", out, "--hazard", "harm")
    assert isinstance(result.exception, CollectionError)
    with pytest.raises(CollectionError, match="to go on: ") as caught:
        Activations.open(out)
    words = shlex.split(str(caught.value).partition("to go on: ")[2])
    assert words[:2] == ["midstream", "collect"]
    collected(*words[2:])
    assert Activations.open(out).tokens.hazards == ("harm",)


def test_wrong_usage_is_named(tmp_path: Path, model: str, data: str) -> None:
    arguments = ("--data", data, "--model", model, "--out", tmp_path / "out")
    for wrong, message in (
        (("--dtype", "int8"), "--dtype int8"),
        (("--taps", "resid_post"), "--taps"),
        (("--data-format", "xml"), "--data-format xml"),
    ):
        result = invoke(*arguments, *wrong)
        assert result.exit_code == 2
        assert message in result.stderr
    result = invoke(*arguments, "--hazard", "greed")
    assert isinstance(result.exception, TrainingDataError)
    assert "no example has a label of 'greed'; there are harm, refusal" in str(result.exception)
    result = invoke(*arguments, "--taps", "resid_post.2")
    assert "no tap resid_post.2" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_public_set_is_read_in_its_layout(tmp_path: Path, model: str) -> None:
    data = tmp_path / "train.csv"
    data.write_text('spans,text\n"[3, 4, 5]",w7 bad w9\n[],w5 w6\n')
    told = collected(
        *("--data", data, "--data-format", "toxic_spans"),
        *("--model", model, "--out", tmp_path / "out"),
    )
    assert told["hazards"] == ["toxic"]
    labels = Activations.open(tmp_path / "out").tokens.labels[:, 0]
    assert labels.tolist() == [-1, 0, 1, 0, -1, 0, 0]


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, [0]),
        (8, [*range(8)]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8]),
        (32, [3, 7, 11, 15, 19, 23, 27, 31]),
    ],
)
def test_layers_are_spread_and_end_with_the_last(depth: int, layers: list[int]) -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=depth)
    assert [tap.layer for tap in command.chosen_taps(model, None)] == layers


def test_the_testbed_is_what_is_collected_without_a_model(tmp_path: Path) -> None:
    testbed.write_corpus(tmp_path / "corpus.jsonl", 12, 0)
    told = collected("--data", tmp_path / "corpus.jsonl", "--out", tmp_path / "out")
    assert told["examples"] == 12
    assert len(told["taps"]) == 4
