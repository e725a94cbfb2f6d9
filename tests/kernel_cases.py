"""Backends, inputs and an oracle that the tests of the kernels share."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from midstream.kernels import ops
from midstream.kernels.tables import (
    GAP_BITS,
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

try:
    from midstream.kernels import _cpu
except ImportError:
    _cpu = None

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


@dataclass(frozen=True)
class Target:
    """A backend that can run here: for cpu with an instruction set, for triton with its device."""

    backend: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    @property
    def looks_at_rows(self) -> bool:
        """Whether a bad slot is an error. On a GPU looking would need a wait: it is padding."""
        return self.backend in ("reference", "cpu")

    @contextmanager
    def active(self) -> Iterator[Target]:
        if self.isa is None:
            yield self
            return
        before = _cpu.isa()
        _cpu.set_isa_cap(self.isa)
        try:
            assert _cpu.isa() == self.isa
            yield self
        finally:
            _cpu.set_isa_cap(before)


def targets() -> list[Target]:
    """Everything that can run in this process. Triton without a GPU needs TRITON_INTERPRET=1."""
    can = ops.capabilities()
    found = [Target("reference")]
    if can["cpu"].available:
        widest = ISAS.index(_cpu.detected_isa())
        found += [Target("cpu", isa=isa) for isa in ISAS[: widest + 1]]
    if can["triton"].available:
        found.append(Target("triton", "cuda" if torch.cuda.is_available() else "cpu"))
    if can["cuda"].available:
        found.append(Target("cuda", "cuda"))
    return found


def fresh_seed() -> int:
    """A new seed for every run, shown by pytest when a test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return seed


class Tables(NamedTuple):
    slots: SlotTable
    evidence: EvidenceTable
    chain: ChainTable
    policy: PolicyTable

    def clone(self, device: str = "cpu") -> Tables:
        """Copy with tensors of its own."""
        return Tables(
            *(
                type(table)(*(tensor.clone().to(device) for tensor in table.tensors()))
                for table in self
            )
        )


class Stream(NamedTuple):
    """Rows of one slot in the order in which they are fed."""

    slot: int
    positions: list[int]
    logits: np.ndarray  # float32 [rows, P]


def powers(step: np.ndarray) -> torch.Tensor:
    """``step ** (2**g)``, each divided by its largest entry."""
    tables = []
    for _ in range(GAP_BITS):
        step = step / step.max()
        tables.append(step)
        step = step @ step
    return torch.tensor(np.stack(tables), dtype=torch.float32)


def make_tables(
    seed: int,
    *,
    slots: int = 6,
    rules: tuple[Rule, ...] = tuple(Rule),
    prompt_probes: int = 2,
    states: int = 4,
    bins: int = 5,
    prompt_bins: int = 3,
    window: int = 5,
    trace: int = 16,
    start: int = 4,
    on_unscored: tuple[OnUnscored, ...] = tuple(OnUnscored),
) -> Tables:
    """Random tables with a probe per rule on the response and some more on the prompt.

    ``states`` is K. There is a policy row per entry of ``on_unscored``; slots take turns.
    """
    rng = np.random.default_rng(seed)
    every = [*rules, *rng.choice([Rule.LAST, Rule.EMA, Rule.MAX], prompt_probes)]
    probes = len(every)

    def ints(values: object) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32)

    def floats(values: object) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float32)

    parameter = [0.3 if rule == Rule.EMA else 0.5 for rule in every]
    evidence = EvidenceTable(
        rule=ints(every),
        parameter=floats(parameter),
        window=ints([window if rule == Rule.MEAN else 1 for rule in every]),
        center=floats(rng.uniform(1.0, 4.0, probes)),
        phase=ints([Phase.RESPONSE] * len(rules) + [Phase.PROMPT] * prompt_probes),
    )
    # Upper triangular and sticky, as risk is; everyone may end, violated streams included.
    move = np.triu(rng.dirichlet(np.ones(states + 1), states + 1)) + 4 * np.eye(states + 1)
    move /= move.sum(axis=1, keepdims=True)
    ends = rng.uniform(0.01, 0.1, states + 1)
    order = np.arange(states + 1)[:, None]

    def emission(count: int) -> np.ndarray:
        mass = rng.dirichlet(np.ones(count), states + 1) * 0.3
        mass += np.exp(-np.abs(np.arange(count) / count - order / (states + 1)) * 4)
        return mass / mass.sum(axis=1, keepdims=True)

    chain = ChainTable(
        step_powers=powers((1 - ends)[:, None] * move),
        emission=floats(emission(bins)),
        edges=floats(np.sort(rng.uniform(0.5, 12.0, bins - 1))),
        prior=floats(rng.dirichlet(np.ones(states + 1))),
        prompt_emission=floats(emission(prompt_bins)),
        prompt_edges=floats(np.sort(rng.uniform(0.1, 2.0, prompt_bins - 1))),
    )
    tiers = len(on_unscored)
    ahead = np.sort(rng.uniform(0, 1, (tiers, states + 1)), axis=1)
    ahead[:, -1] = 1.0
    policy = PolicyTable(
        ahead=floats(ahead),
        halt_at=floats(rng.uniform(0.85, 0.95, tiers)),
        hold_at=floats(rng.uniform(0.6, 0.8, tiers)),
        release_at=floats(rng.uniform(0.3, 0.5, tiers)),
        on_unscored=ints(on_unscored),
    )
    table = SlotTable.allocate(slots, probes, states, window=window, trace=trace)
    for slot in range(slots):
        table.admit(slot, start=start, policy=slot % tiers, prior=chain.prior)
    return Tables(table, evidence, chain, policy)


