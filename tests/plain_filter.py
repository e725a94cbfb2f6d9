"""The belief filter and the verdict, once more and independently: one stream, fp64, plain loops.

Also the reference kernel behind a small interface, so that both can be fed the same tokens.
"""

import math

import numpy as np
import torch

from midstream.chain import Chain
from midstream.kernels import reference
from midstream.kernels.tables import (
    EvidenceTable,
    PolicyTable,
    Rule,
    SlotTable,
    Verdict,
)
from midstream.kernels.tables import Phase as ProbePhase

NAN = math.nan


def random_chain(seed, states=3, bins=4, prompt_bins=3, ending=0.05):
    """A chain without zeros, with emissions well above the floor."""
    rng = np.random.default_rng(seed)

    def rows(count, width, spread=1.0):
        return rng.dirichlet(np.full(width, spread), size=count)

    transition = 0.7 * np.eye(states + 1) + 0.3 * rows(states + 1, states + 1)
    transition[states] = np.eye(states + 1)[states]
    return Chain(
        transition=transition.tolist(),
        ending=rng.uniform(0, 2 * ending, states + 1).tolist(),
        emission=(0.9 * rows(states + 1, bins) + 0.1 / bins).tolist(),
        edges=[float(o + 1) for o in range(bins - 1)],
        prior=rows(1, states + 1)[0].tolist(),
        prompt_emission=(0.9 * rows(states + 1, prompt_bins) + 0.1 / prompt_bins).tolist(),
        prompt_edges=[float(o + 1) for o in range(prompt_bins - 1)],
    )


def logit_in_bin(o):
    """A logit whose log-hazard lies in the middle of bin ``o`` of the edges 1, 2, 3 ..."""
    return math.log(math.expm1(o + 0.5))


class PlainStream:
    """One stream by the words of design sections 4.4 and 4.5."""

    def __init__(self, chain, thresholds, on_unscored):
        self.chain, self.thresholds, self.on_unscored = chain, thresholds, on_unscored
        self.belief = np.array(chain.prior, dtype=float)
        self.verdict = Verdict.CONTINUE

    @property
    def risk(self):
        ahead = np.zeros(len(self.belief))
        ahead[-1] = 1.0
        for _ in range(self.thresholds.horizon):
            later = [
                (1 - c) * sum(a * r for a, r in zip(row, ahead, strict=True))
                for c, row in zip(self.chain.ending, self.chain.transition, strict=True)
            ]
            ahead = np.array([*later[:-1], 1.0])
        return float(self.belief @ ahead)

    @property
    def near_a_threshold(self):
        """Whether rounding may decide the verdict."""
        t = self.thresholds
        levels = [level for level in (t.halt_at, t.hold_at, t.release_at) if level is not None]
        return any(abs(self.risk - level) < 1e-4 for level in levels)

    def prompt(self, logit):
        self._weigh(logit, self.chain.prompt_emission, self.chain.prompt_edges)

    def token(self, logit):
        """Feed a response token; NaN for one that was not scored."""
        self.move()
        if math.isnan(logit):
            unscored = {"pass": self.verdict, "hold": Verdict.HOLD, "halt": Verdict.HALT}
            self.verdict = max(self.verdict, unscored[self.on_unscored])
        else:
            self._weigh(logit, self.chain.emission, self.chain.edges)

    def move(self):
        goes_on = self.belief * (1 - np.array(self.chain.ending))
        moved = goes_on @ np.array(self.chain.transition)
        self.belief = moved / moved.sum()

    def _weigh(self, logit, emission, edges):
        hazard = 1 / (1 + math.exp(-logit))
        o = sum(edge <= -math.log(1 - hazard) for edge in edges)
        likelihood = [max(row[o], 1e-4) / sum(max(p, 1e-4) for p in row) for row in emission]
        weighed = self.belief * likelihood
        self.belief = weighed / weighed.sum()
        t = self.thresholds
        release_at = t.hold_at if t.release_at is None else t.release_at
        if self.verdict == Verdict.HALT or self.risk >= t.halt_at:
            self.verdict = Verdict.HALT
        elif t.hold_at is not None and (
            self.risk >= t.hold_at or (self.verdict == Verdict.HOLD and self.risk >= release_at)
        ):
            self.verdict = Verdict.HOLD
        else:
            self.verdict = Verdict.CONTINUE


class Kernel:
    """``reference.advance`` with a probe for prompts and one for responses, LAST, centred at 0."""

    def __init__(self, chain, *policy_tables, slots=1):
        self.chain = chain.table()
        pairs = zip(*(table.tensors() for table in policy_tables), strict=True)
        self.policy = PolicyTable(*(torch.cat(tensors) for tensors in pairs))
        self.slots = SlotTable.allocate(slots, 2, chain.states)
        self.evidence = EvidenceTable(
            rule=torch.full((2,), int(Rule.LAST), dtype=torch.int32),
            parameter=torch.zeros(2),
            window=torch.ones(2, dtype=torch.int32),
            center=torch.zeros(2),
            phase=torch.tensor([ProbePhase.PROMPT, ProbePhase.RESPONSE], dtype=torch.int32),
        )

    def admit(self, slot, *, start=0, row=0):
        self.slots.admit(slot, start=start, policy=row, prior=self.chain.prior)

    def feed(self, *rows):
        """Feed rows of (slot, position, logit)."""
        slot, position, logit = zip(*rows, strict=True)
        reference.advance(
            torch.tensor([logit, logit], dtype=torch.float32).T.contiguous(),
            torch.tensor(slot, dtype=torch.int32),
            torch.tensor(position, dtype=torch.int32),
            self.slots,
            self.evidence,
            self.chain,
            self.policy,
        )

    def verdict(self, slot=0):
        return Verdict(int(self.slots.verdict[slot]))

    def risk(self, slot=0):
        return float(self.slots.risk[slot])

    def belief(self, slot=0):
        return self.slots.belief[slot].double().numpy()
