"""``score`` and ``advance`` per backend, beside plain PyTorch, eager and compiled, in the same run.

Groups compare like with like; N = 1 and 8 are decode steps, N = 1024 is a prefill. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from midstream.kernels import ops
from midstream.kernels.tables import (
    GAP_BITS,
    ChainTable,
    EvidenceTable,
    OnUnscored,
    Phase,
    PolicyTable,
    Rule,
    SlotTable,
)

PROBES = 4
BACKENDS = (
    [name for name, capability in ops.capabilities().items() if capability.available]
    if not torch.cuda.is_available()
    else ["reference", "triton"]
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def measure(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    """Time a call; on a GPU, with the wait for its result."""
    call()

    def synced() -> None:
        call()
        torch.cuda.synchronize()

    benchmark(synced if DEVICE == "cuda" else call)


def score_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE).bfloat16()
    weight = torch.randn(PROBES, width, device=DEVICE).bfloat16()
    return (
        hidden,
        weight,
        torch.zeros(PROBES, device=DEVICE),
        torch.empty(rows, PROBES, device=DEVICE),
    )


def sizes(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("width", [128, 4096], ids=lambda d: f"d{d}")(
        pytest.mark.parametrize("rows", [1, 8, 1024], ids=lambda n: f"N{n}")(function)
    )


@sizes
@pytest.mark.parametrize("backend", BACKENDS)
def bench_score(benchmark: BenchmarkFixture, backend: str, rows: int, width: int) -> None:
    """The bound call that a monitor makes."""
    benchmark.group = f"score N={rows} d={width} P={PROBES} bf16"
    hidden, weight, bias, out = score_inputs(rows, width)
    score = ops.Backend(DEVICE, backend).bind_score(weight, bias)
    measure(benchmark, lambda: score(hidden, out))


@sizes
@pytest.mark.parametrize("entry", ["plain", "torch.ops"])
def bench_score_entry(benchmark: BenchmarkFixture, entry: str, rows: int, width: int) -> None:
    """What the other two entry points add."""
    benchmark.group = f"score N={rows} d={width} P={PROBES} bf16"
    arguments = score_inputs(rows, width)
    call = ops.score if entry == "plain" else torch.ops.midstream.score.default
    measure(benchmark, lambda: call(*arguments))


@sizes
@pytest.mark.parametrize("how", ["eager", "compile"])
def bench_score_pytorch(benchmark: BenchmarkFixture, how: str, rows: int, width: int) -> None:
    """``F.linear`` into the same buffer, the weights cast beforehand."""
    benchmark.group = f"score N={rows} d={width} P={PROBES} bf16"
    hidden, weight, bias, out = score_inputs(rows, width)
    bias = bias.to(hidden.dtype)

    def linear(hidden: Tensor, out: Tensor) -> None:
        out.copy_(torch.nn.functional.linear(hidden, weight, bias))

    call = torch.compile(linear, fullgraph=True) if how == "compile" else linear
    measure(benchmark, lambda: call(hidden, out))


def advance_tables(slots: int, states: int = 5, bins: int = 8) -> tuple[object, ...]:
    """Tables of usual size; their values do not change the work."""

    def full(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=DEVICE)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    evidence = EvidenceTable(
        rule=ints([Rule.LAST, Rule.EMA, Rule.CUSUM, Rule.MAX]),
        parameter=full(PROBES),
        window=ints([1] * PROBES),
        center=full(PROBES),
        phase=ints([Phase.RESPONSE] * PROBES),
    )
    chain = ChainTable(
        step_powers=full(GAP_BITS, states + 1, states + 1),
        emission=full(states + 1, bins),
        edges=torch.arange(1.0, bins, device=DEVICE),
        prior=full(states + 1),
        prompt_emission=full(states + 1, 1),
        prompt_edges=full(0),
    )
    policy = PolicyTable(
        ahead=full(1, states + 1),
        halt_at=full(1, value=2.0),
        hold_at=full(1, value=2.0),
        release_at=full(1, value=2.0),
        on_unscored=ints([OnUnscored.PASS]),
    )
    table = SlotTable.allocate(slots, PROBES, states, device=DEVICE)
    for slot in range(slots):
        table.admit(slot, start=0, policy=0, prior=chain.prior)
    return table, evidence, chain, policy


@pytest.mark.parametrize("streams", [1, 8, 64], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("length", [1, 128], ids=["decode", "prefill"])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_advance(benchmark: BenchmarkFixture, backend: str, streams: int, length: int) -> None:
    """A decode step of all streams, or 128 tokens of each; positions go on from call to call."""
    benchmark.group = f"advance streams={streams} tokens={length} P={PROBES} K=5"
    if backend == "reference" and streams * length > 1024:
        pytest.skip("seconds per call")
    tables = advance_tables(streams)
    advance = ops.Backend(DEVICE, backend).bind_advance(*tables)
    slot = torch.arange(streams, dtype=torch.int32, device=DEVICE).repeat_interleave(length)
    position = torch.arange(length, dtype=torch.int32, device=DEVICE).repeat(streams)
    logits = torch.zeros(streams * length, PROBES, device=DEVICE)

    def step() -> None:
        logits.zero_()
        advance(logits, slot, position)
        position.add_(length)

    measure(benchmark, step)
