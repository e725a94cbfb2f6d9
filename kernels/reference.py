"""The definition of correct, in fp32 PyTorch.

Every other backend is measured against these two functions. They are written to be read, not to be
fast, yet they also serve where no compiled backend can be had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from midstream.kernels.checks import (
    check_advance_call,
    check_probes,
    check_rows,
    check_score_call,
    check_tables,
)
from midstream.kernels.tables import (
    GAP_BITS,
    LEAST_MASS,
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

_SCORE_CHUNK = 1 << 22  # elements of the [rows, P, d] product held at once: 16 MiB in fp32


@torch.no_grad()
def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    rms_norm: bool = False,
    eps: float = 1e-6,
) -> None:
    """Write ``out[n, p] = weight[p] . phi(hidden[n]) + bias[p]``.

    ``phi`` is the identity, or with ``rms_norm`` the division by ``sqrt(mean(hidden[n] ** 2) +
    eps)``, applied once after the dot product (FlashNorm, arXiv 2407.09577: exact in real
    arithmetic, one pass over the row).

    Sums run pairwise over ``d`` by elementwise adds, so a row's result cannot depend on the other
    rows.

    Parameters
    ----------
    hidden : bf16, fp16 or fp32 [N, d]
        Rows may be strided; the last dimension is contiguous.
    weight : bf16, fp16 or fp32 [P, d]
    bias : fp32 [P]
    out : fp32 [N, P]
        May be a column slice of a wider buffer. A row with a NaN or Inf in ``hidden``, or whose sum
        of squares overflows under ``rms_norm``, is NaN or Inf in every column.
    """
    weight = weight.float()
    rows_at_once = max(1, _SCORE_CHUNK // max(1, weight.numel()))
    for begin in range(0, hidden.shape[0], rows_at_once):
        rows = hidden[begin : begin + rows_at_once].float()
        logits = _pairwise_sum(rows[:, None, :] * weight)
        if rms_norm:
            mean_square = _pairwise_sum(rows * rows) / hidden.shape[1]
            # An infinite sum of squares would scale every logit to 0, a finite lie.
            scale = torch.where(mean_square.isinf(), torch.nan, torch.rsqrt(mean_square + eps))
            logits = logits * scale[:, None]
        out[begin : begin + rows_at_once] = logits + bias


def _pairwise_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension by halving it; the order of adds is fixed by its length alone."""
    while (length := terms.shape[-1]) > 1:
        half = (length + 1) // 2
        paired = terms[..., : length - half] + terms[..., half:]
        terms = torch.cat([paired, terms[..., length - half : half]], dim=-1)
    return terms.squeeze(-1)


@torch.no_grad()
def advance(
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
) -> None:
    """Fold one row per token into its stream's evidence, belief, risk and verdict.

    Per row, with ``s = slot[n]`` and ``t = position[n]``:

    1. ``s < 0`` is padding and ``t < slots.position[s]`` a recomputed token: both change nothing.
    2. A gap ``t > slots.position[s]`` counts as unscored tokens. A row is *scored* when the logits
       of all probes that read its phase are finite.
    3. A scored row folds its logits into the evidence of the probes that read its phase.
    4. Belief. A response row moves it through the chain, once per token including those of a gap,
       and weighs it by the emission of the bin of ``sum(softplus(evidence - center))``; an unscored
       row only moves it. The last prompt token weighs the prior by the prompt emission.
    5. Risk = belief . a_h. Scored response rows and the last prompt token are judged against the
       policy row; unscored response tokens do what ``on_unscored`` says. HALT never changes again.

    The logits are consumed: they are NaN afterwards, so that a tap which writes nothing in the next
    step leaves its row unscored instead of scored with what stood there before.

    Parameters
    ----------
    logits : float32 [N, P]
        Changed to NaN.
    slot, position : int32 [N]
        Rows of one stream stand in ascending order of position.
    slots, evidence, chain, policy
        ``slots`` is updated in place.
    """
    for rows in _rounds(slot):
        s, t = slot[rows].long(), position[rows]
        fresh = t >= slots.position[s]
        _advance_round(logits[rows[fresh]], s[fresh], t[fresh], slots, evidence, chain, policy)
    logits.fill_(torch.nan)


