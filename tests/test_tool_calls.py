"""Tool calls found in text while it is written: where they end, and what is no call."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.agents import call_json
from midstream.agents.action_gate import ActionGate
from midstream.agents.call_chunks import DeltaScanner
from midstream.agents.call_json import CallError, Found, parse_object
from midstream.agents.decisions import GateVerdict, MalformedCall
from midstream.agents.gate_rules import GateRules
from midstream.agents.gated_calls import GatedToolCalls
from midstream.agents.steps import ToolCall
from midstream.agents.tool_calls import (
    FORMATS,
    CallFormat,
    ToolCallScanner,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
nasty = st.sampled_from(['"', "\\", '\\"', "{", "}", "[", "]", "</tool_call>", "<tool_call>", "\n"])
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    leaves | texts | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | nasty, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts | nasty, values, max_size=4)
names = st.from_regex(r"[a-z][a-z_.]{0,15}", fullmatch=True)
prose = st.text(st.sampled_from("abc .,:<>_\n}]\"'Atol"), max_size=20)


@st.composite
def written(draw: Any) -> tuple[str, list[tuple[str, dict[str, Any], int]]]:
    """A message, and its calls with the position after each one's last bracket, by construction."""
    message, calls = "", []
    form = draw(st.sampled_from(list(FORMATS.values())))
    for _ in range(draw(st.integers(1, 3))):
        tool, arguments = draw(names), draw(objects)
        layout = {"indent": draw(st.sampled_from([None, 1])), "ensure_ascii": draw(st.booleans())}
        if form.tool_keys:
            pair = [(form.tool_keys[0], tool), (form.argument_keys[0], arguments)]
            body = json.dumps(dict(draw(st.permutations(pair))), **layout)
        else:
            body = json.dumps(arguments, **layout)
        if form.name == "bare":
            message += draw(st.sampled_from(["", " ", "\n;"])) + body
        elif form.name == "react":
            message += "\n" if message else ""
            message += f"Action: {tool}\nAction Input: {body}"
        else:
            # Not at the start of the message, where a bracket would begin bare JSON.
            message += "x" + draw(prose.filter(lambda text: "Action:" not in text))
            message += form.opens + draw(st.sampled_from(["", "\n", " "])) + body
        calls.append((tool, arguments, len(message)))
    return message, calls


def fed(text: str, cuts: Sequence[int] = ()) -> list[Found]:
    scanner = ToolCallScanner()
    edges = [0, *sorted(cuts), len(text)]
    found = [f for a, b in itertools.pairwise(edges) for f in scanner.feed(text[a:b])]
    return found + scanner.finish()


def only(text: str) -> ToolCall | MalformedCall:
    (found,) = fed(text)
    return found.call


@given(written())
def test_each_call_is_known_at_the_character_that_ends_it(case: Any) -> None:
    message, calls = case
    scanner = ToolCallScanner()
    found = [
        (f.call.tool, f.call.arguments, i)
        for i, character in enumerate(message, start=1)
        for f in scanner.feed(character)
        if isinstance(f.call, ToolCall) and f.end == i
    ]
    assert found == calls
    assert scanner.finish() == []


noise = st.text(st.sampled_from('<>{}[]":\\toolcal_Actin Ip|py\n'), max_size=60)
TOKENS = ["<tool_call>", "<tool_", "call>", "\nAction:", "Action Input:", "<|python_tag|>", "["]
TOKENS += ['{"name":', '"a"', ',"arguments":{', "}", '"', "\\", "\n", "x"]
fragments = st.lists(st.sampled_from(TOKENS), max_size=20).map("".join)


