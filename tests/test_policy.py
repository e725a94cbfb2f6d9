"""Policies: what is accepted, what is refused by name, and the table the kernels are given."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_filter import NAN, Kernel, logit_in_bin, random_chain
from pydantic import ValidationError

from midstream.kernels.tables import OnUnscored, Verdict
from midstream.policy import (
    ANSWER,
    TIERS,
    OnHalt,
    Policy,
    PolicyError,
    Provenance,
    Segment,
    Thresholds,
)

CHAIN = random_chain(5)

EXAMPLE = """
schema_version: 1
tiers:
  strict: {horizon: 16, halt_at: 0.2, hold_at: 0.1, release_at: 0.05}
  moderate: {horizon: 16, halt_at: 0.5, hold_at: 0.3}
  loose: {horizon: 0, halt_at: 0.9}
default_tier: moderate
segments:
  reasoning:
    opens: ["<think>"]
    closes: ["</think>", [7, 8]]
    tiers:
      loose: {horizon: 0, halt_at: 0.99}
      strict: {horizon: 8, halt_at: 0.6}
      moderate: {horizon: 4, halt_at: 0.8}
  tool_call: {opens: [[3]], closes: [[4]]}
hold_back: 2
on_unscored: halt
on_halt: {finish_reason: stopped, message: "Überwacht: no."}
provenance: {calibration_set: testbed, guarantee: at most 1 % false halts per response}
"""

levels = st.floats(0, 1)
markers = st.text(min_size=1, max_size=4) | st.lists(st.integers(0, 99), min_size=1, max_size=3)


@st.composite
def thresholds(draw):
    release_at, hold_at, halt_at = sorted(draw(st.tuples(levels, levels, levels)))
    shape = draw(st.integers(0, 2))
    return Thresholds(
        horizon=draw(st.integers(0, 40)),
        halt_at=halt_at,
        hold_at=hold_at if shape else None,
        release_at=release_at if shape == 2 else None,
    )


@st.composite
def stricter(draw, than):
    """Thresholds that are no milder than ``than`` in any respect."""
    halt_at, hold_at, release_at = (
        min(level, 1.0) * draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])) for level in than.levels
    )
    hold_at = min(hold_at, halt_at)
    return Thresholds(
        horizon=than.horizon + draw(st.integers(0, 9)),
        halt_at=halt_at,
        hold_at=hold_at,
        release_at=min(release_at, hold_at),
    )


@st.composite
def policies(draw):
    names = draw(st.sets(st.sampled_from(TIERS), min_size=1).map(sorted).flatmap(st.permutations))

    def tiers():
        row, ladder = draw(thresholds()), {}
        for name in sorted(names, key=TIERS.index, reverse=True):
            ladder[name] = row
            row = draw(stricter(row))
        return {name: ladder[name] for name in draw(st.permutations(names))}

    default, loosest = sorted(
        (draw(st.sampled_from(names)), draw(st.sampled_from(names))), key=TIERS.index
    )
    segments = draw(st.lists(st.text(max_size=8).filter(lambda s: s != ANSWER), unique=True))
    return Policy(
        tiers=tiers(),
        default_tier=default,
        loosest_tier=draw(st.sampled_from([loosest, default, None])),
        segments={
            name: Segment(
                opens=draw(st.lists(markers, min_size=1, max_size=2)),
                closes=draw(st.lists(markers, min_size=1, max_size=2)),
                tiers=tiers() if draw(st.booleans()) else None,
            )
            for name in segments[:3]
        },
        hold_back=draw(st.integers(1, 9) | st.just("turn")),
        on_unscored=draw(st.sampled_from(["pass", "hold", "halt"])),
        on_halt=OnHalt(message=draw(st.none() | st.text())),
        provenance=Provenance(guarantee=draw(st.text())),
    )


# -- the file --------------------------------------------------------------------------------------


def test_the_example():
    policy = Policy.from_yaml(EXAMPLE)
    assert policy.tiers["strict"] == Thresholds(
        horizon=16, halt_at=0.2, hold_at=0.1, release_at=0.05
    )
    reasoning = policy.segments["reasoning"]
    assert reasoning.tiers["moderate"].halt_at == 0.8
    assert reasoning.closes == ["</think>", [7, 8]]
    assert policy.thresholds_by_segment()[2] == policy.tiers
    assert (policy.hold_back, policy.on_unscored) == (2, "halt")
    assert policy.on_halt.message == "Überwacht: no."


def test_what_is_left_out_is_on_the_safe_side():
    policy = Policy.from_yaml(
        "{tiers: {moderate: {horizon: 0, halt_at: 1}}, default_tier: moderate}"
    )
    assert policy.on_unscored == "hold"
    assert policy.hold_back == 1
    assert policy.loosest == "moderate"


@pytest.mark.parametrize("breaks", ["\x85", "\u2028", "\u2029", "\ufeff"])
def test_what_yaml_takes_for_a_line_break_comes_back(breaks):
    name = f"tool{breaks}call"
    tiers = {"moderate": Thresholds(horizon=0, halt_at=0.5)}
    segment = Segment(opens=[name], closes=[[1]])
    policy = Policy(tiers=tiers, default_tier="moderate", segments={name: segment})
    assert Policy.from_yaml(policy.to_yaml()) == policy


@settings(max_examples=40)
@given(policies())
def test_yaml_round_trip(policy):
    text = policy.to_yaml()
    again = Policy.from_yaml(text)
    assert again == policy
    assert again.to_yaml() == text
    assert [list(t) for t in again.thresholds_by_segment()] == [
        list(t) for t in policy.thresholds_by_segment()
    ]


def change(path, value):
    content = yaml.safe_load(EXAMPLE)
    *parents, key = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("treshold", 0.5, "treshold: unknown key"),
        ("tiers.strict.halt", 0.5, r"tiers\.strict\.halt: unknown key"),
        ("segments.reasoning.x", 0.5, r"segments\.reasoning\.x: unknown key"),
        ("segments.reasoning.opens", None, r"segments\.reasoning\.opens: Field required"),
        ("segments.reasoning.opens", [], r"segments\.reasoning\.opens: .*at least 1"),
        ("segments.reasoning.opens", [""], r"segments\.reasoning\.opens\.0.*at least 1"),
        ("segments.reasoning.opens", [[]], r"segments\.reasoning\.opens\.0.*at least 1"),
        ("segments.reasoning.opens", [[-1]], r"segments\.reasoning\.opens\.0.*greater than"),
        ("on_halt.retry", 1, r"on_halt\.retry: unknown key"),
        ("provenance.who", "me", r"provenance\.who: unknown key"),
        ("tiers.lax", {"horizon": 0, "halt_at": 1.0}, r"tiers\.lax: .*'loose'"),
        ("tiers.strict.halt_at", 1.01, r"tiers\.strict\.halt_at: .*less than or equal to 1"),
        ("tiers.strict.halt_at", -0.01, r"tiers\.strict\.halt_at: .*greater than or equal to 0"),
        ("tiers.strict.halt_at", NAN, r"tiers\.strict\.halt_at: .*finite"),
        ("tiers.strict.halt_at", "high", r"tiers\.strict\.halt_at: .*number"),
        ("tiers.strict.halt_at", True, r"tiers\.strict\.halt_at: .*not a truth value"),
        ("tiers.strict.halt_at", None, r"tiers\.strict\.halt_at: Field required"),
        ("tiers.moderate.hold_at", 7, r"tiers\.moderate\.hold_at: .*less than or equal to 1"),
        ("tiers.moderate.hold_at", False, r"tiers\.moderate\.hold_at: .*not a truth value"),
        ("tiers.strict.release_at", -1, r"tiers\.strict\.release_at: .*greater than or equal"),
        ("tiers.strict.horizon", -1, r"tiers\.strict\.horizon: .*greater than or equal to 0"),
        ("tiers.strict.horizon", 1.5, r"tiers\.strict\.horizon: .*integer"),
        ("tiers.strict.horizon", True, r"tiers\.strict\.horizon: .*not a truth value"),
        ("tiers.strict.hold_at", 0.3, r"tiers\.strict: hold_at \(0.3\) .*halt_at \(0.2\)"),
        ("tiers.strict.release_at", 0.15, r"tiers\.strict: release_at \(0.15\) .*\(0.1\)"),
        ("tiers.loose.release_at", 0.15, r"tiers\.loose: release_at needs hold_at"),
        ("tiers.moderate.halt_at", 0.95, r"tiers\.moderate: can be milder than loose"),
        ("tiers.moderate.horizon", 17, r"tiers\.strict: can be milder than moderate"),
        (
            "segments.reasoning.tiers.strict.halt_at",
            0.81,
            r"segments\.reasoning\.tiers\.strict: can be milder",
        ),
        (
            "segments.reasoning.tiers.strict",
            None,
            r"segments\.reasoning\.tiers: has loose, moderate; needs",
        ),
        (
            "segments.answer",
            {"opens": ["a"], "closes": ["b"]},
            r"segments\.answer: its thresholds are those of the tiers",
        ),
        ("tiers", {}, "tiers: .*at least 1"),
        ("tiers", "strict", "tiers: .*dictionary"),
        ("tiers", None, "tiers: Field required"),
        ("default_tier", "lax", "default_tier: .*'moderate'"),
        ("default_tier", None, "default_tier: Field required"),
        ("loosest_tier", "strict", r"default_tier \(moderate\) is looser than loosest_tier"),
        ("hold_back", 0, "hold_back: expected a number of tokens, 1 or more, or 'turn'; got 0$"),
        ("hold_back", True, "hold_back: .*got True$"),
        ("hold_back", 1.5, "hold_back: .*got 1.5$"),
        ("hold_back", "all", "hold_back: .*got 'all'$"),
        ("on_unscored", "ignore", "on_unscored: .*'pass', 'hold' or 'halt'"),
        ("schema_version", "1", "schema_version: .*integer"),
        ("on_halt.message", 3, r"on_halt\.message: .*string"),
    ],
)
def test_a_fault_is_named_by_its_key(path, value, message):
    with pytest.raises(PolicyError, match=rf"^my\.yaml: {message}"):
        Policy.from_yaml(change(path, value), "my.yaml")


def test_a_tier_that_is_not_there():
    text = "{tiers: {strict: {horizon: 0, halt_at: 1}}, default_tier: loose}"
    with pytest.raises(PolicyError, match=r"^policy\.yaml: default_tier: no tier 'loose'; there "):
        Policy.from_yaml(text)


def test_every_fault_is_told_at_once():
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(change("tiers.strict.halt_at", 2).replace("hold_back: 2", "hold_bakc: 2"))
    assert "tiers.strict.halt_at" in str(caught.value)
    assert "hold_bakc: unknown key" in str(caught.value)


def test_a_newer_schema_is_refused_as_such_whatever_its_keys():
    text = change("schema_version", 2) + "invented_in_version_2: 1\n"
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(text)
    assert str(caught.value) == (
        "policy.yaml: schema_version: 2 is newer than 1, the newest that this midstream reads; "
        "upgrade midstream"
    )


@pytest.mark.parametrize("text", ["", "- 1\n", "strict", "42", "null"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(PolicyError, match=r"^policy\.yaml: expected a mapping of keys, got "):
        Policy.from_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "tiers: [",
        "a: b: c",
        "\t",
        "a: !!python/object:os.system x",
        "x: \x00",
        "[a]: 1\n? {",
        "[" * 5000,
    ],
)
def test_broken_yaml_is_refused(text):
    with pytest.raises(PolicyError, match=r"^policy\.yaml: not YAML: "):
        Policy.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (EXAMPLE + "hold_back: turn\n", "hold_back", 21),
        (EXAMPLE.replace("halt_at: 0.5", "halt_at: 0.5, halt_at: 0.9"), "halt_at", 5),
        (EXAMPLE.replace("  loose: {", '  "moderate": {', 1), "moderate", 6),
        (EXAMPLE.replace("on_halt: {", "on_halt: {finish_reason: other, "), "finish_reason", 19),
    ],
)
def test_a_key_given_twice_is_refused(text, key, line):
    with pytest.raises(PolicyError, match=rf"{key}: given twice\n.*line {line}"):
        Policy.from_yaml(text)


def test_keys_that_are_no_words_are_refused():
    for key in ("1", "[a, b]", "{a: b}", "null"):
        with pytest.raises(PolicyError):
            Policy.from_yaml(f"{EXAMPLE}? {key}\n: 1\n")


def test_a_policy_cannot_be_changed():
    policy = Policy.from_yaml(EXAMPLE)
    with pytest.raises(ValidationError, match="frozen"):
        policy.hold_back = 1


# -- tiers -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(policies(), st.none() | st.sampled_from(TIERS) | st.text())
def test_a_client_never_gets_a_looser_tier_than_the_server_allows(policy, requested):
    allowed = [t for t in policy.tiers if TIERS.index(t) <= TIERS.index(policy.loosest)]
    if requested is None:
        assert policy.tier_for(None) == policy.default_tier
        assert policy.default_tier in allowed
    elif requested in allowed:
        assert policy.tier_for(requested) == requested
    else:
        with pytest.raises(PolicyError, match=r"no tier|looser than this server allows"):
            policy.tier_for(requested)


def test_a_server_may_be_stricter_than_its_policy():
    policy = Policy.from_yaml(EXAMPLE + "loosest_tier: loose\n")
    assert policy.tier_for(None, "strict") == policy.tier_for("strict", "strict") == "strict"
    with pytest.raises(PolicyError, match=r"'moderate' is looser than .*; the loosest is 'strict'"):
        policy.tier_for("moderate", "strict")


def test_the_loosest_tier_is_the_default_unless_given():
    policy = Policy.from_yaml(EXAMPLE)
    assert policy.tier_for("strict") == "strict"
    with pytest.raises(PolicyError, match=r"'loose' is looser than .*; the loosest is 'moderate'"):
        policy.tier_for("loose")
    assert Policy.from_yaml(EXAMPLE + "loosest_tier: loose\n").tier_for("loose") == "loose"
    with pytest.raises(PolicyError, match="no tier 'Strict'; there are strict, moderate, loose"):
        policy.tier_for("Strict")


@given(st.data())
def test_a_stricter_tier_is_never_milder_at_any_token(data):
    """What the validation promises, on the kernel: at each token the verdict is as severe."""
    loose = data.draw(thresholds())
    strict = data.draw(thresholds() | stricter(loose))
    assume(strict.is_at_least_as_strict_as(loose))
    on_unscored = data.draw(st.sampled_from(["pass", "hold", "halt"]))
    policy = Policy(
        tiers={"strict": strict, "loose": loose}, default_tier="loose", on_unscored=on_unscored
    )
    kernel = Kernel(CHAIN, policy.table(CHAIN), slots=2)
    kernel.admit(0, row=policy.row("strict"))
    kernel.admit(1, row=policy.row("loose"))
    logits = st.sampled_from([logit_in_bin(o) for o in range(4)] + [NAN])
    for position, logit in enumerate(data.draw(st.lists(logits, max_size=8))):
        kernel.feed((0, position, logit), (1, position, logit))
        assert kernel.verdict(0) >= kernel.verdict(1)


@pytest.mark.parametrize(
    "milder",
    [
        {"horizon": 7},
        {"halt_at": 0.81},
        {"hold_at": 0.61},
        {"hold_at": None, "release_at": None},
        {"release_at": 0.41},
        {"release_at": None},
    ],
)
def test_each_level_and_the_horizon_count_for_strictness(milder):
    base = {"horizon": 8, "halt_at": 0.8, "hold_at": 0.6, "release_at": 0.4}
    assert Thresholds(**base).is_at_least_as_strict_as(Thresholds(**base))
    assert not Thresholds(**base | milder).is_at_least_as_strict_as(Thresholds(**base))
    assert Thresholds(**base).is_at_least_as_strict_as(Thresholds(**base | milder))


def test_who_halts_early_need_not_hold():
    halts = Thresholds(horizon=8, halt_at=0.4)
    holds = Thresholds(horizon=8, halt_at=0.8, hold_at=0.6, release_at=0.4)
    assert halts.is_at_least_as_strict_as(holds)


# -- the table -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(policies())
def test_rows_correspond_to_segments_and_tiers(policy):
    table = policy.table(CHAIN)
    names = [ANSWER, *policy.segments]
    segments = dict(zip(names, policy.thresholds_by_segment(), strict=True))
    rows = []
    for (segment, tiers), tier in itertools.product(segments.items(), policy.tiers):
        row, wanted = policy.row(tier, segment), tiers[tier]
        rows.append(row)
        np.testing.assert_array_equal(
            table.ahead[row], np.float32(CHAIN.horizon(wanted.horizon)), strict=True
        )
        assert float(table.halt_at[row]) == np.float32(wanted.halt_at)
        hold_at = 2.0 if wanted.hold_at is None else wanted.hold_at
        assert float(table.hold_at[row]) == np.float32(hold_at)
        release_at = hold_at if wanted.release_at is None else wanted.release_at
        assert float(table.release_at[row]) == np.float32(release_at)
        assert OnUnscored(int(table.on_unscored[row])).name == policy.on_unscored.upper()
    assert sorted(rows) == list(range(len(segments) * len(policy.tiers)))
    assert all(len(tensor) == len(rows) for tensor in table.tensors())


def test_a_row_that_is_not_there_is_refused():
    policy = Policy.from_yaml(EXAMPLE)
    with pytest.raises(PolicyError, match="no segment 'tool'; there are answer, reasoning"):
        policy.row("strict", "tool")
    one = Policy(tiers={"strict": policy.tiers["strict"]}, default_tier="strict")
    with pytest.raises(PolicyError, match="no tier 'loose'; there are strict"):
        one.row("loose")


# -- hysteresis, on the kernel ---------------------------------------------------------------------


def verdicts(thresholds, risks, on_unscored="hold"):
    """Verdicts of a stream of which each token makes the risk what is given; None is unscored."""
    policy = Policy(
        tiers={"strict": {"horizon": 0, **thresholds}},
        default_tier="strict",
        on_unscored=on_unscored,
    )
    kernel = Kernel(CHAIN, policy.table(CHAIN))
    kernel.admit(0)
    given = []
    for position, risk in enumerate(risks):
        if risk is None:
            kernel.feed((0, position, NAN))
        else:  # the same a_h for all states makes it the risk, whatever the belief
            kernel.policy.ahead.fill_(risk)
            kernel.feed((0, position, 0.0))
        given.append(kernel.verdict())
    return given


C, H, X = Verdict.CONTINUE, Verdict.HOLD, Verdict.HALT


@pytest.mark.parametrize(
    ("thresholds", "risks", "expected"),
    [
        ({"halt_at": 0.9}, [0.1, 0.8, 0.95, 0.0], [C, C, X, X]),
        ({"halt_at": 0.9, "hold_at": 0.5}, [0.4, 0.6, 0.4, 0.6, 0.95], [C, H, C, H, X]),
        (
            {"halt_at": 0.9, "hold_at": 0.5, "release_at": 0.25},
            [0.4, 0.6, 0.4, 0.3, 0.2, 0.4],
            [C, H, H, H, C, C],
        ),
        # held by an unscored token only: the next score that does not halt frees it
        ({"halt_at": 0.9}, [0.1, None, None, 0.8], [C, H, H, C]),
        ({"halt_at": 0.9}, [0.1, None, 0.95], [C, H, X]),
        ({"halt_at": 0.97}, [0.1, None, 0.9, None, 1.0], [C, H, C, H, X]),
        ({"halt_at": 0.9, "hold_at": 0.5}, [0.1, None, 0.4, None, 0.6], [C, H, C, H, H]),
        ({"halt_at": 0.9, "hold_at": 0.5, "release_at": 0.3}, [None, 0.4, 0.2], [H, H, C]),
    ],
)
def test_hysteresis(thresholds, risks, expected):
    assert verdicts(thresholds, risks) == expected


def test_unscored_tokens_pass_or_halt_when_the_policy_says_so():
    assert verdicts({"halt_at": 0.9}, [0.1, None, 0.1], "pass") == [C, C, C]
    assert verdicts({"halt_at": 0.9, "hold_at": 0.5}, [0.6, None, 0.1], "pass") == [H, H, C]
    assert verdicts({"halt_at": 0.9}, [0.1, None, 0.1], "halt") == [C, X, X]


def test_the_example_in_the_docs_is_a_policy() -> None:
    text = (Path(__file__).parent.parent / "docs" / "bundle.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    assert set(Policy.from_yaml(blocks[1]).segments) == {"reasoning", "tool_call"}
    policy = Policy.from_yaml(blocks[0])
    assert policy.tiers["strict"].release_at == 0.15
