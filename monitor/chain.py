"""The absorbing Markov chain over risk states: closed forms, filter tables, fit by counts.

States ``0 ... K-1`` are transient (calm ... critical), ``V`` (index ``K``) is *violated*, ``C`` is
*closed*: ended safely. ``A`` moves a stream that goes on, ``c[s]`` is the chance that it ends at
this token (design section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from midstream.kernels.tables import GAP_BITS, ChainTable

Array = NDArray[np.float64]
Row = list[float]

EMISSION_FLOOR = 1e-4
"""Smallest P(bin | state): bins are fitted on finite data, so no token may rule a state out."""

_SURVIVAL_FLOOR = 1e-6  # smallest 1 - c: a stream that went on has to be somewhere
_NEGLIGIBLE = 1e-12  # chances that lead nowhere when absorption is checked
_STOCHASTIC_TOLERANCE = 1e-6


class ChainError(ValueError):
    """A chain that is no chain: wrong shapes, rows that are no distributions, unreadable."""


class SingularChainError(ChainError):
    """Some states are never absorbed: ``I - Q`` has no inverse, finite horizons still work."""


def fundamental_matrix(transient: Array) -> Array:
    """Expected visits ``N = (I - Q)^-1`` of an absorbing chain.

    ``N[i, j]`` is the expected number of tokens in ``j`` when started in ``i`` (Kemeny and Snell
    1960, theorem 3.2.1); ``transient`` is ``Q`` [K, K], the moves among the transient states.
    A SingularChainError names the states from which absorption cannot be reached.
    """
    reaches = 1.0 - transient.sum(axis=1) > _NEGLIGIBLE
    for _ in reaches:
        reaches = reaches | ((transient > _NEGLIGIBLE) & reaches).any(axis=1)
    if not reaches.all():
        stuck = np.flatnonzero(~reaches).tolist()
        raise SingularChainError(
            f"states {stuck} are never absorbed, so I - Q is singular and expected times are "
            "infinite; use a finite horizon, or fit with a prior count above 0"
        )
    return np.asarray(np.linalg.inv(np.eye(len(transient)) - transient), dtype=np.float64)


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
            values = np.array(rows)
            if (values < 0).any() or (abs(values.sum(axis=1) - 1) > _STOCHASTIC_TOLERANCE).any():
                raise ValueError(f"{name}: every row must be a distribution (>= 0, sum 1)")
        if len(self.ending) != size or not all(0 <= c <= 1 for c in self.ending):
            raise ValueError(f"ending: expected {size} probabilities")
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
        p[:k, : k + 1] = (1 - ending) * _normalised(self.transition)[:k]
        p[:k, k + 1 :] = ending
        return p

    def horizon(self, tokens: int) -> Array:
        """``a_h`` [K+1]: P(violated now or within ``tokens`` more | state); ``a_0`` is 1 for V."""
        if tokens < 0:
            raise ChainError(f"horizon: expected 0 or more tokens, got {tokens}")
        k = self.states
        return np.asarray(np.linalg.matrix_power(self.absorbing, tokens)[: k + 1, k])

    def first_passage(self, tokens: int) -> Array:
        """P(violated after exactly n tokens | state) for n = 1 ... ``tokens``, [K, tokens]."""
        k, p = self.states, self.absorbing
        chances = np.empty((k, tokens))
        now = p[:k, k]
        for n in range(tokens):
            chances[:, n] = now
            now = p[:k, :k] @ now
        return chances

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
            emission=tensor(_normalised(np.maximum(self.emission, EMISSION_FLOOR))),
            edges=tensor(self.edges),
            prior=tensor(self.prior),
            prompt_emission=tensor(_normalised(np.maximum(self.prompt_emission, EMISSION_FLOOR))),
            prompt_edges=tensor(self.prompt_edges),
        )

    def _step_powers(self) -> Array:
        """``step ** (2**g)`` for the filter, each scaled as a whole; [GAP_BITS, K+1, K+1].

        Each is kept as distributions ``moves`` and the log of each row's survival: over a long gap
        a state whose streams mostly end falls below fp64 beside one whose streams go on, and yet
        has to lead somewhere.
        """
        survival = np.log(np.maximum(1 - np.array(self.ending), _SURVIVAL_FLOOR))
        moves = _normalised(self.transition)
        powers = []
        for _ in range(GAP_BITS):
            powers.append(np.exp(survival - survival.max())[:, None] * moves)
            # step = diag(e^s) M, so step^2 = diag(e^s) (M diag(e^s)) M
            best = np.where(moves > 0, survival, -np.inf).max(axis=1)
            onward = moves * np.exp(np.minimum(survival - best[:, None], 0.0))
            total = onward.sum(axis=1)
            moves = _normalised(onward @ moves)
            survival = survival + best + np.log(total)
        return np.stack(powers)

    def to_json(self) -> str:
        """Canonical JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "chain.json") -> Chain:
        """Parse and validate; a ChainError names each key at fault."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ChainError(f"{source}: {faults_by_key(error)}") from error


def faults_by_key(error: ValidationError) -> str:
    """Say what is wrong with each key, in one line."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        unknown = fault["type"] == "extra_forbidden"
        message = "unknown key" if unknown else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)