@settings(max_examples=200)
@given(st.one_of(written().map(lambda case: case[0]), noise, fragments), st.data())
def test_any_split_finds_the_same_at_the_same_character(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = fed(text)
    assert fed(text, cuts) == whole
    assert fed(text, range(1, len(text))) == whole


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>soon", "expected a JSON object"),
        ('<tool_call>["a"]', "expected a JSON object"),
        ('<tool_call>{"name": "a"}', "no 'arguments'"),
        ('<tool_call>{"arguments": {}}', "no 'name'"),
        ('<tool_call>{"name": 7, "arguments": {}}', "tool's name"),
        ('<tool_call>{"name": " ", "arguments": {}}', "tool's name"),
        ('<tool_call>{"name": "a", "arguments": [1]}', "expected an object, got list"),
        ('<tool_call>{"name": "a", "arguments": "no"}', "not JSON"),
        ("<tool_call>{'name': 'a', 'arguments': {}}", "not JSON"),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}', "NaN is not JSON"),
        ('<tool_call>{"name": "a", "arguments": {"x": -Infinity}}', "-Infinity is not JSON"),
        ('<tool_call>{"name": "a", "arguments": {"x": 1e999}}', "too large"),
        ('<tool_call>{"name": "a", "arguments": {"x": 1, "x": 2}}', "'x' is given twice"),
        ('<tool_call>{"name": "a", "name": "b", "arguments": {}}', "'name' is given twice"),
        ('<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}', "lone surrogate"),
        ('<tool_call>{"name": "a", "arguments": {"x": "\ud800"}}', "lone surrogate"),
        ('<tool_call>{"name": "a", "arguments": ]', "closes what it did not open"),
        ('<tool_call>{"name": "a", "arguments": {', "does not end"),
        ("<tool_call>", "has no arguments"),
        ("<tool_call>" + '{"a":' * 1000, "nested more than"),
        ("Action: find\nThen input", "expected 'Action Input:'"),
        ("Action: find\nAction Input: all", "expected a JSON object"),
        ("Action: find", "no arguments"),
        ("Action: " + "x" * 300, "256 characters"),
        ('{"name": "a", "parameters": {"x": ', "does not end"),
        (f'<tool_call>{{"name": "a", "arguments": {{"x": {"9" * 5000}}}}}', "not JSON"),
    ],
)
def test_what_is_no_call(text: str, reason: str) -> None:
    call = only(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.reason
    assert len(call.text) <= 200


def test_a_call_too_long_is_given_up_at_its_limit_and_the_next_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_json, "MOST_CHARACTERS", 40)
    body = '{"name":"a","arguments":{"x":"' + "y" * 100
    text = f'<tool_call>{body}"}}}}<tool_call>{{"name":"b","arguments":{{}}}}'
    for cuts in ((), range(1, len(text)), (11, 50, 52)):
        first, second = fed(text, cuts)
        assert isinstance(first.call, MalformedCall)
        assert "more than 40 characters" in first.call.reason
        assert first.end == len("<tool_call>") + 41
        assert second.call == ToolCall(tool="b")
    exact = '{"name":"a","arguments":{"x":"' + "y" * 7 + '"}}'
    assert len(exact) == 40
    assert isinstance(only(f"<tool_call>{exact}"), ToolCall)


def test_json_that_is_no_call_is_not_one_unless_a_tag_says_so() -> None:
    assert fed('{"answer": {"name": "x"}} and more') == []
    assert fed('The set {"name": "a", "parameters": {}} is not at the beginning') == []
    assert fed("no call at all, just < and { and Action") == []


def test_only_the_formats_asked_for_are_read() -> None:
    text = '{"name": "a", "parameters": {}}'
    assert ToolCallScanner([FORMATS["hermes"]]).feed(text) == []
    (found,) = ToolCallScanner([FORMATS["bare"]]).feed("  " + text)
    assert found.call == ToolCall(tool="a")
    own = CallFormat("own", "<<call>>", ("fn",), ("with",))
    (found,) = ToolCallScanner([own]).feed('x <<call>> {"with": {"k": 1}, "fn": "b"}')
    assert found.call == ToolCall(tool="b", arguments={"k": 1})


@pytest.mark.parametrize(
    "formats",
    [
        [],
        [CallFormat("a", "<x>"), CallFormat("b", "<x>")],
        [CallFormat("a", "<x>"), CallFormat("b", "<<x>>")],
    ],
)
def test_formats_that_cannot_be_told_apart(formats: list[CallFormat]) -> None:
    with pytest.raises(ValueError, match="formats"):
        ToolCallScanner(formats)


def test_arguments_as_json_in_a_string() -> None:
    call = only('<tool_call>{"name": "a", "arguments": "{\\"x\\": [1]}"}')
    assert call == ToolCall(tool="a", arguments={"x": [1]})


def test_a_scanner_can_be_used_again() -> None:
    scanner = ToolCallScanner()
    scanner.feed('<tool_call>{"name"')
    assert isinstance(scanner.finish()[0].call, MalformedCall)
    (found,) = scanner.feed('{"name": "a", "parameters": {}}')
    assert found == Found(ToolCall(tool="a"), 31)


