"""What a risk leads to.

Horizons, thresholds, strictness tiers, segments. Written as YAML, validated key by key.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    model_validator,
)

from midstream.chain import Chain
from midstream.kernels.tables import OnUnscored, PolicyTable
from midstream.turn_policy import TurnPolicy
from midstream.validation import named_faults
from midstream.yaml_text import read_mapping, refuse_newer, write_mapping

SCHEMA_VERSION = 1

TierName = Literal["strict", "moderate", "loose"]
TIERS: tuple[TierName, ...] = ("strict", "moderate", "loose")
"""From the strictest to the loosest."""

ANSWER = "answer"
"""The segment every stream starts in."""

_NEVER = 2.0  # a risk is at most 1


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):  # YAML's off is not 0.0
        raise ValueError("expected a number, not a truth value")
    return value


def _is_hold_back(value: object) -> object:
    if value == "turn" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"expected a number of tokens, 1 or more, or 'turn'; got {value!r}")


Probability = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, le=1.0)]


class PolicyError(ValueError):
    """A policy that cannot be obeyed; the message names each key at fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thresholds(_Strict):
    """When a stream of one tier is halted or held.

    Attributes
    ----------
    horizon : int
        Tokens to look ahead; 0 detects, more forecasts.
    halt_at : float
        Halt when the risk reaches this.
    hold_at : float, optional
        Hold when the risk reaches this; None never holds for risk.
    release_at : float, optional
        A held stream goes on once the risk is below this (hysteresis); ``hold_at`` when not given.
    """

    horizon: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
    halt_at: Probability
    hold_at: Probability | None = None
    release_at: Probability | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Thresholds:
        if self.hold_at is not None and self.hold_at > self.halt_at:
            raise ValueError(f"hold_at ({self.hold_at}) must not exceed halt_at ({self.halt_at})")
        if self.release_at is not None:
            if self.hold_at is None:
                raise ValueError("release_at needs hold_at")
            if self.release_at > self.hold_at:
                raise ValueError(
                    f"release_at ({self.release_at}) must not exceed hold_at ({self.hold_at})"
                )
        return self

    @property
    def levels(self) -> tuple[float, float, float]:
        """Risks at which a stream is halted; held; and stays held. 2.0 where none is enough.

        A stream can also be held by an unscored token, so that the last one exists without
        ``hold_at``, too: the next scored token that does not halt lets such a stream go on.
        """
        hold_at = _NEVER if self.hold_at is None else self.hold_at
        return self.halt_at, hold_at, hold_at if self.release_at is None else self.release_at

    def is_at_least_as_strict_as(self, other: Thresholds) -> bool:
        """Whether on the same evidence its verdict can never be milder, at any token.

        Risk grows with the horizon, so looking as far ahead with no level higher is what it takes.
        """
        levels = zip(self.levels, other.levels, strict=True)
        return self.horizon >= other.horizon and all(
            min(mine, self.halt_at) <= min(theirs, other.halt_at) for mine, theirs in levels
        )


Marker = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]
)
"""A text that is one token of the tokenizer, or token ids in a row."""


class Segment(_Strict):
    """A part of the response that is told by its markers (see `midstream.segments`).

    Attributes
    ----------
    opens, closes : list of str or of token ids
        Markers, any of which opens it or closes it.
    tiers : mapping of tier name to Thresholds, optional
        Thresholds that replace the tiers' own inside it; for just the tiers there are.
    """

    opens: Annotated[list[Marker], Field(min_length=1)]
    closes: Annotated[list[Marker], Field(min_length=1)]
    tiers: dict[TierName, Thresholds] | None = None


class OnHalt(_Strict):
    """What the client is told when its stream is halted."""

    finish_reason: str = "content_filter"
    message: str | None = None


