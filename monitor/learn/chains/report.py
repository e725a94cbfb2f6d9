"""What is kept beside a fitted ``chain.json``: how it was fitted, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from midstream.chain import ChainError
from midstream.learn.chains.intervals import RiskIntervals
from midstream.validation import named_faults

SCHEMA_VERSION = 1


class Bands(BaseModel):
    """A `midstream.learn.chains.intervals.RiskIntervals` as it is stored; rows are horizons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizons: list[int]
    mean: list[list[float]]
    low: list[list[float]]
    high: list[list[float]]

    @classmethod
    def of(cls, found: RiskIntervals) -> Bands:
        """Store arrays."""
        return cls(**{name: array.tolist() for name, array in asdict(found).items()})

    def at(self, horizon: int) -> tuple[list[float], list[float]] | None:
        """Low and high of every state, or None at a horizon that is not kept."""
        if horizon not in self.horizons:
            return None
        row = self.horizons.index(horizon)
        return self.low[row], self.high[row]


class CategoryReport(BaseModel):
    """One category: the file of its chain, its streams, and the intervals of its risks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    streams: int
    intervals: Bands


class FitReport(BaseModel):
    """What ``fit.json`` holds beside a ``chain.json``.

    Attributes
    ----------
    by : str
        "counts" or "em".
    clock : str
        What a token of the chain is: "token", "turn" or "step".
    streams, tokens, violating : int
    level, draws, seed
        Of the intervals.
    intervals : Bands, optional
        Credible intervals of the horizon risks; only where states were counted.
    frequencies : dict, optional
        `midstream.learn.chains.intervals.Frequencies` of the same streams.
    order_test : dict, optional
        `midstream.learn.chains.order.OrderTest`.
    held_out : dict
        Streams and tokens held out, and the log-likelihood per token (natural log) that the pooled
        chain and those of the categories, fitted to the rest, give them.
    categories : dict of str to CategoryReport
    concentration : dict
        See `midstream.learn.chains.categories.CategoryChains`; None where it is infinite.
    em : dict, optional
        How EM went.
    notes : dict
        Where the streams come from, and what was left out of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    by: str
    clock: str
    streams: int
    tokens: int
    violating: int
    level: float
    draws: int
    seed: int
    intervals: Bands | None
    frequencies: dict[str, Any] | None
    order_test: dict[str, Any] | None
    held_out: dict[str, Any]
    categories: dict[str, CategoryReport]
    concentration: dict[str, float | None]
    em: dict[str, Any] | None
    notes: dict[str, Any]

    @property
    def never_seen(self) -> list[int]:
        """States that no stream was in before it had violated: their rows are the prior's."""
        if self.frequencies is None:
            return []
        visits, unknown = self.frequencies["visits"][0], self.frequencies["unknown"][0]
        return [
            state
            for state, seen in enumerate(map(sum, zip(visits, unknown, strict=True)))
            if not seen
        ]

    @classmethod
    def from_json(cls, text: str, source: str = "fit.json") -> FitReport:
        """Parse and validate; a ChainError names each key at fault."""
        with named_faults(source, ChainError):
            return cls.model_validate_json(text)


def category_file(category: str) -> str:
    """Name of the file of a category's chain; what a file name cannot hold is percent-encoded."""
    return f"chain-{quote(category, safe='')}.json"
