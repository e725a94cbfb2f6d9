"""What the risk of a turn leads to: the section ``turns`` of ``policy.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Chance = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]  # YAML's off is not 0.0


class TurnPolicy(BaseModel):
    """When a whole response, or its tail, is withheld.

    Attributes
    ----------
    horizon : int
        Turns to look ahead. 0 asks whether delivering this response would complete the harm.
    block_at : float
        Withhold when the risk reaches this.
    hold : int or "whole"
        What waits for the gate: the whole response, or its last so many tokens. The rest streams.
    on_store_down : {"closed", "open"}
        Without the ledger nothing is known of earlier turns. "closed" withholds; "open" goes on as
        if it had not seen them. Either way the decision says so.
    on_unseen : {"block", "gap"}
        What earlier turns do that the ledger does not know, as after an edit. "gap": the belief
        moves through each of them without evidence, as through an unscored token.
    expiry : float, optional
        Seconds after its newest turn at which a conversation may be forgotten; None keeps all.
    provenance : str
        Where ``block_at`` comes from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    horizon: Annotated[int, Field(strict=True, ge=0)] = 0
    block_at: _Chance
    hold: Literal["whole"] | Annotated[int, Field(strict=True, ge=1)] = "whole"
    on_store_down: Literal["closed", "open"] = "closed"
    on_unseen: Literal["block", "gap"] = "gap"
    expiry: Annotated[float, Field(strict=True, gt=0.0)] | None = 30 * 86400.0
    provenance: str = "none: chosen by hand"
