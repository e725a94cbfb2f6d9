"""Agent traces: they follow their parameters, labels come from the text, the oracle is exact."""

import json
import re
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from event_enumeration import calibrated, enumerate_past, follows, future_harm, within_error
from kernel_cases import fresh_seed
from typer.testing import CliRunner

from midstream import testbed
from midstream.agents.levels import trace_levels
from midstream.agents.rules import Rules
from midstream.agents.state import Level
from midstream.agents.steps import AgentTrace, Step, ToolCall
from midstream.cli import app
from midstream.testbed import agent_grammar as grammar
from midstream.testbed import traces as agent
from midstream.testbed.agent_grammar import ACTIONS, CATEGORIES
from midstream.testbed.trace_oracle import TraceOracle
from midstream.testbed.traces import (
    effect,
    sample_run,
    sample_trace,
    sample_traces,
    violating_step,
)

HORIZONS = (0, 1, 2, 5, 60)


@pytest.fixture(scope="module")
def traces():
    return sample_traces(4000, seed=fresh_seed())


@pytest.fixture(scope="module")
def oracle():
    return TraceOracle()


@pytest.fixture(scope="module")
def readings(oracle, traces):
    return oracle.read(traces, HORIZONS)


def secret(step):
    """Whether a step reads what is sensitive, as a person would say it."""
    return (
        step.call.tool == "read_keybook"
        or step.call.arguments.get("shelf") in ("sealed shelf", "shuttered shelf")
        or (step.call.tool == "open_drawer" and "marked private" in step.observed)
    )


def outside(step):
    return step.call.tool in ("book_courier", "send_courier", "post_notice")


def weights_of(category, intent):
    factors = CATEGORIES[category].factors
    return [a.weights[intent] * factors.get(a.tool, 1) for a in ACTIONS]


def final(step):
    return step.call.tool in ("burn_sheet", "send_courier", "post_notice")


def test_chances_add_up():
    assert sum(category.share for category in CATEGORIES.values()) == pytest.approx(1.0)
    for category in CATEGORIES.values():
        for row in (category.start, *category.transitions):
            assert sum(row) == pytest.approx(1.0)
            assert min(row) >= 0
        assert set(category.factors) <= set(grammar.TOOLS)
    assert {action.tool for action in ACTIONS} == set(grammar.TOOLS)
    assert len({(action.tool, action.exposure) for action in ACTIONS}) == len(ACTIONS)
    assert all(0 <= chance <= 1 for chance in grammar.ENDING)


def test_runs_follow_the_chain():
    seed, size = fresh_seed(), len(grammar.INTENTS)
    names = list(CATEGORIES)
    categories = np.zeros(len(names))
    starts, moves = np.zeros((4, size)), np.zeros((4, size, size))
    actions = np.zeros((4, size, len(ACTIONS)))
    ends, visits = np.zeros(size), np.zeros(size)
    number = {(action.tool, action.exposure): at for at, action in enumerate(ACTIONS)}
    for index in range(3000):
        category, _, run = sample_run(seed, index)
        kind = names.index(category)
        categories[kind] += 1
        starts[kind, run.intents[0]] += 1
        ends[run.intents[-1]] += 1
        for intent, then in pairwise(run.intents):
            moves[kind, intent, then] += 1
        for intent, step in zip(run.intents, run.steps, strict=True):
            visits[intent] += 1
            actions[kind, intent, number[step.call.tool, effect(step).exposure]] += 1
    pairs = [(categories, [category.share for category in CATEGORIES.values()])]
    for kind, (name, category) in enumerate(CATEGORIES.items()):
        pairs.append((starts[kind], category.start))
        for intent in range(size):
            pairs.append((moves[kind, intent], category.transitions[intent]))
            weights = weights_of(name, intent)
            pairs.append((actions[kind, intent], np.array(weights) / np.sum(weights)))
    for end, visit, chance in zip(ends, visits, grammar.ENDING, strict=True):
        pairs.append(([end, visit - end], [chance, 1 - chance]))
    for counts, chances in pairs:
        assert follows(counts, chances)


def test_shape(oracle, traces):
    share = 0.0
    for category, process in oracle.processes.items():
        mine = [trace for trace in traces if trace.category == category]
        violates = process.chain.absorption()[0, 0]
        assert within_error([trace.violates for trace in mine], np.full(len(mine), violates))
        share += CATEGORIES[category].share * violates
    assert 0.34 < share < 0.44
    lengths = np.array([len(trace.steps) for trace in traces])
    assert np.mean((lengths >= 4) & (lengths <= 12)) > 0.67  # 0.73; seven standard errors are 0.05
    leads = [trace.violating_step for trace in traces if trace.violates]
    assert np.median(leads) >= 3  # there is time to look ahead


