"""Dispatch, named capabilities, argument errors, and the ops as torch sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from kernel_cases import Tables, make_tables, targets
from torch import Tensor

from midstream.kernels import backends, ops
from midstream.kernels.tables import SlotTable

BUILT = ops.capabilities()["cpu"].available
BACKENDS = sorted({target.backend for target in targets() if target.device == "cpu"})


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def score_arguments() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(3, 48, dtype=torch.bfloat16),
        "weight": torch.randn(4, 48),
        "bias": torch.randn(4),
        "out": torch.zeros(3, 4),
    }


def advance_arguments() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.tensor(np.random.default_rng(0).normal(size=(4, 9)), dtype=torch.float32)
    slot = torch.tensor([0, 0, -1, 2], dtype=torch.int32)
    return logits, slot, torch.tensor([3, 4, 0, 5], dtype=torch.int32)


# Dispatch


def test_every_backend_is_named_and_the_missing_have_reasons() -> None:
    found = ops.capabilities()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"].available
    for name, capability in found.items():
        assert capability.name == name
        assert capability.available == (not capability.reason)


def test_the_rule() -> None:
    assert ops.resolve("cpu") == ("cpu" if BUILT else "reference")
    assert ops.resolve(torch.device("cpu"), "reference") == "reference"
    can = ops.capabilities()
    gpu = [name for name in ("cuda", "triton", "reference") if can[name].available]
    assert ops.resolve("cuda:0") == gpu[0]
    assert ops.resolve("meta") == "reference"


@pytest.mark.parametrize("missing", ["cpu", "triton", "cuda"])
def test_missing_backend_is_refused_by_name_and_passed_over_by_the_rule(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends._MISSING, missing, lambda: "it is not here; build it")
    device = "cpu" if missing == "cpu" else "cuda"
    assert ops.resolve(device) != missing
    with pytest.raises(ops.BackendUnavailableError, match=f"'{missing}'.*not here; build it"):
        ops.resolve(device, missing)
    assert ops.capabilities()[missing] == ops.Capability(missing, False, "it is not here; build it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_without_a_gpu_says_so() -> None:
    with pytest.raises(ops.BackendUnavailableError, match="no CUDA device"):
        ops.score(**score_arguments(), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_says_so() -> None:
    with pytest.raises(ops.BackendUnavailableError, match=r"no CUDA device|extension is missing"):
        ops.score(**score_arguments(), backend="cuda")


def test_cuda_comes_before_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._MISSING, name, lambda: "")
    assert ops.resolve("cuda") == "cuda"
    with pytest.raises(
        ops.BackendUnavailableError, match="works on cuda tensors, these are on cpu"
    ):
        ops.resolve("cpu", "cuda")
    monkeypatch.setitem(backends._MISSING, "cuda", lambda: "not built")
    assert ops.resolve("cuda") == "triton"


def test_backend_on_the_wrong_device() -> None:
    if BUILT:
        with pytest.raises(ops.BackendUnavailableError, match=r"works on cpu tensors.*on cuda"):
            ops.resolve("cuda", "cpu")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="no backend 'cuda12'; choose from reference, cpu, triton"):
        ops.score(**score_arguments(), backend="cuda12")


def test_without_the_extension_the_reference_serves() -> None:
    """An installation without a compiler works, and says why it is slow."""
    ran = python(
        "import sys; sys.modules['midstream.kernels._cpu'] = None\n"
        "from midstream.kernels import ops\n"
        "print(ops.Backend('cpu').name, ops.capabilities()['cpu'].reason)"
    )
    assert ran.stdout.startswith("reference the C++ extension is missing ("), ran.stderr


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")
def test_isa_cap_of_the_environment() -> None:
    code = "from midstream.kernels import _cpu; print(_cpu.isa())"
    assert python(code, MIDSTREAM_CPU_ISA="generic").stdout.strip() == "generic"


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")
def test_unknown_isa_is_an_error_and_no_fallback() -> None:
    """A typing error must not select another code path without a word."""
    ran = python(
        "import torch; from midstream.kernels import ops\n"
        "print(ops.capabilities()['cpu'].reason)\n"
        "ops.Backend('cpu').bind_score(torch.ones(1, 4), torch.ones(1))",
        MIDSTREAM_CPU_ISA="avx1024",
    )
    message = "MIDSTREAM_CPU_ISA is 'avx1024'; use one of generic, avx2, avx512, avx512bf16, amx"
    assert ran.stdout.strip() == message
    assert f"ValueError: {message}" in ran.stderr


# Bad arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 48, dtype=torch.int32)}, TypeError, "hidden is torch.int32"),
        ({"hidden": torch.zeros(3, 47)}, ValueError, r"hidden has shape \[3, 47\].*\[N, 48\]"),
        ({"hidden": torch.zeros(48)}, ValueError, r"hidden has shape \[48\]"),
        ({"hidden": torch.zeros(48, 3).T}, ValueError, r"hidden has strides \(1, 3\)"),
        ({"hidden": torch.zeros(3, 48, device="meta")}, Exception, "meta"),
        ({"weight": torch.zeros(4, 48).double()}, TypeError, "weight is torch.float64"),
        ({"weight": torch.zeros(0, 48)}, ValueError, r"weight has shape \[0, 48\]"),
        ({"weight": torch.zeros(48, 4).T}, ValueError, r"weight has strides \(1, 4\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \[5\], expected \[4\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias is torch.float16"),
        ({"out": torch.zeros(3, 5)}, ValueError, r"out has shape \[3, 5\], expected \[3, 4\]"),
        ({"out": torch.zeros(3, 4).half()}, TypeError, "out is torch.float16"),
        ({"out": torch.zeros(4, 3).T}, ValueError, r"out has strides \(1, 3\)"),
        ({"out": torch.zeros(1, 4).expand(3, 4)}, ValueError, r"\(0, 1\).* do not overlap"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_score_names_the_bad_argument(
    backend: str, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.score(**score_arguments() | change, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("which", "value", "error", "message"),
    [
        (0, torch.zeros(4, 9).double(), TypeError, "logits is torch.float64"),
        (0, torch.zeros(4, 8), ValueError, r"logits has shape \[4, 8\], expected \[N, 9\]"),
        (0, torch.zeros(9, 4).T, ValueError, r"logits has strides \(1, 4\)"),
        (0, torch.zeros(1, 9).expand(4, 9), ValueError, r"logits .*\(0, 1\).* do not overlap"),
        (1, torch.zeros(4, dtype=torch.int64), TypeError, "slot is torch.int64"),
        (1, torch.zeros(3, dtype=torch.int32), ValueError, r"slot has shape \[3\]"),
        (1, torch.zeros(8, dtype=torch.int32)[::2], ValueError, r"slot has strides \(2,\)"),
        (2, torch.zeros(4), TypeError, "position is torch.float32"),
        (2, torch.zeros(4, 1, dtype=torch.int32), ValueError, r"position has shape \[4, 1\]"),
    ],
)
def test_advance_names_the_bad_argument(
    backend: str, which: int, value: Tensor, error: type[Exception], message: str
) -> None:
    arguments = list(advance_arguments())
    arguments[which] = value
    with pytest.raises(error, match=message):
        ops.advance(*arguments, *make_tables(0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_field_of_every_table_is_checked(backend: str) -> None:
    tables = make_tables(0)
    bind = ops.Backend("cpu", backend).bind_advance
    bind(*tables)
    for name, table in zip(Tables._fields, tables, strict=True):
        for field in fields(table):
            tensor = getattr(table, field.name)
            wrong_dtype = replace(table, **{field.name: tensor.double()})
            with pytest.raises(TypeError, match=f"{name}.{field.name} is torch.float64"):
                bind(**tables._asdict() | {name: wrong_dtype})
            longer = torch.cat([tensor, tensor])
            with pytest.raises(ValueError, match="has shape"):
                bind(**tables._asdict() | {name: replace(table, **{field.name: longer})})
            apart = torch.stack([tensor, tensor], dim=-1)[..., 0]
            with pytest.raises(ValueError, match=f"{name}.{field.name} has strides"):
                bind(**tables._asdict() | {name: replace(table, **{field.name: apart})})


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")
def test_too_many_states_for_the_stack() -> None:
    tables = make_tables(0, states=64)
    with pytest.raises(ValueError, match=r"65 states, the cpu backend takes 64.*'reference'"):
        ops.Backend("cpu", "cpu").bind_advance(*tables)
    ops.Backend("cpu", "reference").bind_advance(*tables)
    ops.Backend("cpu", "cpu").bind_advance(*make_tables(0, states=63))


def test_memory_of_a_slot_is_the_stated_formula() -> None:
    table = SlotTable.allocate(3, 7, 5, window=4, trace=6)
    assert table.nbytes() == 3 * SlotTable.bytes_per_slot(7, 5, window=4, trace=6)


# The ops as torch sees them


def as_lists(tables: Tables) -> list[list[Tensor]]:
    return [table.tensors() for table in tables]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    score = score_arguments()
    options = {"rms_norm": True, "eps": 1e-5, "backend": backend}
    torch.library.opcheck(torch.ops.midstream.score.default, tuple(score.values()), options)
    torch.library.opcheck(
        torch.ops.midstream.advance.default,
        (*advance_arguments(), *as_lists(make_tables(0, trace=2))),
        {"backend": backend},
    )


@pytest.mark.parametrize(
    ("compiler", "bound"),
    [("aot_eager", False), ("aot_eager", True), ("inductor", True)],
    ids=["aot-plain", "aot-bound", "inductor-bound"],
)
def test_compiled_step_has_one_graph_and_the_same_result(compiler: str, bound: bool) -> None:
    """Two taps write into one buffer, then ``advance``; the trace shows the logits it was given."""
    torch.compiler.reset()
    torch.manual_seed(0)
    weight, bias = torch.randn(9, 48), torch.randn(9)
    eager = make_tables(3)
    compiled = eager.clone()

    def step_on(tables: Tables) -> Callable[..., Tensor]:
        if bound:
            backend = ops.Backend("cpu")
            first = backend.bind_score(weight[:4], bias[:4], rms_norm=True)
            second = backend.bind_score(weight[4:], bias[4:])
            advance = backend.bind_advance(*tables)
        else:
            first = partial(_score_into, weight[:4], bias[:4], rms_norm=True)
            second = partial(_score_into, weight[4:], bias[4:])

            def advance(logits: Tensor, slot: Tensor, position: Tensor) -> None:
                ops.advance(logits, slot, position, *tables)

        def step(x: Tensor, logits: Tensor, slot: Tensor, position: Tensor) -> Tensor:
            first(x, logits[:, :4])
            x = x.relu()
            second(x, logits[:, 4:])
            advance(logits, slot, position)
            return x

        return step

    fast = torch.compile(step_on(compiled), fullgraph=True, backend=compiler)
    slow = step_on(eager)
    slot = torch.tensor([1, 4, -1], dtype=torch.int32)
    for t in range(6):
        x = torch.randn(3, 48)
        position = torch.full((3,), t, dtype=torch.int32)
        for step in (fast, slow):
            logits = torch.zeros(3, 9)
            torch.testing.assert_close(step(x, logits, slot, position), x.relu(), rtol=0, atol=0)
            assert bool(logits.isnan().all())
    assert int(compiled.slots.position[4]) == 6
    for name, a, b in zip(
        eager.slots.__dataclass_fields__,
        eager.slots.tensors(),
        compiled.slots.tensors(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def _score_into(weight: Tensor, bias: Tensor, hidden: Tensor, out: Tensor, **options: bool) -> None:
    ops.score(hidden, weight, bias, out, **options)


def test_training_a_model_is_not_disturbed() -> None:
    """Scores are read off a graph of autograd without becoming part of it."""
    for backend in BACKENDS:
        arguments = score_arguments()
        arguments["hidden"] = arguments["hidden"].float().requires_grad_()
        ops.score(**arguments, backend=backend)
        assert not arguments["out"].requires_grad
