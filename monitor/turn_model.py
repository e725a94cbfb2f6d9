"""The absorbing chain at the clock of turns, and what it means for the tokens of the next turn.

The chain is a `midstream.chain.Chain`; its evidence is one number per turn, the turn's log-hazard
(`midstream.turn_evidence`). Everything here is fp64 and costs O(K^2) per turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from midstream.chain import EMISSION_FLOOR, Chain, ChainError
from midstream.validation import named_faults

Floats = NDArray[np.float64]

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class TurnBelief:
    """Beliefs [K+1] after a candidate response was read.

    Attributes
    ----------
    delivered : float64 [K+1]
        If the client is given the response: the filter's own belief.
    withheld : float64 [K+1]
        If not: the share that the response would have moved to *violated* is back in the states it
        came from.
    """

    delivered: Floats
    withheld: Floats


class TurnModel(BaseModel):
    """What a bundle knows of turns, as stored in ``turns.json``.

    Attributes
    ----------
    chain : Chain
        Over turns. ``edges`` are on a turn's log-hazard, nats. It has no prompt evidence.
    carry : [K+1, k+1], optional
        Row i: belief of the bundle's token chain (k states) before the first token of a response,
        given state i of the turn chain after the turn before. Without it every response starts
        from the token chain's own prior.

    Notes
    -----
    Given the belief ``b`` after the turns before, a turn with log-hazard in bin o has the joint

        m[i, j] = b[i] (1 - c[i]) A[i, j] E[j, o]

    of its state i before and j after: the filter of design section 4.4. Its column sums, divided by
    their total Z, are the belief if the response is delivered. The mass ``m[i, V]``, i not V, is
    the response completing the harm from state i. A withheld response completes nothing, so this
    mass stays at i:

        withheld[j] = (sum_i m[i, j] + m[j, V]) / Z   for j other than V
        withheld[V] = m[V, V] / Z

    Z is the same, so what the candidate said about the states before it is kept: states from which
    harm is completed by such a candidate gain, and the next one like it meets a belief at least as
    wary. All other moves count although the text did not arrive; that errs on the side of caution.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    chain: Chain
    carry: list[list[float]] | None = None

    @model_validator(mode="after")
    def _is_a_turn_model(self) -> TurnModel:
        if self.chain.prompt_edges:
            raise ValueError("chain.prompt_edges: a turn chain has no prompt evidence; leave empty")
        if self.carry is None:
            return self
        height, widths = self.chain.states + 1, {len(row) for row in self.carry}
        if len(self.carry) != height or len(widths) != 1:
            raise ValueError(f"carry: expected {height} rows of one length, one per turn state")
        rows = np.array(self.carry)
        if (rows < 0).any() or (abs(rows.sum(axis=1) - 1) > _TOLERANCE).any():
            raise ValueError("carry: every row must be a distribution (>= 0, sum 1)")
        return self

    @property
    def start(self) -> Floats:
        """Belief before the first turn, [K+1]."""
        return _normalised(np.array(self.chain.prior))

    def bin(self, log_hazard: float) -> int:
        """Evidence bin of a turn: the number of edges at or below its log-hazard."""
        if not 0 <= log_hazard < math.inf:
            raise ChainError(f"log_hazard: expected a number, 0 or more, got {log_hazard}")
        return int(np.searchsorted(self.chain.edges, log_hazard, side="right"))

    def move(self, belief: Floats, turns: int = 1) -> Floats:
        """Belief after so many turns without evidence; O(K^2) each."""
        for _ in range(turns):
            belief = _normalised(belief @ self._step)
        return belief

    def read(self, belief: Floats, log_hazard: float) -> TurnBelief:
        """Fold one candidate response into the belief; see the notes of the class."""
        joint = belief[:, None] * self._step * self._emission[:, self.bin(log_hazard)]
        delivered = joint.sum(axis=0)
        withheld = delivered + joint[:, -1]
        withheld[-1] = joint[-1, -1]
        return TurnBelief(_normalised(delivered), _normalised(withheld))

    def risk(self, belief: Floats, horizon: int) -> float:
        """P(the harm is complete now or within ``horizon`` more turns)."""
        return min(1.0, float(belief @ self._ahead(horizon)))

    def token_prior(self, belief: Floats) -> Floats | None:
        """Belief of the token chain before the next response, [k+1]; None without ``carry``."""
        return None if self.carry is None else _normalised(belief @ np.array(self.carry))

    @cached_property
    def _step(self) -> Floats:
        """``(1 - c[i]) A[i, j]``: what the conversation does when it goes on."""
        goes_on = 1 - np.array(self.chain.ending)
        # As in Chain.table: a conversation that went on has to be somewhere.
        return np.asarray(np.maximum(goes_on, 1e-6)[:, None] * np.array(self.chain.transition))

    @cached_property
    def _emission(self) -> Floats:
        rows = np.maximum(self.chain.emission, EMISSION_FLOOR)
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))

    def _ahead(self, horizon: int) -> Floats:
        known = self._horizons.get(horizon)
        if known is None:
            known = self._horizons[horizon] = self.chain.horizon(horizon)
        return known

    @cached_property
    def _horizons(self) -> dict[int, Floats]:
        return {}

    def to_json(self) -> str:
        """Canonical JSON."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "turns.json") -> TurnModel:
        """Parse and validate; a ChainError names each key at fault."""
        with named_faults(source, ChainError):
            return cls.model_validate_json(text)


def _normalised(values: Floats) -> Floats:
    return np.asarray(values / values.sum())
