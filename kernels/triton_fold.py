"""The kernel of ``advance`` and ``score_advance``: one program per stream walks its rows in order.

The grid has one program per row. A program whose row is the first of its stream's run goes through
the whole run with the stream's state in registers; every other one leaves at once. So nothing is
sorted or counted beforehand, and decode and prefill are the same launch. With ``SCORES`` the
program first computes the logits of its rows, by the same products as ``score``.

Why a run is not scanned in parallel: COUNT, RUN, MAX, LAST, the window of MEAN and the verdict's
automaton are associative to the bit, but EMA, CUSUM and the belief filter only in real arithmetic,
and a stream must have the same bits however it is cut into calls. So the row is made cheap. Its
chain of dependent steps is some 800 cycles for a response token (five sums over a handful of
numbers, an exp, four divisions), 0.5 us; for a prompt token, which moves no belief and is not
judged unless it is the last, some 200 cycles. The next row's logits are read while this one is
folded, and whatever a run does not change is read before it.
"""

# A kernel's arguments are pointers and blocks of Triton's own language, which has no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from midstream.kernels.tables import MAX_POSITION, NO_CAUSE, UNSCORED_CAUSE, Phase, Verdict
from midstream.kernels.triton_belief import (
    bridge_gap,
    fold,
    fold_mean,
    judge,
    softplus,
    step_belief,
    weigh,
)
from midstream.kernels.triton_dot import dot_rows, store_logits

# Kernels read globals only as tl.constexpr.
_MAX_POSITION = tl.constexpr(MAX_POSITION)
_PROMPT = tl.constexpr(int(Phase.PROMPT))
_RESPONSE = tl.constexpr(int(Phase.RESPONSE))
_HALT = tl.constexpr(int(Verdict.HALT))
_NO_CAUSE = tl.constexpr(NO_CAUSE)
_UNSCORED_CAUSE = tl.constexpr(UNSCORED_CAUSE)