class FalseHaltBound(_Strict):
    """What is promised about false halts of one tier (see `midstream.learn.guarantee`).

    Attributes
    ----------
    method : {"learn-then-test", "conformal risk control"}
    halt_at, horizon
        The thresholds it was given for. It still holds with a higher level and a shorter horizon.
    bound : float
        Share of safe responses that are halted, at most, with ``confidence`` over the draw of the
        calibration set.
    confidence : float
    mean_bound : float, optional
        The same on average over calibration sets, where the method bounds that.
    responses : int
        Safe responses it was calibrated on.
    max_tokens : int
        Longest response it speaks of.
    """

    method: Literal["learn-then-test", "conformal risk control"]
    halt_at: Probability
    horizon: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
    bound: Probability
    confidence: Probability
    mean_bound: Probability | None = None
    responses: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]
    max_tokens: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]

    def covers(self, thresholds: Thresholds) -> bool:
        """Whether it holds for these: as fp32, which is how the kernels compare."""
        level, promised = torch.tensor([thresholds.halt_at, self.halt_at], dtype=torch.float32)
        return bool(level >= promised) and thresholds.horizon <= self.horizon


class Provenance(_Strict):
    """Where the thresholds come from, and what they promise.

    Attributes
    ----------
    calibration_set, guarantee : str
        In words.
    false_halts : mapping of tier name to FalseHaltBound, optional
        In numbers. A policy whose thresholds halt more than was promised is refused.
    """

    calibration_set: str = "none"
    guarantee: str = "none: the thresholds were chosen by hand"
    false_halts: dict[TierName, FalseHaltBound] | None = None