def run(target: Target, tables: Tables, rows: list[tuple[int, int, np.ndarray]]) -> torch.Tensor:
    """Feed (slot, position, logits) rows in one call; return what is left of the logits."""
    probes = tables.slots.evidence.shape[1]
    stacked = np.stack([z for _, _, z in rows]) if rows else np.zeros((0, probes))
    logits = torch.tensor(stacked, dtype=torch.float32, device=target.device)
    slot = torch.tensor([s for s, _, _ in rows], dtype=torch.int32, device=target.device)
    position = torch.tensor([t for _, t, _ in rows], dtype=torch.int32, device=target.device)
    ops.advance(logits, slot, position, *tables, backend=target.backend)
    return logits


def rows_of(stream: Stream) -> list[tuple[int, int, np.ndarray]]:
    return [(stream.slot, t, z) for t, z in zip(stream.positions, stream.logits, strict=True)]


@dataclass
class Oracle:
    """One stream, token by token, in Python floats: written from the formulas, not from the code.

    ``margin`` is the smallest distance so far from any point where a decision would flip; inputs
    are chosen so that it stays wide, and then every backend must decide alike.
    """

    tables: Tables
    slot: int
    margin: float = math.inf
    seen: list[tuple[int, list[float]]] = field(default_factory=list)  # scored tokens
    trace: dict[int, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots, slot = self.tables.slots, self.slot
        self.start = int(slots.start[slot])
        self.tier = int(slots.policy[slot])
        self.belief = slots.belief[slot].double().numpy()
        self.next = 0
        self.risk = self.peak = 0.0
        self.verdict, self.cause, self.halted_at = Verdict.CONTINUE, NO_CAUSE, -1
        self.scored = self.unscored = 0

    def feed(self, t: int, z: np.ndarray) -> None:
        if t < self.next:
            return
        table = self.tables.evidence
        prompt = t < self.start
        phase = Phase.PROMPT if prompt else Phase.RESPONSE
        mine = [p for p in range(len(z)) if int(table.phase[p]) == phase]
        skipped = range(self.next, t)
        if Phase.PROMPT not in table.phase.tolist():
            skipped = [u for u in skipped if u >= self.start]
        self.unscored += len(skipped)
        lost = len([u for u in skipped if u >= self.start])
        scored = all(math.isfinite(z[p]) for p in mine)
        self.unscored += not scored
        self.scored += scored and bool(mine)
        if scored:
            self.seen.append((t, [float(x) for x in z]))

        logit = {p: self.smooth(p) - float(table.center[p]) for p in mine}
        if not prompt:
            self.predict(lost + 1)
        judged = scored and t >= self.start - 1
        if judged:
            self.weigh(sum(math.log1p(math.exp(x)) for x in logit.values()), prompt)
        self.judge(t, judged, lost > 0 or (not scored and not prompt), logit)
        self.next = t + 1

    def smooth(self, p: int) -> float:
        """Evidence of a probe from all its scored tokens at once."""
        table = self.tables.evidence
        prompt = int(table.phase[p]) == Phase.PROMPT
        zs = [z[p] for t, z in self.seen if (t < self.start) == prompt]
        a = float(table.parameter[p])
        if not zs:
            return 0.0
        match Rule(int(table.rule[p])):
            case Rule.LAST:
                return zs[-1]
            case Rule.EMA:
                n = len(zs)
                tail = sum(a * (1 - a) ** (n - 1 - i) * zs[i] for i in range(1, n))
                return (1 - a) ** (n - 1) * zs[0] + tail
            case Rule.MEAN:
                window = zs[-int(table.window[p]) :]
                return sum(window) / len(window)
            case Rule.CUSUM:  # the largest sum of a suffix, the empty one included
                sums = np.cumsum([z - a for z in reversed(zs)])
                return max(0.0, float(sums.max()))
            case Rule.COUNT:
                return float(sum(z >= a for z in zs))
            case Rule.RUN:
                below = [i for i, z in enumerate(zs) if z < a]
                return float(len(zs) - 1 - below[-1] if below else len(zs))
            case Rule.MAX:
                return max(zs)

    def predict(self, steps: int) -> None:
        step = self.tables.chain.step_powers[0].double().numpy()
        while steps:
            if steps % 2:
                self.belief = self.belief @ step
                self.belief = self.belief / self.belief.sum()
            step = step @ step
            step = step / step.max()
            steps //= 2

    def weigh(self, log_hazard: float, prompt: bool) -> None:
        chain = self.tables.chain
        edges = (chain.prompt_edges if prompt else chain.edges).tolist()
        emission = (chain.prompt_emission if prompt else chain.emission).double().numpy()
        self.margin = min([self.margin, *(abs(log_hazard - edge) for edge in edges)])
        self.belief = self.belief * emission[:, sum(edge <= log_hazard for edge in edges)]
        self.belief = self.belief / self.belief.sum()

    def judge(self, t: int, judged: bool, missing: bool, logit: dict[int, float]) -> None:
        policy, tier = self.tables.policy, self.tier
        risk = float(self.belief @ policy.ahead[tier].double().numpy())
        halt, hold, release = (
            float(field[tier]) for field in (policy.halt_at, policy.hold_at, policy.release_at)
        )
        if judged:
            self.margin = min([self.margin, *(abs(risk - at) for at in (halt, hold, release))])
            self.peak = max(self.peak, risk)
        if judged or missing:
            self.risk = risk
        self.trace[t] = (risk if judged else math.nan, self.verdict)
        if self.verdict == Verdict.HALT:
            return
        todo = OnUnscored(int(policy.on_unscored[tier])) if missing else OnUnscored.PASS
        if todo == OnUnscored.HALT:
            self.verdict, self.cause, self.halted_at = Verdict.HALT, UNSCORED_CAUSE, t
        else:
            held = self.verdict == Verdict.HOLD or todo == OnUnscored.HOLD
            if judged and risk >= halt:
                self.verdict, self.halted_at = Verdict.HALT, t
                ranked = sorted(logit.values())
                if len(ranked) > 1:
                    self.margin = min(self.margin, ranked[-1] - ranked[-2])
                self.cause = max(logit, key=logit.__getitem__, default=NO_CAUSE)
            elif judged:
                on = risk >= hold or (held and risk >= release)
                self.verdict = Verdict.HOLD if on else Verdict.CONTINUE
            else:
                self.verdict = Verdict.HOLD if held else Verdict.CONTINUE
        self.trace[t] = (self.trace[t][0], self.verdict)


def random_stream(
    rng: np.random.Generator, tables: Tables, slot: int, tokens: int, *, gaps: bool = True
) -> tuple[Stream, Oracle]:
    """Draw a stream with gaps, repeated and unscored rows, whose decisions are all clear-cut."""
    oracle = Oracle(tables, slot)
    positions: list[int] = []
    rows: list[np.ndarray] = []
    probes = tables.evidence.rule.shape[0]
    while len(rows) < tokens:
        t = oracle.next
        if gaps and rng.random() < 0.1:
            t += int(rng.choice([1, 2, 7, 1000]))
        if positions and rng.random() < 0.1:
            t = int(rng.choice(positions))
        z = rng.normal(0.0, 1.5, probes).astype(np.float32)
        if rng.random() < 0.1:
            z[rng.integers(probes)] = rng.choice([np.nan, np.inf, -np.inf])
        trial = copy.copy(oracle)
        trial.seen, trial.trace = list(oracle.seen), dict(oracle.trace)
        trial.feed(t, z)
        if trial.margin >= 1e-3:
            oracle = trial
            positions.append(t)
            rows.append(z)
    return Stream(slot, positions, np.stack(rows)), oracle


def check_against(oracle: Oracle, slots: SlotTable) -> None:
    """Compare a slot with the oracle: counts and decisions exactly, numbers within fp32 rounding.

    The filter renormalises at each token, so rounding does not grow with the stream: 1e-5 is some
    100 ulp of a probability. Evidence is a sum of at most a few hundred logits near 1.
    """
    s = oracle.slot
    exact = {
        "position": oracle.next,
        "verdict": oracle.verdict,
        "cause": oracle.cause,
        "halted_at": oracle.halted_at,
        "scored": oracle.scored,
        "unscored": oracle.unscored,
    }
    assert {name: int(getattr(slots, name)[s]) for name in exact} == exact
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(slots.belief[s].cpu().numpy(), oracle.belief, **close)
    np.testing.assert_allclose(float(slots.risk[s]), oracle.risk, **close)
    np.testing.assert_allclose(float(slots.peak[s]), oracle.peak, **close)
    smooth = [oracle.smooth(p) for p in range(slots.evidence.shape[1])]
    np.testing.assert_allclose(slots.evidence[s].cpu().numpy(), smooth, rtol=1e-4, atol=1e-4)
    for cell, t in enumerate(slots.trace_position[s].tolist()):
        if t >= 0:
            risk, verdict = oracle.trace[t]
            np.testing.assert_allclose(float(slots.trace_risk[s, cell]), risk, **close)
            assert int(slots.trace_verdict[s, cell]) == verdict
