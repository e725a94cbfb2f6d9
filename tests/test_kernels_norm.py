"""``add_rms_norm_score`` on every backend and instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from kernel_cases import Target, fresh_seed, targets
from torch import Tensor

from midstream.kernels import ops

WIDTHS = [1, 7, 769, 4097]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORM_EPS = 1e-5  # not that of the probes
EPS = 1e-6
BACKENDS = sorted({target.backend for target in targets() if target.device == "cpu"})


@pytest.fixture(params=targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.active() as active:
        yield active


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    x: Tensor
    residual: Tensor
    gamma: Tensor
    weight: Tensor
    bias: Tensor


def draw(target: Target, rows: int, width: int, probes: int, dtype: torch.dtype) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape)

    case = Case(
        normal(rows, width).to(dtype),
        (3 * normal(rows, width)).to(dtype),
        (1 + 0.3 * normal(width)).to(dtype),
        (normal(probes, width) / math.sqrt(width)).to(dtype),
        normal(probes),
    )
    return Case(*(tensor.to(target.device) for tensor in case))


def run(
    target: Target, case: Case, norm_eps: float = NORM_EPS, rms_norm: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, residual and out as they are afterwards."""
    x, residual = case.x.clone(), case.residual.clone()
    out = torch.full((len(x), len(case.weight)), math.nan, device=x.device)
    ops.add_rms_norm_score(
        x,
        residual,
        case.gamma,
        norm_eps,
        case.weight,
        case.bias,
        out,
        rms_norm=rms_norm,
        eps=EPS,
        backend=target.backend,
    )
    return x, residual, out


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of a format at each value."""
    info = torch.finfo(dtype)
    exponent = values.double().abs().clamp_min(info.tiny).log2().floor()
    return info.eps * torch.exp2(exponent)


def check_normed(case: Case, x: Tensor, residual: Tensor) -> None:
    """The normed rows against fp64.

    Rounding the quotient costs half an ulp, rounding the product with gamma another half; the fp32
    scale before is off by little more than a sum of d / 4 + 8 roundings, which a 16-bit format does
    not see except as a tie that falls the other way.
    """
    dtype = x.dtype
    rows = residual.double()
    scale = (rows.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
    truth = case.gamma.double() * rows * scale
    fp32 = (residual.shape[1] / 4 + 8) * 2**-24 * truth.abs()
    bound = 1.01 * (ulp(truth, dtype) + case.gamma.double().abs() * ulp(rows * scale, dtype)) / 2
    # A product that lands in the next binade counts in its steps.
    assert bool(((x.double() - truth).abs() <= 2 * bound + fp32).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", WIDTHS)
def test_sum_norm_and_logits(target: Target, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    for probes in (1, 6):
        case = draw(target, 5, width, probes, dtype)
        x, residual, out = run(target, case)
        torch.testing.assert_close(residual, case.x + case.residual, rtol=0, atol=0)
        check_normed(case, x, residual)
        alone = torch.full_like(out, math.nan)
        ops.score(
            residual, case.weight, case.bias, alone, rms_norm=True, eps=EPS, backend=target.backend
        )
        # A fused kernel on a GPU may cut a row elsewhere: two fp32 sums of N(0, 1) size then differ
        # by a few ulp.
        off = 0.0 if target.backend in ("reference", "cpu") else 1e-5
        torch.testing.assert_close(out, alone, rtol=off, atol=off)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_roundings_are_those_of_the_model(target: Target, dtype: torch.dtype) -> None:
    """As transformers' LlamaRMSNorm: nearly every element has its bits."""
    torch.manual_seed(fresh_seed())
    case = draw(target, 4, 1031, 2, dtype)
    x, _, _ = run(target, case)
    rows = (case.x + case.residual).float()
    normed = rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + NORM_EPS)
    expected = case.gamma * normed.to(dtype)
    if dtype == torch.float32:
        # Two roundings of products on either side, and half the error of two sums of 1031 squares
        # in chains of at most 1031 / 16 + 8 roundings: some 40 of 2^-24.
        torch.testing.assert_close(x, expected, rtol=40 * 2**-24, atol=0)
    else:
        assert float((x == expected).float().mean()) > 0.99


