"""The turn gate with real streams: evidence from reports, priors, whole and tail hold."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toy
import turn_cases
from kernel_cases import fresh_seed
from plain_filter import PlainStream, random_chain
from test_hf_stream import Writer, text_of, types, words
from toy import BAD, EOS
from turn_cases import DownLedger, asks, two_seals

from midstream import testbed
from midstream.bundle import Bundle
from midstream.engines.hf import stream
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.evidence import Mean
from midstream.kernels.tables import Verdict
from midstream.ledger.memory import MemoryLedger
from midstream.monitor import Monitor
from midstream.policy import OnHalt, Policy, Thresholds
from midstream.streams import Event, Phase, PhaseError, Session
from midstream.testbed.conversations import sample_conversation
from midstream.turn_evidence import TurnEvidence, TurnEvidenceError
from midstream.turn_policy import TurnPolicy
from midstream.turns import TurnGate

PAST = [9, 8, BAD, 7]  # a response with the bad word

Gated = tuple[Monitor, TurnGate]


def gated(ledger: MemoryLedger | None = None, **policy: Any) -> Gated:
    bundle = turn_cases.bundle(**policy)
    monitor = Monitor(bundle, slots=4, rows=64, trace=64)
    return monitor, TurnGate(bundle, ledger or MemoryLedger())


def run(pair: Gated, tokens: list[int], *said: str, **options: Any) -> list[Event]:
    monitor, gate = pair
    options = {"gate": gate, "conversation": "c", **options}
    return list(
        stream(
            toy.model(),
            toy.tokenizer(),
            options.pop("prompt", asks(*said)),
            monitor,
            logits_processor=[Writer(tokens)],
            max_new_tokens=options.pop("max_new_tokens", len(tokens)),
            **options,
        )
    )


# --- evidence -------------------------------------------------------------------------------------


def report_of(monitor: Monitor, logits: list[float], prompt: int = 1) -> Any:
    """Feed logits straight to the kernels, as an engine that scored such rows would."""
    slot = monitor.admit("s", prompt)
    rows = torch.tensor([[math.nan]] * prompt + [[z] for z in logits], dtype=torch.float32)
    hidden = rows * torch.tensor([[1.0]])
    for at in range(len(rows)):
        monitor._set_rows(1)
        monitor._logits[0] = hidden[at]
        monitor.advance(
            torch.tensor([slot], dtype=torch.int32), torch.tensor([at], dtype=torch.int32)
        )
    return monitor.retire(slot)


def test_the_evidence_is_the_peak_detect_risk_whatever_the_tier_looks_ahead_to() -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    for case in range(10):
        chain = random_chain(seed + case, states=3, bins=4).model_dump()
        chain |= {"prompt_edges": [], "prompt_emission": [[1.0]] * 4}
        base = toy.bundle()
        tiers = {"moderate": Thresholds(horizon=7, halt_at=1.0)}
        bundle = Bundle(
            bank=base.bank,
            chain=type(base.chain)(**chain),
            policy=Policy(tiers=tiers, default_tier="moderate"),
            fingerprint=base.fingerprint,
        )
        logits = random.normal(0, 2, 12).tolist()
        plain = PlainStream(bundle.chain, Thresholds(horizon=0, halt_at=1.0), "pass")
        risks = []
        for logit in logits:
            plain.token(logit)
            risks.append(plain.risk)
        report = report_of(Monitor(bundle, slots=1, trace=32), logits)
        found = TurnEvidence(bundle).log_hazard(report)
        assert found is not None
        assert math.exp(-found) == pytest.approx(1 - max(risks), rel=1e-5, abs=2e-6)  # p is fp32


def test_a_prior_that_was_carried_over_is_no_evidence() -> None:
    monitor = toy.monitor()
    evidence = TurnEvidence(monitor.bundle)
    found = []
    for prior in (None, [0.2, 0.8]):
        slot = monitor.admit("s", 1, prior=prior)
        monitor._logits[:3, 0] = torch.tensor([-20.0, -20.0, 20.0])
        monitor._set_rows(3)
        slots = torch.full((3,), slot, dtype=torch.int32)
        monitor.advance(slots, torch.arange(3, dtype=torch.int32))
        report = monitor.retire(slot)
        found.append((report.peak, evidence.log_hazard(report)))
    assert found[0][0] < found[1][0]
    assert found[0][1] == found[1][1]


def test_reports_the_evidence_cannot_be_read_from() -> None:
    monitor = toy.monitor(trace=3)
    evidence = TurnEvidence(monitor.bundle)
    assert evidence.log_hazard(report_of(monitor, [-20.0] * 3)) is not None
    with pytest.raises(TurnEvidenceError, match="trace as long as the longest response"):
        evidence.log_hazard(report_of(monitor, [-20.0] * 4))
    bare = toy.monitor(trace=0)
    with pytest.raises(TurnEvidenceError, match="trace as long"):
        evidence.log_hazard(report_of(bare, [-20.0]))
    other = toy.monitor(hold_back=3)
    with pytest.raises(TurnEvidenceError, match="the same bundle"):
        evidence.log_hazard(report_of(other, [-20.0]))


def reads_prompts() -> Bundle:
    """The toy's bundle, and a probe of prompts whose evidence the token chain weighs in."""
    probes = [
        toy.detector(toy.model()),
        toy.detector(toy.model(), name="p", reads="prompt", evidence=Mean(window=8)),
    ]
    bundle = toy.bundle(probes=probes)
    doubtful = bundle.chain.model_copy(update={"prior": [0.5, 0.5]})
    turns = TurnPolicy(block_at=0.5)
    policy = bundle.policy.model_copy(update={"turns": turns})
    return replace(bundle, chain=doubtful, policy=policy).with_turns(two_seals())


