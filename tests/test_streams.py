"""Phases, events, and the session that puts them beside the hold-back queue."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from midstream.kernels.tables import Verdict
from midstream.policy import Policy
from midstream.streams import (
    EVENT_SCHEMA_VERSION,
    TRANSITIONS,
    Event,
    Phase,
    PhaseError,
    Session,
    StreamReport,
    Trace,
)

C, H, X = Verdict.CONTINUE, Verdict.HOLD, Verdict.HALT

# Design section 4.6: PROMPT -> GENERATING <-> HELD -> HALTED | RELEASED | FINISHED
ALLOWED = {
    ("PROMPT", "GENERATING"),
    ("PROMPT", "HELD"),  # the prompt alone is judged, too
    ("PROMPT", "HALTED"),
    ("PROMPT", "FINISHED"),
    ("GENERATING", "HELD"),
    ("HELD", "GENERATING"),
    *itertools.product(("GENERATING", "HELD"), ("HALTED", "RELEASED", "FINISHED")),
}


def session(hold_back=1, on_unscored="hold"):
    policy = Policy(
        tiers={"strict": {"horizon": 0, "halt_at": 0.5}},
        default_tier="strict",
        hold_back=hold_back,
        on_unscored=on_unscored,
    )
    return Session("s-1", policy, "sha256:abc")


def put_into(phase):
    """A session in this phase, brought there as an engine would."""
    s = session(hold_back="turn" if phase == Phase.RELEASED else 1)
    s.push(0, "a")
    if phase == Phase.PROMPT:
        return session()
    s.judge(0, {Phase.HELD: H, Phase.HALTED: X}.get(phase, C), 0.5)
    if phase in (Phase.RELEASED, Phase.FINISHED):
        s.finish()
    assert s.phase == phase
    return s


REPORT = StreamReport(
    stream="s-1",
    bundle="sha256:abc",
    tier="strict",
    prompt_tokens=2,
    scored=3,
    unscored=1,
    verdict="HALT",
    cause="insult",
    halted_at=5,
    risk=0.75,
    peak=0.8,
    finish_reason="content_filter",
    trace=Trace(
        position=[4, 5], risk=[None, 0.75], verdict=["HOLD", "HALT"], scores={"insult": [None, 2.5]}
    ),
)


# -- phases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_every_pair_of_phases(before, after):
    allowed = (before.name, after.name) in ALLOWED
    assert (after in TRANSITIONS[before]) == allowed
    s = put_into(before)
    if allowed:
        s._enter(after)
        assert s.phase == after
    else:
        with pytest.raises(PhaseError, match=f"'s-1': {before.name} does not lead to {after.name}"):
            s._enter(after)
        assert s.phase == before


def test_every_phase_has_its_row():
    assert set(TRANSITIONS) == set(Phase)


def test_the_refusal_says_what_is_allowed():
    with pytest.raises(PhaseError, match="allowed: nothing, it has ended"):
        put_into(Phase.FINISHED).judge(1, H, 0.1)
    with pytest.raises(
        PhaseError, match=r"allowed: \['FINISHED', 'GENERATING', 'HALTED', 'HELD'\]"
    ):
        session()._enter(Phase.RELEASED)


@given(st.lists(st.sampled_from([C, H, X])), st.sampled_from([1, 2, "turn"]), st.booleans())
def test_a_session_walks_along_the_table(script, hold_back, finishes):
    s = session(hold_back)
    seen = [s.phase]
    for position, verdict in enumerate(script):
        s.push(position, position)
        s.judge(position, verdict, 0.1)
        seen.append(s.phase)
    if finishes:
        s.finish()
        seen.append(s.phase)
    for before, after in itertools.pairwise(seen):
        assert before == after or (before.name, after.name) in ALLOWED
    assert not finishes or TRANSITIONS[s.phase] == frozenset()


@given(st.lists(st.sampled_from([C, H, X])))
def test_halted_is_absorbing(script):
    s = session()
    s.judge(0, X, 1.0)
    for position, verdict in enumerate(script, start=1):
        s.push(position, position)
        assert s.judge(position, verdict, 0.0) == ([], [])
        assert s.phase == Phase.HALTED
    assert s.finish() == []
    assert s.phase == Phase.HALTED
    assert s.hold_back.withheld == len(script)


@pytest.mark.parametrize(
    ("hold_back", "script", "last", "tokens"),
    [
        (1, [C, C], Phase.FINISHED, []),
        (2, [C, C], Phase.FINISHED, [1]),
        ("turn", [C, C], Phase.RELEASED, [0, 1]),
        ("turn", [C, H], Phase.FINISHED, []),  # nothing was delivered
        ("turn", [C, X], Phase.HALTED, []),
        ("turn", [], Phase.FINISHED, []),
        (1, [], Phase.FINISHED, []),
    ],
)
def test_how_a_stream_ends(hold_back, script, last, tokens):
    s = session(hold_back)
    for position, verdict in enumerate(script):
        s.push(position, position)
        s.judge(position, verdict, 0.1)
    assert s.finish() == tokens
    assert s.phase == last


def test_a_sampled_token_ends_the_prompt():
    s = session(hold_back="turn", on_unscored="pass")
    s.push(3, "a")
    assert s.phase == Phase.GENERATING
    assert s.finish() == ["a"]  # never judged, and the policy says so in words
    assert s.phase == Phase.RELEASED


def test_a_held_prompt_stays_held_when_a_token_comes():
    s = session()
    s.judge(2, H, 0.4)
    s.push(3, "a")
    assert s.phase == Phase.HELD
    assert s.judge(3, C, 0.1)[0] == ["a"]


def test_an_ended_stream_gives_nothing_more():
    s = put_into(Phase.FINISHED)
    s.push(1, "b")
    with pytest.raises(PhaseError, match="FINISHED does not lead to GENERATING"):
        s.judge(1, C, 0.0)
    with pytest.raises(PhaseError, match="FINISHED does not lead to FINISHED"):
        s.finish()
    assert (s.hold_back.released, s.hold_back.withheld) == (1, 1)


# -- events ----------------------------------------------------------------------------------------


def events_of(script):
    s = session()
    found = []
    for position, verdict in enumerate(script, start=7):
        s.push(position, position)
        found += s.judge(position, verdict, risk=position / 10, cause="insult")[1]
    return [(e.type, e.position, e.verdict, e.risk, e.cause) for e in found]


def test_events_come_when_something_changes_and_in_order():
    assert events_of([C, C, H, H, C, C, H, X, X]) == [
        ("verdict", 9, "HOLD", 0.9, "insult"),
        ("verdict", 11, "CONTINUE", 1.1, "insult"),
        ("verdict", 13, "HOLD", 1.3, "insult"),
        ("halted", 14, "HALT", 1.4, "insult"),
    ]


def test_what_every_stream_does_is_no_event():
    assert events_of([C, C, C]) == []
    assert events_of([X]) == [("halted", 7, "HALT", 0.7, "insult")]
    assert [type for type, *_ in events_of([H, C])] == ["verdict", "verdict"]
    s = session()
    assert s.judge(1, C, 0.0) == ([], [])  # the prompt
    assert [e.verdict for e in s.judge(2, H, 0.0)[1]] == ["HOLD"]


def test_an_event_names_its_stream_and_bundle():
    event = session().event("released", position=3, text="hallo")
    assert event == Event(
        type="released", stream="s-1", bundle="sha256:abc", position=3, text="hallo"
    )


def test_the_schema_is_stable():
    """Change this only together with EVENT_SCHEMA_VERSION."""
    assert EVENT_SCHEMA_VERSION == 3
    event = session().event("finished", report=REPORT)
    assert json.loads(event.model_dump_json()) == {
        "schema_version": 3,
        "type": "finished",
        "stream": "s-1",
        "bundle": "sha256:abc",
        "position": None,
        "risk": None,
        "verdict": None,
        "cause": None,
        "text": None,
        "message": None,
        "scores": None,
        "delivered": None,
        "delivered_unscored": None,
        "report": {
            "stream": "s-1",
            "bundle": "sha256:abc",
            "tier": "strict",
            "prompt_tokens": 2,
            "scored": 3,
            "unscored": 1,
            "verdict": "HALT",
            "cause": "insult",
            "halted_at": 5,
            "risk": 0.75,
            "peak": 0.8,
            "finish_reason": "content_filter",
            "trace": {
                "position": [4, 5],
                "risk": [None, 0.75],
                "verdict": ["HOLD", "HALT"],
                "scores": {"insult": [None, 2.5]},
            },
            "segments": {},
        },
    }
    schema = Event.model_json_schema()
    assert schema["properties"]["type"]["enum"] == [
        "admitted",
        "scored",
        "verdict",
        "halted",
        "released",
        "finished",
        "error",
    ]
    assert schema["required"] == ["type", "stream", "bundle"]
    assert schema["additionalProperties"] is False


maybe = st.none()
events = st.builds(
    Event,
    type=st.sampled_from(["admitted", "scored", "verdict", "halted", "released", "error"]),
    stream=st.text(),
    bundle=st.text(),
    position=maybe | st.integers(0, 2**31 - 1),
    risk=maybe | st.floats(0, 1),
    verdict=maybe | st.sampled_from([v.name for v in Verdict]),
    cause=maybe | st.text(),
    text=maybe | st.text(),
    message=maybe | st.text(),
    report=st.sampled_from([None, REPORT]),
)


@given(events)
def test_events_round_trip_through_one_line_of_json(event):
    line = event.model_dump_json()
    assert "\n" not in line
    assert Event.model_validate_json(line) == event
    assert Event.model_validate(json.loads(line)) == event


@pytest.mark.parametrize("wrong", [{"type": "stopped"}, {"colour": 1}, {"verdict": "MAYBE"}])
def test_an_event_that_is_not_in_the_schema_is_refused(wrong):
    with pytest.raises(ValidationError):
        session().event(**{"type": "error"} | wrong)