def test_every_rounding_of_the_sum(target: Target) -> None:
    """Ties, subnormals, overflow to infinity and both zeros, for both 16-bit formats."""
    torch.manual_seed(fresh_seed())
    for dtype in (torch.float16, torch.bfloat16):
        count = 64 if target.backend == "triton" else 4096
        bits = torch.randint(-(2**15), 2**15, (2, count, 3)).to(torch.int16)
        a, b = bits.view(dtype).to(target.device)
        b[:16], b[16:32] = a[:16] / 256, -a[16:32]
        case = Case(
            a, b, torch.ones_like(a[0]), a[:1].nan_to_num(0, 0, 0), torch.zeros(1).to(a.device)
        )
        _, residual, _ = run(target, case)
        expected = a + b
        if target.backend == "triton" and target.device == "cpu":
            # Triton's interpreter reads and rounds numbers next to the subnormals of bf16 in its
            # own way; a subnormal term shows in sums of 24 times the smallest normal.
            values = torch.stack([expected, a, b])
            tiny = ((values != 0) & (values.abs() < 2 * torch.finfo(dtype).tiny)).any(dim=0)
            residual, expected = residual.masked_fill(tiny, 0), expected.masked_fill(tiny, 0)
        torch.testing.assert_close(residual, expected, rtol=0, atol=0, equal_nan=True)