def _rounds(slot: Tensor) -> list[Tensor]:
    """Split the rows, padding left out, so that no slot occurs twice in a round; in row order."""
    turn: dict[int, int] = {}
    rounds: list[list[int]] = []
    for row, stream in enumerate(slot.tolist()):
        if stream < 0:
            continue
        nth = turn.get(stream, 0)
        turn[stream] = nth + 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(row)
    return [torch.tensor(rows, device=slot.device) for rows in rounds]


def _advance_round(
    z: Tensor,
    s: Tensor,
    t: Tensor,
    slots: SlotTable,
    evidence: EvidenceTable,
    chain: ChainTable,
    policy: PolicyTable,
) -> None:
    expected, start, tier = slots.position[s], slots.start[s], slots.policy[s].long()
    in_prompt = t < start
    closes_prompt = t == start - 1
    gap = t - expected
    response_gap = (t - torch.maximum(expected, start)).clamp(min=0)

    phase = torch.where(in_prompt, int(Phase.PROMPT), int(Phase.RESPONSE))
    reads = evidence.phase == phase[:, None]
    scored = (z.isfinite() | ~reads).all(dim=1)
    missing = (response_gap > 0) | (~scored & ~in_prompt)

    smoothed = _fold(z, s, reads & scored[:, None], slots, evidence)
    hazard_logit = smoothed - evidence.center
    # Lambda = sum of -log(1 - sigmoid(x)) = sum of softplus(x), over the probes of this phase
    log_hazard = torch.where(reads, torch.nn.functional.softplus(hazard_logit), 0.0).sum(dim=1)

    belief = _predict(slots.belief[s], torch.where(in_prompt, 0, response_gap + 1), chain)
    likelihood = torch.where(
        in_prompt[:, None],
        chain.prompt_emission.T[torch.bucketize(log_hazard, chain.prompt_edges, right=True)],
        chain.emission.T[torch.bucketize(log_hazard, chain.edges, right=True)],
    )
    judged = scored & (~in_prompt | closes_prompt)
    belief = torch.where(judged[:, None], _normalise(belief * likelihood, belief), belief)
    risk = (belief * policy.ahead[tier]).sum(dim=1).clamp(0.0, 1.0)

    before = slots.verdict[s].int()
    verdict, by_unscored = _judge(before, risk, judged, missing, tier, policy)
    halts_now = (verdict == Verdict.HALT) & (before != Verdict.HALT)
    cause = torch.where(reads, hazard_logit, -torch.inf).argmax(dim=1)
    cause = torch.where(reads.any(dim=1), cause, NO_CAUSE)
    cause = torch.where(by_unscored, UNSCORED_CAUSE, cause)

    slots.belief[s] = belief
    slots.risk[s] = torch.where(judged | missing, risk, slots.risk[s])
    slots.peak[s] = torch.where(judged, torch.maximum(slots.peak[s], risk), slots.peak[s])
    slots.verdict[s] = verdict.to(torch.uint8)
    slots.cause[s] = torch.where(halts_now, cause.to(torch.int16), slots.cause[s])
    slots.halted_at[s] = torch.where(halts_now, t, slots.halted_at[s])
    # A prompt token that no probe reads is neither scored nor unscored.
    prompt_is_read = bool((evidence.phase == Phase.PROMPT).any())
    slots.scored[s] += (scored & reads.any(dim=1)).int()
    slots.unscored[s] += (gap if prompt_is_read else response_gap) + (~scored).int()
    slots.position[s] = t + 1

    if trace := slots.trace_position.shape[1]:
        cell = (t % trace).long()
        slots.trace_position[s, cell] = t
        slots.trace_risk[s, cell] = torch.where(judged, risk, torch.nan)
        slots.trace_verdict[s, cell] = verdict.to(torch.uint8)
        slots.trace_logits[s, cell] = z


