"""The absorbing Markov chain over risk states: closed forms and the tables of the filter.

States ``0 ... K-1`` are transient (calm ... critical), ``V`` (index ``K``) is *violated*, ``C`` is
*closed*: ended safely. ``A`` moves a stream that goes on, ``c[s]`` is the chance that it ends at
this token (design section 4.4). The clock is tokens of a response, turns of a conversation or steps
of an agent alike; "token" stands for any of them. Chains are fitted in `midstream.learn.chains`.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.absorbing import ChainError as ChainError
from midstream.absorbing import SingularChainError as SingularChainError
from midstream.absorbing import check_distributions, fundamental_matrix, normalised, orbit, power
from midstream.kernels.tables import GAP_BITS, MAX_POSITION, ChainTable
from midstream.validation import named_faults

Array = NDArray[np.float64]
Row = list[float]

MAX_HORIZON = MAX_POSITION
"""Farthest look ahead: no stream is longer. Rounding stays below ``horizon * 1e-16``, relative."""

MAX_CURVE = 10**6
"""Longest curve, all of which is kept: 8 (K+2) bytes per token of it."""

WATCH, NO_RETURN = 0.30, 0.85
"""Where SafetyDrift's zones begin (arXiv 2603.27148)."""

EMISSION_FLOOR = 1e-4
"""Smallest P(bin | state): bins are fitted on finite data, so no token may rule a state out."""

_SURVIVAL_FLOOR = 1e-6  # smallest 1 - c: a stream that went on has to be somewhere


class Zone(StrEnum):
    """What the risk of a state says about it."""

    SAFE = "safe"
    WATCH = "watch"
    NO_RETURN = "point of no return"


