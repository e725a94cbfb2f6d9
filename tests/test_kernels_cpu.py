"""What only the C++ backend has: instruction sets, packed weights, threads, checks in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import ISAS, Target, fresh_seed, make_tables
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from midstream.kernels import library, ops

_cpu = pytest.importorskip("midstream.kernels._cpu", reason="the C++ extension is not built")

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(code: str, **env: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_runs_or_says_why_not(isa: str) -> None:
    """Those that are skipped here are not tested by this run."""
    if ISAS.index(isa) > ISAS.index(_cpu.detected_isa()):
        pytest.skip(f"this machine has no {isa}, its widest is {_cpu.detected_isa()}")
    with Target("cpu", isa=isa).active():
        out = torch.zeros(1, 1)
        ops.score(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1), out, backend="cpu")
        assert out.item() == 4.0


def test_binding_keeps_its_instruction_set_and_weights() -> None:
    torch.manual_seed(fresh_seed())
    hidden = torch.randn(3, 777).bfloat16()
    weight, bias = torch.randn(5, 777).bfloat16(), torch.randn(5)
    bound = ops.Backend("cpu", "cpu").bind_score(weight, bias)
    before, after, fresh = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, 5)
    bound(hidden, before)
    weight.fill_(1.0)  # needs a new binding
    bias += 1.0  # does not
    with Target("cpu", isa="generic").active():
        bound(hidden, after)
        ops.Backend("cpu", "cpu").bind_score(weight, bias)(hidden, fresh)
    # Three sums round, each by half a unit of numbers below 256, which is 2^-17.
    torch.testing.assert_close(after, before + 1.0, rtol=0, atol=3 * 2.0**-17)
    assert not torch.allclose(fresh, after)


def test_subnormal_products_are_lost_at_most() -> None:
    """Instructions for bf16 take subnormal numbers for zero: an error below 2^-126 a term."""
    tiny = torch.full((1, 64), 2.0**-130).bfloat16()
    out = torch.full((1, 1), torch.nan)
    ops.score(tiny, torch.ones(1, 64).bfloat16(), torch.zeros(1), out, backend="cpu")
    assert 0.0 <= out.item() <= 64 * 2.0**-130
    tiny[0, 3] = torch.inf
    ops.score(tiny, torch.full((1, 64), 2.0**-130).bfloat16(), torch.zeros(1), out, backend="cpu")
    assert not bool(out.isfinite())


LARGE = """
    import os, torch
    from midstream.kernels import ops
    torch.manual_seed(0)
    hidden = torch.randn(2800, 2048).bfloat16()
    weight, bias = torch.randn(9, 2048).bfloat16(), torch.randn(9)
    score = ops.Backend("cpu", "cpu").bind_score(weight, bias, rms_norm=True)

    def scored(threads):
        torch.set_num_threads(threads)
        out = torch.full((2800, 9), torch.nan)
        score(hidden, out)
        return out

    one = scored(1)
    assert torch.equal(one, scored(3))
"""


def test_threads_change_no_bits_and_leave_quietly() -> None:
    assert run(LARGE + "    print('done')") == "done"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_of_a_fork_has_threads_of_its_own() -> None:
    """OpenMP would wait for its parent's threads there for ever."""
    code = """
    child = os.fork()
    if child == 0:
        same = torch.equal(scored(3), one)
        tasks = "/proc/self/task"
        os._exit(0 if same and (not os.path.exists(tasks) or len(os.listdir(tasks)) == 3) else 1)
    print(os.waitpid(child, 0)[1])
    """
    assert run(LARGE + code) == "0"