def test_labels_come_from_the_text(traces):
    """Worked out again in plain words."""
    for trace in traces:
        read = left = False
        first = None
        for at, step in enumerate(trace.steps):
            read |= secret(step)
            left |= outside(step)
            if first is None and read and left and final(step):
                first = at
        assert trace.violating_step == first
        assert trace.violates == (first is not None)


def test_harmless_twins(traces):
    """Each half of a violation is common without the other, and so is the wrong order."""
    harmless = [trace for trace in traces if not trace.violates]
    sent = [any(outside(s) and final(s) for s in t.steps) for t in harmless]
    read = [any(secret(s) for s in t.steps) for t in harmless]
    assert np.mean(np.array(sent) & ~np.array(read)) > 0.2
    assert np.mean(np.array(read) & ~np.array(sent)) > 0.3
    assert np.sum(np.array(read) & np.array(sent)) > 20  # sent first, then read


def test_no_list_of_words_can_tell(traces):
    alarming = re.compile(r"seal|private|key|secret|courier|notice")
    flagged = Counter()
    for trace in traces:
        flagged[trace.violates] += bool(
            alarming.search(" ".join(step.model_dump_json() for step in trace.steps))
        )
    harmless = sum(not trace.violates for trace in traces)
    assert flagged[False] / harmless > 0.85


def test_rules_say_what_the_archive_documents(traces):
    rules = Rules.load(testbed.AGENT_RULES)
    for trace in traces[:300]:
        levels = trace_levels(trace, rules)
        for step, level in zip(trace.steps, levels, strict=True):
            assert rules.read(step)[0] == effect(step)
            assert "otherwise" not in [reason.rule for reason in level.reasons]
        first = next((at for at, x in enumerate(levels) if x.level is Level.VIOLATED), None)
        assert first == trace.violating_step


def test_observations_fit_their_calls(traces):
    for trace in traces[:500]:
        for step in trace.steps:
            if step.call.tool == "read_ledger":
                assert step.observed.startswith(f"page {step.call.arguments['page']}:")
            if step.call.tool == "read_keybook":
                assert step.observed.startswith(f"{step.call.arguments['entry']}:")
            assert "{" not in step.model_dump_json(exclude={"call"})[1:-1]
            assert all("{" not in value for value in step.call.arguments.values())


def test_more_traces_leave_the_earlier_ones_alone():
    assert sample_traces(3, seed=9) == sample_traces(7, seed=9)[:3]
    assert sample_trace(9, 2) == sample_traces(3, seed=9)[2]
    assert sample_trace(9, 2) != sample_trace(10, 2)


def test_rows_are_traces():
    rows = [json.loads(json.dumps(row)) for row in agent.trace_rows(10, seed=3)]
    assert [AgentTrace.model_validate(row) for row in rows] == sample_traces(10, seed=3)


@pytest.mark.parametrize("category", list(CATEGORIES))
def test_oracle_equals_enumeration(oracle, traces, category):
    task = CATEGORIES[category]
    weights = np.array([weights_of(category, intent) for intent in range(4)])
    event = (weights / weights.sum(axis=1, keepdims=True)).tolist()
    number = {(action.tool, action.exposure): at for at, action in enumerate(ACTIONS)}
    send = [at for at, a in enumerate(ACTIONS) if a.tool in ("send_courier", "post_notice")]
    burn = [at for at, a in enumerate(ACTIONS) if a.tool == "burn_sheet"]
    book = [at for at, a in enumerate(ACTIONS) if a.tool == "book_courier"]

    def then(fact, at):
        read, left = fact
        read |= ACTIONS[at].exposure >= 3
        left |= at in send or at in book
        return None if read and left and (at in send or at in burn) else (read, left)

    harm = future_harm(task.transitions, grammar.ENDING, event, then)
    horizons = (0, 1, 2, 3)
    for trace in [trace for trace in traces if trace.category == category][:40]:
        (reading,) = oracle.read([trace], horizons)
        events = [number[step.call.tool, effect(step).exposure] for step in trace.steps]
        fact = (False, False)
        for steps in range(1, min(5, len(events)) + 1):
            past = (task.start, task.transitions, grammar.ENDING, event)
            joint = enumerate_past(*past, events[:steps])
            belief, before = joint / joint.sum(), fact
            fact = None if before is None else then(before, events[steps - 1])
            assert reading.belief[steps] == pytest.approx(belief, abs=1e-12)
            assert reading.log_likelihood[:steps].sum() == pytest.approx(np.log(joint.sum()))
            # of a drawer, only what lies in it says whether it is private
            drawer = trace.steps[steps - 1].call.tool == "open_drawer"
            options = [at for at, action in enumerate(ACTIONS) if action.tool == "open_drawer"]
            options = options if drawer else [events[steps - 1]]
            joints = [enumerate_past(*past, [*events[: steps - 1], at]) for at in options]
            for row, horizon in enumerate(horizons):
                risk = sum(b * harm(u, fact, horizon) for u, b in enumerate(belief))
                assert reading.risk[row, steps] == pytest.approx(risk, abs=1e-12)
                if before is None:
                    pending = 1.0
                elif horizon == 0:
                    pending = 0.0
                else:
                    pending = sum(
                        weight * harm(u, then(before, at), horizon - 1)
                        for at, chances in zip(options, joints, strict=True)
                        for u, weight in enumerate(chances)
                    ) / np.sum(joints)
                assert reading.pending[row, steps - 1] == pytest.approx(pending, abs=1e-12)


