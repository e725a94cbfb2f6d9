"""What the action gate is told: scope of each role, signals, vetoes, consensus. YAML, validated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, model_validator

from midstream.agents.phrases import Phrases
from midstream.agents.roles import EFFECTS, Effect, Names, Number, Role, Size, Strict
from midstream.validation import named_faults
from midstream.yaml_text import read_mapping, refuse_newer

SCHEMA_VERSION = 1

SEEN = {
    "secret": "an argument holds a key, a token or a card number",
    "bulk": "an argument stands for everything: *, /, ~",
    "foreign-address": "an address that neither the user nor the role named",
    "copied": "a name, path or address that only the prose of an observation mentions",
    "obeys": "the call repeats words of a request that stands in an observation",
    "forgot": "observations were larger than what the session may remember",
}
"""Signals that are computed, beside effects and those that the rules define with phrases."""

_MOST_PHRASE_WORDS = 8


class GateRulesError(ValueError):
    """Rules that cannot be obeyed; the message names each key at fault."""


class Limits(Strict):
    """Sizes above which a call is refused unread: what bounds the time of a decision.

    Attributes
    ----------
    characters : int
        All keys and values of the arguments together.
    depth, values : int
        Of the arguments, as JSON.
    remembered_words : int
        Words of observations that a session keeps; past that it says so by the signal ``forgot``.
    """

    characters: Size = 65_536
    depth: Annotated[Size, Field(le=200)] = 32
    values: Size = 4096
    remembered_words: Size = 200_000


class Signal(Strict):
    """Words that mean something.

    Attributes
    ----------
    phrases : list of str
        See `midstream.agents.phrases.Phrases`.
    of : {"call", "observation"}
        Where they are looked for: the tool's name and arguments, or what tools gave back. A signal
        of observations stays on for the rest of the task.
    requests : bool
        For observations: text around it asks for something. A call that repeats its words has the
        signal ``obeys``.
    """

    phrases: Annotated[Names, Field(min_length=1)]
    of: Literal["call", "observation"] = "call"
    requests: bool = False


class Veto(Strict):
    """A rule that decides alone.

    Attributes
    ----------
    rule : str
        Its name in explanations.
    when : list of str
        Signals or effects that must all be there; ``a|b`` is either.
    verdict : {"BLOCK", "ASK"}
    because, remedy : str
        Why, and what would make the call pass.
    """

    rule: Annotated[str, Field(min_length=1)]
    when: Annotated[Names, Field(min_length=1)]
    verdict: Literal["BLOCK", "ASK"] = "BLOCK"
    because: Annotated[str, Field(min_length=1)]
    remedy: Annotated[str, Field(min_length=1)]

    @property
    def alternatives(self) -> tuple[frozenset[str], ...]:
        """One set of names per condition."""
        return tuple(frozenset(names.split("|")) for names in self.when)


class Consensus(Strict):
    """How weak signals and voters decide together.

    Attributes
    ----------
    weights : mapping of signal to number
        Added up for the signals that a call has.
    borderline_at : float
        From here on a call needs ``agree`` voters for it, and none against.
    block_at : float
        From here on a borderline call with a voter against it, and none for it, is blocked.
    agree : int
    """

    weights: dict[str, Number] = Field(default_factory=dict)
    borderline_at: Annotated[Number, Field(gt=0)]
    block_at: Annotated[Number, Field(gt=0)]
    agree: Size = 1

    @model_validator(mode="after")
    def _in_order(self) -> Consensus:
        if self.block_at < self.borderline_at:
            raise ValueError(
                f"block_at ({self.block_at}) must not be below borderline_at ({self.borderline_at})"
            )
        return self


class GateRules(Strict):
    """Rules of an action gate, as stored in ``gate.yaml``.

    Attributes
    ----------
    limits : Limits
    roles : mapping of name to Role
    effects : mapping of effect to list of words
        A tool whose name holds one of the words has the effect.
    nouns : mapping of effect to list of words
        The same, for names that hold none of those.
    signals : mapping of name to Signal
    vetoes : list of Veto
        In this order; the first that holds decides.
    consensus : Consensus
    """

    schema_version: StrictInt = SCHEMA_VERSION
    limits: Limits = Limits()
    roles: Annotated[dict[str, Role], Field(min_length=1)]
    effects: dict[Effect, Names]
    nouns: dict[Effect, Names] = Field(default_factory=dict)
    signals: dict[str, Signal] = Field(default_factory=dict)
    vetoes: tuple[Veto, ...] = ()
    consensus: Consensus

    @model_validator(mode="before")
    @classmethod
    def _not_newer(cls, content: Any) -> Any:
        refuse_newer(content, SCHEMA_VERSION)
        return content

    @model_validator(mode="after")
    def _consistent(self) -> GateRules:
        for name, signal in self.signals.items():
            if name in EFFECTS or name in SEEN:
                raise ValueError(f"signals.{name}: the name is taken; choose another")
            if signal.requests and signal.of == "call":
                raise ValueError(f"signals.{name}.requests: only observations have requests")
            for i, phrase in enumerate(signal.phrases):
                fault = fault_of_phrase(phrase)
                if fault:
                    raise ValueError(f"signals.{name}.phrases.{i}: {fault}")
        known = {*EFFECTS, *SEEN, *self.signals}
        rules = [veto.rule for veto in self.vetoes]
        for i, veto in enumerate(self.vetoes):
            if veto.rule in rules[:i]:
                raise ValueError(f"vetoes.{i}.rule: {veto.rule!r} is there already")
            self._check_known(f"vetoes.{i}.when", frozenset().union(*veto.alternatives), known)
        self._check_known("consensus.weights", frozenset(self.consensus.weights), known)
        return self

    @staticmethod
    def _check_known(key: str, names: frozenset[str], known: set[str]) -> None:
        unknown = sorted(names - known)
        if unknown:
            raise ValueError(
                f"{key}: no signal or effect {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(sorted(known))}"
            )

    def effects_of(self, name: Iterable[str]) -> frozenset[str]:
        """Effects of a tool, from the words of its name."""
        for table in (self.effects, self.nouns):
            found = [effect for effect, listed in table.items() if not set(listed).isdisjoint(name)]
            if found:
                return frozenset(found)
        return frozenset({"unknown"})

    def phrases(self, of: Literal["call", "observation"]) -> Phrases:
        """Return the phrases of all signals of one kind, ready to be looked for."""
        return Phrases({n: s.phrases for n, s in self.signals.items() if s.of == of})

    @classmethod
    def from_yaml(cls, text: str, source: str = "gate.yaml") -> GateRules:
        """Parse and validate; a GateRulesError names each key at fault."""
        content = read_mapping(text, source, GateRulesError)
        with named_faults(source, GateRulesError):
            return cls.model_validate(content)

    @classmethod
    def load(cls, path: Path | None = None) -> GateRules:
        """Read a file, or the rules that come with the package.

        Raises
        ------
        GateRulesError
            For a file that cannot be read or obeyed.
        """
        file = resources.files("midstream.agents") / "gate.yaml" if path is None else path
        try:
            return cls.from_yaml(file.read_text(encoding="utf-8"), str(path or "gate.yaml"))
        except (OSError, UnicodeDecodeError) as error:
            raise GateRulesError(f"{path}: cannot be read: {error}") from error


def fault_of_phrase(phrase: str) -> str | None:
    """Say what is wrong with a phrase, if anything."""
    parts = phrase.split()
    if not 1 <= len(parts) <= _MOST_PHRASE_WORDS:
        return f"expected 1 to {_MOST_PHRASE_WORDS} words, got {len(parts)}"
    for part in parts:
        for word in part.split("|"):
            if not word:
                return f"{part!r} has an empty alternative"
            if word != word.lower():
                return f"{word!r}: write it in lower case; case is ignored"
            if re.search(r".\*.", word) or (len(word) > 1 and word[0] == "*"):
                return f"{word!r}: * may only stand at the end of a word, or alone"
    if any(len(word) > 1 and word.endswith("*") for word in parts[0].split("|")):
        return "its first word must be whole: a call is searched by first words"
    return None