def test_callers_at_once_get_the_bits_of_one() -> None:
    """OpenMP gives each caller threads; a pool of ours serves one, and others run on their own."""
    torch.manual_seed(fresh_seed())
    hidden = torch.randn(1024, 4096).bfloat16()
    bound = ops.Backend("cpu", "cpu").bind_score(torch.randn(9, 4096).bfloat16(), torch.randn(9))
    expected = torch.zeros(1024, 9)
    bound(hidden, expected)

    def call(_: int) -> Tensor:
        out = torch.full((1024, 9), torch.nan)
        bound(hidden, out)
        return out

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for out in pool.map(call, range(40)):
                torch.testing.assert_close(out, expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_tensor_without_memory_is_refused() -> None:
    bound = ops.Backend("cpu", "cpu").bind_score(torch.ones(2, 8), torch.zeros(2))
    with FakeTensorMode(), pytest.raises(ValueError, match="no memory that the cpu backend"):
        bound(torch.ones(3, 8), torch.ones(3, 2))
    with pytest.raises((TypeError, AttributeError)):
        bound([[1.0] * 8], torch.ones(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(2, 8, device="meta"), torch.ones(2, device="meta"), "weight is on meta"),
        (torch._efficientzerotensor((2, 8)), torch.ones(2), "weight has no memory"),
        (torch.ones(2, 8), torch._efficientzerotensor(2), "bias has no memory"),
        (torch._neg_view(torch.ones(2, 8)), torch.ones(2), r"weight\.resolve_neg"),
    ],
)
def test_probes_without_values_to_read_are_refused(
    weight: Tensor, bias: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.score(torch.ones(3, 8), weight, bias, torch.zeros(3, 2), backend="cpu")


def test_tables_without_values_to_read_are_refused() -> None:
    tables = [type(t)(*(f.to("meta") for f in t.tensors())) for t in make_tables(0, start=0)]
    row = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="SlotTable is on meta"):
        ops.advance(torch.zeros(1, 9), row, row, *tables, backend="cpu")  # type: ignore[arg-type]


def test_unbound_advance_reuses_a_binding_of_the_same_memory_only() -> None:
    library._bound.clear()
    tables = make_tables(0, start=0)
    slot, position = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def advance() -> None:
        ops.advance(torch.zeros(1, 9), slot, position, *tables, backend="cpu")

    advance()
    position += 1
    tables.policy.halt_at.fill_(0.0)  # values are read anew
    advance()
    assert len(library._bound) == 1
    assert int(tables.slots.verdict[0]) == 2
    old = tables.slots.scored.clone()
    tables.slots.scored.set_(torch.zeros(6, dtype=torch.int32))  # other memory
    position += 1
    advance()
    assert len(library._bound) == 2
    assert int(tables.slots.scored[0]) == 1 != int(old[0])
    tables.slots.scored.resize_(5)
    with pytest.raises(ValueError, match=r"slots.scored has shape \[5\]"):
        advance()
    for seed in range(6):
        ops.advance(torch.zeros(1, 9), slot, position, *make_tables(seed, start=0), backend="cpu")
    assert len(library._bound) == library._MOST_BOUND


def compiler() -> list[str]:
    """A compiler whose sanitizers work, or a skip."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(name):
            trial = subprocess.run(
                [name, *SANITIZE, "-x", "c++", "-", "-o", os.devnull],
                input="int main() {}",
                capture_output=True,
                text=True,
                check=False,
            )
            if trial.returncode == 0:
                return [name, "-std=c++17", "-O1", "-g1", *SANITIZE, "-Icsrc/include", "-Icsrc/cpu"]
    pytest.skip("no compiler with address and undefined behaviour sanitizers")


@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are tried on Linux only")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """All entry points on odd sizes and pointers, the order of AMX tiles among them."""
    command = compiler()
    sources = [*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "tests/native/kernels.cpp"]

    def build(source: Path) -> str:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([*command, "-c", source, "-o", target], cwd=ROOT, check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = str(tmp_path / "kernels")
    subprocess.run([*command, *objects, "-pthread", "-ldl", "-o", program], cwd=ROOT, check=True)
    ran = subprocess.run(
        [program, str(fresh_seed())], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip() == f"ok, up to {_cpu.detected_isa()}"