def _fold(
    z: Tensor, s: Tensor, folds_now: Tensor, slots: SlotTable, evidence: EvidenceTable
) -> Tensor:
    """Fold the logits in where ``folds_now`` [n, P]; return the evidence [n, P]."""
    old, count = slots.evidence[s], slots.folds[s]
    first = count == 0
    rule, parameter = evidence.rule, evidence.parameter
    above = z >= parameter

    new = z.clone()  # LAST
    new = torch.where((rule == Rule.EMA) & ~first, parameter * z + (1.0 - parameter) * old, new)
    new = torch.where(rule == Rule.CUSUM, (old + z - parameter).clamp(min=0.0), new)
    new = torch.where(rule == Rule.COUNT, old + above.float(), new)
    new = torch.where(rule == Rule.RUN, torch.where(above, old + 1.0, 0.0), new)
    new = torch.where((rule == Rule.MAX) & ~first, torch.maximum(old, z), new)

    if slots.ring.shape[2]:
        ring = slots.ring[s]  # [n, P, M]
        cell = (count % evidence.window).long()[..., None]
        averages = folds_now & (rule == Rule.MEAN)
        ring.scatter_(2, cell, torch.where(averages[..., None], z[..., None], ring.gather(2, cell)))
        slots.ring[s] = ring
        seen = torch.minimum(count + 1, evidence.window)
        in_window = torch.arange(ring.shape[2], device=z.device) < seen[..., None]
        mean = torch.where(in_window, ring, 0.0).sum(dim=2) / seen
        new = torch.where(rule == Rule.MEAN, mean, new)

    slots.evidence[s] = torch.where(folds_now, new, old)
    slots.folds[s] = count + folds_now.int()
    return slots.evidence[s]


def _predict(belief: Tensor, steps: Tensor, chain: ChainTable) -> Tensor:
    """Move each belief [n, K+1] by its own steps [n], bit by bit, up to 2**GAP_BITS - 1."""
    steps, belief = steps.clamp(max=(1 << GAP_BITS) - 1), belief.clone()
    for bit in range(GAP_BITS):
        takes = (steps >> bit) & 1 == 1
        if takes.any():
            belief[takes] = _leap(belief[takes], bit, chain)
    return belief


def _leap(belief: Tensor, bit: int, chain: ChainTable) -> Tensor:
    """Move each belief [n, K+1] by 2**bit steps; in two halves where that underflows."""
    moved = (belief[:, :, None] * chain.step_powers[bit]).sum(dim=1)
    lost = moved.sum(dim=1) < LEAST_MASS
    if bit > 0 and lost.any():
        moved[lost] = _leap(_leap(belief[lost], bit - 1, chain), bit - 1, chain)
    return _normalise(moved, belief)


def _normalise(mass: Tensor, otherwise: Tensor) -> Tensor:
    """Divide by the row sum; a row without mass (underflow) keeps the belief it had."""
    total = mass.sum(dim=1, keepdim=True)
    return torch.where(total > 0, mass / total, otherwise)


def _judge(
    before: Tensor,
    risk: Tensor,
    judged: Tensor,
    missing: Tensor,
    tier: Tensor,
    policy: PolicyTable,
) -> tuple[Tensor, Tensor]:
    """Return the new verdict [n] and whether an unscored token is what halted the stream [n]."""
    on_unscored = policy.on_unscored[tier]
    was_halted = before == Verdict.HALT
    by_unscored = missing & (on_unscored == OnUnscored.HALT) & ~was_halted
    held = (before == Verdict.HOLD) | (missing & (on_unscored == OnUnscored.HOLD))
    verdict = torch.where(held, int(Verdict.HOLD), before)

    holds = (risk >= policy.hold_at[tier]) | (held & (risk >= policy.release_at[tier]))
    decided = torch.where(holds, int(Verdict.HOLD), int(Verdict.CONTINUE))
    decided = torch.where(risk >= policy.halt_at[tier], int(Verdict.HALT), decided)
    verdict = torch.where(judged, decided, verdict)
    return torch.where(was_halted | by_unscored, int(Verdict.HALT), verdict), by_unscored


def bind_score(
    weight: Tensor, bias: Tensor, *, rms_norm: bool, eps: float
) -> Callable[[Tensor, Tensor], None]:
    """Check the probes of a tap once and return ``score(hidden, out)`` for them."""
    check_probes(weight, bias)
    probes, width = weight.shape

    def bound(hidden: Tensor, out: Tensor) -> None:
        check_score_call(hidden, out, probes, width, weight.device)
        score(hidden, weight, bias, out, rms_norm=rms_norm, eps=eps)

    return bound


def bind_advance(
    slots: SlotTable, evidence: EvidenceTable, chain: ChainTable, policy: PolicyTable
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Check the tables once and return ``advance(logits, slot, position)`` for them."""
    sizes = check_tables(slots, evidence, chain, policy)

    def bound(logits: Tensor, slot: Tensor, position: Tensor) -> None:
        check_advance_call(logits, slot, position, sizes.probes, slots.device)
        check_rows(slot, position, slots, sizes)
        advance(logits, slot, position, slots, evidence, chain, policy)

    return bound