def test_prompt_evidence_that_fell_out_of_the_trace_is_missed() -> None:
    bundle = reads_prompts()
    evidence, found = TurnEvidence(bundle), {}
    for alarming in (-20.0, 400.0):
        for trace in (11, 8):
            monitor = Monitor(bundle, slots=1, rows=16, trace=trace)
            slot = monitor.admit("s", 8)
            monitor._logits[:11] = -20.0
            monitor._logits[0, 1] = alarming
            monitor._set_rows(11)
            slots = torch.full((11,), slot, dtype=torch.int32)
            monitor.advance(slots, torch.arange(11, dtype=torch.int32))
            report = monitor.retire(slot)
            if trace == 8:
                with pytest.raises(TurnEvidenceError, match="longest prompt and response together"):
                    evidence.log_hazard(report)
            else:
                found[alarming] = evidence.log_hazard(report)
                seen = max(report.trace.risk[8:])
                assert found[alarming] == pytest.approx(-math.log(1 - seen), rel=1e-3)
    assert found[400.0] > 2 * found[-20.0]


def test_segments_do_not_enter_the_evidence() -> None:
    """Belief restarts in a segment; a turn's evidence is that of the response as one."""
    parts = {"reasoning": {"opens": [[5]], "closes": [[6]]}}
    found = []
    for monitor in (toy.monitor(), toy.monitor(segments=parts)):
        slot = monitor.admit("s", 1)
        for at, logit in enumerate([-20.0, -20.0, 20.0, -20.0, -20.0]):
            if at == 3 and monitor.segments is not None:
                monitor.enter_segment(slot, "reasoning")
            monitor._set_rows(1)
            monitor._logits[0] = logit
            index = torch.tensor([slot], dtype=torch.int32)
            monitor.advance(index, torch.tensor([at], dtype=torch.int32))
        found.append(TurnEvidence(monitor.bundle).log_hazard(monitor.retire(slot)))
    assert found[0] == found[1]
    assert found[0] is not None