class Policy(_Strict):
    """A monitor's policy, as stored in ``policy.yaml``.

    Attributes
    ----------
    tiers : mapping of tier name to Thresholds
        At least one of strict, moderate, loose; each at least as strict as the next.
    default_tier : str
        Tier of a request that asks for none.
    loosest_tier : str, optional
        The loosest tier a client may ask for; ``default_tier`` when not given.
    segments : mapping of segment name to Segment
        Parts of a response that are judged on their own, five at most. What lies outside of all
        is the answer.
    hold_back : int or "turn"
        Tokens a client's text stays behind the last judged token; "turn" delivers whole responses.
    on_unscored : {"pass", "hold", "halt"}
        What a response token without a score does. "hold": it waits until a later token, whose
        residual has attended to it, is scored and allowed.
    turns : TurnPolicy, optional
        The same decision one level up: whether a whole response may leave.
    """

    schema_version: StrictInt = SCHEMA_VERSION
    tiers: Annotated[dict[TierName, Thresholds], Field(min_length=1)]
    default_tier: TierName
    loosest_tier: TierName | None = None
    segments: Annotated[dict[str, Segment], Field(max_length=5)] = {}
    hold_back: Annotated[int | Literal["turn"], BeforeValidator(_is_hold_back)] = 1
    on_unscored: Literal["pass", "hold", "halt"] = "hold"
    on_halt: OnHalt = OnHalt()
    turns: TurnPolicy | None = None
    provenance: Provenance = Provenance()

    @model_validator(mode="before")
    @classmethod
    def _not_newer(cls, content: Any) -> Any:
        refuse_newer(content, SCHEMA_VERSION)
        return content

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        for key in ("default_tier", "loosest_tier"):
            name = getattr(self, key)
            if name is not None and name not in self.tiers:
                raise ValueError(f"{key}: {self._no_tier(name)}")
        if _looser(self.default_tier, self.loosest):
            raise ValueError(
                f"default_tier ({self.default_tier}) is looser than loosest_tier ({self.loosest})"
            )
        if ANSWER in self.segments:
            raise ValueError(f"segments.{ANSWER}: its thresholds are those of the tiers")
        self._check_order("tiers", self.tiers)
        for name, segment in self.segments.items():
            if segment.tiers is None:
                continue
            if set(segment.tiers) != set(self.tiers):
                raise ValueError(
                    f"segments.{name}.tiers: has {', '.join(segment.tiers) or 'nothing'}; needs "
                    f"thresholds for just the tiers there are, {', '.join(self.tiers)}"
                )
            self._check_order(f"segments.{name}.tiers", segment.tiers)
        self._check_promises()
        return self

    @staticmethod
    def _check_order(key: str, tiers: dict[TierName, Thresholds]) -> None:
        for stricter, looser in pairwise(name for name in TIERS if name in tiers):
            if not tiers[stricter].is_at_least_as_strict_as(tiers[looser]):
                raise ValueError(
                    f"{key}.{stricter}: can be milder than {looser}; give it no shorter horizon "
                    "and no higher halt_at, hold_at or release_at"
                )

    def _check_promises(self) -> None:
        for name, promise in (self.provenance.false_halts or {}).items():
            key = f"provenance.false_halts.{name}"
            if name not in self.tiers:
                raise ValueError(f"{key}: {self._no_tier(name)}")
            if self.segments:
                raise ValueError(
                    f"{key}: speaks of responses that are judged as a whole; with segments each "
                    "part is judged on its own. Remove the promise, or the segments"
                )
            if not promise.covers(self.tiers[name]):
                raise ValueError(
                    f"{key}: holds for halt_at {promise.halt_at} or above and a horizon of "
                    f"{promise.horizon} or less; tiers.{name} has {self.tiers[name].halt_at} and "
                    f"{self.tiers[name].horizon}. Calibrate again, or remove the promise"
                )

    @property
    def loosest(self) -> TierName:
        """The loosest tier a client may ask for."""
        return self.loosest_tier or self.default_tier

    def tier_for(self, requested: str | None, server: TierName | None = None) -> TierName:
        """Return the tier of a request, which may be stricter than the server's, never looser.

        Parameters
        ----------
        requested : str, optional
        server : str, optional
            What the server was started with, in place of ``default_tier`` and ``loosest_tier``.

        Raises
        ------
        PolicyError
            For an unknown tier, or one looser than the loosest.
        """
        if requested is None:
            return server or self.default_tier
        loosest = server or self.loosest
        for name in self.tiers:
            if name == requested:
                if _looser(name, loosest):
                    raise PolicyError(
                        f"tier {name!r} is looser than this server allows; "
                        f"the loosest is {loosest!r}"
                    )
                return name
        raise PolicyError(self._no_tier(requested))

    def thresholds_by_segment(self) -> list[dict[TierName, Thresholds]]:
        """Thresholds in force in the answer, and in each of the segments."""
        return [self.tiers, *(part.tiers or self.tiers for part in self.segments.values())]

    def row(self, tier: TierName, segment: str = ANSWER) -> int:
        """Row of :meth:`table` for a tier inside a segment."""
        segments = [ANSWER, *self.segments]
        if segment not in segments:
            raise PolicyError(f"no segment {segment!r}; there are {', '.join(segments)}")
        if tier not in self.tiers:
            raise PolicyError(self._no_tier(tier))
        return segments.index(segment) * len(self.tiers) + list(self.tiers).index(tier)

    def table(self, chain: Chain, device: torch.device | str = "cpu") -> PolicyTable:
        """Tensors for the kernels: one row per segment and tier, in the order of :meth:`row`."""
        rows = [
            thresholds
            for tiers in self.thresholds_by_segment()
            for thresholds in (tiers[name] for name in self.tiers)
        ]

        def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        halt_at, hold_at, release_at = zip(*(row.levels for row in rows), strict=True)
        return PolicyTable(
            ahead=tensor([chain.horizon(row.horizon).tolist() for row in rows]),
            halt_at=tensor(halt_at),
            hold_at=tensor(hold_at),
            release_at=tensor(release_at),
            on_unscored=tensor([OnUnscored[self.on_unscored.upper()]] * len(rows), torch.int32),
        )

    def _no_tier(self, name: str) -> str:
        return f"no tier {name!r}; there are {', '.join(self.tiers)}"

    def to_yaml(self) -> str:
        """YAML in the order of the fields."""
        return write_mapping(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def from_yaml(cls, text: str, source: str = "policy.yaml") -> Policy:
        """Parse and validate; a PolicyError names each key at fault."""
        content = read_mapping(text, source, PolicyError)
        with named_faults(source, PolicyError):
            return cls.model_validate(content)


def _looser(tier: TierName, than: TierName) -> bool:
    return TIERS.index(tier) > TIERS.index(than)
