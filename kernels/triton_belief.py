"""What ``advance`` does with one stream's numbers: evidence, belief and verdict, in registers."""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from midstream.kernels.tables import GAP_BITS, LEAST_MASS, OnUnscored, Rule, Verdict

# Kernels read globals only as tl.constexpr.
_LEAST_MASS = tl.constexpr(LEAST_MASS)
_MOST_STEPS = tl.constexpr((1 << GAP_BITS) - 1)
_EMA = tl.constexpr(int(Rule.EMA))
_MEAN = tl.constexpr(int(Rule.MEAN))
_CUSUM = tl.constexpr(int(Rule.CUSUM))
_COUNT = tl.constexpr(int(Rule.COUNT))
_RUN = tl.constexpr(int(Rule.RUN))
_MAX = tl.constexpr(int(Rule.MAX))
_HOLD_UNSCORED = tl.constexpr(int(OnUnscored.HOLD))
_HALT_UNSCORED = tl.constexpr(int(OnUnscored.HALT))
_CONTINUE = tl.constexpr(int(Verdict.CONTINUE))
_HOLD = tl.constexpr(int(Verdict.HOLD))
_HALT = tl.constexpr(int(Verdict.HALT))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without the cancellation of a log near 1.

    With y = exp(-|x|) in (0, 1] and r = y / (2 + y) <= 1/3, log1p(y) = 2 atanh(r); the series is
    cut after r^17, at 1e-10 of the result.
    """
    y = tl.exp(-tl.abs(x))
    r = y / (2.0 + y)
    q = r * r
    series = 1.0 / 15.0 + q * (1.0 / 17.0)
    series = 1.0 / 11.0 + q * (1.0 / 13.0 + q * series)
    series = 1.0 / 7.0 + q * (1.0 / 9.0 + q * series)
    series = 1.0 / 3.0 + q * (1.0 / 5.0 + q * series)
    return tl.maximum(x, 0.0) + 2.0 * r * (1.0 + q * series)


@triton.jit
def fold(z, evidence, folds, rule, parameter):
    """Evidence of every probe after logits ``z``, as its rule says; MEAN is done elsewhere."""
    first = folds == 0
    above = z >= parameter
    new = z
    smooth = parameter * z + (1.0 - parameter) * evidence
    new = tl.where((rule == _EMA) & (first == 0), smooth, new)
    new = tl.where(rule == _CUSUM, tl.maximum(evidence + z - parameter, 0.0), new)
    new = tl.where(rule == _COUNT, evidence + above.to(tl.float32), new)
    new = tl.where(rule == _RUN, tl.where(above, evidence + 1.0, 0.0), new)
    return tl.where((rule == _MAX) & (first == 0), tl.maximum(evidence, z), new)


@triton.jit
def fold_mean(z, new, ring, folds, folds_now, rule, window, m):
    """Put ``z`` into the rings of the probes that average; return the rings and all evidence."""
    averages = folds_now & (rule == _MEAN)
    here = averages[:, None] & (m[None, :] == (folds % window)[:, None])
    ring = tl.where(here, z[:, None], ring)
    seen = tl.minimum(folds + 1, window)
    in_window = m[None, :] < seen[:, None]
    mean = tl.sum(tl.where(in_window, ring, 0.0), axis=1) / seen.to(tl.float32)
    return ring, tl.where(rule == _MEAN, mean, new)


@triton.jit
def _normalise(mass, otherwise):
    total = tl.sum(mass, axis=0)
    return tl.where(total > 0.0, mass / tl.where(total > 0.0, total, 1.0), otherwise)


@triton.jit
def step_belief(belief, step):
    """Move the belief by one token."""
    return _normalise(tl.sum(belief[:, None] * step, axis=0), belief)


@triton.jit
def bridge_gap(belief, steps, step_powers, STATES: tl.constexpr, BLOCK_STATES: tl.constexpr):
    """Move the belief by ``steps`` tokens, bit by bit; a leap that underflows goes in halves."""
    k = tl.arange(0, BLOCK_STATES)
    at = k[:, None] * STATES + k[None, :]
    real = (k < STATES)[:, None] & (k < STATES)[None, :]
    left = tl.minimum(steps, _MOST_STEPS)
    bit = 0
    level = 0
    leaps = left % 2  # of 2**level steps, still to be made for this bit
    while left > 0:  # one loop: a nested one spilled for K = 63 on sm_80
        if leaps > 0:
            power = step_powers + level * STATES * STATES
            step = tl.load(power + at, mask=real, other=0.0)
            moved = tl.sum(belief[:, None] * step, axis=0)
            if (level > 0) & (tl.sum(moved, axis=0) < _LEAST_MASS):
                level -= 1
                leaps *= 2
            else:
                belief = _normalise(moved, belief)
                leaps -= 1
        else:
            bit += 1
            level = bit
            left = left // 2
            leaps = left % 2
    return belief


@triton.jit
def weigh(
    belief,
    log_hazard,
    emission,
    edge,
    STATES: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
):
    """Weigh the belief by the likelihood of the bin that ``log_hazard`` falls into."""
    i = tl.arange(0, BLOCK_EDGES)
    bin = tl.sum(((edge <= log_hazard) & (i < BINS - 1)).to(tl.int32), axis=0)
    k = tl.arange(0, BLOCK_STATES)
    likelihood = tl.load(emission + k * BINS + bin, mask=k < STATES, other=0.0)
    return _normalise(belief * likelihood, belief)


@triton.jit
def judge(before, risk, judged, missing, halt_at, hold_at, release_at, on_unscored):
    """Verdict after a row, and whether an unscored token is what halts the stream."""
    was_halted = before == _HALT
    by_unscored = missing & (on_unscored == _HALT_UNSCORED) & (before != _HALT)
    held = (before == _HOLD) | (missing & (on_unscored == _HOLD_UNSCORED))
    holds = (risk >= hold_at) | (held & (risk >= release_at))
    decided = tl.where(holds, _HOLD, _CONTINUE)
    decided = tl.where(risk >= halt_at, _HALT, decided)
    verdict = tl.where(judged, decided, tl.where(held, _HOLD, before))
    return tl.where(was_halted | by_unscored, _HALT, verdict), by_unscored
