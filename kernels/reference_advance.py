"""The definition of ``advance``, in fp32 PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

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
