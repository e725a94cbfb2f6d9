"""The Triton backend without a GPU: its interpreter for results, its compiler for resources.

The tests of results run in a process of their own, started by ``test_results_in_the_interpreter``:
the variable that calls the interpreter counts when Triton is imported. On a GPU the shared tests
of the ops run in this process, on CUDA tensors.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import Tables, fresh_seed, make_tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from midstream.kernels import ops
from midstream.kernels.backends import triton_interprets
from midstream.kernels.checks import Sizes
from midstream.kernels.launch import (
    Batch,
    ScoreOrder,
    ScoreTile,
    advance_launch,
    batch_of,
    chunk_tile,
    fuses,
    norm_columns,
    norm_tile,
    score_order,
    score_tile,
)

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from midstream.kernels import triton as backend  # noqa: E402
from midstream.kernels import (  # noqa: E402
    triton_advance,
    triton_dot,
    triton_fold,
    triton_norm,
    triton_score,
)

TESTS = Path(__file__).parent
CAPABILITIES = [80, 90, 100]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def targets_of(*cases: tuple[object, ...]) -> list[tuple[object, ...]]:
    """The first case for every capability, the others for one in turn: a compilation takes 1 s."""
    first = [(*cases[0], capability) for capability in CAPABILITIES]
    return first + [(*case, CAPABILITIES[i % 3]) for i, case in enumerate(cases[1:])]


compiled = pytest.mark.skipif(triton_interprets(), reason="Triton interprets in this process")
interpreted = pytest.mark.skipif(
    not triton_interprets(), reason="runs with TRITON_INTERPRET=1, in a process of its own"
)

POINTERS = {
    "slot": "i32",
    "position": "i32",
    "s_position": "i32",
    "s_start": "i32",
    "s_policy": "i32",
    "s_folds": "i32",
    "s_verdict": "u8",
    "s_cause": "i16",
    "s_halted_at": "i32",
    "s_scored": "i32",
    "s_unscored": "i32",
    "s_trace_position": "i32",
    "s_trace_verdict": "u8",
    "e_rule": "i32",
    "e_window": "i32",
    "e_phase": "i32",
    "p_on_unscored": "i32",
}
SCALARS = {
    "hidden_stride": "i32",
    "x_stride": "i32",
    "residual_stride": "i32",
    "out_stride": "i32",
    "logits_stride": "i32",
    "rows": "i32",
    "slots": "i32",
    "eps": "fp32",
    "norm_eps": "fp32",
}


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], capability: int, **types: str
) -> tuple[str, dict[str, int]]:
    """Compile to a cubin; return the PTX and the resources used. Needs no driver.

    ``arguments`` are the kernel's compile-time arguments and the compiler's options, as a binding
    passes them. Pointers and strides are multiples of 16, as those of real batches are.
    """
    names = kernel.arg_names
    pointers = POINTERS | types
    constants = {name: value for name, value in arguments.items() if name in names}
    signature = {
        name: "constexpr"
        if name in constants
        else SCALARS.get(name) or f"*{pointers.get(name, 'fp32')}"
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    options = {name: value for name, value in arguments.items() if name not in names}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return made.asm["ptx"], used | {"SHARED": made.metadata.shared}


def assert_fits(used: dict[str, int], warps: int) -> None:
    """No spill and no local array; registers and shared memory that every GPU has."""
    assert used["LOCAL"] == 0, used
    assert used["STACK"] == 0, used
    assert used["REG"] * warps * 32 <= 65536, used
    assert used["SHARED"] <= 99 << 10, used


def product_arguments(
    probes: int, width: int, order: ScoreOrder, tile: ScoreTile, *, rms_norm: bool = True
) -> dict[str, Any]:
    return {
        "PROBES": probes,
        "WIDTH": width,
        "RMS_NORM": rms_norm,
        **triton_dot.constants(order, tile, interpreted=False),
        **triton_dot.options(tile),
    }


def assert_same_products(ptx: str, order: ScoreOrder, tile: ScoreTile) -> None:
    """Every tile takes the steps along ``d`` with one instruction, so that none changes a bit."""
    found = re.findall(r"wgmma|tcgen05\.mma|mma\.sync[\w.]*", ptx)
    if order.by_fma:
        assert not found
        return
    kind, step = {"bf16": ("bf16", 16), "fp16": ("f16", 16), "fp32": ("tf32", 8)}[order.operand]
    assert set(found) == {f"mma.sync.aligned.m16n8k{step}.row.col.f32.{kind}.{kind}.f32"}
    steps = order.block_width // step * order.pieces
    squares = -(-tile.rows // 16) * -(-tile.probes // 8)
    assert len(found) % (steps * squares) == 0  # a slice to each of 8 warps


@compiled
@pytest.mark.parametrize(
    ("probes", "width", "hidden", "weight", "batches", "capability"),
    targets_of(
        (8, 4096, "bf16", "fp32", tuple(Batch)),
        (64, 4096, "bf16", "bf16", (Batch.MANY,)),
        (16, 4097, "fp16", "fp32", (Batch.MANY,)),
        (64, 5125, "fp32", "fp32", (Batch.MANY,)),
    ),
)
def test_score_compiles_without_spills(
    probes: int, width: int, hidden: str, weight: str, batches: tuple[Batch, ...], capability: int
) -> None:
    order = score_order(probes, width, DTYPES[hidden], DTYPES[weight])
    for batch in batches:
        tile = score_tile(batch, order, probes)
        ptx, used = compile_kernel(
            triton_score.score_kernel,
            product_arguments(probes, width, order, tile),
            capability,
            hidden=hidden,
            weight=weight,
        )
        assert_fits(used, tile.num_warps)
        assert_same_products(ptx, order, tile)


@compiled
@pytest.mark.parametrize(
    ("probes", "width", "hidden", "weight", "batch", "capability"),
    targets_of(
        (8, 4096, "bf16", "fp32", Batch.FEW),
        (64, 16384, "bf16", "bf16", Batch.FEW),
        (8, 8192, "bf16", "fp32", Batch.MANY),
        (16, 4097, "fp16", "fp32", Batch.MANY),
    ),
)
def test_add_rms_norm_score_compiles_without_spills(
    probes: int, width: int, hidden: str, weight: str, batch: Batch, capability: int
) -> None:
    order = score_order(probes, width, DTYPES[hidden], DTYPES[weight])
    tile = norm_tile(batch, order, probes)
    ptx, used = compile_kernel(
        triton_norm.add_rms_norm_score_kernel,
        product_arguments(probes, width, order, tile)
        | {"COLUMNS": norm_columns(tile, width), "INTERPRETED": False},
        capability,
        **dict.fromkeys(("x", "residual", "gamma"), hidden),
        weight=weight,
    )
    assert_fits(used, tile.num_warps)
    assert_same_products(ptx, order, tile)


SMALL = Sizes(64, 8, 6, 8, 4, 16, 256, 3)
LARGE = Sizes(64, 64, 17, 32, 9, 64, 64, 12)


def size_name(sizes: object) -> str | None:
    if not isinstance(sizes, Sizes):
        return None
    return f"P{sizes.probes}-K{sizes.states - 1}-M{sizes.window}-L{sizes.trace}"


@compiled
@pytest.mark.parametrize(
    ("sizes", "capability"),
    targets_of(
        (SMALL,),
        (LARGE,),
        (Sizes(64, 8, 6, 8, 4, 0, 0, 3),),
        (Sizes(8, 100, 64, 64, 64, 32, 0, 3),),
    ),
    ids=size_name,
)
def test_advance_compiles_without_spills(sizes: Sizes, capability: int) -> None:
    launch = advance_launch(sizes)
    arguments = triton_advance.fold_arguments(sizes, launch)
    nothing = dict.fromkeys(("hidden", "weight", "bias"))
    _, used = compile_kernel(triton_fold.advance_kernel, arguments | nothing, capability)
    assert_fits(used, launch.num_warps)


@compiled
@pytest.mark.parametrize(
    ("sizes", "width", "hidden", "weight", "capability"),
    targets_of(
        (SMALL, 4096, "bf16", "fp32"),
        (LARGE, 1024, "bf16", "fp32"),
        (SMALL, 769, "fp16", "fp32"),
    ),
    ids=size_name,
)
def test_score_advance_compiles_without_spills(
    sizes: Sizes, width: int, hidden: str, weight: str, capability: int
) -> None:
    order = score_order(sizes.probes, width, DTYPES[hidden], DTYPES[weight])
    launch, tile = advance_launch(sizes), chunk_tile(order, sizes.probes)
    assert launch.num_warps == tile.num_warps
    arguments = triton_advance.fold_arguments(sizes, launch)
    arguments |= {"SCORES": True, **product_arguments(sizes.probes, width, order, tile)}
    ptx, used = compile_kernel(
        triton_fold.advance_kernel, arguments, capability, hidden=hidden, weight=weight
    )
    assert_fits(used, tile.num_warps)
    assert_same_products(ptx, order, tile)


@compiled
def test_results_in_the_interpreter() -> None:
    """The shared tests of the ops, and those of this module that are marked for it."""
    ops_tested = ("score", "advance", "norm", "score_advance", "triton")
    files = [TESTS / f"test_kernels_{name}.py" for name in ops_tested]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"),
            # NumPy warns where a kernel computes an Inf that the test put there.
            *("-W", "ignore::RuntimeWarning:triton", "-W", "ignore::RuntimeWarning:numpy"),
            *(str(file) for file in files if file.exists()),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed, ran.stdout
    assert int(passed[1]) >= 90, ran.stdout


def dot_in_order(
    self: object, a: Any, b: Any, d: Any, input_precision: object, imprecise: object
) -> Any:
    """``tl.dot`` as tensor cores add: along ``d``, whatever the tile. NumPy's follows shapes."""
    total = d.data
    for k in range(a.data.shape[-1]):
        total = total + a.data[..., :, k : k + 1] * b.data[..., k : k + 1, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize(
    ("probes", "width", "hidden_dtype", "weight_dtype", "rms_norm"),
    [
        (9, 769, torch.bfloat16, torch.float32, True),
        (3, 65, torch.float16, torch.float32, False),
        (35, 40, torch.bfloat16, torch.bfloat16, True),
        (9, 150, torch.float32, torch.float32, True),
    ],
)
def test_every_tile_gives_the_same_bits(
    probes: int,
    width: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rms_norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of ``score`` and of ``add_rms_norm_score``, for rows in any place."""
    torch.manual_seed(fresh_seed())
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_order)
    monkeypatch.setattr(triton_norm, "_launch", triton_norm._launch.__wrapped__)
    weight, bias = draw(probes, width, dtype=weight_dtype), draw(probes)
    gamma = draw(width, dtype=hidden_dtype)
    x, residual = (draw(11, width + 1, dtype=hidden_dtype)[2::2, 1:] for _ in range(2))
    total = x + residual
    expected = None
    for batch in Batch:
        for module in (triton_score, triton_norm):
            monkeypatch.setattr(module, "batch_for", lambda rows, probes, batch=batch: batch)
        if batch is Batch.MANY:  # in pieces, as a row that is too wide for registers
            monkeypatch.setattr(triton_norm, "norm_columns", lambda tile, width: 64)
        score = backend.bind_score(weight, bias, rms_norm=rms_norm, eps=1e-6)
        fused = backend.bind_add_rms_norm_score(weight, bias, rms_norm=rms_norm, eps=1e-6)
        out, fused_out = torch.full((2, 5, probes), math.nan)
        normed, sum_ = x.clone(), residual.clone()
        score(total, out)
        fused(normed, sum_, gamma, 1e-5, fused_out)
        if expected is None:
            expected = (out, normed)
            assert bool(out.isfinite().all())
        same_bits(out, expected[0])
        same_bits(fused_out, expected[0])
        same_bits(normed, expected[1])
        same_bits(sum_, total)


def watched_tables(seed: int) -> tuple[Tables, Tensor, Tensor]:
    """Tables and rows: a long run with a prompt, decode, padding, a gap, a repeated row."""
    runs = [(2, range(19)), (0, [0]), (-1, [0]), (4, [0, 1, 5, 5]), (1, [3]), (-1, [7])]
    slot = [slot for slot, positions in runs for _ in positions]
    position = [t for _, positions in runs for t in positions]
    tables = make_tables(seed, start=6)
    return tables, *(torch.tensor(rows, dtype=torch.int32) for rows in (slot, position))


@interpreted
@pytest.mark.parametrize(
    ("tile", "rms_norm"), [("one row", False), ("chunks", True), ("two kernels", True)]
)
def test_score_advance_is_score_then_advance(
    tile: str, rms_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = fresh_seed()
    torch.manual_seed(seed)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_order)
    if tile == "chunks":
        monkeypatch.setattr(
            triton_advance, "score_tile", lambda batch, order, probes: chunk_tile(order, probes)
        )
    if tile == "two kernels":
        monkeypatch.setattr(triton_advance, "fuses", lambda *sizes: False)
    monkeypatch.setattr(triton_advance, "_fused", triton_advance._fused.__wrapped__)
    tables, slot, position = watched_tables(seed)
    rows, probes, width = len(slot), len(tables.evidence.rule), 135
    hidden = draw(rows, width + 3, dtype=torch.bfloat16)[:, 2:-1]
    hidden[7, 20] = hidden[21, 0] = math.nan
    weight, bias = draw(probes, width) / math.sqrt(width), draw(probes)
    apart, together = tables.clone(), tables.clone()
    options = {"rms_norm": rms_norm, "backend": "triton"}

    logits = torch.full((rows, probes), math.nan)
    ops.score(hidden, weight, bias, logits, **options)
    ops.advance(logits, slot, position, *apart, backend="triton")
    wide = torch.full((rows, probes + 4), 0.25)
    ops.score_advance(hidden, weight, bias, wide[:, 1:-3], slot, position, *together, **options)

    for a, b in zip(apart.slots.tensors(), together.slots.tensors(), strict=True):
        same_bits(a, b)
    assert int(together.slots.position[2]) == 19
    assert int(together.slots.unscored.sum()) > 0
    assert bool(wide[:, 1:-3].isnan().all())
    assert bool((wide[:, [0, -3, -2, -1]] == 0.25).all())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("width", "probes"), [(1, 1), (7, 65), (769, 3), (4097, 2)])
def test_add_rms_norm_score_is_its_definition(width: int, probes: int, dtype: torch.dtype) -> None:
    """The sum to the bit, the normed row to a rounding, the logits to those of ``score``."""
    torch.manual_seed(fresh_seed())
    weight = draw(probes * width + 1)[1:].view(probes, width) / math.sqrt(width)
    bias, gamma = draw(probes), draw(width + 1, dtype=dtype)[1:]
    x, residual = (draw(3, width + 5, dtype=dtype)[:, 1 : width + 1] for _ in range(2))
    x[1, width // 2] = math.nan
    expected = [x.clone(), residual.clone(), torch.empty(3, probes)]
    out = torch.full((3, probes), math.nan)
    arguments = (gamma, 1e-5, weight, bias)
    ops.add_rms_norm_score(*expected[:2], *arguments, expected[2], backend="reference")
    ops.add_rms_norm_score(x, residual, *arguments, out, backend="triton")
    same_bits(residual, expected[1])
    # Another sum of squares may round the row, and then the product, the other way.
    torch.testing.assert_close(
        x, expected[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True
    )
    alone = torch.full((3, probes), math.nan)
    ops.score(residual, weight, bias, alone, backend="triton")
    same_bits(out, alone)
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not bool(out[1].isfinite().any())


@interpreted
def test_overflowing_squares_of_a_sum_are_unscored() -> None:
    x, residual = torch.full((2, 20), 5e18), torch.full((2, 20), 5e18)
    x[1] = residual[1] = 1.0
    weight, out = torch.full((3, 20), 1e-3), torch.zeros(2, 3)
    gamma, bias = torch.ones(20), torch.ones(3)
    x, residual = 2 * x, 2 * residual  # 2e19 together: its square is Inf
    ops.add_rms_norm_score(
        x, residual, gamma, 1e-5, weight, bias, out, rms_norm=True, backend="triton"
    )
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())


@interpreted
def test_many_probes_of_an_odd_width() -> None:
    torch.manual_seed(fresh_seed())
    hidden, weight, bias = draw(2, 4097, dtype=torch.bfloat16), draw(70, 4097), draw(70)
    out = torch.full((2, 70), math.nan)
    ops.score(hidden, weight, bias, out, backend="triton")
    exact = hidden.double() @ weight.double().T + bias.double()
    rounding = (4097 / 8 / 64 + 64 + 8) * 2**-24  # a slice's chain, and the sums across slices
    bound = rounding * (hidden.double().abs() @ weight.double().abs().T + bias.double().abs())
    assert bool(((out.double() - exact).abs() <= bound).all())


@interpreted
def test_long_run_in_any_pieces() -> None:
    """Rows read ahead, and prompt rows that skip the belief, change no bit."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    tables = make_tables(seed, start=12)
    logits = torch.tensor(rng.normal(0, 1.5, (30, len(tables.evidence.rule))), dtype=torch.float32)
    position = torch.arange(30, dtype=torch.int32)
    slot = torch.full((30,), 3, dtype=torch.int32)
    states = []
    for cuts in ([0, 30], list(range(31)), [0, 5, 11, 12, 13, 29, 30]):
        mine = tables.clone()
        advance = backend.bind_advance(*mine)
        for begin, end in pairwise(cuts):
            rows = slice(begin, end)
            advance(logits[rows].clone(), slot[rows], position[rows])
        states.append(mine.slots.tensors())
    for other in states[1:]:
        for a, b in zip(states[0], other, strict=True):
            same_bits(a, b)


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, tuple[object, ...]]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **constants: self.launches.append((grid, args))


class NoTensorWork(TorchDispatchMode):
    """Fails on whatever would allocate, copy or sync: a launch alone is no operation of torch."""

    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> None:
        raise AssertionError(f"a bound call ran {func}")


@pytest.mark.parametrize("rows", [1, 40])
def test_bound_calls_only_launch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they can be captured in a CUDA graph: the same launch with the same addresses."""
    recorder = Recorder()
    monkeypatch.setattr(triton_score, "score_kernel", recorder)
    monkeypatch.setattr(triton_norm, "add_rms_norm_score_kernel", recorder)
    monkeypatch.setattr(triton_advance, "advance_kernel", recorder)
    tables = make_tables(1)
    probes = len(tables.evidence.rule)
    weight, bias = draw(probes, 64), draw(probes)
    hidden, x = (draw(rows, 64, dtype=torch.bfloat16) for _ in range(2))
    gamma = draw(64, dtype=torch.bfloat16)
    logits = torch.zeros(rows, probes)
    slot, position = torch.zeros(2, rows, dtype=torch.int32)
    options: dict[str, Any] = {"rms_norm": True, "eps": 1e-6}
    score = backend.bind_score(weight, bias, **options)
    advance = backend.bind_advance(*tables)
    both = backend.bind_score_advance(weight, bias, *tables, **options)
    fused = backend.bind_add_rms_norm_score(weight, bias, **options)
    for _ in range(2):
        with NoTensorWork():
            score(hidden, logits)
            advance(logits, slot, position)
            both(hidden, logits, slot, position)
            fused(x, hidden, gamma, 1e-5, logits)
    assert len(recorder.launches) == 8
    for (grid, first), (again, second) in zip(
        recorder.launches[:4], recorder.launches[4:], strict=True
    ):
        assert grid == again
        assert all(a is b or a == b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("probes", [1, 3, 8, 64, 200])
@pytest.mark.parametrize("width", [1, 33, 769, 8192])
@pytest.mark.parametrize("hidden", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_tiles_cover_everything_and_fit(probes: int, width: int, hidden: str, weight: str) -> None:
    order = score_order(probes, width, DTYPES[hidden], DTYPES[weight])
    chunks = {chunk_tile(order, probes)}
    scores = {score_tile(batch, order, probes) for batch in Batch}
    norms = {norm_tile(batch, order, probes) for batch in Batch}
    for tile in chunks | scores | norms:
        assert norm_columns(tile, width) * tile.rows <= 16384
        blocks = tile.programs(1, probes)
        assert probes <= blocks * tile.probes < probes + tile.probes
        assert tile.programs(100, 1) * tile.rows >= 100
        held = (tile.num_stages - 1) * order.slices * order.block_width
        sizes = DTYPES[hidden].itemsize, DTYPES[weight].itemsize
        assert held * (tile.rows * sizes[0] + tile.probes * sizes[1]) <= 96 << 10
    assert order.slices * order.block_width >= min(width, 128)


def test_batches_grow_with_rows() -> None:
    sizes = (1, 16, 17, 64, 65, 2048, 2049, 100_000)
    found = [batch_of(rows, 8) for rows in sizes]
    assert found == sorted(found)
    assert set(found) == set(Batch)
    assert batch_of(2, 64) is Batch.LONE
    assert batch_of(3, 64) is Batch.FEW


def test_weights_that_tensor_cores_multiply_exactly() -> None:
    def pieces(hidden: str, weight: str) -> tuple[str, int, str]:
        order = score_order(8, 4096, DTYPES[hidden], DTYPES[weight])
        return order.operand, order.pieces, order.precision

    assert pieces("bf16", "bf16") == ("bf16", 1, "ieee")
    assert pieces("bf16", "fp16") == ("bf16", 2, "ieee")
    assert pieces("bf16", "fp32") == ("bf16", 3, "ieee")
    assert pieces("fp16", "fp16") == ("fp16", 1, "ieee")
    assert pieces("fp16", "bf16") == ("fp32", 1, "tf32")
    assert pieces("fp16", "fp32") == ("fp32", 3, "tf32")
    for weight in DTYPES:
        assert score_order(8, 4096, torch.float32, DTYPES[weight]).by_fma


def test_small_banks_are_fused() -> None:
    order = score_order(8, 4096, torch.bfloat16, torch.float32)
    assert fuses(1, 8 * 4096 * 4, order, 8)
    assert not fuses(1, 64 * 4096 * 4, order, 8)  # 1 MB into one SM
    assert not fuses(4096, 8 * 4096 * 4, order, 8)
    assert not fuses(1, 8 * 4096 * 4, order, 16)
    assert not fuses(1, 4, score_order(1, 1, torch.float32, torch.float32), 8)


def test_advance_launch_covers_everything() -> None:
    launch = advance_launch(Sizes(64, 9, 6, 8, 1, 3, 0, 3))
    assert launch.block_probes == 16
    assert launch.block_states == 8
    assert launch.block_edges == 8
    assert launch.block_prompt_edges == 1
    assert launch.block_window == 4
    assert launch.num_warps == 8
    assert advance_launch(Sizes(64, 200, 6, 8, 1, 64, 0, 3)).num_warps == 16
