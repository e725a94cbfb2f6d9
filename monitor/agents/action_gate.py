"""A deterministic gate for tool calls, before they run: scope, veto, consensus.

Three stages in the manner of ILION's cascade; the first decisive one wins. *Scope*: the tool, its
arguments and places are what the role may use. *Veto*: rules that decide alone. *Consensus*: weak
signals add up; what is borderline passes only if voters (a forecast, an encoder) agree to it. No
clock, no chance: after the same events the same call gets the same verdict, and each says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from midstream.agents.call_text import CallText, FormError, read_arguments
from midstream.agents.consensus import ask, settle, shown
from midstream.agents.decisions import Decision, GateVerdict, MalformedCall
from midstream.agents.gate_rules import GateRules, GateRulesError
from midstream.agents.places import addresses, is_listed_host, is_listed_recipient
from midstream.agents.roles import ToolScope
from midstream.agents.scope import Finding, entry_of, outside_arguments, outside_places
from midstream.agents.secret_forms import secret_in
from midstream.agents.steps import AgentTrace, Step, ToolCall
from midstream.agents.taint import Origins
from midstream.agents.text import is_disguised, unquoted, words, words_of_name
from midstream.agents.voters import Situation, Voter

OBEYED_WORDS = 2
"""Words of a request in an observation that a call must repeat for the signal ``obeys``."""

_LONGEST_NAME = 256
_EVERYTHING = re.compile(r"(?:[a-z]:|~|\.)?(?:[/\\]|\*\.\*|\.?\*{1,2}|%)*")  # *, /, ~/, ./*, c:\, %
_LONGEST_EVERYTHING = 12
_SHELLS = frozenset({"run", "unknown"})  # effects of tools that may join quoted words


class _Tool(NamedTuple):
    """A tool as a role knows it: which of its entries fits, what it does, its name in words."""

    entry: str | None
    scope: ToolScope | None
    effects: frozenset[str]
    name: str


class ActionGate:
    """Rules and voters, ready to judge the calls of many tasks.

    Parameters
    ----------
    rules : GateRules, optional
        Those of the package when not given.
    voters : sequence of Voter
        Beside the rules' own score.
    """

    def __init__(self, rules: GateRules | None = None, voters: Sequence[Voter] = ()) -> None:
        self.rules = rules or GateRules.load()
        self.voters = tuple(voters)
        self._in_calls = self.rules.phrases("call")
        self._in_observations = self.rules.phrases("observation")
        self._requests = frozenset(n for n, s in self.rules.signals.items() if s.requests)
        self._vetoes = tuple((veto, veto.alternatives) for veto in self.rules.vetoes)
        self._about = lru_cache(maxsize=1024)(self._about_tool)

    def session(self, task: str = "", role: str | None = None) -> GateSession:
        """Begin a task; ``role`` is the first of the rules' when not given.

        Raises
        ------
        GateRulesError
            For a role that the rules do not have.
        """
        name = next(iter(self.rules.roles)) if role is None else role
        if name not in self.rules.roles:
            there = ", ".join(self.rules.roles)
            raise GateRulesError(f"no role {name!r}; there are {there}")
        return GateSession(self, task, name)

    def _about_tool(self, role: str, tool: str) -> _Tool:
        entry = entry_of(self.rules.roles[role], tool)
        scope = None if entry is None else self.rules.roles[role].tools[entry]
        parts = words_of_name(tool)
        stated = None if scope is None else scope.effects
        effects = self.rules.effects_of(parts) if stated is None else frozenset(stated)
        return _Tool(entry, scope, effects, " ".join(parts))


class GateSession:
    """One task of one agent: what was said, seen and done so far.

    Tell it of every user turn (`trust`), every call that ran (`ran`) and every observation
    (`observe`), in order. `decide` changes nothing.
    """

    def __init__(self, gate: ActionGate, task: str, role: str) -> None:
        self._gate, self._rules = gate, gate.rules
        self._name, self._role = role, gate.rules.roles[role]
        self._task = task
        self._steps: list[Step] = []  # for voters
        self._observed: list[str] = []  # since the last of them
        self._calls: Counter[str | None] = Counter()  # by entry of the role
        self._origins = Origins(
            gate._in_observations, gate._requests, self._rules.limits.remembered_words
        )
        for text in (self._role.about, task):
            self._origins.trust(text)

    def trust(self, text: str) -> None:
        """Take in what the user said."""
        self._origins.trust(text)

    def observe(self, text: str) -> None:
        """Take in what the last call gave back, as a whole. Linear in the text."""
        self._origins.observe(text)
        if self._steps:
            self._observed.append(text)

    def ran(self, call: ToolCall) -> None:
        """Count a call that was made."""
        self._calls[self._gate._about(self._name, call.tool).entry] += 1
        if self._gate.voters:
            self._history()
            self._steps.append(Step(call=call))

    def _history(self) -> tuple[Step, ...]:
        """Steps so far; what was observed since the last look belongs to the last of them."""
        if self._observed:
            last = self._steps[-1]
            observed = "".join([last.observed, *self._observed])
            self._steps[-1] = last.model_copy(update={"observed": observed})
            self._observed.clear()
        return tuple(self._steps)

    def decide(self, call: ToolCall | MalformedCall) -> Decision:
        """Judge a call before it runs. Never raises; linear in the length of the arguments."""
        if isinstance(call, MalformedCall):
            return _malformed(call, call.reason)
        limits = self._rules.limits
        fault = _fault_of_name(call.tool)
        if fault:
            return _malformed(call, fault)
        try:
            text = read_arguments(call.arguments, limits.characters, limits.depth, limits.values)
        except FormError as error:
            return _malformed(call, str(error))
        tool = self._gate._about(self._name, call.tool)
        said = words(f"{tool.name}\n{text.text}")
        distinct = frozenset(said)
        hosts: list[str] = []
        recipients: list[str] = []
        if "@" in text.text or "://" in text.text:
            hosts, recipients = addresses(distinct)
        finding = self._outside(call, tool, text.leaves, hosts, recipients)
        if finding is not None:
            return Decision(
                GateVerdict.BLOCK,
                "scope",
                finding.rule,
                finding.matched,
                f"outside what the role {self._name} may do",
                finding.remedy,
                call,
            )
        signals = dict.fromkeys(sorted(tool.effects), f"tool {call.tool}")
        if not _SHELLS.isdisjoint(tool.effects) and (joined := unquoted(text.text)) is not None:
            as_shells = words(f"{tool.name}\n{joined}")
            signals |= self._gate._in_calls.find(as_shells, frozenset(as_shells))
        signals |= self._gate._in_calls.find(said, distinct)
        signals |= self._seen(text, distinct, hosts, recipients)
        for veto, alternatives in self._gate._vetoes:
            if all(not names.isdisjoint(signals) for names in alternatives):
                matched = shown(signals, frozenset().union(*alternatives))
                return Decision(
                    GateVerdict(veto.verdict),
                    "veto",
                    veto.rule,
                    matched,
                    veto.because,
                    veto.remedy,
                    call,
                )
        return self._consensus(call, signals, f"{tool.name}: {text.text}")

    def _outside(
        self,
        call: ToolCall,
        tool: _Tool,
        leaves: Sequence[str],
        hosts: Sequence[str],
        recipients: Sequence[str],
    ) -> Finding | None:
        role, scope = self._role, tool.scope
        if scope is None:
            return Finding("tools", f"tool {call.tool}", f"one of {', '.join(role.tools)}")
        made = self._calls.total()
        if role.calls is not None and made >= role.calls:
            return Finding("calls", f"{made} calls were made", f"{role.calls} per task")
        made = self._calls[tool.entry]
        if scope.calls is not None and made >= scope.calls:
            matched = f"{tool.entry} was called {made} times"
            return Finding(f"tools.{tool.entry}.calls", matched, f"{scope.calls} per task")
        return outside_arguments(scope, call.arguments) or outside_places(
            role, scope, call.arguments, leaves, hosts, recipients
        )

    def _seen(
        self,
        text: CallText,
        distinct: frozenset[str],
        hosts: Sequence[str],
        recipients: Sequence[str],
    ) -> dict[str, str]:
        """Signals that are computed, with what gave each."""
        origins = self._origins
        found = dict(origins.raised)
        secret = secret_in(text.text)
        if secret is not None:
            found["secret"] = secret
        bulk = next((leaf for leaf in text.leaves if _is_everything(leaf)), None)
        if bulk is not None:
            found["bulk"] = bulk.strip()
        role = self._role
        for address, is_listed, listed in (
            *((host, is_listed_host, role.hosts) for host in hosts),
            *((recipient, is_listed_recipient, role.recipients) for recipient in recipients),
        ):
            if address not in origins.trusted and not is_listed(address, listed or ()):
                found["foreign-address"] = address[:80]
                break
        copied = (distinct & origins.copied) or (origins.copied & set(hosts))
        if copied:
            found["copied"] = min(copied)[:80]
        obeyed = distinct & origins.requested
        if len(obeyed) >= OBEYED_WORDS:
            found["obeys"] = " ".join(sorted(obeyed)[:5])
        if origins.forgot:
            found["forgot"] = f"more than {self._rules.limits.remembered_words} words"
        return found

    def _consensus(self, call: ToolCall, signals: Mapping[str, str], action: str) -> Decision:
        situation = Situation(self._task, self._role.about, self._history(), call, action)
        votes = tuple(ask(voter, situation) for voter in self._gate.voters)
        return settle(self._rules.consensus, call, signals, votes)


def check_calls(trace: AgentTrace, gate: ActionGate, role: str | None = None) -> list[Decision]:
    """Judge the calls of a trace in order, each before its own observation is known.

    As the trace went: a call that would have been stopped still counts, and its observation is
    still read.
    """
    session = gate.session(trace.task, role)
    decisions = []
    for step in trace.steps:
        if step.call is not None:
            decisions.append(session.decide(step.call))
            session.ran(step.call)
        session.observe(step.observed)
    return decisions


def _malformed(call: ToolCall | MalformedCall, reason: str) -> Decision:
    return Decision(
        GateVerdict.BLOCK,
        "form",
        "malformed",
        reason,
        "what cannot be read cannot be judged",
        "one JSON object of arguments within the limits, for a tool with a name",
        call,
    )


def _fault_of_name(tool: object) -> str | None:
    if not isinstance(tool, str) or not tool.strip():
        return "tool: expected a name"
    if len(tool) > _LONGEST_NAME:
        return f"tool: a name of more than {_LONGEST_NAME} characters"
    if not tool.isprintable():
        return "tool: a name with characters that cannot be printed"
    return "tool: a name with letters that look like others" if is_disguised(tool) else None


def _is_everything(leaf: str) -> bool:
    if leaf[:1].isalnum() and leaf[1:2] != ":":  # most are told by this
        return False
    bare = leaf.strip().lower() if len(leaf) <= 4 * _LONGEST_EVERYTHING else ""
    return 0 < len(bare) <= _LONGEST_EVERYTHING and bool(_EVERYTHING.fullmatch(bare))
