"""Readers of public research data, each from the file as published; and of any labelled file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from midstream.learn.examples import Example
from midstream.learn.layout import RowError, examples_of
from midstream.learn.readers import ExampleError, Format, read_examples
from midstream.texts import records

_REFUSAL = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": None}
_UNSAFE = {"safe": False, "unsafe": True}


def toxic_spans(path: str | Path, *, hazard: str = "toxic") -> Iterator[Example]:
    """Read SemEval-2021 Task 5 (``train.csv``, ``trial.csv``): comments with their toxic spans.

    A comment without spans is known to have none. Offsets that follow on one another are one span.

    Raises
    ------
    ExampleError
        For a row in another layout.
    """
    for line, row in _rows(path, "spans", "text"):
        yield _example(path, line, {"text": row["text"], "spans": row["spans"]}, hazard=hazard)


def xstest_prompts(path: str | Path, *, hazard: str = "unsafe") -> Iterator[Example]:
    """Read XSTest's ``prompts.csv``: 250 safe prompts that look unsafe, 200 unsafe ones like them.

    ``label`` becomes the label of the prompt, ``type`` and ``focus`` become columns.

    Raises
    ------
    ExampleError
        For a row in another layout.
    """
    for line, row in _rows(path, "id", "prompt", "type", "label", "focus"):
        yield _example(
            path,
            line,
            {
                "id": f"xstest/{row['id']}",
                "group": f"xstest/{row['id']}",
                "prompt": row["prompt"],
                "prompt_labels": {hazard: _choice(path, line, row, "label", _UNSAFE)},
                "columns": {"type": row["type"], "focus": row["focus"]},
            },
        )


def xstest_completions(
    path: str | Path, *, hazard: str = "unsafe", refusal: str = "refusal"
) -> Iterator[Example]:
    """Read XSTest's ``completions_MODEL.csv``: answers with the label two annotators agreed on.

    Whether the answer refuses: a full refusal does, full compliance does not. A partial refusal is
    neither, so that label is left out; the column ``final_label`` has all three. The prompt is
    unsafe where ``type`` begins with ``contrast_``. The model, from the file's name, is a column.

    Raises
    ------
    ExampleError
        For a row in another layout.
    """
    model = Path(path).stem.removeprefix("completions_")
    for line, row in _rows(path, "id", "type", "prompt", "completion", "final_label"):
        refuses = _choice(path, line, row, "final_label", _REFUSAL)
        yield _example(
            path,
            line,
            {
                "id": f"xstest/{model}/{row['id']}",
                "group": f"xstest/{row['id'].removeprefix('v2-')}",
                "prompt": row["prompt"],
                "response": row["completion"],
                "labels": {} if refuses is None else {refusal: refuses},
                "prompt_labels": {hazard: row["type"].startswith("contrast_")},
                "columns": {
                    "model": model,
                    "type": row["type"],
                    "final_label": row["final_label"],
                },
            },
        )


def r_judge(path: str | Path, *, hazard: str = "unsafe") -> Iterator[Example]:
    """Read R-Judge's traces of agents, one JSON array.

    The profile and the first request, where the trace has one, are the conversation; the response
    is the rest of the trace, a line for each thought, action, answer and observation, and a blank
    line between sessions. The label is that of the whole trace: no step has one of its own.
    ``scenario`` becomes a column.

    Raises
    ------
    ExampleError
        For a file or a trace in another layout.
    """
    try:
        traces = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of UTF-8
        raise ExampleError(f"{path}: not JSON: {error}") from error
    if not isinstance(traces, list):
        raise ExampleError(f"{path}: expected a list of traces, found a {type(traces).__name__}")
    for number, trace in enumerate(traces, start=1):
        try:
            yield _trace(trace, hazard)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ExampleError(
                f"{path}, trace {number}: expected id, profile, label and contents, a list of "
                f"sessions of steps with a role; failed at {error!r}"
            ) from error
        except RowError as error:
            raise ExampleError(f"{path}, trace {number}: {error}") from error


def _trace(trace: Mapping[str, Any], hazard: str) -> Example:
    first, *steps = trace["contents"][0]
    messages = [{"role": "system", "content": trace["profile"]}]
    if first["role"] != "user":
        steps = [first, *steps]
    elif first["content"]:  # a quarter of the traces have none
        messages.append({"role": "user", "content": first["content"]})
    sessions = [steps, *trace["contents"][1:]]
    return examples_of(
        {
            "messages": messages,
            "response": "\n\n".join("\n".join(map(_line, session)) for session in sessions),
            "labels": {hazard: trace["label"]},
            "columns": {"scenario": trace.get("scenario") or "general"},
        },
        id=f"r_judge/{trace['id']}",
    )[0]


def _line(step: Mapping[str, Any]) -> str:
    """One step of a trace as a person would read it."""
    said = [f"{key}: {step[key]}" for key in ("thought", "action") if step.get(key)]
    if step.get("content"):
        said.append(str(step["content"]))
    return f"[{step['role']}] " + "\n".join(said or ["(nothing)"])


def _rows(path: str | Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in records(Path(path), "csv"):
        for name in columns:
            if row.get(name) is None:
                raise ExampleError(
                    f"{path}, line {line}: {name!r}: expected the columns {', '.join(columns)}"
                )
        yield line, row


def _choice(
    path: str | Path,
    line: int,
    row: Mapping[str, str],
    key: str,
    choices: Mapping[str, bool | None],
) -> bool | None:
    if row[key] not in choices:
        raise ExampleError(
            f"{path}, line {line}: {key!r}: expected one of {', '.join(choices)}, "
            f"found {row[key]!r}"
        )
    return choices[row[key]]


def _example(
    path: str | Path, line: int, row: Mapping[str, Any], *, hazard: str | None = None
) -> Example:
    try:
        return examples_of(row, id=f"{Path(path).stem}:{line}", hazard=hazard)[0]
    except RowError as error:
        raise ExampleError(f"{path}, line {line}: {error}") from error


SETS: dict[str, Callable[..., Iterator[Example]]] = {
    "toxic_spans": toxic_spans,
    "xstest_prompts": xstest_prompts,
    "xstest_completions": xstest_completions,
    "r_judge": r_judge,
}

DATA_FORMATS = (*get_args(Format), *SETS)
"""What a file of labelled data can be: a layout of `midstream.learn.readers`, or a public set."""


def read_labelled(
    path: Path,
    data_format: str | None = None,
    *,
    hazard: str | None = None,
    columns: Sequence[str] = (),
    labelled: bool = True,
) -> Iterator[Example]:
    """Read a file of any of `DATA_FORMATS`; by the end of its name when none is given.

    Other parameters and errors as for `midstream.learn.readers.read_examples`. A public set has its
    own columns.
    """
    if data_format is not None and data_format not in DATA_FORMATS:
        raise ExampleError(f"data format {data_format!r}: there are {', '.join(DATA_FORMATS)}")
    if data_format in SETS:
        return SETS[data_format](path) if hazard is None else SETS[data_format](path, hazard=hazard)
    return read_examples(
        path,
        format=cast("Format | None", data_format),
        hazard=hazard,
        columns=columns,
        labelled=labelled,
    )
