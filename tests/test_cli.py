"""The command line, as a user meets it: output, exit codes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from typer.testing import CliRunner

from midstream.bundle import Bundle
from midstream.cli import app
from midstream.commands.watch import HALTED

GOOD = "w5 w6 w7"
BAD = "w5 bad w7"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model that is not the testbed's, on disk, with a bundle made for it."""
    folder = tmp_path_factory.mktemp("user")
    model, tokenizer = toy.new_model(), toy.tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    toy.bundle(model, tokenizer).save(folder / "bundle")
    return folder / "model", folder / "bundle"


def run(
    *arguments: object, stdin: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", "from midstream.cli import main; main()", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    for command in ("demo", "watch", "score", "inspect", "doctor", "testbed", "serve", "audit"):
        assert command in shown


def test_doctor_gives_a_reason_for_each_missing_backend() -> None:
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert facts["backends"]["reference"]["available"]
    for backend in facts["backends"].values():
        assert backend["available"] == (backend["reason"] == "")


def test_watch_on_a_foreign_checkpoint(checkpoint: tuple[Path, Path]) -> None:
    model, bundle = checkpoint
    found = run("watch", GOOD, "--model", model, "--bundle", bundle, "--json", "--seed", 1)
    assert found.stderr == ""
    events = lines(found.stdout)
    assert events[0]["type"] == "admitted"
    assert events[-1]["type"] == "finished"
    halted = any(e["type"] == "halted" for e in events)
    assert found.returncode == (HALTED if halted else 0)
    assert "bad" not in "".join(e["text"] for e in events if e["type"] == "released")


def test_watch_halts_some_seed_and_says_so(checkpoint: tuple[Path, Path]) -> None:
    model, bundle = checkpoint
    arguments = ["watch", GOOD, "--model", model, "--bundle", bundle]
    for seed in range(20):
        found = CliRunner().invoke(app, [*map(str, arguments), "--seed", str(seed)])
        assert found.exit_code in (0, HALTED), found.output
        if found.exit_code == HALTED:
            assert "halted at token" in found.output
            answer = found.output.split("halted at token")[0].removeprefix(f"user: {GOOD}")
            assert "bad" not in answer
            assert "\x1b[" not in found.output  # no terminal, no colour
            return
    pytest.fail("no seed of 20 wrote the bad token")


def test_watch_refuses_another_model(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = checkpoint
    other = toy.new_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    toy.tokenizer().save_pretrained(tmp_path / "other")
    found = run("watch", GOOD, "--model", tmp_path / "other", "--bundle", bundle)
    assert found.returncode == 1
    assert "weights" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_model_without_its_bundle_is_wrong_usage(checkpoint: tuple[Path, Path]) -> None:
    found = CliRunner().invoke(app, ["watch", GOOD, "--model", str(checkpoint[0])])
    assert found.exit_code == 2
    assert "--bundle" in found.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nowhere"], "nowhere"),
        (["watch", "hi", "--model", "nowhere", "--bundle", "BUNDLE"], "nowhere"),
        (["score", "--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["watch", "hi", "--tier", "gentle"], "gentle"),
        (["watch", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_refusal_is_one_line(
    arguments: list[str], says: str, checkpoint: tuple[Path, Path]
) -> None:
    found = run(*[str(checkpoint[1]) if a == "BUNDLE" else a for a in arguments])
    assert found.returncode == 1
    assert says in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [("serve",), ("proxy", "--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m")],
)
@pytest.mark.parametrize(
    "option", [("--audit-text",), ("--audit-sync", "always"), ("--on-audit-failure", "refuse")]
)
def test_options_of_an_audit_log_that_is_not_kept_are_wrong_usage(
    command: tuple[str, ...], option: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(app, [*command, *option, "--settings", "nowhere.yaml"])
    assert result.exit_code == 2
    assert "--audit" in result.output


@pytest.mark.parametrize(
    "arguments", [["serve"], ["proxy", "--upstream", "http://u/v1", "--upstream-model", "m"]]
)
def test_serving_names_the_libraries_it_lacks(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "httptools", None)
    refusal = CliRunner().invoke(app, arguments).exception
    assert isinstance(refusal, ImportError)
    assert "fastapi, httptools: pip install 'midstream[serve]'" in str(refusal)


def test_score_reads_jsonl_and_csv_alike(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    model, bundle = checkpoint
    texts = [GOOD, BAD, "w8"]
    jsonl = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts))
    table = tmp_path / "texts.csv"
    table.write_text("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(texts)))
    options = ["--model", model, "--bundle", bundle]
    first = run("score", *options, stdin=jsonl)
    assert first.returncode == 0, first.stderr
    output = tmp_path / "scores.jsonl"
    assert run("score", *options, "--input", table, "--output", output).returncode == 0
    scored = lines(first.stdout)
    for one, other in zip(scored, lines(output.read_text()), strict=True):
        assert {**one, "id": str(one["id"])} == other
    assert [record["verdict"] for record in scored] == ["CONTINUE", "HALT", "CONTINUE"]
    assert scored[1]["halted_at"] == 1
    spans = [texts[1][token["start"] : token["end"]] for token in scored[1]["tokens"]]
    assert [span.strip() for span in spans] == texts[1].split()


@pytest.mark.parametrize("line", ["{not json", '{"id": 1}', '{"text": "  "}', "[1]"])
def test_score_names_the_bad_line(checkpoint: tuple[Path, Path], line: str) -> None:
    model, bundle = checkpoint
    good = json.dumps({"text": GOOD})
    found = run("score", "--model", model, "--bundle", bundle, stdin=f"{good}\n{line}\n")
    assert found.returncode == 1
    assert "line 2" in found.stderr


def test_watch_text_colours_on_a_terminal_only(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    model, bundle = checkpoint
    file = tmp_path / "text.txt"
    file.write_text(f"{GOOD}\n{BAD}\n")
    arguments = ["watch", "--model", model, "--bundle", bundle, "--text", file]
    plain = run(*arguments)
    assert plain.stdout.splitlines() == [GOOD, BAD]
    coloured = run(*arguments, FORCE_COLOR="1", COLORTERM="truecolor")
    assert "\x1b[38;2;" in coloured.stdout
    assert "\x1b[38;2" not in run(*arguments, FORCE_COLOR="1", NO_COLOR="1").stdout
    scored = lines(run(*arguments, "--json").stdout)
    assert [record["verdict"] for record in scored] == ["CONTINUE", "HALT"]


def test_inspect(checkpoint: tuple[Path, Path]) -> None:
    bundle = Bundle.load(checkpoint[1])
    summary = json.loads(CliRunner().invoke(app, ["inspect", str(checkpoint[1]), "--json"]).output)
    assert summary["hash"] == bundle.hash
    assert [probe["name"] for probe in summary["probes"]] == list(bundle.bank.names)
    table = CliRunner().invoke(app, ["inspect", str(checkpoint[1])]).output
    assert bundle.bank.names[0] in table


def test_testbed_sample_is_seeded() -> None:
    arguments = ["testbed", "sample", "-n", "3", "--seed", "5", "--json"]
    first = CliRunner().invoke(app, arguments).output
    assert first == CliRunner().invoke(app, arguments).output
    assert len(lines(first)) == 3
    assert first != CliRunner().invoke(app, [*arguments[:-2], "6", "--json"]).output
