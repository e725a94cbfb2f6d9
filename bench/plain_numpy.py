"""The same in NumPy, in fp32: it has no bf16, so it reads twice the bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from midstream.kernels.tables import ChainTable, EvidenceTable, PolicyTable, SlotTable


def score(weight: Tensor, bias: Tensor, out: np.ndarray) -> Callable[[np.ndarray], None]:
    """Return the read-out of hidden rows into ``out``."""
    columns, offset = _columns(weight), bias.numpy()

    def call(hidden: np.ndarray) -> None:
        np.matmul(hidden, columns, out=out)
        np.add(out, offset, out=out)

    return call


def add_rms_norm_score(
    weight: Tensor, bias: Tensor, out: np.ndarray, norm_eps: float
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """Return add, norm and read-out, in place."""
    read_out = score(weight, bias, out)

    def call(x: np.ndarray, residual: np.ndarray, gamma: np.ndarray) -> None:
        np.add(residual, x, out=residual)
        mean = np.einsum("nd,nd->n", residual, residual) / residual.shape[1]
        np.multiply(residual, (1 / np.sqrt(mean + norm_eps))[:, None], out=x)
        np.multiply(x, gamma, out=x)
        read_out(residual)

    return call


class Step:
    """A monitor's step, as :class:`plain.PlainStep` in its direct form."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        slots: SlotTable,
        evidence: EvidenceTable,
        chain: ChainTable,
        policy: PolicyTable,
    ) -> None:
        self.columns, self.bias = _columns(weight), bias.numpy().copy()
        self.alpha, self.center = evidence.parameter.numpy(), evidence.center.numpy()
        self.step, self.edges = chain.step_powers[0].numpy(), chain.edges.numpy()
        self.emission = np.ascontiguousarray(chain.emission.numpy().T)
        self.ahead = policy.ahead[0].numpy()
        self.thresholds = np.array([float(policy.hold_at[0]), float(policy.halt_at[0])])
        self.evidence, self.belief = slots.evidence.numpy().copy(), slots.belief.numpy().copy()
        self.risk = slots.risk.numpy().copy()
        self.verdict = slots.verdict.numpy().astype(np.int64)

    def score_advance(self, hidden: np.ndarray, slot: np.ndarray) -> None:
        """Read out and fold."""
        self.advance(hidden @ self.columns + self.bias, slot)

    def advance(self, z: np.ndarray, slot: np.ndarray) -> None:
        """Fold logits."""
        old = self.evidence[slot]
        new = old + self.alpha * (z - old)
        log_hazard = np.logaddexp(0, new - self.center).sum(axis=1)
        likelihood = self.emission[np.searchsorted(self.edges, log_hazard, side="right")]
        belief = (self.belief[slot] @ self.step) * likelihood
        belief /= belief.sum(axis=1, keepdims=True)
        risk = belief @ self.ahead
        decided = np.searchsorted(self.thresholds, risk, side="right")
        self.verdict[slot] = np.maximum(self.verdict[slot], decided)
        self.evidence[slot], self.belief[slot], self.risk[slot] = new, belief, risk


def _columns(weight: Tensor) -> np.ndarray:
    return np.ascontiguousarray(weight.float().numpy().T)