class Chain(BaseModel):
    """An absorbing chain with its evidence model, as stored in ``chain.json``.

    Attributes
    ----------
    transition : [K+1, K+1]
        ``A`` over ``{0 ... K-1, V}``; the last row is ``V``'s, and absorbing.
    ending : [K+1]
        ``c``: chance that a stream in this state ends at this token.
    emission : [K+1, O]
        P(evidence bin | state).
    edges : [O-1]
        Ascending edges of the bins of the cumulative log-hazard, natural log units.
    prior : [K+1]
        Belief before the first response token.
    prompt_emission : [K+1, O']
        P(prompt evidence bin | state before the first response token).
    prompt_edges : [O'-1]
        Edges of the prompt bins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    transition: list[Row] = Field(min_length=2)
    ending: Row
    emission: list[Row]
    edges: Row
    prior: Row
    prompt_emission: list[Row]
    prompt_edges: Row

    @model_validator(mode="after")
    def _is_a_chain(self) -> Chain:
        size = len(self.transition)
        shapes = {
            "transition": (self.transition, (size, size)),
            "emission": (self.emission, (size, len(self.edges) + 1)),
            "prompt_emission": (self.prompt_emission, (size, len(self.prompt_edges) + 1)),
            "prior": ([self.prior], (1, size)),
        }
        for name, (rows, (height, width)) in shapes.items():
            if len(rows) != height or any(len(row) != width for row in rows):
                raise ValueError(f"{name}: expected {height} x {width} for {size - 1} states")
            check_distributions(name, np.array(rows))
        if len(self.ending) != size:
            raise ValueError(f"ending: expected {size} probabilities, got {len(self.ending)}")
        for state, chance in enumerate(self.ending):
            if not 0 <= chance <= 1:
                raise ValueError(f"ending: that of state {state} is {chance:.6g}, no probability")
        if self.transition[-1] != [0.0] * (size - 1) + [1.0]:
            raise ValueError("transition: the last state, violated, must be absorbing")
        for name in ("edges", "prompt_edges"):
            if (np.diff(getattr(self, name)) <= 0).any():
                raise ValueError(f"{name}: must ascend")
        return self

    @property
    def states(self) -> int:
        """K, the number of transient states."""
        return len(self.transition) - 1

    @property
    def absorbing(self) -> Array:
        """``P`` [K+2, K+2] over ``0 ... K-1, V, C``; looking ahead, both V and C absorb."""
        k = self.states
        ending = np.array(self.ending)[:k, None]
        p = np.eye(k + 2)
        p[:k, : k + 1] = (1 - ending) * normalised(self.transition)[:k]
        p[:k, k + 1 :] = ending
        return p

    def horizon(self, tokens: int) -> Array:
        """``a_h`` [K+1]: P(violated now or within ``tokens`` more | state); ``a_0`` is 1 for V.

        By squaring: ``log2(tokens)`` products of [K+2, K+2].
        """
        _check_horizon(tokens, MAX_HORIZON)
        return np.asarray(power(self.absorbing, tokens)[: self.states + 1, self.states])

    def horizon_curve(self, tokens: int) -> Array:
        """``a_h`` for h = 0 ... ``tokens``, [tokens + 1, K+1]; O(tokens K^2), see `MAX_CURVE`."""
        _check_horizon(tokens, MAX_CURVE)
        violated = np.eye(self.states + 2)[self.states]
        return np.asarray(orbit(self.absorbing, violated, tokens + 1)[:, : self.states + 1])

    def forecast(self, belief: Array, tokens: int) -> Array:
        """P(violated now or within ``tokens`` more) for beliefs [..., K+1], [...]."""
        beliefs = np.asarray(belief, dtype=np.float64)
        if beliefs.shape[-1:] != (self.states + 1,):
            raise ChainError(
                f"belief: expected [..., {self.states + 1}] for {self.states} states and violated, "
                f"got {list(beliefs.shape)}"
            )
        check_distributions("belief", beliefs.reshape(-1, self.states + 1))
        return np.asarray(beliefs @ self.horizon(tokens))

    def first_passage(self, tokens: int) -> Array:
        """P(violated after exactly n tokens | state) for n = 1 ... ``tokens``, [K, tokens]."""
        _check_horizon(tokens, MAX_CURVE)
        k, p = self.states, self.absorbing
        at_once = np.append(p[:k, k], [0.0, 0.0])
        return np.asarray(orbit(p, at_once, tokens)[:, :k].T)

    def first_passage_tail(self, tokens: int) -> Array:
        """P(violated, and after more than ``tokens`` tokens | state), [K]: ``Q^n B[:, V]``.

        With ``a_n`` it adds up to the chance to end violated, without the cancellation that the
        difference would suffer.
        """
        _check_horizon(tokens, MAX_HORIZON)
        still = power(self.absorbing, tokens)[: self.states, : self.states]
        return np.asarray(still @ self.absorption()[:, 0])

    def risk(self, tokens: int | None = None) -> Array:
        """Risk of each transient state [K]: within ``tokens``, or ever when not given."""
        if tokens is None:
            return self.absorption()[:, 0]
        return self.horizon(tokens)[: self.states]

    def points_of_no_return(self, level: float = NO_RETURN, tokens: int | None = None) -> list[int]:
        """Transient states whose :meth:`risk` is ``level`` or more."""
        if not 0 < level <= 1:
            raise ChainError(f"level: expected more than 0 and at most 1, got {level}")
        return np.flatnonzero(self.risk(tokens) >= level).tolist()

    def zones(self, tokens: int | None = None) -> list[Zone]:
        """Zone of each transient state by its :meth:`risk` (SafetyDrift): below 0.30, 0.85."""
        zones = list(Zone)
        return [
            zones[place]
            for place in np.searchsorted([WATCH, NO_RETURN], self.risk(tokens), "right")
        ]

    def visits(self) -> Array:
        """``N`` [K, K]; see :func:`fundamental_matrix`."""
        return fundamental_matrix(self.absorbing[: self.states, : self.states])

    def absorption(self) -> Array:
        """``B = N R`` [K, 2]: chance to end violated (column 0) or closed (column 1)."""
        return self.visits() @ self.absorbing[: self.states, self.states :]

    def expected_tokens(self) -> Array:
        """``t = N 1`` [K]: expected tokens until the stream is violated or closed."""
        return np.asarray(self.visits().sum(axis=1))

    def table(self, device: torch.device | str = "cpu") -> ChainTable:
        """Tensors for the belief filter, floors applied."""

        def tensor(values: Array | Row) -> torch.Tensor:
            return torch.tensor(np.asarray(values), dtype=torch.float32, device=device)

        return ChainTable(
            step_powers=tensor(self._step_powers()),
            emission=tensor(normalised(np.maximum(self.emission, EMISSION_FLOOR))),
            edges=tensor(self.edges),
            prior=tensor(self.prior),
            prompt_emission=tensor(normalised(np.maximum(self.prompt_emission, EMISSION_FLOOR))),
            prompt_edges=tensor(self.prompt_edges),
        )

    def _step_powers(self) -> Array:
        """``step ** (2**g)`` for the filter, each scaled as a whole; [GAP_BITS, K+1, K+1].

        Each is kept as distributions ``moves`` and the log of each row's survival: over a long gap
        a state whose streams mostly end falls below fp64 beside one whose streams go on, and yet
        has to lead somewhere.
        """
        survival = np.log(np.maximum(1 - np.array(self.ending), _SURVIVAL_FLOOR))
        moves = normalised(self.transition)
        powers = []
        for _ in range(GAP_BITS):
            powers.append(np.exp(survival - survival.max())[:, None] * moves)
            # step = diag(e^s) M, so step^2 = diag(e^s) (M diag(e^s)) M
            best = np.where(moves > 0, survival, -np.inf).max(axis=1)
            onward = moves * np.exp(np.minimum(survival - best[:, None], 0.0))
            total = onward.sum(axis=1)
            moves = normalised(onward @ moves)
            survival = survival + best + np.log(total)
        return np.stack(powers)

    def to_json(self) -> str:
        """Canonical JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "chain.json") -> Chain:
        """Parse and validate; a ChainError names each key at fault."""
        with named_faults(source, ChainError):
            return cls.model_validate_json(text)


def _check_horizon(tokens: int, most: int) -> None:
    if tokens < 0:
        raise ChainError(f"horizon: expected 0 or more tokens, got {tokens}")
    if tokens > most:
        raise ChainError(f"horizon: expected at most {most} tokens, got {tokens}")
