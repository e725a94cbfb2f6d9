"""The C interface: a C program that links the library gets the reference's verdicts."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import fresh_seed, make_tables

from midstream.kernels import ops
from midstream.kernels.checks import check_tables
from midstream.kernels.tables import Verdict

ROOT = Path(__file__).resolve().parent.parent
WIDTH, TOKENS, START, SLOT, POLICY = 37, 60, 4, 1, 1

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not all(map(shutil.which, ("make", "cc", "c++"))),
    reason="make, cc and c++ are needed to build a C program",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make library`, and the program of tests/native/stream.c linked to it."""
    folder = tmp_path_factory.mktemp("c")
    library = folder / "libmidstream.so"
    subprocess.run(["make", "-s", "library", f"LIBRARY={library}"], cwd=ROOT, check=True)
    program = folder / "stream"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    link = [f"-L{folder}", "-lmidstream", f"-Wl,-rpath,{folder}"]
    command = ["cc", *strict, "-Icsrc/include", "tests/native/stream.c", *link, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def test_only_the_interface_is_exported(program: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", "--defined-only", str(program.with_name("libmidstream.so"))]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = {line.split()[-1] for line in symbols.splitlines()}
    assert {name for name in named if name.startswith("midstream_")} == {
        "midstream_add_rms_norm_score",
        "midstream_admit",
        "midstream_advance",
        "midstream_isa",
        "midstream_last_error",
        "midstream_probes_create",
        "midstream_probes_destroy",
        "midstream_score",
        "midstream_score_advance",
    }


@pytest.mark.parametrize("isa", ["generic", None])
def test_a_stream_gets_the_verdicts_of_the_reference(
    program: Path, tmp_path: Path, isa: str | None
) -> None:
    seed = fresh_seed()
    tables = make_tables(seed, start=START)
    sizes = check_tables(*tables)
    torch.manual_seed(seed)
    weight = torch.randn(sizes.probes, WIDTH) / WIDTH**0.5 * 2
    bias = torch.randn(sizes.probes)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16()
    hidden[20, 3] = torch.nan  # an unscored token
    tables.slots.admit(SLOT, start=START, policy=POLICY, prior=tables.chain.prior)

    want = []
    for t in range(TOKENS):
        ops.score_advance(
            hidden[t : t + 1],
            weight,
            bias,
            torch.empty(1, sizes.probes),
            torch.tensor([SLOT], dtype=torch.int32),
            torch.tensor([t], dtype=torch.int32),
            *tables,
            backend="reference",
        )
        slots = tables.slots
        want.append((int(slots.verdict[SLOT]), float(slots.risk[SLOT]), int(slots.cause[SLOT])))

    arrays = [weight, bias]
    for table in (tables.evidence, tables.chain, tables.policy):
        arrays += table.tensors()
    path = tmp_path / "input"
    numbers = struct.pack("=12q", *sizes.values(), WIDTH, TOKENS, START, POLICY)
    path.write_bytes(
        numbers
        + b"".join(array.numpy().tobytes() for array in arrays)
        + hidden.view(torch.int16).numpy().tobytes()
    )
    environment = {k: v for k, v in os.environ.items() if k != "MIDSTREAM_CPU_ISA"}
    if isa:
        environment["MIDSTREAM_CPU_ISA"] = isa
    ran = subprocess.run(
        [program, path], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [int(position) for position, *_ in lines] == list(range(TOKENS))
    verdicts = [int(verdict) for _, verdict, _, _ in lines]
    assert verdicts == [verdict for verdict, _, _ in want]
    assert [int(cause) for *_, cause in lines] == [cause for *_, cause in want]
    risks = torch.tensor([float(risk) for _, _, risk, _ in lines])
    torch.testing.assert_close(
        risks, torch.tensor([risk for _, risk, _ in want]), atol=2e-5, rtol=0
    )
    assert max(verdicts) > Verdict.CONTINUE, "the stream shows no verdict but one"


def test_a_bad_cap_is_an_error_with_a_message(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(struct.pack("=12q", 2, 1, 2, 1, 1, 0, 0, 1, 1, 0, 0, 0) + bytes(8))
    ran = subprocess.run(
        [program, path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MIDSTREAM_CPU_ISA": "sse9"},
    )
    assert ran.returncode == 1
    assert "MIDSTREAM_CPU_ISA is 'sse9'" in ran.stderr
