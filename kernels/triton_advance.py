"""``advance`` in Triton: one program per stream walks its rows in order.

The grid has one program per row. A program whose row is the first of its stream's run goes through
the whole run with the stream's state in registers; every other one leaves at once. So nothing is
sorted or counted beforehand, and decode and prefill are the same launch.
"""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from midstream.kernels.backends import BoundAdvance
from midstream.kernels.checks import check_advance_call, check_tables
from midstream.kernels.launch import advance_launch
from midstream.kernels.tables import (
    GAP_BITS,
    LEAST_MASS,
    MAX_POSITION,
    NO_CAUSE,
    UNSCORED_CAUSE,
    ChainTable,
    EvidenceTable,
    OnUnscored,
    Phase,
    PolicyTable,
    Rule,
    SlotTable,
    Verdict,
)

# Kernels read globals only as tl.constexpr.
_LEAST_MASS = tl.constexpr(LEAST_MASS)
_MAX_POSITION = tl.constexpr(MAX_POSITION)
_EMA = tl.constexpr(int(Rule.EMA))
_MEAN = tl.constexpr(int(Rule.MEAN))
_CUSUM = tl.constexpr(int(Rule.CUSUM))
_COUNT = tl.constexpr(int(Rule.COUNT))
_RUN = tl.constexpr(int(Rule.RUN))
_MAX = tl.constexpr(int(Rule.MAX))
_PROMPT = tl.constexpr(int(Phase.PROMPT))
_RESPONSE = tl.constexpr(int(Phase.RESPONSE))
_HOLD_UNSCORED = tl.constexpr(int(OnUnscored.HOLD))
_HALT_UNSCORED = tl.constexpr(int(OnUnscored.HALT))
_CONTINUE = tl.constexpr(int(Verdict.CONTINUE))
_HOLD = tl.constexpr(int(Verdict.HOLD))
_HALT = tl.constexpr(int(Verdict.HALT))
_NO_CAUSE = tl.constexpr(NO_CAUSE)
_UNSCORED_CAUSE = tl.constexpr(UNSCORED_CAUSE)
_MOST_STEPS = tl.constexpr((1 << GAP_BITS) - 1)


@triton.jit
def _softplus(x):
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
def _normalise(mass, otherwise):
    total = tl.sum(mass, axis=0)
    return tl.where(total > 0.0, mass / tl.where(total > 0.0, total, 1.0), otherwise)


@triton.jit
def _predict(belief, steps, step_powers, STATES: tl.constexpr, BLOCK_STATES: tl.constexpr):
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
def _weigh(
    belief,
    log_hazard,
    emission,
    edges,
    STATES: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
):
    """Weigh the belief by the likelihood of the bin that ``log_hazard`` falls into."""
    i = tl.arange(0, BLOCK_EDGES)
    edge = tl.load(edges + i, mask=i < BINS - 1, other=0.0)
    bin = tl.sum(((edge <= log_hazard) & (i < BINS - 1)).to(tl.int32), axis=0)
    k = tl.arange(0, BLOCK_STATES)
    likelihood = tl.load(emission + k * BINS + bin, mask=k < STATES, other=0.0)
    return _normalise(belief * likelihood, belief)


@triton.jit
def _judge(before, risk, judged, missing, halt_at, hold_at, release_at, on_unscored):
    """Verdict after a row, and whether an unscored token is what halts the stream."""
    was_halted = before == _HALT
    by_unscored = missing & (on_unscored == _HALT_UNSCORED) & (before != _HALT)
    held = (before == _HOLD) | (missing & (on_unscored == _HOLD_UNSCORED))
    holds = (risk >= hold_at) | (held & (risk >= release_at))
    decided = tl.where(holds, _HOLD, _CONTINUE)
    decided = tl.where(risk >= halt_at, _HALT, decided)
    verdict = tl.where(judged, decided, tl.where(held, _HOLD, before))
    return tl.where(was_halted | by_unscored, _HALT, verdict), by_unscored