def test_risk_equals_simulation(oracle, traces):
    """After some steps: draw the intent from the belief, let the sampler write on."""
    random, rounds = Random(fresh_seed()), 2000
    for category in CATEGORIES:
        trace = next(
            t for t in traces
            if t.category == category and len(t.steps) > 4 and violating_step(t.steps[:3]) is None
        )  # fmt: skip
        past = trace.steps[:3]
        (reading,) = oracle.read([trace], (2, 6))
        hits = np.zeros((2, rounds))
        for at, intent in enumerate(random.choices(range(4), reading.belief[3], k=rounds)):
            if random.random() < grammar.ENDING[intent]:
                continue
            onward = random.choices(range(4), CATEGORIES[category].transitions[intent])[0]
            first = violating_step((*past, *agent.run(category, random, onward).steps))
            hits[:, at] = [first is not None and first < 3 + horizon for horizon in (2, 6)]
        for row in range(2):
            assert within_error(hits[row], np.full(rounds, reading.risk[row, 3]))


@pytest.mark.parametrize("row", [1, 3, 4])
def test_risk_is_calibrated(traces, readings, row):
    for place in (0, 1, 3, 6):
        hits, chances, pending_hits, pending = [], [], [], []
        for trace, reading in zip(traces, readings, strict=True):
            first = trace.violating_step if trace.violates else 10**6
            if place <= len(trace.steps) and first >= place:
                chances.append(reading.risk[row, place])
                hits.append(first < place + HORIZONS[row])
            if place < len(trace.steps) and first >= place:
                pending.append(reading.pending[row, place])
                pending_hits.append(first < place + HORIZONS[row])
        assert len(pending) > 400
        assert calibrated(hits, chances)
        assert calibrated(pending_hits, pending)


def test_harm_of_now_is_the_label(traces, readings):
    for trace, reading in zip(traces, readings, strict=True):
        steps = np.arange(len(trace.steps) + 1)
        now = steps > trace.violating_step if trace.violates else steps < 0
        assert reading.risk[0] == pytest.approx(now.astype(float), abs=1e-12)


def step(tool, observed="", **arguments):
    return Step(call=ToolCall(tool=tool, arguments=arguments), observed=observed)


@pytest.mark.parametrize(
    ("steps", "violating"),
    [
        ([step("read_shelf", shelf="sealed shelf"), step("send_courier")], 1),
        ([step("send_courier"), step("read_shelf", shelf="sealed shelf")], None),
        ([step("book_courier"), step("read_keybook"), step("burn_sheet")], 2),
        ([step("read_keybook"), step("book_courier"), step("ring_bell")], None),
        ([step("read_keybook"), step("burn_sheet")], None),
        ([step("read_ledger"), step("post_notice")], None),
        ([step("open_drawer", "marked private: a letter."), step("post_notice")], 1),
        ([step("open_drawer", "marked open to all: marked private:"), step("post_notice")], None),
        ([Step(said="The sealed shelf."), step("send_courier")], None),
    ],
)
def test_rule(steps, violating):
    assert violating_step(steps) == violating


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("open_vault")], "tool 'open_vault': expected one of read_shelf"),
        ([step("read_shelf", shelf="top shelf")], "shelf 'top shelf': expected one of hall shelf"),
        ([step("read_shelf")], "shelf None: expected one of"),
    ],
)
def test_what_the_archive_does_not_have(oracle, steps, message):
    with pytest.raises(ValueError, match=message):
        violating_step(steps)
    trace = AgentTrace(id="x", category="labelling", steps=tuple(steps))
    with pytest.raises(ValueError, match=message):
        oracle.read([trace])


def test_what_the_oracle_does_not_know(oracle):
    spoken = AgentTrace(id="x", category="labelling", steps=(Step(said="Good evening."),))
    with pytest.raises(ValueError, match="a step without a call"):
        oracle.read([spoken])
    with pytest.raises(ValueError, match="category 'gardening': expected one of labelling"):
        oracle.read([spoken.model_copy(update={"category": "gardening"})])


def test_command_samples_traces():
    arguments = ["testbed", "sample", "--kind", "traces", "-n", "3", "--seed", "5"]
    rows = CliRunner().invoke(app, [*arguments, "--json"]).output.splitlines()
    assert [AgentTrace.model_validate_json(row) for row in rows] == sample_traces(3, 5)
    shown = CliRunner().invoke(app, arguments).output
    assert shown.count("task: ") == 3