def test_the_evidence_of_the_beginning_of_a_response() -> None:
    logits = np.random.default_rng(fresh_seed()).normal(0, 2, 9).tolist()
    monitor = toy.monitor()
    evidence = TurnEvidence(monitor.bundle)
    whole = report_of(monitor, logits, prompt=3)
    for tokens in range(1, 10):
        part = evidence.log_hazard(report_of(monitor, logits[:tokens], prompt=3))
        assert evidence.log_hazard(whole, tokens) == part


def test_no_token_is_no_harm_and_no_score_is_no_evidence() -> None:
    monitor = toy.monitor()
    evidence = TurnEvidence(monitor.bundle)
    assert evidence.log_hazard(report_of(monitor, [])) == 0.0
    assert evidence.log_hazard(report_of(monitor, [math.nan] * 3)) is None
    partly = evidence.log_hazard(report_of(monitor, [math.nan, 20.0, math.nan]))
    assert partly is not None
    assert partly > 1.0


# --- admission with a prior -----------------------------------------------------------------------


def test_a_stream_starts_from_the_belief_it_is_given_and_the_prompt_weighs_it() -> None:
    reads_prompt = toy.detector(toy.model(), name="p", reads="prompt")
    bundle = toy.bundle(probes=[toy.detector(toy.model()), reads_prompt])
    for prior in ([0.3, 0.7], [1.0, 0.0]):
        monitor = Monitor(bundle, slots=1)
        slot = monitor.admit("s", 1, prior=prior)
        assert monitor.slots.belief[slot].tolist() == pytest.approx(prior)
        plain = PlainStream(bundle.chain, toy.HORIZON_0, "pass")
        plain.belief = np.array(prior)
        plain.prompt(20.0)
        monitor._logits[0] = 20.0
        monitor._set_rows(1)
        monitor.advance(torch.tensor([slot], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        np.testing.assert_allclose(monitor.slots.belief[slot].numpy(), plain.belief, atol=1e-6)


@pytest.mark.parametrize(
    "prior", [[1.0], [0.5, 0.4], [1.5, -0.5], [math.nan, 1.0], [[1.0, 0.0]], []]
)
def test_a_prior_is_a_distribution_over_the_states(prior: Any) -> None:
    monitor = toy.monitor()
    with pytest.raises(ValueError, match="prior: expected 2 chances"):
        monitor.admit("s", 1, prior=prior)
    assert monitor.free_slots == 8


def test_the_next_response_starts_from_what_the_turns_before_said() -> None:
    carry = [[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.0, 1.0]]
    bundle = turn_cases.bundle(two_seals(carry=carry))
    gate = TurnGate(bundle, MemoryLedger())
    fresh = gate.open("c", asks("a"))
    assert fresh.token_prior == pytest.approx([0.9, 0.1])
    gate.commit(fresh, gate.judge(fresh, turn_cases.OPENS), "b")
    later = gate.open("c", asks("a", "b", "c"))
    assert later.token_prior is not None
    assert later.token_prior[1] > 0.5
    monitor = Monitor(bundle, slots=1, rows=64, trace=64)
    risks = []
    for turn in (asks("a"), asks("a", "b", "c")):
        events = run((monitor, gate), [9, EOS], prompt=turn, max_new_tokens=4)
        report = events[-1].report
        assert report is not None
        risks.append(report.trace.risk[-1])
    assert risks[1] > risks[0]


# --- the front end --------------------------------------------------------------------------------


def test_withholding_ends_a_session_from_every_phase_it_may() -> None:
    for reach in (Verdict.CONTINUE, Verdict.HOLD, Verdict.HALT):
        session: Session[int] = Session("s", toy.policy(hold_back="turn"), "b")
        session.push(1, 7)
        session.judge(1, reach, 0.5)
        events = session.withhold(risk=0.5, cause="turn gate: risk")
        assert [event.type for event in events] == ([] if reach == Verdict.HALT else ["halted"])
        assert session.phase == Phase.HALTED
        assert session.finish() == []
        assert session.hold_back.withheld == 1
    done: Session[int] = Session("s", toy.policy(), "b")
    done.push(1, 7)
    done.finish()
    with pytest.raises(PhaseError):
        done.withhold()


def test_what_would_leave_is_what_finish_lets_go() -> None:
    random = np.random.default_rng(fresh_seed())
    for _ in range(50):
        depth: Any = random.choice(["turn", "1", "3"])
        on_unscored = str(random.choice(["pass", "hold"]))
        policy = toy.policy(
            hold_back=depth if depth == "turn" else int(depth), on_unscored=on_unscored
        )
        session: Session[int] = Session("s", policy, "b")
        for at in range(int(random.integers(1, 8))):
            session.push(at, at)
            if random.random() < 0.8:
                session.judge(at, Verdict(int(random.choice([0, 0, 1]))), 0.1)
        leaving = session.hold_back.leaving
        assert session.finish() == leaving
        assert session.hold_back.leaving == []


def test_a_whole_response_waits_for_the_gate_and_leaves_at_once() -> None:
    events = run(gated(), [9, 8, 7, EOS], "w7", max_new_tokens=9)
    assert types(events) == ["admitted", "verdict", "released", "finished"]
    assert text_of(events) == words(9, 8, 7)
    assert "turn 1 delivered" in (events[1].message or "")
    assert events[-1].message == "stop"


def test_a_whole_response_that_completes_the_harm_never_leaves() -> None:
    pair = gated()
    first = run(pair, [*PAST, EOS], "w7", max_new_tokens=9)
    assert text_of(first) == words(*PAST)
    said = ["w7", text_of(first), "w8"]
    second = run(pair, [*PAST, EOS], *said, max_new_tokens=9)
    assert types(second) == ["admitted", "halted", "finished"]
    assert text_of(second) == ""
    halted = second[1]
    assert (halted.verdict, halted.cause) == ("HALT", "turn gate: risk")
    assert halted.risk is not None
    assert halted.risk > 0.5
    assert "turn 2 withheld" in (halted.message or "")
    report = second[-1].report
    assert report is not None
    assert (second[-1].message, report.finish_reason) == ("content_filter", "content_filter")
    # what the client was given stands in the ledger: nothing, and the belief before completion
    turn = pair[1].open("c", asks(*said, "", "w9"))
    assert (turn.unseen, int(turn.belief.argmax())) == (0, turn_cases.JUST_OPENED)
    harmless = run(pair, [9, 9, EOS], *said, "", "w9", max_new_tokens=9)
    assert text_of(harmless) == words(9, 9)
    assert pair[0].free_slots == 4


def test_the_client_that_was_told_something_is_known_by_it() -> None:
    pair = gated(on_halt=OnHalt(finish_reason="stopped", message="I will not."), block_at=0.0)
    events = run(pair, [9, EOS], "w7", max_new_tokens=5)
    assert events[-1].message == "stopped"
    assert pair[1].open("c", asks("w7", "I will not.", "w8")).unseen == 0


@pytest.mark.parametrize("tail", [1, 2, 5])
@pytest.mark.parametrize("ends", ["eos", "length"])
def test_all_but_the_tail_streams_and_the_tail_leaves_only_through_the_gate(
    tail: int, ends: str
) -> None:
    response = [9, 8, 7, 6, 5, 10, 11]
    tokens, most = ([*response, EOS], 20) if ends == "eos" else (response, len(response))
    passed = run(gated(hold=tail), tokens, "w7", max_new_tokens=most)
    at = types(passed).index("verdict")
    assert text_of(passed) == words(*response)
    assert text_of(passed[:at]) == words(*response[:-tail])
    blocked = run(gated(hold=tail, block_at=0.0), tokens, "w7", max_new_tokens=most)
    assert types(blocked)[-2:] == ["halted", "finished"]
    assert text_of(blocked) == words(*response[:-tail])


def test_a_blocked_tail_is_known_by_its_head() -> None:
    pair = gated(hold=2, block_at=0.0)
    head = text_of(run(pair, [9, 8, 7, 6, EOS], "w7", max_new_tokens=9))
    assert head == words(9, 8)
    assert pair[1].open("c", asks("w7", head, "w8")).unseen == 0


def test_the_head_of_a_blocked_response_is_judged_as_what_the_client_has() -> None:
    """The harm left before the gate was asked; the ledger must not say that it was withheld."""
    pair = gated(hold=2)
    first = text_of(run(pair, [*PAST, EOS], "w7", max_new_tokens=9, enforce=False))
    said = ["w7", first, "w8"]
    second = run(pair, [BAD, 9, 8, 7, 6, EOS], *said, max_new_tokens=9)
    assert types(second)[-2:] == ["halted", "finished"]
    head = text_of(second)
    assert head.startswith(words(BAD, 9))
    turn = pair[1].open("c", asks(*said, head, "w9"))
    assert (turn.unseen, int(turn.belief.argmax())) == (0, turn_cases.COMPLETE)
    assert pair[1].open("c", asks(*said)).withheld == 1
    # where the bad word waits with the tail, what left is harmless
    pair = gated(hold=3)
    run(pair, [*PAST, EOS], "w7", max_new_tokens=9, enforce=False)
    head = text_of(run(pair, [9, 8, 7, BAD, 6, EOS], *said, max_new_tokens=9))
    assert head == words(9, 8)
    turn = pair[1].open("c", asks(*said, head, "w9"))
    assert (turn.unseen, int(turn.belief.argmax())) == (0, turn_cases.LOOSENED)


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_leaves_before_the_gate_is_asked_is_not_forgotten(fails: bool) -> None:
    class Breaks(Writer):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 40:
                raise RuntimeError("the generation failed")
            return super().__call__(input_ids, scores)

    bundle = turn_cases.bundle(hold=1)
    pair = Monitor(bundle, slots=1, rows=64, trace=64), TurnGate(bundle, MemoryLedger())
    tokens = [BAD, *([9] * 50)]
    writer = Breaks(tokens) if fails else Writer(tokens)
    events = stream(
        toy.model(), toy.tokenizer(), asks("w7"), pair[0], gate=pair[1], conversation="c",
        logits_processor=[writer], max_new_tokens=50,
    )  # fmt: skip
    given = ""
    failed = pytest.raises(RuntimeError, match="the generation failed")
    with failed if fails else nullcontext():
        for event in events:
            given += event.text or ""
            if not fails and len(given) > 12:
                events.close()  # type: ignore[attr-defined]
    assert given.startswith(words(BAD))
    turn = pair[1].open("c", asks("w7", given, "w8"))
    assert turn.unseen == 0
    assert turn.belief[turn_cases.JUST_OPENED] + turn.belief[turn_cases.LOOSENED] > 0.9
    assert pair[0].free_slots == 1


def test_a_response_that_the_token_monitor_halts_is_withheld_and_written_down() -> None:
    pair = gated(halt_at=0.5)
    events = run(pair, [9, BAD, 9, EOS], "w7", max_new_tokens=9)
    assert types(events) == ["admitted", "halted", "finished"]
    assert events[1].cause == "bad"
    assert text_of(events) == ""
    assert pair[1].open("c", asks("w7", "", "w8")).unseen == 0


@pytest.mark.parametrize(("reads", "writes"), [(True, False), (False, True)])
def test_nothing_leaves_while_the_store_is_down(reads: bool, writes: bool) -> None:
    events = run(
        gated(DownLedger(reads=reads, writes=writes)), [9, EOS], "w7", "w8", "w9", max_new_tokens=5
    )
    assert types(events) == ["admitted", "halted", "finished"]
    assert events[1].cause == "turn gate: store"
    assert "nobody answers" in (events[1].message or "")
    opened = run(gated(DownLedger(), on_store_down="open"), [9, EOS], "w7", max_new_tokens=5)
    assert text_of(opened) == words(9)
    assert "the ledger is down" in (opened[1].message or "")


def test_a_gate_that_only_observes_says_so_and_delivers() -> None:
    pair = gated(block_at=0.0)
    events = run(pair, [*PAST, EOS], "w7", max_new_tokens=9, enforce=False)
    assert text_of(events) == words(*PAST)
    verdict = next(event for event in events if event.type == "verdict")
    assert (verdict.verdict, events[-1].message) == ("HALT", "stop")
    turn = pair[1].open("c", asks("w7", text_of(events), "w8"))
    assert (turn.unseen, int(turn.belief.argmax())) == (0, turn_cases.JUST_OPENED)


def test_what_a_gated_stream_needs() -> None:
    pair = gated()
    for options in (
        {"prompt": "w7"},
        {"conversation": None},
        {"gate": None},
        {"gate": gated(block_at=0.7)[1]},
    ):
        with pytest.raises(UnsupportedGenerationError, match="gate"):
            run(pair, [9], "w7", **options)  # type: ignore[arg-type]
    short = Monitor(pair[1].bundle, slots=1, trace=4)
    with pytest.raises(UnsupportedGenerationError, match="build it with trace=5"):
        run((short, pair[1]), [9] * 4, "w7")
    prompts = reads_prompts()
    for trace, works in ((5, False), (64, True)):
        reader = Monitor(prompts, slots=1, rows=64, trace=trace), TurnGate(prompts, MemoryLedger())
        if works:
            assert types(run(reader, [9] * 4, "w7"))[-1] == "finished"
        else:
            with pytest.raises(UnsupportedGenerationError, match="reads prompts and whole"):
                run(reader, [9] * 4, "w7")
    assert pair[0].free_slots == 4


# --- the testbed's model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive() -> tuple[Any, Any, Bundle]:
    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    tiers = {"moderate": Thresholds(horizon=0, halt_at=1.0)}
    policy = Policy(tiers=tiers, default_tier="moderate", turns=TurnPolicy(block_at=0.5, hold=8))
    return model, tokenizer, bundle.with_policy(policy).with_turns(two_seals())


@pytest.mark.parametrize("hold", ["whole", 6])
def test_the_testbeds_second_opening_is_withheld(archive: Any, hold: Any) -> None:
    """The model is made to write what the grammar wrote; probes, chain and gate are real."""
    model, tokenizer, bundle = archive
    turns = bundle.policy.turns.model_copy(update={"hold": hold})
    bundle = bundle.with_policy(bundle.policy.model_copy(update={"turns": turns}))
    monitor = Monitor(bundle, slots=1, trace=512)
    gate = TurnGate(bundle, MemoryLedger())
    talk = next(
        talk
        for talk in (sample_conversation(3, n) for n in range(200))
        if talk.labels.target_turn in (3, 4)
        and max(map(len, talk.responses[: talk.labels.target_turn])) < 120
    )
    history: list[dict[str, str]] = []
    for number, turn in enumerate(talk.turns[: talk.labels.target_turn], start=1):
        # what the model reads is one turn; the history is in the gate's ledger
        asked = [{"role": "user", "content": turn.prompt.messages[1]["content"]}]
        events = list(
            stream(
                model,
                tokenizer,
                turn.prompt.messages if not history else [*history, *asked],
                monitor,
                gate=gate,
                conversation="c",
                max_new_tokens=len(turn.response) + 4,
                logits_processor=[Writer(list(turn.response))],
            )
        )
        if not history:
            history = turn.prompt.messages[:1]
        text = text_of(events)
        history += [*asked, {"role": "assistant", "content": text}]
        whole = tokenizer.decode(turn.response, skip_special_tokens=True)
        if number < talk.labels.target_turn:
            assert text == whole
        else:
            held = 6 if hold == 6 else len(turn.response)
            assert text == tokenizer.decode(turn.response[:-1][:-held], skip_special_tokens=True)
            assert events[-1].message == "content_filter"
