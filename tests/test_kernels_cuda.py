"""The CUDA backend without a GPU: an emulator for results, nvcc for resources.

The tests shared by all backends run here once more, on the emulated one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_kernels_advance
import test_kernels_norm
import test_kernels_score
import test_kernels_score_advance
import torch
from kernel_cases import Tables, Target, fresh_seed, make_tables, random_stream, rows_of, run
from torch import Tensor

from midstream.kernels import ops
from midstream.kernels.checks import Sizes
from midstream.kernels.tables import Rule

cuda_emulated = pytest.importorskip("cuda_emulated")
if os.uname().machine != "x86_64" or shutil.which("g++") is None:
    pytest.skip("the emulator needs g++ on x86-64", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests/native/cuda_emulator"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = list(itertools.product(DTYPES, DTYPES))  # of hidden rows and weights


ON_A_GPU = [Target("cuda", "cuda")] if ops.capabilities()["cuda"].available else []


@pytest.fixture(params=[None, *ON_A_GPU], ids=lambda target: str(target or "emulated"))
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if request.param is not None:
        yield request.param
        return
    with cuda_emulated.installed() as emulated:
        yield emulated


def name(value: object) -> str:
    return str(value).replace("torch.", "")


# The shared tests. pytest takes the fixture `target` from the module where it finds a test.
for _module in (
    test_kernels_score,
    test_kernels_advance,
    test_kernels_norm,
    test_kernels_score_advance,
):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_"):
            globals()[f"test_{_module.__name__.removeprefix('test_kernels_')}_{_name[5:]}"] = _test


# score: what must not change a bit


def score(target: Target, hidden: Tensor, weight: Tensor, bias: Tensor, **options: bool) -> Tensor:
    """Logits on the CPU; the arguments are brought to the target's device, strides kept."""
    out = torch.full((len(hidden), len(weight)), math.nan, device=target.device)
    weight, bias = weight.to(target.device), bias.to(target.device)
    ops.score(on(target, hidden), weight, bias, out, backend=target.backend, **options)
    return out.cpu()


def on(target: Target, tensor: Tensor) -> Tensor:
    """A matrix on the target's device, with its strides and its offset from 16 bytes."""
    if tensor.device.type == target.device:
        return tensor
    size, rows = tensor.element_size(), len(tensor)
    offset = tensor.data_ptr() % 16 // size
    buffer = torch.empty(offset + rows * tensor.stride(0), dtype=tensor.dtype, device=target.device)
    return buffer[offset:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def shifted(tensor: Tensor, by: int) -> Tensor:
    """A copy whose rows start `by` elements after a 16-byte boundary, in a padded buffer."""
    rows, width = tensor.shape
    per_vector = 16 // tensor.element_size()
    stride = -(-(width + by) // per_vector) * per_vector
    wide = torch.full((rows + 1, stride), math.nan, dtype=tensor.dtype)
    assert wide.data_ptr() % 16 == 0
    view = wide.flatten()[by : by + rows * stride].view(rows, stride)[:, :width]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("probes", [1, 8, 9, 19])
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=name)
def test_batch_and_alignment_change_no_bit(
    target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, probes: int
) -> None:
    """Row 0 alone, among 33, and in slow loads; N = 200 has two rows a block, N = 1 has one."""
    torch.manual_seed(fresh_seed())
    for width in (136, 521):
        hidden = torch.randn(200, width).to(hidden_dtype)
        weight, bias = torch.randn(probes, width).to(weight_dtype), torch.randn(probes)
        for rms_norm in (False, True):
            alone = score(target, hidden[:1].clone(), weight, bias, rms_norm=rms_norm)
            for rows in (33, 200) if probes == 9 else (33,):
                several = score(target, hidden[:rows], weight, bias, rms_norm=rms_norm)
                equal(several[:1], alone)
            slow = score(target, shifted(hidden[:33], 1), weight, bias, rms_norm=rms_norm)
            fast = score(target, shifted(hidden[:33], 0), weight, bias, rms_norm=rms_norm)
            equal(slow, several[:33])
            equal(fast, several[:33])


@pytest.mark.parametrize("probes", [3, 11, 17])
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=name)
def test_prefill_tiles_change_no_bit(
    target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, probes: int
) -> None:
    """More than 2048 rows take the tiles of prefill."""
    torch.manual_seed(fresh_seed())
    hidden = torch.randn(2081, 72).to(hidden_dtype)
    weight, bias = torch.randn(probes, 72).to(weight_dtype), torch.randn(probes)
    got = score(target, hidden, weight, bias, rms_norm=True)
    for n in (0, 15, 16, 31, 32, 2079, 2080):
        equal(score(target, hidden[n : n + 1], weight, bias, rms_norm=True)[0], got[n])


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=name)
def test_many_probes_and_a_wide_stream(
    target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(fresh_seed())
    for probes, width in ((130, 257), (3, 4097)):
        hidden = torch.randn(3, width).to(hidden_dtype)
        weight = (torch.randn(probes, width) / math.sqrt(width)).to(weight_dtype)
        arguments = (tensor.to(target.device) for tensor in (hidden, weight, torch.randn(probes)))
        test_kernels_score.check(target, *arguments, rms_norm=True)


def test_large_weights_are_split_exactly(target: Target) -> None:
    """Rounding the first part of the largest fp32 would give Inf, and Inf - Inf is NaN."""
    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([[largest], [-largest], [1.0 + 2**-23], [2.0**-120]])
    got = score(target, torch.ones(1, 1, dtype=torch.bfloat16), weight, torch.zeros(4))
    equal(got, weight.T)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=name)
