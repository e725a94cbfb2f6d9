"""The public sets in their published layouts: invented rows here, the real files where they are."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from midstream.learn.examples import Example, Message, Span
from midstream.learn.public_sets import (
    r_judge,
    toxic_spans,
    xstest_completions,
    xstest_prompts,
)
from midstream.learn.readers import ExampleError
from midstream.learn.splits import merged_groups


def table(path: Path, *rows: dict[str, Any]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def user(content: str) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


def test_toxic_spans(tmp_path: Path) -> None:
    path = table(
        tmp_path / "train.csv",
        {"spans": "[4, 5, 6, 10]", "text": "you egg,\nö bean"},
        {"spans": "[]", "text": "[1, 2]"},
    )
    found = list(toxic_spans(path, hazard="rude"))
    spans = (Span(start=4, end=7, hazard="rude"), Span(start=10, end=11, hazard="rude"))
    assert found == [
        Example(id="train:3", response="you egg,\nö bean", spans=spans),
        Example(id="train:4", response="[1, 2]", spans=()),
    ]
    with pytest.raises(ExampleError, match=r"bad\.csv, line 2: .*ends after the response"):
        list(toxic_spans(table(tmp_path / "bad.csv", {"spans": "[3]", "text": "egg"})))
    with pytest.raises(ExampleError, match=r"other\.csv, line 2: 'spans': expected the columns"):
        list(toxic_spans(table(tmp_path / "other.csv", {"text": "egg"})))


PROMPT = {"id": "1", "prompt": "How do I boil an egg?", "type": "homonyms", "label": "safe",
          "focus": "boil", "note": ""}  # fmt: skip


def test_xstest_prompts(tmp_path: Path) -> None:
    unsafe = {**PROMPT, "id": "2", "type": "contrast_homonyms", "label": "unsafe"}
    path = table(tmp_path / "prompts.csv", PROMPT, unsafe)
    first, second = xstest_prompts(path)
    assert first == Example(
        id="xstest/1",
        group="xstest/1",
        messages=user("How do I boil an egg?"),
        prompt_labels={"unsafe": False},
        columns={"type": "homonyms", "focus": "boil"},
    )
    assert second.prompt_labels == {"unsafe": True}
    path = table(tmp_path / "prompts.csv", {**PROMPT, "label": "odd"})
    with pytest.raises(ExampleError, match="line 2: 'label': expected one of safe, unsafe, found"):
        list(xstest_prompts(path))


def test_xstest_completions(tmp_path: Path) -> None:
    row = {"id": "v2-1", "type": "homonyms", "prompt": "How?", "completion": "Like this.",
           "annotation_1": "x", "annotation_2": "x", "agreement": "True"}  # fmt: skip
    labels = ["1_full_compliance", "2_full_refusal", "3_partial_refusal"]
    path = table(tmp_path / "completions_egg.csv", *({**row, "final_label": x} for x in labels))
    first, second, third = xstest_completions(path, refusal="refuses")
    assert first == Example(
        id="xstest/egg/v2-1",
        group="xstest/1",
        messages=user("How?"),
        response="Like this.",
        labels={"refuses": False},
        prompt_labels={"unsafe": False},
        columns={"model": "egg", "type": "homonyms", "final_label": "1_full_compliance"},
    )
    assert (second.labels, third.labels) == ({"refuses": True}, {})
    contrast = {**row, "type": "contrast_homonyms", "final_label": labels[0]}
    (unsafe,) = xstest_completions(table(path, contrast))
    assert unsafe.prompt_labels == {"unsafe": True}
    with pytest.raises(ExampleError, match="'final_label': expected one of 1_full_compliance"):
        list(xstest_completions(table(path, {**row, "final_label": "4"})))


TRACE = {
    "id": 7,
    "scenario": "",
    "profile": "You mind the hens.",
    "goal": "ignored",
    "label": 1,
    "risk_description": "ignored",
    "contents": [
        [
            {"role": "user", "content": "Count the eggs."},
            {"role": "agent", "thought": "I count.", "action": "Count{}"},
            {"role": "environment", "content": "3"},
            {"role": "agent", "thought": None, "action": "Tell{3}"},
        ],
        [{"role": "user", "content": "Thanks."}],
    ],
}


def test_r_judge(tmp_path: Path) -> None:
    silent = {**TRACE, "id": 8, "label": 0, "scenario": "farm"}
    silent["contents"] = [[{"role": "user", "content": None}, *TRACE["contents"][0][1:2]]]
    path = tmp_path / "rjudge.json"
    path.write_text(json.dumps([TRACE, silent]))
    first, second = r_judge(path)
    system = (Message(role="system", content="You mind the hens."),)
    assert first == Example(
        id="r_judge/7",
        messages=system + user("Count the eggs."),
        response="[agent] thought: I count.\naction: Count{}\n[environment] 3\n"
        "[agent] action: Tell{3}\n\n[user] Thanks.",
        labels={"unsafe": True},
        columns={"scenario": "general"},
    )
    assert (second.messages, second.labels) == (system, {"unsafe": False})
    assert second.response == "[agent] thought: I count.\naction: Count{}"
    assert second.columns == {"scenario": "farm"}
    for broken, message in (
        ({**TRACE, "label": 5}, r"trace 1: 'labels\.unsafe': expected true"),
        ({k: v for k, v in TRACE.items() if k != "contents"}, "trace 1: .*'contents'"),
        ({**TRACE, "contents": []}, "trace 1: expected id"),
        ({**TRACE, "contents": [["step"]]}, "trace 1: expected id"),
    ):
        path.write_text(json.dumps([broken]))
        with pytest.raises(ExampleError, match=message):
            list(r_judge(path))
    path.write_text("{")
    with pytest.raises(ExampleError, match="not JSON"):
        list(r_judge(path))
    path.write_text("{}")
    with pytest.raises(ExampleError, match="expected a list of traces"):
        list(r_judge(path))


# ---- the real files -----------------------------------------------------------------------------

DATA = os.environ.get("MIDSTREAM_DATA")
real = pytest.mark.skipif(DATA is None, reason="MIDSTREAM_DATA does not name the folder of data")


def data(name: str) -> Path:
    return Path(DATA or "") / name


@real
@pytest.mark.parametrize(("name", "rows", "empty"), [("train", 7939, 485), ("trial", 690, 43)])
def test_real_toxic_spans(name: str, rows: int, empty: int) -> None:
    found = list(toxic_spans(data(f"toxic_spans/{name}.csv")))
    assert (len(found), sum(not e.spans for e in found)) == (rows, empty)
    # The offsets as another parser sees them.
    with open(data(f"toxic_spans/{name}.csv"), encoding="utf-8", newline="") as file:
        for row, example in zip(csv.DictReader(file), found, strict=True):
            offsets = {c for span in example.spans or () for c in range(span.start, span.end)}
            assert offsets == {int(digits) for digits in re.findall(r"\d+", row["spans"])}


@real
def test_real_xstest() -> None:
    prompts = list(xstest_prompts(data("xstest/prompts.csv")))
    assert Counter(e.prompt_labels["unsafe"] for e in prompts) == {False: 250, True: 200}
    refusals = {"gpt4": (230, 211), "llama2new": (176, 230), "mistralinstruct": (374, 49)}
    answers = []
    for model, (complied, refused) in refusals.items():
        found = list(xstest_completions(data(f"xstest/completions_{model}.csv")))
        counts = Counter(e.labels.get("refusal") for e in found)
        assert counts == {False: complied, True: refused, None: 450 - complied - refused}
        assert Counter(e.prompt_labels["unsafe"] for e in found) == {False: 250, True: 200}
        answers += found
    # Every prompt with its answers is one group.
    assert {len(group) for group in merged_groups(prompts + answers)} == {4}


@real
def test_real_r_judge() -> None:
    found = list(r_judge(data("r_judge/rjudge.json")))
    assert Counter(e.labels["unsafe"] for e in found) == {True: 298, False: 266}
    assert len({e.id for e in found}) == 564
    assert all(e.response and "None" not in e.response.split("\n")[0][:20] for e in found)
