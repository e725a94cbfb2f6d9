"""Every form of labelled data becomes the same examples; every bad row is named."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream import testbed
from midstream.learn.examples import Contrast, Example, Message, Span
from midstream.learn.readers import ExampleError, read_examples
from midstream.texts import TextInputError


def one(row: dict[str, Any], **options: Any) -> Example:
    (example,) = read_examples([row], **options)
    return example


def span(start: int, end: int, hazard: str = "h") -> Span:
    return Span(start=start, end=end, hazard=hazard)


# ---- the layout ---------------------------------------------------------------------------------


@st.composite
def examples(draw: Any) -> Example:
    response = draw(st.text(max_size=12))
    words = st.text("ab ü", min_size=1, max_size=4)
    messages = draw(
        st.lists(
            st.builds(Message, role=st.sampled_from(["user", "assistant"]), content=st.text()),
            min_size=0 if response else 1,
            max_size=3,
        )
    )
    places = draw(st.lists(st.integers(0, len(response)), max_size=6))
    spans = [span(a, b, draw(words)) for a, b in zip(places, sorted(places), strict=True) if a < b]
    labels = {s.hazard: True for s in spans} | draw(
        st.dictionaries(words.filter(lambda w: all(w != s.hazard for s in spans)), st.booleans())
    )
    return Example(
        id=draw(st.text(min_size=1)),
        group=draw(st.none() | st.text(min_size=1)),
        messages=tuple(messages),
        response=response,
        spans=draw(st.sampled_from([None, tuple(spans)])),
        labels=labels,
        prompt_labels=draw(st.dictionaries(words, st.booleans())),
        contrast=draw(
            st.none() | st.builds(Contrast, pair=words, negated=st.booleans(), answer=st.booleans())
        ),
        columns=draw(st.dictionaries(words, st.text())),
    )


@given(example=examples())
def test_an_examples_own_json_comes_back(example: Example) -> None:
    row = json.loads(example.model_dump_json())
    assert one(row, labelled=False) == example


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"text": "ab", "label": 1}, {"response": "ab", "labels": {"h": True}}),
        ({"text": "ab", "label": "False"}, {"response": "ab", "labels": {"h": False}}),
        (
            {"prompt": "p", "response": "r", "labels": {"x": 0, "y": None}, "prompt_label": True},
            {
                "messages": (Message(role="user", content="p"),),
                "response": "r",
                "labels": {"x": False},
                "prompt_labels": {"h": True},
            },
        ),
        (
            {
                "messages": [{"role": "user", "content": "p", "name": None}],
                "prompt_labels": {"x": 1},
            },
            {"messages": (Message(role="user", content="p"),), "prompt_labels": {"x": True}},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "r"},
                ],
                "label": 0.0,
            },
            {
                "messages": (Message(role="user", content="p"),),
                "response": "r",
                "labels": {"h": False},
            },
        ),
        (
            {"text": "abcdef", "spans": [5, 1, 2, 2]},
            {"response": "abcdef", "spans": (span(1, 3), span(5, 6))},
        ),
        (
            {"text": "abcdef", "spans": [[0, 2], [3, 4, "x"], {"start": 4, "end": 5}]},
            {"response": "abcdef", "spans": (span(0, 2), span(3, 4, "x"), span(4, 5))},
        ),
        ({"text": "abc", "spans": "[]"}, {"response": "abc", "spans": ()}),
        (
            {"sentences": ["One.", "Two."], "labels": [0, 1]},
            {"response": "One.\nTwo.", "spans": (span(5, 9),)},
        ),
        (
            {"sentences": ["a", "b"], "labels": [1, 1]},
            {"response": "a\nb", "spans": (span(0, 1), span(2, 3))},
        ),
        (
            {"sentences": ["a", "a"], "labels": [[], ["x", "y"]], "response": "a  a"},
            {"response": "a  a", "spans": (span(3, 4, "x"), span(3, 4, "y"))},
        ),
        (
            {"tokens": ["a", "bc", "d", "e"], "labels": [0, 1, 1, 0]},
            {"response": "a bc d e", "spans": (span(2, 6),)},
        ),
        (
            {"tokens": ["a", "bc", "a"], "labels": [["x"], ["x", "y"], ["y"]], "text": "a(bc)a"},
            {"response": "a(bc)a", "spans": (span(0, 4, "x"), span(2, 6, "y"))},
        ),
        (
            {"text": "a", "contrast": {"pair": "p", "answer": False}, "group": 3, "id": 7},
            {"id": "7", "group": "3", "response": "a", "contrast": Contrast(pair="p", answer=0)},
        ),
        (
            {"text": "a", "label": 1, "columns": {"n": 2}, "other": [1]},
            {"response": "a", "labels": {"h": True}, "columns": {"n": "2"}},
        ),
    ],
)
def test_flat_forms(row: dict[str, Any], fields: dict[str, Any]) -> None:
    want = Example(**{"id": "row:1", **fields})
    assert one(row, hazard="h") == want
    flat = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
    assert one(flat, hazard="h") == want  # as a CSV would have it


def test_labelled_turns() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1", "label": False},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "u3"},
        {"role": "assistant", "content": "a3", "spans": [[0, 2]], "labels": {"x": True}},
    ]
    first, second = read_examples([{"id": "c", "messages": turns, "columns": {"k": 1}}], hazard="h")
    plain = tuple(Message(role=t["role"], content=t["content"]) for t in turns)
    assert (first.id, second.id, first.group, second.group) == ("c/2", "c/6", "c", "c")
    assert (first.messages, first.response, first.labels) == (plain[:2], "a1", {"h": False})
    assert (second.messages, second.response) == (plain[:6], "a3")
    assert (second.spans, second.labels) == ((span(0, 2),), {"x": True})
    assert first.columns == second.columns == {"k": "1"}
    (grouped,) = read_examples([{"group": "g", "messages": turns[:3]}], hazard="h")
    assert (grouped.id, grouped.group) == ("row:1/2", "g")


def test_columns_are_kept_when_named() -> None:
    row = {"text": "a", "label": 1, "severity": 3, "note": "x"}
    assert one(row, hazard="h", columns=["severity"]).columns == {"severity": "3"}
    with pytest.raises(ExampleError, match=r"row 1: 'kind': no such column; there are text, label"):
        one(row, hazard="h", columns=["kind"])


# ---- files --------------------------------------------------------------------------------------

ROWS = [
    {"text": "ab\ncd", "label": True, "spans": [[0, 1]], "kind": "k"},
    {"text": 'ü, "q"', "label": False, "spans": None, "kind": "l"},
]
WANT = [
    Example(
        id="d:{}", response="ab\ncd", labels={"h": True}, spans=(span(0, 1),), columns={"kind": "k"}
    ),
    Example(id="d:{}", response='ü, "q"', labels={"h": False}, columns={"kind": "l"}),
]


def check(path: Path, numbers: tuple[int, int], **options: Any) -> None:
    found = list(read_examples(path, hazard="h", columns=["kind"], **options))
    assert found == [
        want.model_copy(update={"id": f"d:{n}"}) for want, n in zip(WANT, numbers, strict=True)
    ]


def test_jsonl_and_csv(tmp_path: Path) -> None:
    import csv

    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "d.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    check(tmp_path / "d.jsonl", (1, 3))
    (tmp_path / "d.txt").write_text("\n".join(lines), encoding="utf-8")
    check(tmp_path / "d.txt", (1, 2), format="jsonl")
    with open(tmp_path / "d.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["text", "label", "spans", "kind"])
        table.writeheader()
        table.writerows(ROWS)
    check(tmp_path / "d.csv", (3, 4))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    check(path, (1, 2))
    maps = pa.array([[("x", True), ("y", None)]], pa.map_(pa.string(), pa.bool_()))
    pq.write_table(pa.table({"text": ["a"], "labels": maps}), path)
    assert next(read_examples(path)).labels == {"x": True}
    path.write_bytes(b"no such thing")
    with pytest.raises(ExampleError, match=r"d\.parquet, after row 0: not Parquet"):
        list(read_examples(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("midstream[learn]")):
        list(read_examples(path))


def test_the_testbeds_corpus(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    testbed.write_corpus(path, 60, seed=2)
    marked = 0
    for example, dialogue in zip(
        read_examples(path), testbed.sample_dialogues(60, seed=2), strict=True
    ):
        labels, sealed = dialogue.labels, dialogue.prompt.sealed
        words = re.findall(r"\w+|[.,?]", example.response)
        assert (
            words
            == testbed.text_of(dialogue.response)
            .replace(".", " .")
            .replace(",", " ,")
            .replace("?", " ?")
            .split()
        )
        assert example.labels == {
            "sealed vessel opened": labels.violates,
            "refusal": labels.refusal,
        }
        assert example.prompt_labels == {"sealed vessel opened": labels.attack}
        assert example.columns["attack"] == ("yes" if labels.attack else "no")
        assert example.spans is not None
        assert len(example.spans) == labels.violates
        for found in example.spans:
            before = example.response[: found.start]
            assert example.response[found.start : found.end] == sealed
            assert len(re.findall(r"\w+|[.,?]", before)) == labels.first
            marked += 1
    assert marked > 5


# ---- bad rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "lable": 1}, "no label; expected one of .* found the keys 'text', 'lable'"),
        ({"text": "a", "label": "maybe"}, "'label': expected true, false, 0 or 1, found 'maybe'"),
        ({"text": "a", "label": 2}, "'label': expected true, false, 0 or 1, found 2"),
        ({"text": "a", "label": [1]}, "'label': expected true"),
        ({"text": 3, "label": 1}, "'text': expected a string, found 3"),
        ({"label": 1}, "neither messages nor a response"),
        ({"text": "a", "response": "b", "label": 1}, "'text': there is 'response' as well"),
        ({"text": "a", "prompt": "b", "label": 1}, "'text': there is 'prompt' as well"),
        ({"prompt": "a", "messages": [], "label": 1}, "'prompt': there are 'messages'"),
        ({"text": "a", "label": 1, "labels": {}}, "'label': there is 'labels' as well"),
        ({"text": "a", "labels": [1]}, "'labels': expected hazards with truth values"),
        ({"text": "a", "labels": {"x": "y"}}, r"'labels\.x': expected true"),
        ({"text": "a", "labels": "{x"}, "'labels': not JSON: .* found '{x'"),
        ({"text": "a", "spans": 4}, "'spans': expected a list, found 4"),
        ({"text": "a", "spans": [[0]]}, r"'spans': expected .* found \[0\]"),
        ({"text": "a", "spans": [[0, "b"]]}, r"'spans\.end': .*integer"),
        ({"text": "a", "spans": [[1, 1]]}, "'spans': .*empty"),
        ({"text": "a", "spans": [[0, 2]]}, "ends after the response, which has 1"),
        ({"text": "a", "spans": [-1]}, r"'spans\.start': .*greater than or equal to 0"),
        ({"text": "a", "spans": [[0, 1]], "label": 0}, "says that it is not there"),
        ({"messages": "x", "label": 1}, "'messages': not JSON"),
        ({"messages": ["x"], "label": 1}, r"'messages\[0\]': expected role and content"),
        (
            {"messages": [{"role": "user", "text": "x"}], "label": 1},
            r"'messages\[0\]\.content': Field required",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "label": 1}]},
            r"'messages\[0\]': a 'user' turn has a label; only 'assistant' may",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "label": 1}], "label": 1},
            "'label': turns have labels of their own",
        ),
        ({"tokens": ["a", "b"], "labels": [1]}, "'labels': expected one for each of the 2 tokens"),
        ({"tokens": ["a"], "labels": [1], "text": "b"}, r"'tokens\[0\]': 'a' is not in the text"),
        ({"tokens": ["a", " "], "labels": [1, 0]}, "'tokens': expected strings that are not"),
        ({"tokens": ["a"], "sentences": ["a"], "labels": [1]}, "labels of their own"),
        ({"tokens": ["a"], "labels": ["x"]}, "'labels': expected true, false, 0 or 1, found 'x'"),
        ({"text": "a", "contrast": {"pair": "p"}}, r"'contrast\.answer': Field required"),
        ({"text": "a", "label": 1, "columns": 3}, "'columns': expected names with values"),
        ({"text": "a", "label": 1, "id": ""}, "'id': .*at least 1 character"),
        ("train", "expected a mapping, found a str; of a DatasetDict, give one split"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str) -> None:
    rows = read_examples([{"text": "good", "label": 1}, row], hazard="h")
    assert next(rows).response == "good"
    with pytest.raises(ExampleError, match="row 2: .*" + message):
        next(rows)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": 1},
        {"text": "a", "spans": [[0, 1]]},
        {"tokens": ["a"], "labels": [1]},
        {"prompt": "a", "prompt_label": 1},
    ],
)
def test_a_label_needs_a_hazard(row: dict[str, Any]) -> None:
    with pytest.raises(ExampleError, match="names no hazard; say which it speaks of with hazard="):
        one(row)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": 7}\n')
    with pytest.raises(ExampleError, match=re.escape(f"{path}, line 3: 'label'")):
        list(read_examples(path, hazard="h"))
    path.write_text('{"text": "a"')
    with pytest.raises(TextInputError, match="line 1: not JSON"):
        list(read_examples(path))
    path.write_text('{"text": "a", "id": 1, "spans": []}\n' * 2)
    with pytest.raises(ExampleError, match="line 2: 'id': '1' is that of line 1, too"):
        list(read_examples(path))
    with pytest.raises(ExampleError, match=r"d\.json: cannot tell its format"):
        list(read_examples(tmp_path / "d.json"))
    table = tmp_path / "d.csv"
    table.write_text("text,label\na,1,2\n")
    with pytest.raises(ExampleError, match="line 2: more fields than the header"):
        list(read_examples(table, hazard="h"))


def test_unlabelled_rows_when_asked_for() -> None:
    assert one({"text": "a"}, labelled=False) == Example(id="row:1", response="a")