def test_nothing_outside_a_row_is_read(
    target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, side: str
) -> None:
    """Rows that touch a page without access: a load beyond them would end this process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for first in (0, 2 * page):
        assert protect(ctypes.c_void_p(address + first), ctypes.c_size_t(page), 0) == 0
    whole = torch.frombuffer(memory, dtype=hidden_dtype)
    per_page = page // whole.element_size()
    for width in (1, 7, 64, 83):
        numbers = whole[per_page : per_page + 5 * width]
        if side == "after":
            numbers = whole[2 * per_page - 5 * width : 2 * per_page]
        hidden = numbers.view(5, width)
        hidden.fill_(0.5)
        weight = torch.ones(3, width).to(weight_dtype)
        got = score(target, hidden, weight, torch.zeros(3), rms_norm=True)
        torch.testing.assert_close(got, torch.full((5, 3), float(width)), rtol=1e-5, atol=0)


# advance: long runs, wide tables


def token_by_token(target: Target, tables: Tables, rows: list[tuple[int, int, np.ndarray]]) -> None:
    for row in rows:
        run(target, tables, [row])


@pytest.mark.parametrize("trace", [0, 7, 64])
def test_long_runs_are_their_rows(target: Target, trace: int) -> None:
    """Chunks of 32 rows, blocks of one and of four warps, a trace shorter than a chunk."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    tables = make_tables(seed, start=120, trace=trace)
    drawn = [random_stream(rng, tables, slot, tokens)[0] for slot, tokens in ((3, 200), (0, 101))]
    whole, steps = tables.clone(target.device), tables.clone(target.device)
    run(target, whole, [row for stream in drawn for row in rows_of(stream)])
    for stream in drawn:
        token_by_token(target, steps, rows_of(stream))
    test_kernels_advance.same(whole.slots, steps.slots)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rules": tuple(Rule) * 10, "states": 4},
        {"rules": tuple(Rule) * 40, "states": 70, "bins": 60, "window": 3},
        {"states": 31, "bins": 1, "prompt_bins": 40},
        {"rules": (Rule.MEAN,), "window": 64, "prompt_probes": 0, "trace": 1, "states": 1},
    ],
    ids=["many-probes", "large", "32-states", "one-probe"],
)
def test_table_sizes(target: Target, sizes: dict[str, object]) -> None:
    """Against the reference, in one call and token by token."""
    seed = fresh_seed()
    tables = make_tables(seed, start=5, **sizes)
    stream, _ = random_stream(np.random.default_rng(seed), tables, 1, 40)
    expected, whole, steps = (tables.clone(place) for place in ("cpu", *[target.device] * 2))
    run(Target("reference"), expected, rows_of(stream))
    run(target, whole, rows_of(stream))
    token_by_token(target, steps, rows_of(stream))
    test_kernels_advance.same(whole.slots, steps.slots)
    for key, got, true in zip(
        whole.slots.__dataclass_fields__,
        whole.slots.tensors(),
        expected.slots.tensors(),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


def test_too_many_probes_for_shared_memory(target: Target) -> None:
    tables = make_tables(0, rules=(Rule.LAST,) * 1500, prompt_probes=0).clone(target.device)
    with pytest.raises(ValueError, match="1500 probes and 5 states do not fit"):
        ops.Backend(target.device, target.backend).bind_advance(*tables)


# score_advance


@pytest.mark.parametrize("rules", [tuple(Rule), tuple(Rule) * 6], ids=["P9", "P44"])
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=name)
def test_score_advance_is_score_then_advance(
    target: Target,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rules: tuple[Rule, ...],
) -> None:
    """Runs of 1, 40 and 3 rows, padding, a bad slot, poisoned and repeated rows: the same bits."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    tables = make_tables(seed, rules=rules, start=17)
    probes, width = len(tables.evidence.rule), 83
    weight = (torch.randn(probes, width) / math.sqrt(width)).to(weight_dtype).to(target.device)
    bias = torch.randn(probes).to(target.device)
    runs = [(2, range(1)), (-1, range(2)), (0, range(40)), (6, range(1)), (5, [4, 4, 9])]
    pairs = [(s, t) for s, positions in runs for t in positions]
    slot, position = torch.tensor(pairs, dtype=torch.int32, device=target.device).T.contiguous()
    hidden = on(target, shifted(torch.randn(len(pairs), width).to(hidden_dtype), seed % 2))
    hidden[20, 3] = math.nan
    options = {"rms_norm": bool(seed % 3), "eps": 1e-5, "backend": target.backend}

    one, two = tables.clone(target.device), tables.clone(target.device)
    wide = torch.full((len(pairs), probes + 5), 0.25, device=target.device)
    logits = torch.full((len(pairs), probes), math.nan, device=target.device)
    for shift in (0, 50):  # the second time on moved streams
        moved = position + shift
        ops.score_advance(hidden, weight, bias, wide[:, 2:-3], slot, moved, *one, **options)
        ops.score(hidden, weight, bias, logits, **options)
        ops.advance(logits, slot, moved, *two, backend=target.backend)
        test_kernels_advance.same(one.slots, two.slots)
        assert bool(wide[:, 2:-3].isnan().all())
        assert bool((wide[:, :2] == 0.25).all())
        assert bool((wide[:, -3:] == 0.25).all())
    assert int(one.slots.scored[0]) > 0


def test_score_advance_of_a_large_bank_takes_two_launches(target: Target) -> None:
    tables = make_tables(0, rules=(Rule.LAST,) * 1000, prompt_probes=0, start=0)
    tables = tables.clone(target.device)
    backend = ops.Backend(target.device, target.backend)
    with torch.device(target.device):
        bound = backend.bind_score_advance(torch.zeros(1000, 3), torch.zeros(1000), *tables)
        zero = torch.zeros(1, dtype=torch.int32)
        bound(torch.zeros(1, 3), torch.zeros(1, 1000), zero, zero)
    assert int(tables.slots.scored[0]) == 1


def test_no_rows_anywhere(target: Target) -> None:
    backend = ops.Backend(target.device, target.backend)
    tables = make_tables(0).clone(target.device)
    with torch.device(target.device):
        weight, bias = torch.ones(9, 4), torch.ones(9)
        none = torch.zeros(0, dtype=torch.int32)
        empty = torch.zeros(0, 4)
        backend.bind_score_advance(weight, bias, *tables)(empty, torch.zeros(0, 9), none, none)
        bound = backend.bind_add_rms_norm_score(weight, bias)
        bound(empty, empty.clone(), torch.ones(4), 1e-6, torch.zeros(0, 9))


# add_rms_norm_score


@pytest.mark.parametrize("width", [1, 7, 83, 769, 26000])
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=name)
def test_add_rms_norm_score(
    target: Target, dtype: torch.dtype, weight_dtype: torch.dtype, width: int
) -> None:
    """The sum as PyTorch rounds it, the logits with the bits of ``score``, the norm within an ulp.

    A row of 26000 numbers does not fit shared memory.
    """
    torch.manual_seed(fresh_seed())
    rows, probes = (2, 3) if width > 1000 else (37, 11)
    weight, bias = torch.randn(probes, width).to(weight_dtype), torch.randn(probes)
    weight, bias = weight.to(target.device), bias.to(target.device)
    gamma = torch.randn(width).to(dtype).to(target.device)
    results = []
    for by in (0, 1):
        x, residual = (
            on(target, shifted(torch.randn(rows, width, generator=seeded).to(dtype), by))
            for seeded in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
        )
        x[-1, width // 2] = math.inf
        expected_x, expected_residual = x.clone(), residual.clone()
        expected_out = torch.full((rows, probes), math.nan, device=target.device)
        out = torch.full((rows, probes), math.nan, device=target.device)
        arguments = (gamma, 1e-5, weight, bias)
        ops.add_rms_norm_score(x, residual, *arguments, out, rms_norm=True, backend=target.backend)
        ops.add_rms_norm_score(
            expected_x, expected_residual, *arguments, expected_out, backend="reference"
        )
        equal(residual, expected_residual)
        equal(out.cpu(), score(target, residual, weight, bias, rms_norm=True))
        # Two roundings, each of which may fall to the other side.
        ulp = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(x, expected_x, rtol=ulp, atol=1e-6, equal_nan=True)
        results.append((x, residual, out))
    for a, b in zip(*results, strict=True):
        equal(a, b)
    assert bool(results[0][1][-1].isinf().any())
    assert not bool(results[0][2][-1].isfinite().any())


def test_normed_row_does_not_depend_on_its_batch(target: Target) -> None:
    torch.manual_seed(fresh_seed())
    rows, width = 150, 200
    x, residual = torch.randn(2, rows, width).bfloat16().to(target.device)
    gamma = torch.randn(width).bfloat16().to(target.device)
    weight, bias = torch.randn(4, width).to(target.device), torch.randn(4).to(target.device)
    out = torch.full((rows, 4), math.nan, device=target.device)
    together = x.clone(), residual.clone(), out.clone()
    alone = x[7:8].clone(), residual[7:8].clone(), out[7:8].clone()
    for a, b, logits in (together, alone):
        ops.add_rms_norm_score(a, b, gamma, 1e-6, weight, bias, logits, backend=target.backend)
    for one, all_rows in zip(alone, together, strict=True):
        equal(one[0], all_rows[7])


# Launch choices


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return cuda_emulated.backend()._cuda


def test_launch_choices(native: ModuleType) -> None:
    assert [native.score_warps(d, 64) for d in (1, 64, 65, 769, 4096)] == [1, 1, 2, 13, 16]
    rows = (1, 128, 129, 512, 2048, 2049, 4096, 10**6)
    assert [native.rows_per_block(n, 16) for n in rows] == [1, 1, 2, 4, 16, 16, 16, 16]
    assert [native.rows_per_block(n, 32) for n in rows[-3:]] == [32, 32, 32]
    assert [native.advance_threads(n) for n in (1, 256, 257)] == [32, 32, 128]
    assert native.norm_tile(1, 16, 4096, 2, 40_000) == [1, 4104]  # 16 bytes of padding
    assert native.norm_tile(2000, 16, 4096, 2, 40_000) == [4, 4104]
    assert native.norm_tile(2000, 4, 20_000, 4, 40_000) == [4, 0]


def test_chunk_fits_shared_memory(native: ModuleType) -> None:
    usual = Sizes(64, 8, 6, 8, 4, 0, 0, 3).values()
    assert native.advance_chunk(usual, 32, 48 * 1024) == 32
    wide = Sizes(64, 256, 17, 8, 4, 0, 0, 3).values()
    assert native.advance_chunk(wide, 32, 48 * 1024) == 19
    assert native.fits(wide)
    assert native.fits_score_advance(wide)


# nvcc

NVCC = shutil.which(os.environ.get("MIDSTREAM_NVCC") or "nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
ARCHITECTURES = [80, 90, 100]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture: int, tmp_path: Path) -> None:
    """Every kernel in registers; at most 128, for blocks of 512 threads."""
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}", "-cubin"]
    command = [NVCC, *flags, "-Xptxas=-v", f"-I{ROOT}/csrc/include"]
    report: dict[str, int] = {}
    started = [
        subprocess.Popen(
            [*command, source, "-o", tmp_path / f"{source.stem}.cubin"],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for source in sorted(ROOT.glob("csrc/cuda/*.cu"))
    ]
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        entries = re.split(r"Compiling entry function '", said)[1:]
        assert entries, said
        for entry in entries:
            kernel = entry.split("'")[0]
            stack, stores, loads = map(
                int,
                re.search(
                    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", entry
                ).groups(),
            )
            assert (stack, stores, loads) == (0, 0, 0), entry
            report[kernel] = int(re.search(r"Used (\d+) registers", entry)[1])
    for kernel, registers in sorted(report.items()):
        print(f"sm_{architecture} {registers:4d} registers  {kernel}")
    assert len(report) == 17 + 5 + 5 + 1  # score, both fused ops, advance
    assert max(report.values()) <= 128
    # Two blocks of the fused norm share a processor where a weight is one 16-bit number.
    lean = {k: n for k, n in report.items() if "add_rms_norm" in k and "16ELi1E" in k}
    assert len(lean) == 2, report
    assert max(lean.values()) <= 64, lean


def test_nothing_waits_or_allocates() -> None:
    """Of the CUDA runtime the sources use the launch, and loading when probes are bound."""
    used = set()
    for source in [*ROOT.glob("csrc/cuda/*"), ROOT / "csrc/python/cuda_bindings.cpp"]:
        used |= set(re.findall(r"\bcu(?:da)?[A-Z]\w+(?=\()", source.read_text()))
    allowed = {"cudaLaunchKernelEx", "cudaFuncGetAttributes"}  # the latter in preload alone
    assert used == allowed | {"cudaGetErrorName", "cudaGetErrorString"}


# The emulator


def test_emulator_finds_what_a_gpu_leaves_undefined(tmp_path: Path) -> None:
    program = tmp_path / "selftest"
    sources = [EMULATOR / "selftest.cpp", EMULATOR / "emulator.cpp"]
    command = ["g++", *cuda_emulated.FLAGS, "-fno-pic", "-no-pie", f"-I{EMULATOR}", *sources]
    command = [word for word in command if word not in ("-shared", "-fPIC")]
    subprocess.run([*command, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "sum 496",
        "divergent barrier: some threads have left and others wait at a barrier (block 0, 0, "
        "thread 0)",
        "divergent warp: a lane never comes to its warp's operation (block 0, 0, thread 0)",
        "two operations: lanes of a warp are at different operations (block 0, 0, thread 1)",
        "overrun: write beyond shared memory (block 0, 0, thread 0)",
        "missing barrier: results differ",
        "mma: right",
    ]