def _normalised(rows: Array | list[Row]) -> Array:
    values = np.asarray(rows, dtype=np.float64)
    return np.asarray(values / values.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class ObservedStream:
    """One labelled stream for fitting; a ChainError where it cannot be one.

    Attributes
    ----------
    log_hazard : float [n]
        Cumulative log-hazard of the response evidence at each response token, n >= 1.
    violated : bool [n]
        Whether the stream has violated at or before this token.
    ended : bool
        False where generation was cut off: its last token says nothing about ending.
    prompt_log_hazard : float
        The same sum over the prompt probes at the last prompt token; 0 without prompt probes.
    """

    log_hazard: Array
    violated: NDArray[np.bool_]
    ended: bool
    prompt_log_hazard: float = 0.0

    def __post_init__(self) -> None:
        if len(self.log_hazard) != len(self.violated) or len(self.violated) == 0:
            raise ChainError("violated: expected one label per log_hazard, and at least one")
        if not np.isfinite(np.append(self.log_hazard, self.prompt_log_hazard)).all():
            raise ChainError("log_hazard: holds a NaN or an infinity; leave unscored tokens out")
        if (self.violated[:-1] & ~self.violated[1:]).any():
            raise ChainError("violated: a stream that has violated stays violated")


def fit_by_counts(
    streams: Sequence[ObservedStream],
    edges: Sequence[float],
    *,
    prompt_edges: Sequence[float] = (),
    prior_count: float = 1.0,
) -> Chain:
    """Fit a chain whose transient states are the evidence bins (SafetyDrift, arXiv 2603.27148).

    Counts with a Dirichlet prior of total weight ``prior_count`` per row; that of the transitions
    is centred on the transitions of all states together, every other one is uniform. A transient
    state emits its own bin; V emits the bins seen at violated tokens. The state of the first token
    stands for the state before it.

    Parameters
    ----------
    streams : sequence of ObservedStream
        At least one of them violated, or there is a ChainError.
    edges, prompt_edges : ascending
        Edges between the K bins of the cumulative log-hazard, and the same for the prompt's.
    prior_count : float
        Pseudo-counts per row; 0 is the maximum-likelihood fit, in which a state that was never
        left stays where it is.
    """
    if not any(stream.violated.any() for stream in streams):
        raise ChainError("fit_by_counts: no stream violates, so nothing can be learnt about it")
    if prior_count < 0:
        raise ChainError(f"prior_count: expected 0 or more, got {prior_count}")
    k = len(edges) + 1
    moves = np.zeros((k + 1, k + 1))
    ends = np.zeros(k + 1)
    violated_bins = np.zeros((1, k))
    first = np.zeros((k + 1, len(prompt_edges) + 1))
    for stream in streams:
        bins = np.searchsorted(edges, stream.log_hazard, side="right")
        state = np.where(stream.violated, k, bins)
        np.add.at(moves, (state[:-1], state[1:]), 1)
        ends[state[-1]] += stream.ended
        np.add.at(violated_bins[0], bins[stream.violated], 1)
        first[state[0], np.searchsorted(prompt_edges, stream.prompt_log_hazard, side="right")] += 1

    stay = np.eye(k + 1)
    # Centred on where streams go at all: a uniform prior would find it as likely that a calm stream
    # jumps into a bin only violated streams are in as that it violates.
    pooled = moves[:k].sum(axis=0) + 1 / (k + 1)
    transition = _dirichlet_mean(moves, prior_count, stay, pooled / pooled.sum())
    transition[k] = stay[k]
    ends_or_goes_on = np.stack([ends, moves.sum(axis=1)], axis=1)
    anywhere = np.full_like(first, 1 / first.shape[1])
    return Chain(
        transition=transition.tolist(),
        ending=_dirichlet_mean(ends_or_goes_on, prior_count, np.array([0.0, 1.0]))[:, 0].tolist(),
        emission=[*np.eye(k).tolist(), *_dirichlet_mean(violated_bins, prior_count).tolist()],
        edges=list(map(float, edges)),
        prior=_dirichlet_mean(first.sum(axis=1)[None], prior_count)[0].tolist(),
        prompt_emission=_dirichlet_mean(first, prior_count, anywhere).tolist(),
        prompt_edges=list(map(float, prompt_edges)),
    )


def _dirichlet_mean(
    counts: Array,
    prior_count: float,
    otherwise: Array | float = 0.0,
    center: Array | None = None,
) -> Array:
    """Posterior mean of each row, or that of ``otherwise`` where the row has no mass at all.

    ``center`` is the mean of the prior, uniform when not given.
    """
    mass = counts + prior_count * (1 / counts.shape[1] if center is None else center)
    total = mass.sum(axis=1, keepdims=True)
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), otherwise)
