"""Texts in and scores out: JSONL, CSV, plain lines; every bad line is named."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from midstream import texts
from midstream.engines.hf.scoring import TextScore
from midstream.streams import StreamReport, Trace
from midstream.texts import STDIO, TextInputError


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def scored(offsets: list[tuple[int, int]], risks: list[float | None]) -> TextScore:
    count = len(offsets)
    report = StreamReport(
        stream="text-0",
        bundle="b",
        tier="moderate",
        prompt_tokens=0,
        scored=count,
        unscored=2,
        verdict="HALT",
        cause="toxic",
        halted_at=1,
        risk=0.25,
        peak=0.75,
        finish_reason="stop",
        trace=Trace(
            position=list(range(count)),
            risk=risks,
            verdict=["HALT" if n else "CONTINUE" for n in range(count)],
            scores={"toxic": [n / 2 for n in range(count)], "odd": [None] * count},
        ),
    )
    return TextScore(report, offsets)


# ---- reading -------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", '{"id": 1, "text": "ä b"}\r\n\n  \n{"text": "c"}')
    assert list(texts.read(path, "text")) == [{"id": 1, "text": "ä b"}, {"text": "c"}]
    other = written(tmp_path, "u.jsonl", '{"body": "x", "text": 3}\n')
    assert list(texts.read(other, "body")) == [{"body": "x", "text": 3}]
    assert list(texts.read(written(tmp_path, "empty.jsonl", ""), "text")) == []


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv(tmp_path: Path, mark: bytes) -> None:
    table = 'text,id\r\n"a, ""b""\r\nc",1\r\nd,2\r\n'
    path = written(tmp_path, "t.csv", mark + table.encode())
    assert list(texts.read(path, "text")) == [
        {"text": 'a, "b"\r\nc', "id": "1"},
        {"text": "d", "id": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("t.jsonl", '{"text": "a"}\n{oh', 2, "not JSON"),
        ("t.jsonl", '{"text": "a"}\n\n{"id": 1}', 3, "no text under 'text'"),
        ("t.jsonl", '"text"', 1, "no text under 'text'"),
        ("t.jsonl", "[]", 1, "no text"),
        ("t.jsonl", '{"text": 7}', 1, "no text"),
        ("t.jsonl", '{"text": null}', 1, "no text"),
        ("t.jsonl", '{"text": " "}', 1, "no text"),
        ("t.csv", "text,id\na,1\n,2\n", 3, "no text"),
        ("t.csv", 'text,id\n"a\nb",1\n,2\n', 4, "no text"),
        ("t.csv", "id\n1\n", 2, "no text"),
        ("t.csv", "id,text\n1\n", 2, "no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, content: str, line: int, says: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(TextInputError, match=re.escape(f"{path}, line {line}: {says}")):
        list(texts.read(path, "text"))


def test_what_csv_cannot_hold_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "text\na\n" + "a" * 200_000)
    with pytest.raises(TextInputError, match=re.escape(f"{path}, after line 2: not CSV")):
        list(texts.read(path, "text"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, b"text\n\xff\xfe\n")
    with pytest.raises(TextInputError, match=r"t\.(jsonl|csv).*not (UTF-8|JSON)"):
        list(texts.read(path, "text"))
    with pytest.raises(TextInputError, match="not UTF-8"):
        texts.read_lines(path)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.StringIO('{"text": "a"}\n')
    monkeypatch.setattr(sys, "stdin", stdin)
    assert list(texts.read(STDIO, "text")) == [{"text": "a"}]
    assert not stdin.closed
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}\n"))
    with pytest.raises(TextInputError, match="-, line 1"):
        list(texts.read(STDIO, "text"))


def test_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "t.txt", " a b \r\n\n \nc\nd")
    assert texts.read_lines(path) == [" a b ", "c", "d"]
    with pytest.raises(TextInputError, match="no text"):
        texts.read_lines(written(tmp_path, "empty.txt", "\n \n"))


# ---- writing -------------------------------------------------------------------------------------


def test_written_records_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    records = [{"text": "ä\n☃", "n": 1}, {"text": "b"}]
    with texts.writer(path) as write:
        for record in records:
            write(record)
    assert "☃" in path.read_text(encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert list(texts.read(path, "text")) == records


def test_standard_output_stays_open(capsys: pytest.CaptureFixture[str]) -> None:
    with texts.writer(STDIO) as write:
        write({"a": 1})
    print("more")
    assert capsys.readouterr().out == '{"a": 1}\nmore\n'


def test_a_scored_record() -> None:
    record = texts.scored_record({"id": 7, "text": "ab c"}, scored([(0, 2), (3, 4)], [0.75, None]))
    assert record == {
        "id": 7,
        "text": "ab c",
        "verdict": "HALT",
        "halted_at": 1,
        "cause": "toxic",
        "peak": 0.75,
        "scored": 2,
        "unscored": 2,
        "tokens": [
            {
                "start": 0,
                "end": 2,
                "risk": 0.75,
                "verdict": "CONTINUE",
                "scores": {"toxic": 0.0, "odd": None},
            },
            {
                "start": 3,
                "end": 4,
                "risk": None,
                "verdict": "HALT",
                "scores": {"toxic": 0.5, "odd": None},
            },
        ],
    }
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([(0, 2), (3, 4)], [("ab", 0.5), (" ", None), ("c", 0.5), (" d", None)]),
        ([(0, 2), (2, 4), (4, 6)], [("ab", 0.5), (" c", 0.5), (" d", 0.5)]),
        ([(1, 2), (1, 2), (2, 3)], [("a", None), ("b", 0.5), (" ", 0.5), ("c d", None)]),
        ([(0, 3), (2, 4)], [("ab ", 0.5), ("c", 0.5), (" d", None)]),
    ],
)
def test_pieces_give_the_whole_text_once(
    offsets: list[tuple[int, int]], expected: list[tuple[str, float | None]]
) -> None:
    found = list(texts.pieces("ab c d", scored(offsets, [0.5] * len(offsets))))
    assert [piece for piece in found if piece[0]] == expected
    assert "".join(piece for piece, _ in found) == "ab c d"