def test_strides_misaligned_pointers_and_neighbours(target: Target) -> None:
    """Rows in wider buffers, an element off any alignment; what stands between them stays."""
    torch.manual_seed(fresh_seed())
    width, dtype = 129, torch.bfloat16
    case = draw(target, 4, width, 9, dtype)
    wide_x = torch.full((8, width + 2), 7.0, dtype=dtype, device=target.device)
    wide_residual = torch.full((4, 2 * width + 1), 7.0, dtype=dtype, device=target.device)
    x, residual = wide_x[::2, 1:-1], wide_residual[:, 1 : width + 1]
    x.copy_(case.x), residual.copy_(case.residual)
    gamma = torch.cat([case.gamma[:1], case.gamma])[1:]
    buffer = torch.full((4, 20), -123.0, device=target.device)
    bound = ops.Backend(target.device, target.backend).bind_add_rms_norm_score(
        case.weight, case.bias, rms_norm=True, eps=EPS
    )
    bound(x, residual, gamma, NORM_EPS, buffer[:, 3:12])
    for got, expected in zip((x, residual, buffer[:, 3:12]), run(target, case), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    x.fill_(7.0), residual.fill_(7.0), buffer[:, 3:12].fill_(-123.0)
    assert bool((wide_x == 7.0).all() and (wide_residual == 7.0).all() and (buffer == -123.0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_row_does_not_depend_on_its_batch(target: Target, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    rows = 4 if target.backend == "triton" else 11
    case = draw(target, rows, 519, 5, dtype)
    together = run(target, case)
    order = torch.randperm(rows)
    case.x[order[0]] = math.nan  # not even a poisoned neighbour shows
    shuffled = run(target, case._replace(x=case.x[order], residual=case.residual[order]))
    for a, b in zip(shuffled, together, strict=True):
        torch.testing.assert_close(a[1:], b[order][1:], rtol=0, atol=0)
    n = int(order[-1])
    alone = run(target, case._replace(x=case.x[n : n + 1], residual=case.residual[n : n + 1]))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a[0], b[n], rtol=0, atol=0)


@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "rms"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_poisoned_row_is_unscored_in_every_column(
    target: Target, poison: float, rms_norm: bool
) -> None:
    torch.manual_seed(fresh_seed())
    for which in ("x", "residual"):
        case = draw(target, 3, 70, 5, torch.bfloat16)
        case.weight[2] = 0.0
        getattr(case, which)[1, 69] = poison
        x, residual, out = run(target, case, rms_norm=rms_norm)
        assert out.isfinite().all(dim=1).tolist() == [True, False, True]
        assert not bool(out[1].isfinite().any())
        assert not bool(residual[1, 69].isfinite())
        assert bool(x[1, 69].isnan())
        assert bool(x[[0, 2]].isfinite().all())


def test_norm_eps_is_not_that_of_the_probes(target: Target) -> None:
    torch.manual_seed(fresh_seed())
    case = draw(target, 2, 33, 3, torch.float32)
    x, residual, out = run(target, case, norm_eps=3.0)
    rows = residual.double()
    scale = (rows.square().mean(dim=1, keepdim=True) + 3.0).rsqrt()
    torch.testing.assert_close(x.double(), case.gamma * rows * scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out, run(target, case)[2], rtol=0, atol=0)


def test_no_rows(target: Target) -> None:
    x, residual, out = run(target, draw(target, 0, 8, 2, torch.bfloat16))
    assert x.shape == residual.shape == (0, 8)
    assert out.shape == (0, 2)


def arguments() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(3, 48, dtype=torch.bfloat16),
        "residual": torch.randn(3, 48, dtype=torch.bfloat16),
        "gamma": torch.randn(48, dtype=torch.bfloat16),
        "weight": torch.randn(4, 48),
        "bias": torch.randn(4),
        "out": torch.zeros(3, 4),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 48)}, TypeError, "x is torch.float32, expected torch.bfloat16"),
        ({"x": torch.zeros(2, 48).bfloat16()}, ValueError, r"x has shape \[2, 48\]"),
        ({"x": torch.zeros(48, 3).bfloat16().T}, ValueError, r"x has strides \(1, 3\)"),
        ({"residual": torch.zeros(3, 48).int()}, TypeError, "residual is torch.int32"),
        ({"residual": torch.zeros(3, 47).bfloat16()}, ValueError, r"residual has shape \[3, 47\]"),
        ({"residual": torch.zeros(48).bfloat16()}, ValueError, r"residual has shape \[48\]"),
        (
            {"residual": torch.zeros(48, 3).bfloat16().T},
            ValueError,
            r"residual has strides \(1, 3\)",
        ),
        ({"gamma": torch.zeros(48)}, TypeError, "gamma is torch.float32, expected torch.bfloat16"),
        ({"gamma": torch.zeros(47).bfloat16()}, ValueError, r"gamma has shape \[47\]"),
        ({"gamma": torch.zeros(96).bfloat16()[::2]}, ValueError, r"gamma has strides \(2,\)"),
        ({"weight": torch.zeros(4, 48).double()}, TypeError, "weight is torch.float64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \[5\], expected \[4\]"),
        ({"out": torch.zeros(3, 5)}, ValueError, r"out has shape \[3, 5\], expected \[3, 4\]"),
        ({"out": torch.zeros(3, 4).half()}, TypeError, "out is torch.float16"),
        ({"out": torch.zeros(4, 3).T}, ValueError, r"out has strides \(1, 3\)"),
        ({"out": torch.zeros(1, 4).expand(3, 4)}, ValueError, "out .* do not overlap"),
        ({"x": torch.zeros(1, 48).bfloat16().expand(3, 48)}, ValueError, "x .* do not overlap"),
        (
            {"residual": torch.zeros(1, 48).bfloat16().expand(3, 48)},
            ValueError,
            "residual .* do not overlap",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named(
    backend: str, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    given = arguments() | change
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(error, match=message):
        ops.add_rms_norm_score(**given, norm_eps=NORM_EPS, backend=backend)
    for key, tensor in given.items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    a = arguments()
    torch.library.opcheck(
        torch.ops.midstream.add_rms_norm_score.default,
        (a["x"], a["residual"], a["gamma"], NORM_EPS, a["weight"], a["bias"], a["out"]),
        {"rms_norm": True, "eps": EPS, "backend": backend},
    )
