"""The one training loop of the methods that descend a gradient: linear heads at all taps at once.

A head is ``w . (h - mean) / scale + b`` with the moments of the tokens it is trained on; they are
folded into the probe, and into the matrix product of the loop, so that no standardised copy of the
residuals is made. Heads of different taps share the pass over the data and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Evidence
from midstream.learn.methods.checks import probe_name, require_finite
from midstream.learn.methods.method import Task
from midstream.learn.methods.ragged import pad
from midstream.learn.tokens import Source, TrainingDataError
from midstream.probe import Probe
from midstream.taps import Tap

_BATCH = 256  # examples at once where nothing is trained
# Residuals are fp32: a spread below this share of the mean is rounding, not information.
_CONSTANT = 1e-6


def require(holds: bool, key: str, value: float | None, allowed: str) -> None:
    """Refuse a parameter, with a ValueError that names it and says what it must be."""
    if not holds:
        raise ValueError(f"{key}: {value} must be {allowed}")


@dataclass(frozen=True)
class Descent:
    """How far and how fast: AdamW, its rate falling linearly to zero.

    A linear head on standardised inputs needs a number of steps rather than of passes: small sets
    are passed over more often. The cost is that of ``steps * batch`` examples, and of one pass more
    for the moments, however large the set; and of one whole pass at least. As it stands here, with
    100 tokens per example and 4 taps of width 128: 5 to 9 s of one core, by method. Memory is that
    of a chunk of the source, three times.

    Attributes
    ----------
    steps : int
        Rounded up to whole passes over the examples.
    batch : int
        Examples per step, at most.
    rate : float
        Adam moves a weight by at most about this much per step, in units of logits per standard
        deviation of the input.
    decay : float
        Decoupled weight decay; biases are left alone.
    """

    steps: int = 1000
    batch: int = 32
    rate: float = 1e-2
    decay: float = 0.01

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        require(self.rate > 0, "rate", self.rate, "above zero")
        require(self.decay >= 0, "decay", self.decay, "zero or more")

    def passes(self, examples: int) -> int:
        """Passes over so many examples."""
        return max(1, -(-self.steps * self.batch // examples))


DESCENT = Descent()


@dataclass(frozen=True)
class Batch:
    """The response tokens of B examples, R in all, example by example.

    Attributes
    ----------
    examples : int64 [B]
        Indices into the `Tokens` of the source.
    rows : int64 [R]
        Rows of these tokens; those of one example are consecutive.
    lengths : int64 [B]
        Of the responses, each at least 1.
    """

    examples: NDArray[np.int64]
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def first(self) -> NDArray[np.int64]:
        """Where each example begins among the R tokens, [B]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def mask(self) -> Tensor:
        """Which places of the padded form hold a token, bool [B, L]."""
        lengths = torch.from_numpy(self.lengths)
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Lay ``values`` [..., R] out as [..., B, L], L the longest response, ``fill`` behind."""
        return pad(values, self.lengths, fill)

    def last(self, values: Tensor) -> Tensor:
        """Pick the last token's of each example: [..., R] to [..., B]."""
        return values[..., torch.from_numpy(self.first + self.lengths - 1)]


Loss = Callable[[Tensor, Batch, float], Tensor]
"""Of logits fp32 [K, T, R] (heads, taps, tokens), their batch and the share of training done, in
[0, 1): the loss of each tap, [T]."""


