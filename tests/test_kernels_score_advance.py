"""``score_advance`` on every backend: the bits of ``score`` and then ``advance``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_cases import Tables, Target, fresh_seed, make_tables, targets
from torch import Tensor

from midstream.kernels import ops

PROBES = 9  # of make_tables
BACKENDS = sorted({target.backend for target in targets() if target.device == "cpu"})


@pytest.fixture(params=targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.active() as active:
        yield active


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def ints(target: Target, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=target.device)


def same(a: Tables, b: Tables) -> None:
    for field, x, y in zip(
        a.slots.__dataclass_fields__, a.slots.tensors(), b.slots.tensors(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=field)


def probes(target: Target, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(PROBES, width) / math.sqrt(width)).to(dtype)
    return weight.to(target.device), torch.randn(PROBES).to(target.device)


@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_bits_of_the_two_ops(target: Target, dtype: torch.dtype, rms_norm: bool) -> None:
    """Prefill, decode, padding, old and skipped rows, and an unscored row, in ragged batches."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    width = 131
    weight, bias = probes(target, width, dtype)
    one = make_tables(seed, slots=6).clone(target.device)
    two = one.clone(target.device)
    backend = ops.Backend(target.device, target.backend)
    both = backend.bind_score_advance(weight, bias, *one, rms_norm=rms_norm)
    score = backend.bind_score(weight, bias, rms_norm=rms_norm)
    advance = backend.bind_advance(*two)
    expected = [0] * 6
    for step in range(3 if target.backend == "triton" else 12):
        slot: list[int] = []
        position: list[int] = []
        for s in rng.permutation(6)[: rng.integers(1, 7)].tolist():
            rows = int(rng.integers(1, 6)) if step == 0 else 1
            first = max(0, expected[s] + int(rng.choice([0, 0, 0, -1, 3])))
            slot += [s] * rows
            position += range(first, first + rows)
            expected[s] = max(expected[s], first + rows)
            if rng.random() < 0.3:
                slot.append(-1)
                position.append(int(rng.integers(0, 9)))
        hidden = torch.randn(len(slot), 2 * width).to(dtype).to(target.device)[:, 1 : width + 1]
        if step % 4 == 1:
            hidden[0, -1] = math.nan
        rows_of = (ints(target, slot), ints(target, position))
        buffer = torch.full((len(slot), PROBES + 3), math.nan, device=target.device)
        both(hidden, buffer[:, 2 : 2 + PROBES], *rows_of)
        logits = torch.full((len(slot), PROBES), math.nan, device=target.device)
        score(hidden, logits)
        advance(logits, *rows_of)
        assert bool(buffer.isnan().all())
        same(one, two)
    assert int(one.slots.scored.sum()) > 0


