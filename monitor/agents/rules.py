"""Rules that read a step of an agent: which data it touches, how far it reaches, what undoes it.

Written as YAML. ``rules.yaml`` beside this module holds the default; a file that says
``extends: default`` adds its own before them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from midstream.agents.patterns import Pattern
from midstream.agents.roles import Size, Strict
from midstream.agents.state import Escalation, Exposure, Named, Reversibility, State
from midstream.agents.steps import Step
from midstream.agents.text import lines_of, plain, words_of_name
from midstream.validation import named_faults
from midstream.yaml_text import read_mapping

Place = Literal["tool", "arguments", "observed", "said"]
Category = Literal["read", "write", "exec", "network"]

CATEGORIES: Mapping[Category, tuple[Escalation, Reversibility]] = {
    "read": (Escalation.READ_ONLY, Reversibility.FULL),
    "write": (Escalation.FILE_WRITE, Reversibility.PARTIAL),
    "exec": (Escalation.CODE_EXEC, Reversibility.PARTIAL),
    "network": (Escalation.NETWORK, Reversibility.IRREVERSIBLE),
}
"""What a call of each category does (SafetyDrift)."""

_SHOWN = 60  # characters of a match that an explanation quotes
_SHOWN_OF_SECRETS = 8  # an explanation is logged and must not spread what it found
_DIGIT = re.compile(r"\d")

_Value = TypeVar("_Value", bound=Named)


class RulesError(ValueError):
    """Rules that cannot be used; the message names each key at fault."""


def _by_label(kind: type[_Value]) -> BeforeValidator:
    names = {value.label: value for value in kind}

    def parse(value: object) -> object:
        if isinstance(value, kind):
            return value
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(names)}; got {value!r}")
        return names[value]

    return BeforeValidator(parse)


class _Strict(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)


class ActionRule(_Strict):
    """What a call does. All patterns given have to match.

    Attributes
    ----------
    name : str
        Shown in explanations; a rule of the same name in a file that extends replaces this one.
    tool, arguments : Pattern, optional
        ``tool`` is matched against the words of the name, in lower case: ``GmailSendEmail`` and
        ``gmail.send_email`` are both ``gmail send email``. ``arguments`` against a line
        ``key: value`` for each.
    category : {"read", "write", "exec", "network"}
    reversibility : optional
        Other than the category's, for what cannot be undone (or can).
    """

    name: str = Field(min_length=1)
    tool: Pattern | None = None
    arguments: Pattern | None = None
    category: Category
    reversibility: Annotated[Reversibility, _by_label(Reversibility)] | None = None

    @model_validator(mode="after")
    def _matches_something(self) -> ActionRule:
        if self.tool is None and self.arguments is None:
            raise ValueError("expected a pattern for tool, arguments or both")
        return self


class DataRule(_Strict):
    """What data a step touches; of all that match, the highest exposure counts.

    Attributes
    ----------
    name : str
    exposure
    pattern : Pattern
    where : tuple of {"tool", "arguments", "observed", "said"}
        Where it is looked for. What the agent says is not, unless asked for: to speak of a
        password is not to hold it.
    """

    name: str = Field(min_length=1)
    exposure: Annotated[Exposure, _by_label(Exposure)]
    pattern: Pattern
    where: tuple[Place, ...] = Field(default=("arguments", "observed"), min_length=1)


@dataclass(frozen=True)
class Reason:
    """One rule that matched.

    Attributes
    ----------
    rule : str
        Name of the rule.
    gives : str
        What it says: a category, an exposure.
    where : str
        Place of the match; empty where nothing had to match.
    matched : str
        What matched, cut short, its digits hidden; of a secret its first characters alone.
    """

    rule: str
    gives: str
    where: str = ""
    matched: str = ""

    def __str__(self) -> str:
        found = f": {self.where} {self.matched!r}" if self.where else ""
        return f"{self.gives} ({self.rule}{found})"


class Rules(_Strict):
    """Rules as read from YAML.

    Attributes
    ----------
    actions : tuple of ActionRule
        The first that matches a call decides.
    data : tuple of DataRule
    otherwise : category
        Of a call that no rule knows.
    text_limit : int
        Characters read of each place of a step; patterns take time linear in them.
    unread : exposure
        Assumed where a text is longer: what was not read may hold anything.
    """

    actions: tuple[ActionRule, ...] = ()
    data: tuple[DataRule, ...] = ()
    otherwise: Category = "write"
    text_limit: Size = 50_000
    unread: Annotated[Exposure, _by_label(Exposure)] = Exposure.SENSITIVE

    @model_validator(mode="after")
    def _names_are_unique(self) -> Rules:
        for key in ("actions", "data"):
            names = [rule.name for rule in getattr(self, key)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{key}: more than one rule is named {', '.join(twice)}")
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what the rules say, whatever file they came from."""
        plain = self.model_dump(mode="json")
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def read(self, step: Step) -> tuple[State, tuple[Reason, ...]]:
        """State a step would be in on its own, and why. O(rules x characters), bounded."""
        texts, cut = self._texts(step)
        escalation, reversibility, action = self._action(step, texts)
        exposure, reasons = Exposure.NONE, [action]
        for rule in self.data:
            for place in rule.where:
                if found := rule.pattern.search(texts[place]):
                    secret = rule.exposure >= Exposure.CREDENTIALS
                    shown = _quote(found.group(), _SHOWN_OF_SECRETS if secret else _SHOWN)
                    reasons.append(Reason(rule.name, rule.exposure.label, place, shown))
                    exposure = max(exposure, rule.exposure)
                    break
        for place in cut:
            exposure = max(exposure, self.unread)
            reasons.append(
                Reason("unread", self.unread.label, place, f"longer than {self.text_limit:,}")
            )
        return State(exposure, escalation, reversibility), tuple(reasons)

    def _action(
        self, step: Step, texts: Mapping[Place, str]
    ) -> tuple[Escalation, Reversibility, Reason]:
        if step.call is None:
            return *CATEGORIES["read"], Reason("no call", "read")
        for rule in self.actions:
            places: list[tuple[Place, Pattern | None]] = [
                ("tool", rule.tool),
                ("arguments", rule.arguments),
            ]
            where, matched = "", ""
            for place, pattern in places:
                found = pattern.search(texts[place]) if pattern is not None else None
                if pattern is not None and found is None:
                    break
                if found is not None:
                    where, matched = place, _quote(found.group(), _SHOWN)
            else:
                escalation, reversibility = CATEGORIES[rule.category]
                if rule.reversibility is not None:
                    reversibility = rule.reversibility
                gives = f"{rule.category}, {reversibility.label}"
                return escalation, reversibility, Reason(rule.name, gives, where, matched)
        return *CATEGORIES[self.otherwise], Reason("otherwise", self.otherwise)

    def _texts(self, step: Step) -> tuple[dict[Place, str], list[Place]]:
        call = step.call
        whole: dict[Place, str] = {
            "tool": "" if call is None else " ".join(words_of_name(call.tool)),
            "arguments": "" if call is None else lines_of(call.arguments, self.text_limit + 1),
            "observed": step.observed,
            "said": step.said,
        }
        texts = {place: plain(text[: self.text_limit + 1]) for place, text in whole.items()}
        cut = [place for place, text in texts.items() if len(text) > self.text_limit]
        return {place: text[: self.text_limit] for place, text in texts.items()}, cut

    @classmethod
    def default(cls) -> Rules:
        """Rules that come with the package."""
        return _default()

    @classmethod
    def load(cls, path: Path | None) -> Rules:
        """Read a YAML file; the default where there is none. RulesError, OSError."""
        if path is None:
            return cls.default()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RulesError(f"{path}: not UTF-8: {error}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, source: str = "rules.yaml") -> Rules:
        """Parse and validate; ``extends: default`` puts these rules before the default's.

        Raises
        ------
        RulesError
            Naming every key at fault.
        """
        content = read_mapping(text, source, RulesError)
        extends = content.pop("extends", None)
        if extends not in (None, "default"):
            raise RulesError(f"{source}: extends: expected 'default', got {extends!r}")
        with named_faults(source, RulesError):
            own = cls.model_validate(content)
        return own if extends is None else own._before(cls.default())

    def _before(self, base: Rules) -> Rules:
        given = {key: getattr(base, key) for key in type(self).model_fields}
        given |= {key: getattr(self, key) for key in self.model_fields_set}
        for key in ("actions", "data"):
            own = getattr(self, key)
            names = {rule.name for rule in own}
            kept = [rule for rule in getattr(base, key) if rule.name not in names]
            given[key] = (*own, *kept)
        return Rules(**given)


@lru_cache(maxsize=1)
def _default() -> Rules:
    text = files("midstream.agents").joinpath("rules.yaml").read_text(encoding="utf-8")
    return Rules.from_yaml(text, "rules.yaml of the package")


def _quote(text: str, limit: int) -> str:
    """Cut a match short and hide its digits, which may be a card's or an account's."""
    shown = _DIGIT.sub("#", text[:limit])
    return shown if len(text) <= limit else f"{shown}…"