@triton.jit(do_not_specialize=["rows", "slots"])
def advance_kernel(
    logits,
    logits_stride,
    slot,
    position,
    rows,
    slots,
    s_position,
    s_start,
    s_policy,
    s_evidence,
    s_folds,
    s_ring,
    s_belief,
    s_risk,
    s_peak,
    s_verdict,
    s_cause,
    s_halted_at,
    s_scored,
    s_unscored,
    s_trace_position,
    s_trace_risk,
    s_trace_verdict,
    s_trace_logits,
    e_rule,
    e_parameter,
    e_window,
    e_center,
    e_phase,
    c_step_powers,
    c_emission,
    c_edges,
    c_prompt_emission,
    c_prompt_edges,
    p_ahead,
    p_halt_at,
    p_hold_at,
    p_release_at,
    p_on_unscored,
    PROBES: tl.constexpr,
    STATES: tl.constexpr,
    BINS: tl.constexpr,
    PROMPT_BINS: tl.constexpr,
    WINDOW: tl.constexpr,
    TRACE: tl.constexpr,
    POLICIES: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
    BLOCK_PROMPT_EDGES: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
):
    """Fold the run of rows that starts at this program's row. Prefixes name the table."""
    n = tl.program_id(0)
    stream = tl.load(slot + n)
    p = tl.arange(0, BLOCK_PROBES)
    real = p < PROBES
    known = (stream >= 0) & (stream < slots)
    tier = tl.load(s_policy + stream, mask=known, other=-1)
    if (tier < 0) | (tier >= POLICIES):  # padding, or a row that names no slot or no policy
        tl.store(logits + n.to(tl.int64) * logits_stride + p, float("nan"), mask=real)
        return
    if tl.load(slot + n - 1, mask=n > 0, other=-1) == stream:
        return

    s = stream.to(tl.int64)
    k = tl.arange(0, BLOCK_STATES)
    m = tl.arange(0, BLOCK_WINDOW)
    is_state = k < STATES
    rule = tl.load(e_rule + p, mask=real, other=0)
    parameter = tl.load(e_parameter + p, mask=real, other=0.0)
    window = tl.load(e_window + p, mask=real, other=1)
    center = tl.load(e_center + p, mask=real, other=0.0)
    phase = tl.load(e_phase + p, mask=real, other=-1)
    prompt_is_read = tl.max((phase == _PROMPT).to(tl.int32), axis=0) > 0
    ahead = tl.load(p_ahead + tier * STATES + k, mask=is_state, other=0.0)
    halt_at = tl.load(p_halt_at + tier)
    hold_at = tl.load(p_hold_at + tier)
    release_at = tl.load(p_release_at + tier)
    on_unscored = tl.load(p_on_unscored + tier)

    start = tl.load(s_start + s)
    expected = tl.load(s_position + s)
    evidence = tl.load(s_evidence + s * PROBES + p, mask=real, other=0.0)
    folds = tl.load(s_folds + s * PROBES + p, mask=real, other=0)
    belief = tl.load(s_belief + s * STATES + k, mask=is_state, other=0.0)
    risk = tl.load(s_risk + s)
    peak = tl.load(s_peak + s)
    verdict = tl.load(s_verdict + s).to(tl.int32)
    cause = tl.load(s_cause + s).to(tl.int32)
    halted_at = tl.load(s_halted_at + s)
    scored_count = tl.load(s_scored + s)
    unscored_count = tl.load(s_unscored + s)
    if WINDOW > 0:
        at_ring = s * PROBES * WINDOW + p[:, None] * WINDOW + m[None, :]
        in_ring = real[:, None] & (m < WINDOW)[None, :]
        ring = tl.load(s_ring + at_ring, mask=in_ring, other=0.0)

    current = stream
    while current == stream:
        t = tl.load(position + n)
        at_logits = logits + n.to(tl.int64) * logits_stride + p
        z = tl.load(at_logits, mask=real, other=0.0)
        # Small tiles are replicated over threads: all must have read before one writes.
        tl.debug_barrier()
        tl.store(at_logits, float("nan"), mask=real)
        if (t >= expected) & (t < _MAX_POSITION):
            in_prompt = t < start
            response_gap = tl.maximum(t - tl.maximum(expected, start), 0)
            reads = phase == tl.where(in_prompt, _PROMPT, _RESPONSE)
            read = tl.max(reads.to(tl.int32), axis=0) > 0
            lost = reads & ((tl.abs(z) < float("inf")) == 0)  # NaN or Inf
            scored = tl.max(lost.to(tl.int32), axis=0) == 0
            judged = scored & (t >= start - 1)
            missing = (response_gap > 0) | ((scored == 0) & (t >= start))

            first = folds == 0
            above = z >= parameter
            new = z
            smooth = parameter * z + (1.0 - parameter) * evidence
            new = tl.where((rule == _EMA) & (first == 0), smooth, new)
            new = tl.where(rule == _CUSUM, tl.maximum(evidence + z - parameter, 0.0), new)
            new = tl.where(rule == _COUNT, evidence + above.to(tl.float32), new)
            new = tl.where(rule == _RUN, tl.where(above, evidence + 1.0, 0.0), new)
            new = tl.where((rule == _MAX) & (first == 0), tl.maximum(evidence, z), new)
            folds_now = reads & scored
            if WINDOW > 0:
                averages = folds_now & (rule == _MEAN)
                here = averages[:, None] & (m[None, :] == (folds % window)[:, None])
                ring = tl.where(here, z[:, None], ring)
                seen = tl.minimum(folds + 1, window)
                in_window = m[None, :] < seen[:, None]
                mean = tl.sum(tl.where(in_window, ring, 0.0), axis=1) / seen.to(tl.float32)
                new = tl.where(rule == _MEAN, mean, new)
            evidence = tl.where(folds_now, new, evidence)
            folds += folds_now.to(tl.int32)

            hazard_logit = evidence - center
            log_hazard = tl.sum(tl.where(reads, _softplus(hazard_logit), 0.0), axis=0)
            if t >= start:
                belief = _predict(belief, response_gap + 1, c_step_powers, STATES, BLOCK_STATES)
                if scored:
                    belief = _weigh(
                        belief,
                        log_hazard,
                        c_emission,
                        c_edges,
                        STATES,
                        BINS,
                        BLOCK_STATES,
                        BLOCK_EDGES,
                    )
            elif judged:
                belief = _weigh(
                    belief,
                    log_hazard,
                    c_prompt_emission,
                    c_prompt_edges,
                    STATES,
                    PROMPT_BINS,
                    BLOCK_STATES,
                    BLOCK_PROMPT_EDGES,
                )

            now = tl.minimum(tl.maximum(tl.sum(belief * ahead, axis=0), 0.0), 1.0)
            before = verdict
            verdict, by_unscored = _judge(
                before, now, judged, missing, halt_at, hold_at, release_at, on_unscored
            )
            halts_now = (verdict == _HALT) & (before != _HALT)
            blamed = tl.argmax(tl.where(reads, hazard_logit, float("-inf")), axis=0)
            blamed = tl.where(read, blamed, _NO_CAUSE)
            blamed = tl.where(by_unscored, _UNSCORED_CAUSE, blamed)
            cause = tl.where(halts_now, blamed, cause)
            halted_at = tl.where(halts_now, t, halted_at)
            risk = tl.where(judged | missing, now, risk)
            peak = tl.where(judged, tl.maximum(peak, now), peak)
            gap = tl.where(prompt_is_read, t - expected, response_gap)
            unscored_count += gap + (scored == 0).to(tl.int32)
            scored_count += (scored & read).to(tl.int32)
            expected = t + 1

            if TRACE > 0:
                cell = s * TRACE + t % TRACE
                tl.store(s_trace_position + cell, t)
                tl.store(s_trace_risk + cell, tl.where(judged, now, float("nan")))
                tl.store(s_trace_verdict + cell, verdict.to(tl.uint8))
                tl.store(s_trace_logits + cell * PROBES + p, z, mask=real)
        n += 1
        current = tl.load(slot + n, mask=n < rows, other=-1)

    tl.debug_barrier()
    tl.store(s_position + s, expected)
    tl.store(s_evidence + s * PROBES + p, evidence, mask=real)
    tl.store(s_folds + s * PROBES + p, folds, mask=real)
    tl.store(s_belief + s * STATES + k, belief, mask=is_state)
    tl.store(s_risk + s, risk)
    tl.store(s_peak + s, peak)
    tl.store(s_verdict + s, verdict.to(tl.uint8))
    tl.store(s_cause + s, cause.to(tl.int16))
    tl.store(s_halted_at + s, halted_at)
    tl.store(s_scored + s, scored_count)
    tl.store(s_unscored + s, unscored_count)
    if WINDOW > 0:
        tl.store(s_ring + at_ring, ring, mask=in_ring)


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> BoundAdvance:
    """Check the tables once and return ``advance(logits, slot, position)`` for them."""
    sizes = check_tables(slots, evidence, chain, policy)
    launch = advance_launch(sizes)
    device = slots.device
    # The prior is only read when a slot is admitted.
    read_chain = [tensor for tensor in chain.tensors() if tensor is not chain.prior]
    tables = [*slots.tensors(), *evidence.tensors(), *read_chain, *policy.tensors()]

    def advance(logits: Tensor, slot: Tensor, position: Tensor) -> None:
        rows, stride = check_advance_call(logits, slot, position, sizes.probes, device)
        if rows == 0:
            return
        with torch.cuda.device_of(logits):
            advance_kernel[(rows,)](
                logits,
                stride,
                slot,
                position,
                rows,
                sizes.slots,
                *tables,
                PROBES=sizes.probes,
                STATES=sizes.states,
                BINS=sizes.bins,
                PROMPT_BINS=sizes.prompt_bins,
                WINDOW=sizes.window,
                TRACE=sizes.trace,
                POLICIES=sizes.policies,
                BLOCK_PROBES=launch.block_probes,
                BLOCK_STATES=launch.block_states,
                BLOCK_EDGES=launch.block_edges,
                BLOCK_PROMPT_EDGES=launch.block_prompt_edges,
                BLOCK_WINDOW=launch.block_window,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,  # Triton 3.10 turns its default; bits must not follow
            )

    return advance
