"""The C++ ``advance`` against the reference over random lives of slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kernel_cases import Tables, make_tables

from midstream.kernels import ops

SLOTS = 4
PROBES = 9
SAFE = 1e-3  # distance from a bin edge or a threshold at which backends cannot disagree


class Slots(RuleBasedStateMachine):
    """Admit, feed, skip, repeat, pad and re-threshold, on both backends."""

    @initialize(seed=st.integers(0, 2**31))
    def begin(self, seed: int) -> None:
        self.reference = make_tables(seed, slots=SLOTS)
        self.cpu = self.reference.clone()
        backend = ops.Backend("cpu", "cpu")
        self.advance = backend.bind_advance(*self.cpu)

    @rule(slot=st.integers(0, SLOTS - 1), start=st.integers(0, 6), policy=st.integers(0, 2))
    def admit(self, slot: int, start: int, policy: int) -> None:
        for tables in (self.reference, self.cpu):
            tables.slots.admit(slot, start=start, policy=policy, prior=tables.chain.prior)

    @rule(row=st.integers(0, 2), halt=st.floats(0.5, 1.0), hold=st.floats(0.2, 0.9))
    def change_thresholds(self, row: int, halt: float, hold: float) -> None:
        for tables in (self.reference, self.cpu):
            tables.policy.halt_at[row] = halt
            tables.policy.hold_at[row] = hold
            tables.policy.release_at[row] = hold / 2

    @rule(
        runs=st.lists(
            st.tuples(
                st.integers(-1, SLOTS - 1),
                st.integers(-3, 4),  # where the run starts, from the expected position
                st.integers(1, 4),
                st.booleans(),  # whether its first row is unscored
            ),
            min_size=1,
            max_size=4,
            unique_by=lambda run: run[0],
        ),
        seed=st.integers(0, 2**31),
    )
    def feed(self, runs: list[tuple[int, int, int, bool]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        slot: list[int] = []
        position: list[int] = []
        rows = []
        for stream, offset, length, unscored in runs:
            expected = int(self.reference.slots.position[stream]) if stream >= 0 else 0
            logits = rng.normal(0.0, 1.5, (length, PROBES))
            if unscored:
                logits[0] = rng.choice([np.nan, np.inf])
            slot += [stream] * length
            position += [max(0, expected + offset) + i for i in range(length)]
            rows.append(logits)
        batch = (
            torch.tensor(np.concatenate(rows), dtype=torch.float32),
            torch.tensor(slot, dtype=torch.int32),
            torch.tensor(position, dtype=torch.int32),
        )
        clear = True
        for n in range(len(slot)):
            one = [tensor[n : n + 1].clone() for tensor in batch]
            ops.advance(*one, *self.reference, backend="reference")
            clear &= slot[n] < 0 or self.is_clear(self.reference, slot[n])
        self.advance(*batch)
        assert bool(batch[0].isnan().all())
        if not clear:  # a coin on its edge: both sides are right
            for a, b in zip(self.cpu.slots.tensors(), self.reference.slots.tensors(), strict=True):
                a.copy_(b)

    @staticmethod
    def is_clear(tables: Tables, s: int) -> bool:
        """Whether the last row of a slot was decided away from every edge and threshold."""
        slots, evidence, chain, policy = tables
        hazard = torch.nn.functional.softplus(slots.evidence[s] - evidence.center)
        tier = int(slots.policy[s])
        thresholds = torch.stack(
            [field[tier] for field in (policy.halt_at, policy.hold_at, policy.release_at)]
        )
        distances = [(slots.risk[s] - thresholds).abs()]
        for phase, edges in ((0, chain.prompt_edges), (1, chain.edges)):
            distances.append((hazard[evidence.phase == phase].sum() - edges).abs())
            logits = (slots.evidence[s] - evidence.center)[evidence.phase == phase]
            top = logits.topk(2).values
            distances.append((top[0] - top[1]).abs()[None])
        return bool(torch.cat(distances).min() > SAFE)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "cpu"):
            return
        for name, a, b in zip(
            self.cpu.slots.__dataclass_fields__,
            self.cpu.slots.tensors(),
            self.reference.slots.tensors(),
            strict=True,
        ):
            if a.dtype == torch.float32:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
            else:
                assert a.tolist() == b.tolist(), name


TestSlots = pytest.mark.skipif(
    not ops.capabilities()["cpu"].available, reason="the C++ extension is not built"
)(Slots.TestCase)
TestSlots.settings = settings(max_examples=40, stateful_step_count=20)