@dataclass(frozen=True)
class Heads:
    """K linear heads at each of T taps.

    Attributes
    ----------
    taps : tuple of Tap
    mean, scale : float64 [T, d]
        Of the tokens trained on. The scale is 1 where a feature is constant; its weight is 0 then.
    weight : float32 [T, K, d]
        On standardised residuals.
    bias : float32 [T, K]
    loss : float64 [T]
        Mean over the last pass.
    """

    taps: tuple[Tap, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    loss: Tensor

    def logits(self, hidden: Sequence[Tensor]) -> Tensor:
        """Of residuals fp32 [m, d] at each tap: fp32 [K, T, m]."""
        weight, bias = folded(self.weight, self.bias, self.mean.float(), 1 / self.scale.float())
        return products(hidden, weight, bias)

    def probe(self, method: str, task: Task, index: int, evidence: Evidence) -> Probe:
        """Serve the first head of one tap."""
        tap = self.taps[index]
        return Probe.folded(
            name=probe_name(task.hazard, method, tap),
            hazard=task.hazard,
            tap=tap,
            weight=self.weight[index, 0],
            bias=float(self.bias[index, 0]),
            mean=self.mean[index],
            scale=self.scale[index],
            evidence=evidence,
        )

    def per_example(
        self,
        source: Source,
        examples: NDArray[np.bool_],
        statistic: Callable[[Tensor, Batch], Tensor],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Apply ``statistic``, [K, T, R] to [..., B], in one more pass.

        Returns
        -------
        [..., E'] and int64 [E']
            The examples chosen that have a response token, and which they are.
        """
        found: list[NDArray[np.float32]] = []
        order: list[NDArray[np.int64]] = []
        for batch, hidden in batches(source, examples, _BATCH, None):
            found.append(statistic(self.logits(hidden), batch).numpy())
            order.append(batch.examples)
        return np.concatenate(found, axis=-1), np.concatenate(order)


def folded(weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [T, K, d] and bias [T, K] on raw residuals of heads on standardised ones."""
    raw = weight * inverse[:, None]
    return raw, bias - (mean[:, None] * raw).sum(dim=2)


def products(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Logits [K, T, m] of residuals [m, d] at each of T taps, without a stacked copy of these."""
    # In this order, for BLAS is up to ten times slower where the result is tall and thin.
    return (
        torch.stack([w @ h.T for w, h in zip(weight, hidden, strict=True)], 1) + bias.T[..., None]
    )


def batches(
    source: Source, examples: NDArray[np.bool_], size: int, seed: int | None
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Response tokens of the ``examples`` [E] chosen, with their residuals [R, d] per tap.

    Batches end where the chunks of the source end, and are of like size within one. Examples
    without a response token are left out.
    """
    tokens = source.tokens
    length = tokens.response_tokens
    chosen = examples & (length > 0)
    keep_row = np.repeat(chosen, np.diff(tokens.starts)) & tokens.in_response
    for chunk in source.chunks(seed):
        inside = chunk.examples[chosen[chunk.examples]]
        if not len(inside):
            continue
        kept = np.flatnonzero(keep_row[chunk.rows])
        begin = 0
        for part in np.array_split(inside, -(-len(inside) // size)):
            end = begin + int(length[part].sum())
            places = torch.from_numpy(kept[begin:end])
            hidden = [chunk.hidden[tap].index_select(0, places) for tap in source.taps]
            yield Batch(part, chunk.rows[kept[begin:end]], length[part]), hidden
            begin = end


def moments(
    method: str, source: Source, task: Task, examples: NDArray[np.bool_]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp64 [T, d], of the response tokens of the examples chosen.

    Merged chunk by chunk (Chan, Golub and LeVeque 1983).
    """
    count = 0
    mean = torch.zeros(len(source.taps), source.width, dtype=torch.float64)
    square = torch.zeros_like(mean)
    for batch, hidden in batches(source, examples, _BATCH, None):
        rows = len(batch.rows)
        center = [h.mean(dim=0) for h in hidden]
        spread = [(h - m).square_().mean(dim=0) for h, m in zip(hidden, center, strict=True)]
        for tap, h, v in zip(source.taps, hidden, spread, strict=True):
            if not bool(v.isfinite().all()):
                require_finite(method, source.tokens, tap, batch.rows, h)
                raise TrainingDataError(
                    f"{method}: hazard {task.hazard!r}: residuals at {tap} are too large for fp32 "
                    f"to square, up to {float(h.abs().max()):g}; choose another tap"
                )
        shift = torch.stack(center).double() - mean
        square += torch.stack(spread).double() * rows + shift.square() * (
            count * rows / (count + rows)
        )
        mean += shift * (rows / (count + rows))
        count += rows
    return mean, (square / count).sqrt()


def train(
    method: str,
    source: Source,
    task: Task,
    examples: NDArray[np.bool_],
    loss: Loss,
    descent: Descent,
    *,
    biases: Sequence[bool] = (True,),
) -> Heads:
    """Train heads at every tap of the source on the response tokens of some examples.

    Parameters
    ----------
    method : str
        For errors.
    examples : bool [E]
        Those to train on.
    loss : Loss
        Minimised at each tap by itself.
    biases : sequence of bool
        Of each head, whether it has a bias.

    Returns
    -------
    Heads
        Weights begin as N(0, 0.01^2), alike at all taps, so that a tap does not depend on which
        others there are. The same seed and number of threads give the same bits.

    Raises
    ------
    TrainingDataError
        When residuals or a loss are not finite, naming the method and the tap; or without a
        response token.
    """
    usable = examples & (source.tokens.response_tokens > 0)
    if not usable.any():
        raise TrainingDataError(
            f"{method}: hazard {task.hazard!r}: no response token in the {int(examples.sum())} "
            "examples with labels; give examples with responses"
        )
    mean, scale = moments(method, source, task, examples)
    varies = scale > _CONSTANT * mean.abs()
    scale = torch.where(varies, scale, 1.0)
    shift, inverse = mean.float(), (varies / scale).float()
    taps, heads = len(source.taps), len(biases)
    start = torch.Generator().manual_seed(task.seed)
    weight = 0.01 * torch.randn(heads, source.width, generator=start)
    weight = weight.repeat(taps, 1, 1).requires_grad_()
    bias = torch.zeros(taps, heads, requires_grad=True)
    has_bias = torch.tensor(biases, dtype=torch.float32)
    adam = torch.optim.AdamW(
        [
            {"params": [weight], "weight_decay": descent.decay},
            {"params": [bias], "weight_decay": 0.0},
        ],
        lr=descent.rate,
        fused=True,
    )
    passes = descent.passes(int(usable.sum()))
    seen, whole = 0, passes * int(usable.sum())
    for epoch in range(passes):
        total, steps = torch.zeros(taps, dtype=torch.float64), 0
        for batch, hidden in batches(source, examples, descent.batch, task.seed + epoch):
            done = seen / whole
            for group in adam.param_groups:
                group["lr"] = descent.rate * (1 - done)
            logits = products(hidden, *folded(weight, bias * has_bias, shift, inverse))
            value = loss(logits, batch, done)
            for tap, finite in zip(source.taps, value.isfinite().tolist(), strict=True):
                if not finite:
                    raise TrainingDataError(
                        f"{method}: hazard {task.hazard!r}: the loss at {tap} is not finite after "
                        f"{seen} examples; lower the rate, {descent.rate:g}"
                    )
            adam.zero_grad()
            value.sum().backward()
            adam.step()
            total += value.detach()
            steps += 1
            seen += len(batch.examples)
    return Heads(
        taps=source.taps,
        mean=mean,
        scale=scale,
        weight=weight.detach() * varies[:, None],
        bias=bias.detach() * has_bias,
        loss=total / steps,
    )
