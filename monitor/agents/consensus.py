"""The last stage of the gate: weak signals add up, voters agree or do not."""

from __future__ import annotations

from collections.abc import Mapping

from midstream.agents.decisions import Decision, GateVerdict
from midstream.agents.gate_rules import Consensus
from midstream.agents.steps import ToolCall
from midstream.agents.voters import Situation, Stance, Vote, Voter


def ask(voter: Voter, situation: Situation) -> Vote:
    """Let a voter vote. One that fails is against: it must not open the gate, nor stop it."""
    try:
        return voter.vote(situation)
    except Exception as error:
        return Vote(voter.name, Stance.AGAINST, f"failed: {type(error).__name__}: {error}")


def settle(
    rules: Consensus, call: ToolCall, signals: Mapping[str, str], votes: tuple[Vote, ...]
) -> Decision:
    """Decide a call that nothing forbids.

    Parameters
    ----------
    rules : Consensus
    call : ToolCall
    signals : mapping of name to what in the call gave it
    votes : tuple of Vote
    """
    counted = {name: rules.weights[name] for name in signals if name in rules.weights}
    score = sum(counted.values())
    matched = shown(signals, frozenset(counted))
    against = [vote for vote in votes if vote.stance is Stance.AGAINST]
    in_favour = sum(vote.stance is Stance.FOR for vote in votes)
    borderline = score >= rules.borderline_at
    needed = f"needs {rules.agree} voters for it and none against"
    if not borderline and not against:
        verdict, rule, why, remedy = GateVerdict.ALLOW, "nothing against it", "", ""
    elif borderline and not against and in_favour >= rules.agree:
        verdict, rule, remedy = GateVerdict.ALLOW, "voters agree", ""
        why = f"weak signals add up to {score:g}, and {in_favour} voters are for it"
    elif borderline and score >= rules.block_at and against and not in_favour:
        verdict, rule = GateVerdict.BLOCK, "all against"
        why, remedy = "weak signals add up and voters agree with them", "a person has to do it"
    else:
        verdict, rule = GateVerdict.ASK, "borderline" if borderline else "voter against"
        why = f"weak signals add up to {score:g}; it {needed}" if borderline else ""
        remedy = "the user confirms it, or names its target in the task"
    why = why or "; ".join(f"{vote.voter}: {vote.reason}" for vote in against)
    why = why or f"weak signals add up to {score:g}, below {rules.borderline_at:g}"
    return Decision(verdict, "consensus", rule, matched, why, remedy, call, votes)


def shown(signals: Mapping[str, str], names: frozenset[str]) -> str:
    """Those of the signals that have one of these names, with what gave each."""
    return "; ".join(f"{name}: {signals[name]}" for name in sorted(names & signals.keys()))
