"""The Triton backend without a GPU: its interpreter for results, its compiler for resources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from midstream.kernels.checks import Sizes
from midstream.kernels.launch import advance_launch, score_launch

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from midstream.kernels import triton_advance, triton_score  # noqa: E402

TESTS = Path(__file__).parent
CAPABILITIES = [80, 90, 100]
POINTERS = {
    "hidden": "bf16",
    "weight": "bf16",
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
    "out_stride": "i32",
    "logits_stride": "i32",
    "rows": "i32",
    "slots": "i32",
    "eps": "fp32",
}


def resources(
    kernel: object, constants: dict[str, object], warps: int, capability: int, **types: str
) -> dict[str, int]:
    """Compile a kernel to a cubin and return what cuobjdump says it uses. Needs no driver."""
    names = kernel.arg_names
    pointers = POINTERS | types
    signature = {
        name: "constexpr"
        if name in constants
        else SCALARS.get(name) or f"*{pointers.get(name, 'fp32')}"
        for name in names
    }
    # As at run time: torch aligns storage to at least 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def assert_in_registers(used: dict[str, int], warps: int) -> None:
    """No spill and no local array; few enough registers for two programs of this size at once."""
    assert used["LOCAL"] == 0, used
    assert used["STACK"] == 0, used
    assert used["REG"] * warps * 32 * 2 <= 65536, used


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("probes", "width", "hidden", "weight", "rms_norm"),
    [
        (1, 4096, "bf16", "bf16", False),
        (8, 4096, "bf16", "bf16", True),
        (16, 8192, "fp16", "fp32", True),
        (64, 5125, "fp32", "fp32", True),
        (5, 33, "bf16", "fp32", False),
    ],
)
def test_score_compiles_without_spills(
    probes: int, width: int, hidden: str, weight: str, rms_norm: bool, capability: int
) -> None:
    launch = score_launch(probes, width)
    constants = {
        "PROBES": probes,
        "WIDTH": width,
        "RMS_NORM": rms_norm,
        "BLOCK_PROBES": launch.block_probes,
        "BLOCK_WIDTH": launch.block_width,
    }
    used = resources(
        triton_score.score_kernel,
        constants,
        launch.num_warps,
        capability,
        hidden=hidden,
        weight=weight,
    )
    assert_in_registers(used, launch.num_warps)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(64, 8, 6, 8, 4, 0, 0, 3),
        Sizes(64, 8, 6, 8, 4, 16, 256, 3),
        Sizes(512, 1, 2, 1, 1, 1, 1, 1),
        Sizes(64, 64, 17, 32, 9, 64, 64, 12),
        Sizes(8, 100, 64, 64, 64, 32, 0, 3),
    ],
    ids=lambda sizes: f"P{sizes.probes}-K{sizes.states - 1}-M{sizes.window}-L{sizes.trace}",
)
def test_advance_compiles_without_spills(sizes: Sizes, capability: int) -> None:
    launch = advance_launch(sizes)
    constants = {
        "PROBES": sizes.probes,
        "STATES": sizes.states,
        "BINS": sizes.bins,
        "PROMPT_BINS": sizes.prompt_bins,
        "WINDOW": sizes.window,
        "TRACE": sizes.trace,
        "POLICIES": sizes.policies,
        "BLOCK_PROBES": launch.block_probes,
        "BLOCK_STATES": launch.block_states,
        "BLOCK_EDGES": launch.block_edges,
        "BLOCK_PROMPT_EDGES": launch.block_prompt_edges,
        "BLOCK_WINDOW": launch.block_window,
    }
    used = resources(triton_advance.advance_kernel, constants, launch.num_warps, capability)
    assert_in_registers(used, launch.num_warps)


def test_results_in_the_interpreter() -> None:
    """The tests of both ops, in a process of its own: the variable counts when Triton is imported.

    On a GPU the same tests run in this process, on CUDA tensors.
    """
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"),
            # NumPy warns where a kernel computes an Inf that the test put there.
            *("-W", "ignore::RuntimeWarning:triton", "-W", "ignore::RuntimeWarning:numpy"),
            *(str(TESTS / name) for name in ("test_kernels_score.py", "test_kernels_advance.py")),
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


@pytest.mark.parametrize("probes", [1, 3, 8, 64, 200])
@pytest.mark.parametrize("width", [1, 33, 4096, 8192])
def test_score_launch_covers_everything_once(probes: int, width: int) -> None:
    launch = score_launch(probes, width)
    rows, blocks = launch.grid(7, probes)
    assert rows == 7
    assert probes <= blocks * launch.block_probes < probes + launch.block_probes
    assert launch.block_probes * launch.block_width <= 32 * 32 * launch.num_warps


def test_advance_launch_covers_everything() -> None:
    launch = advance_launch(Sizes(64, 9, 6, 8, 1, 3, 0, 3))
    assert launch.block_probes == 16
    assert launch.block_states == 8
    assert launch.block_edges == 8
    assert launch.block_prompt_edges == 1
    assert launch.block_window == 4
    assert launch.num_warps == 1
    assert advance_launch(Sizes(64, 64, 6, 8, 1, 64, 0, 3)).num_warps == 4