@triton.jit(do_not_specialize=["rows", "slots"])
def advance_kernel(
    hidden,
    hidden_stride,
    weight,
    bias,
    eps,
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
    ALL_PROBES: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_EDGES: tl.constexpr,
    BLOCK_PROMPT_EDGES: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
    SCORES: tl.constexpr,
    WIDTH: tl.constexpr,
    RMS_NORM: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
):
    """Fold the run of rows that starts at this program's row. Prefixes name the table."""
    n = tl.program_id(0)
    stream = tl.load(slot + n)
    p = tl.arange(0, ALL_PROBES)
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
    at_edge = tl.arange(0, BLOCK_EDGES)
    edge = tl.load(c_edges + at_edge, mask=at_edge < BINS - 1, other=0.0)
    step = tl.load(
        c_step_powers + k[:, None] * STATES + k[None, :],
        mask=is_state[:, None] & is_state[None, :],
        other=0.0,
    )

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

    scored_until = n
    current = stream
    t = tl.load(position + n)
    at_logits = logits + n.to(tl.int64) * logits_stride + p
    z = tl.load(at_logits, mask=real, other=0.0)
    while current == stream:
        if SCORES:
            if n == scored_until:
                row = n.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
                mine = tl.load(slot + row, mask=row < rows, other=-1) == stream
                at_row = row * hidden_stride
                for first_probe in range(0, PROBES, BLOCK_PROBES):
                    dot, square = dot_rows(
                        hidden,
                        at_row,
                        mine,
                        weight,
                        first_probe,
                        PROBES,
                        WIDTH,
                        RMS_NORM,
                        SLICES,
                        BLOCK_WIDTH,
                        OPERAND,
                        PIECES,
                        PRECISION,
                        BLOCK_ROWS,
                        BLOCK_PROBES,
                    )
                    store_logits(
                        dot,
                        square,
                        bias,
                        logits,
                        row * logits_stride,
                        mine,
                        first_probe,
                        eps,
                        PROBES,
                        WIDTH,
                        RMS_NORM,
                        BLOCK_PROBES,
                    )
                scored_until += BLOCK_ROWS
                tl.debug_barrier()  # other threads stored what is read now
            z = tl.load(at_logits, mask=real, other=0.0)
        # Small tiles are replicated over threads: all must have read before one writes.
        tl.debug_barrier()
        tl.store(at_logits, float("nan"), mask=real)
        # The next row is read now, to be there when this one is folded.
        more = n + 1 < rows
        current = tl.load(slot + n + 1, mask=more, other=-1)
        next_t = tl.load(position + n + 1, mask=more, other=0)
        at_logits += logits_stride
        next_z = tl.load(at_logits, mask=p < tl.where(more, PROBES, 0), other=0.0)
        if (t >= expected) & (t < _MAX_POSITION):
            in_prompt = t < start
            response_gap = tl.maximum(t - tl.maximum(expected, start), 0)
            reads = phase == tl.where(in_prompt, _PROMPT, _RESPONSE)
            read = tl.max(reads.to(tl.int32), axis=0) > 0
            lost = reads & ((tl.abs(z) < float("inf")) == 0)  # NaN or Inf
            scored = tl.max(lost.to(tl.int32), axis=0) == 0

            folds_now = reads & scored
            new = fold(z, evidence, folds, rule, parameter)
            if WINDOW > 0:
                ring, new = fold_mean(z, new, ring, folds, folds_now, rule, window, m)
            evidence = tl.where(folds_now, new, evidence)
            folds += folds_now.to(tl.int32)

            judged_risk = float("nan")
            if t >= start - 1:  # a prompt token before its last moves and judges nothing
                judged = scored
                missing = (response_gap > 0) | ((scored == 0) & (t >= start))
                hazard_logit = evidence - center
                log_hazard = tl.sum(tl.where(reads, softplus(hazard_logit), 0.0), axis=0)
                if t >= start:
                    if response_gap == 0:
                        belief = step_belief(belief, step)
                    else:
                        belief = bridge_gap(
                            belief, response_gap + 1, c_step_powers, STATES, BLOCK_STATES
                        )
                    if scored:
                        belief = weigh(
                            belief,
                            log_hazard,
                            c_emission,
                            edge,
                            STATES,
                            BINS,
                            BLOCK_STATES,
                            BLOCK_EDGES,
                        )
                elif judged:
                    at_prompt_edge = tl.arange(0, BLOCK_PROMPT_EDGES)
                    prompt_edge = tl.load(
                        c_prompt_edges + at_prompt_edge,
                        mask=at_prompt_edge < PROMPT_BINS - 1,
                        other=0.0,
                    )
                    belief = weigh(
                        belief,
                        log_hazard,
                        c_prompt_emission,
                        prompt_edge,
                        STATES,
                        PROMPT_BINS,
                        BLOCK_STATES,
                        BLOCK_PROMPT_EDGES,
                    )

                now = tl.minimum(tl.maximum(tl.sum(belief * ahead, axis=0), 0.0), 1.0)
                before = verdict
                verdict, by_unscored = judge(
                    before, now, judged, missing, halt_at, hold_at, release_at, on_unscored
                )
                if (verdict == _HALT) & (before != _HALT):
                    blamed = tl.argmax(tl.where(reads, hazard_logit, float("-inf")), axis=0)
                    blamed = tl.where(read, blamed, _NO_CAUSE)
                    cause = tl.where(by_unscored, _UNSCORED_CAUSE, blamed)
                    halted_at = t
                risk = tl.where(judged | missing, now, risk)
                peak = tl.where(judged, tl.maximum(peak, now), peak)
                judged_risk = tl.where(judged, now, float("nan"))
            gap = tl.where(prompt_is_read, t - expected, response_gap)
            unscored_count += gap + (scored == 0).to(tl.int32)
            scored_count += (scored & read).to(tl.int32)
            expected = t + 1

            if TRACE > 0:
                cell = s * TRACE + t % TRACE
                tl.store(s_trace_position + cell, t)
                tl.store(s_trace_risk + cell, judged_risk)
                tl.store(s_trace_verdict + cell, verdict.to(tl.uint8))
                tl.store(s_trace_logits + cell * PROBES + p, z, mask=real)
        n += 1
        t = next_t
        z = next_z

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