def test_row_does_not_depend_on_its_batch(target: Target) -> None:
    """Each stream alone, and all in one batch with padding between them: the same state."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    streams, tokens, width = 5, 3 if target.backend == "triton" else 8, 519
    weight, bias = probes(target, width, torch.bfloat16)
    together = make_tables(seed, slots=streams, start=2).clone(target.device)
    alone = together.clone(target.device)
    hidden = torch.randn(tokens, streams, width).bfloat16().to(target.device)
    backend = ops.Backend(target.device, target.backend)
    batch = backend.bind_score_advance(weight, bias, *together)
    single = backend.bind_score_advance(weight, bias, *alone)
    order = torch.randperm(streams)
    for t in range(tokens):
        rows = torch.cat([hidden[t, order], torch.full_like(hidden[t, :1], math.nan)])
        logits = torch.zeros(streams + 1, PROBES, device=target.device)
        batch(rows, logits, ints(target, [*order.tolist(), -1]), ints(target, [t] * (streams + 1)))
        for s in range(streams):
            logits = torch.zeros(1, PROBES, device=target.device)
            single(hidden[t, s : s + 1], logits, ints(target, [s]), ints(target, [t]))
    same(together, alone)


def test_tables_are_read_at_every_call(target: Target) -> None:
    """Thresholds, biases and rules may change in place after binding."""
    torch.manual_seed(fresh_seed())
    width = 40
    weight, bias = probes(target, width, torch.float32)
    tables = make_tables(1, start=0).clone(target.device)
    call = ops.Backend(target.device, target.backend).bind_score_advance(weight, bias, *tables)
    hidden = torch.randn(1, width).to(target.device)

    def step(t: int) -> None:
        call(
            hidden,
            torch.zeros(1, PROBES, device=target.device),
            ints(target, [0]),
            ints(target, [t]),
        )

    tables.policy.halt_at.fill_(2.0)
    tables.policy.hold_at.fill_(2.0)
    step(0)
    assert int(tables.slots.verdict[0]) == 0
    bias.fill_(math.nan)
    step(1)
    assert int(tables.slots.unscored[0]) == 1
    bias.fill_(0.0)
    tables.policy.halt_at.fill_(0.0)
    step(2)
    assert int(tables.slots.verdict[0]) == 2


def test_no_rows(target: Target) -> None:
    weight, bias = probes(target, 16, torch.float32)
    tables = make_tables(2).clone(target.device)
    before = tables.clone(target.device)
    call = ops.Backend(target.device, target.backend).bind_score_advance(weight, bias, *tables)
    empty = torch.zeros(0, PROBES, device=target.device)
    call(torch.zeros(0, 16, device=target.device), empty, ints(target, []), ints(target, []))
    same(tables, before)


def arguments() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(4, 48, dtype=torch.bfloat16),
        "weight": torch.randn(PROBES, 48),
        "bias": torch.randn(PROBES),
        "logits": torch.zeros(4, PROBES),
        "slot": torch.tensor([0, 0, -1, 2], dtype=torch.int32),
        "position": torch.tensor([3, 4, 0, 5], dtype=torch.int32),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 48, dtype=torch.int32)}, TypeError, "hidden is torch.int32"),
        ({"hidden": torch.zeros(4, 47)}, ValueError, r"hidden has shape \[4, 47\]"),
        ({"hidden": torch.zeros(48, 4).T}, ValueError, r"hidden has strides \(1, 4\)"),
        ({"weight": torch.zeros(8, 48), "bias": torch.zeros(8)}, ValueError, "has 9 probes"),
        ({"weight": torch.zeros(PROBES, 48).double()}, TypeError, "weight is torch.float64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \[5\], expected \[9\]"),
        ({"logits": torch.zeros(4, 8)}, ValueError, r"shape \[4, 8\], expected \[4, 9\]"),
        ({"logits": torch.zeros(4, PROBES).half()}, TypeError, "is torch.float16"),
        ({"logits": torch.zeros(PROBES, 4).T}, ValueError, r"has strides \(1, 4\)"),
        ({"logits": torch.zeros(1, PROBES).expand(4, PROBES)}, ValueError, "do not overlap"),
        ({"slot": torch.zeros(4)}, TypeError, "slot is torch.float32"),
        ({"slot": torch.zeros(3, dtype=torch.int32)}, ValueError, r"slot has shape \[3\]"),
        ({"position": torch.zeros(4).long()}, TypeError, "position is torch.int64"),
        ({"position": torch.zeros(8).int()[::2]}, ValueError, r"position has strides \(2,\)"),
        ({"slot": torch.full((4,), 6).int()}, IndexError, "row 0 names slot 6, the table has 6"),
        ({"position": torch.full((4,), 1 << 30).int()}, IndexError, "row 0 has position"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named_and_changes_no_slot(
    backend: str, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    if error is IndexError and not Target(backend).looks_at_rows:
        pytest.skip("such a row is padding here")
    tables = make_tables(0)
    before = tables.clone()
    given = arguments() | change
    with pytest.raises(error, match=message):
        ops.score_advance(**given, **tables._asdict(), backend=backend)
    same(tables, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_elsewhere_than_the_weights_are_refused(backend: str) -> None:
    tables = [type(table)(*(t.to("meta") for t in table.tensors())) for table in make_tables(0)]
    weight, bias = torch.zeros(PROBES, 48), torch.zeros(PROBES)
    with pytest.raises(ValueError, match="weight is on cpu, the slot table is on meta"):
        ops.Backend("cpu", backend).bind_score_advance(weight, bias, *tables)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(
        torch.ops.midstream.score_advance.default,
        (*arguments().values(), *(table.tensors() for table in make_tables(0, trace=2))),
        {"rms_norm": True, "backend": backend},
    )