@given(st.text(max_size=40) | values.map(json.dumps))
def test_parse_object_takes_what_the_library_takes_or_says_why(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        return  # judged by the tests above
    with pytest.raises(CallError):
        parse_object(text)


# ---- chunks -------------------------------------------------------------------------------------


def chunk(index: int, name: str | None = None, arguments: str | None = None) -> Mapping[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"name": name, "arguments": arguments}}]}


@given(st.lists(st.tuples(names, objects), min_size=1, max_size=3), st.data())
def test_chunks_of_several_calls_in_any_order(calls: Any, data: st.DataObject) -> None:
    scanner = DeltaScanner()
    rest = [json.dumps(arguments) for _, arguments in calls]
    for i, (tool, _) in enumerate(calls):
        assert scanner.feed(chunk(i, tool, "")) == []
    while any(rest):
        i = data.draw(st.sampled_from([i for i, text in enumerate(rest) if text]))
        size = data.draw(st.integers(1, len(rest[i])))
        piece, rest[i] = rest[i][:size], rest[i][size:]
        found = [f.call for f in scanner.feed(chunk(i, None, piece))]
        assert found == ([] if rest[i] else [ToolCall(tool=calls[i][0], arguments=calls[i][1])])
    assert scanner.finish() == []


def test_chunks_without_arguments_are_a_call_without() -> None:
    scanner = DeltaScanner()
    assert scanner.feed({"content": "hello"}) == []
    assert scanner.feed(chunk(0, "ping")) == []
    assert [f.call for f in scanner.finish()] == [ToolCall(tool="ping")]


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([chunk(0, "a", "[1]")], "expected a JSON object"),
        ([chunk(0, "a", "{} {}")], "more after"),
        ([chunk(0, "a", "{}"), chunk(0, None, "{}")], "more after"),
        ([chunk(0, "a", "{}"), chunk(0, "b")], "more after"),
        ([chunk(0, "a", '{"x": ')], "does not end"),
        ([chunk(0, "", "{}")], "tool's name"),
        ([{"tool_calls": "x"}], "without index"),
        ([{"tool_calls": [{"index": "0", "function": {}}]}], "without index"),
        ([{"tool_calls": [{"index": 0, "function": {"name": 7}}]}], "must be text"),
        ([chunk(i, "a") for i in range(129)], "128 calls"),
    ],
)
def test_chunks_that_are_no_calls(pieces: Sequence[Mapping[str, Any]], reason: str) -> None:
    scanner = DeltaScanner()
    found = [f for piece in pieces for f in scanner.feed(piece)] + scanner.finish()
    faults = [f.call.reason for f in found if isinstance(f.call, MalformedCall)]
    assert len(faults) == 1
    assert reason in faults[0]


# ---- with a gate --------------------------------------------------------------------------------

RULES = """
roles:
  archivist:
    tools: {find: {calls: 1}, dust: {}}
effects: {read: [find]}
consensus: {borderline_at: 2, block_at: 4}
"""


def test_calls_are_judged_as_they_end_and_counted() -> None:
    session = ActionGate(GateRules.from_yaml(RULES)).session("Find vessel 7")
    gated = GatedToolCalls(session)
    call = '<tool_call>{"name": "find", "arguments": {"vessel": 7}}'
    assert gated.feed(call[:-1]) == []
    (first,) = gated.feed(call[-1:])
    assert first.verdict is GateVerdict.ALLOW
    second, third, fourth = gated.feed(
        call + '</tool_call><tool_call>{"name": "melt", "arguments": {}}<tool_call>oops'
    )
    assert (second.verdict, second.rule) == (GateVerdict.BLOCK, "tools.find.calls")
    assert (third.verdict, third.rule) == (GateVerdict.BLOCK, "tools")
    assert (fourth.verdict, fourth.stage) == (GateVerdict.BLOCK, "form")
    gated.feed('<tool_call>{"name": "du')
    (left,) = gated.finish()
    assert left.verdict is GateVerdict.BLOCK


def test_chunks_are_judged_too() -> None:
    session = ActionGate(GateRules.from_yaml(RULES)).session()
    gated = GatedToolCalls(session, DeltaScanner())
    assert gated.feed(chunk(0, "find", '{"vessel": ')) == []
    (decision,) = gated.feed(chunk(0, None, "7}"))
    assert decision.verdict is GateVerdict.ALLOW
    assert decision.call == ToolCall(tool="find", arguments={"vessel": 7})
