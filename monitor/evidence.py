"""How a probe's logits are smoothed over a stream into its evidence (design section 4.3).

A rule is data: the kernels need four numbers of it per probe. Parameters are kept as given and
rounded to fp32 when the device table is made.

The hazard of a probe is ``sigmoid(evidence - center)``. ``center`` puts one half where the rule
alarms: at logit 0 for the rules that stay on the scale of the logits, at the alarm level for CUSUM,
and between ``k - 1`` and ``k`` tokens for COUNT and RUN.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from midstream.kernels.tables import Rule

_FP32 = torch.finfo(torch.float32)
_MAX_TOKENS = 1 << 24  # fp32 counts tokens exactly up to here

_Real = Annotated[float, Field(ge=_FP32.min, le=_FP32.max, allow_inf_nan=False)]
_Tokens = Annotated[int, Field(ge=1, le=_MAX_TOKENS)]


class EvidenceRule(BaseModel):
    """What all rules have in common.

    Raises
    ------
    pydantic.ValidationError
        A ``ValueError`` that names the key: missing, unknown, of the wrong type, not finite or out
        of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    code: ClassVar[Rule]

    @property
    def parameter(self) -> float:
        """The number that `midstream.kernels.tables.EvidenceTable.parameter` holds."""
        return 0.0

    @property
    def tokens(self) -> int:
        """Tokens averaged; 1 for every rule but MEAN."""
        return 1

    @property
    def center(self) -> float:
        """Evidence at which the probe's hazard is one half."""
        return 0.0


class Last(EvidenceRule):
    """The newest logit."""

    code = Rule.LAST
    rule: Literal["last"] = "last"


class Ema(EvidenceRule):
    """Exponential moving average ``e <- alpha z + (1 - alpha) e``; the first token sets it."""

    code = Rule.EMA
    rule: Literal["ema"] = "ema"
    alpha: float = Field(ge=_FP32.tiny, le=1.0, description="weight of the newest logit, in (0, 1]")

    @property
    def parameter(self) -> float:
        """Alpha."""
        return self.alpha


class Mean(EvidenceRule):
    """Mean over the last ``window`` tokens, over all of them while there are fewer."""

    code = Rule.MEAN
    rule: Literal["mean"] = "mean"
    window: _Tokens

    @property
    def tokens(self) -> int:
        """Tokens averaged."""
        return self.window


class Cusum(EvidenceRule):
    """Cumulative sum with drift, ``g <- max(0, g + z - kappa)``, which alarms at ``alarm``."""

    code = Rule.CUSUM
    rule: Literal["cusum"] = "cusum"
    kappa: _Real
    alarm: Annotated[_Real, Field(gt=0.0)]

    @property
    def parameter(self) -> float:
        """Kappa."""
        return self.kappa

    @property
    def center(self) -> float:
        """The alarm level."""
        return self.alarm


class _Counting(EvidenceRule):
    theta: _Real
    k: _Tokens = Field(description="tokens it takes to alarm")

    @property
    def parameter(self) -> float:
        """Theta."""
        return self.theta

    @property
    def center(self) -> float:
        """Half a token below ``k``, so that ``k`` tokens are clearly above and ``k - 1`` below."""
        return self.k - 0.5


class Count(_Counting):
    """Tokens so far with ``z >= theta``, which alarms at ``k`` of them."""

    code = Rule.COUNT
    rule: Literal["count"] = "count"


class Run(_Counting):
    """Consecutive tokens up to the newest with ``z >= theta``, which alarms at ``k`` of them."""

    code = Rule.RUN
    rule: Literal["run"] = "run"


class Max(EvidenceRule):
    """The largest logit so far."""

    code = Rule.MAX
    rule: Literal["max"] = "max"


Evidence = Annotated[Last | Ema | Mean | Cusum | Count | Run | Max, Field(discriminator="rule")]
"""Any of the rules; in JSON an object with its ``rule`` and that rule's parameters."""
