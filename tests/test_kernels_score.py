"""``score`` on every backend and instruction set, against fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Target, fresh_seed, targets
from torch import Tensor

from midstream.kernels import ops

WIDTHS = [1, 7, 33, 769, 5125]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


@pytest.fixture(params=targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.active() as active:
        yield active


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def draw(target: Target, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(target.device)


def score(target: Target, hidden: Tensor, weight: Tensor, bias: Tensor, **options: bool) -> Tensor:
    out = torch.full((len(hidden), len(weight)), math.nan, device=hidden.device)
    ops.score(hidden, weight, bias, out, eps=EPS, backend=target.backend, **options)
    return out


def exact(hidden: Tensor, weight: Tensor, bias: Tensor, rms_norm: bool) -> Tensor:
    x = hidden.double()
    if rms_norm:
        x = x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt()
    return x @ weight.double().T + bias.double()


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, rms_norm: bool) -> Tensor:
    """What one would write in PyTorch, in the dtype of the activations."""
    x = hidden
    if rms_norm:
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPS)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def tolerance(hidden: Tensor, weight: Tensor, bias: Tensor, rms_norm: bool) -> Tensor:
    """Twice the error of the plain expression, plus what any fp32 sum may be off by.

    A sum whose longest chain has h roundings is off by at most h u sum|x w|, u = 2^-24 (Higham,
    Accuracy and Stability, 4.2). The narrowest backend keeps 16 partial sums, which gives
    h = d / 16 + 4, and 4 more for product, scale and bias.
    """
    truth = exact(hidden, weight, bias, rms_norm)
    twice = 2 * (plain(hidden, weight, bias, rms_norm).double() - truth).abs()
    rounding = (hidden.shape[1] / 16 + 8) * 2**-24
    return twice + rounding * exact(hidden.abs(), weight.abs(), bias.abs(), rms_norm)


def check(target: Target, hidden: Tensor, weight: Tensor, bias: Tensor, rms_norm: bool) -> None:
    got = score(target, hidden, weight, bias, rms_norm=rms_norm).double()
    error = (got - exact(hidden, weight, bias, rms_norm)).abs()
    assert bool((error <= tolerance(hidden, weight, bias, rms_norm)).all())


@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_that_of_fp32(
    target: Target, width: int, dtype: torch.dtype, rms_norm: bool
) -> None:
    torch.manual_seed(fresh_seed())
    for probes in (1, 4, 7):
        hidden = draw(target, 3, width, dtype=dtype)
        weight = draw(target, probes, width) / math.sqrt(width)
        check(target, hidden, weight, draw(target, probes), rms_norm)


@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=name)
def test_every_column_counts_once(
    target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Unit vectors read the weights out, exactly: no column is dropped, doubled or misread."""
    torch.manual_seed(fresh_seed())
    width = 83  # one AVX-512 chunk of 64 and a tail; 5 AVX2 chunks of 16 and a tail
    weight = draw(target, 6, width, dtype=weight_dtype)
    hidden = torch.eye(width, dtype=hidden_dtype, device=target.device)
    zero = torch.zeros(6, device=target.device)
    if target.backend == "triton":
        hidden = hidden[[0, 1, 63, 64, 82]]
    got = score(target, hidden, weight, zero)
    expected = hidden.float() @ weight.float().T
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_all_halfs_are_read_exactly(target: Target) -> None:
    """Subnormals, both zeros and the largest numbers, for both 16-bit formats."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if target.backend == "triton":
        bits = bits[:: 2**11]
    zero = torch.zeros(1, device=target.device)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite()].to(target.device)[:, None]
        one = torch.ones(1, 1, device=target.device)
        torch.testing.assert_close(score(target, values, one, zero), values.float(), rtol=0, atol=0)
        if target.backend != "triton":  # a weight row per value
            got = score(target, one, values, torch.zeros(len(values), device=target.device))
            torch.testing.assert_close(got, values.float().T, rtol=0, atol=0)


def test_strided_rows_and_misaligned_pointers(target: Target) -> None:
    torch.manual_seed(fresh_seed())
    wide = draw(target, 8, 3 * 129 + 1, dtype=torch.bfloat16)
    hidden = wide[::2, 1:130]
    weight = draw(target, 9 * 129 + 1, dtype=torch.bfloat16)[1:].view(9, 129)
    bias = draw(target, 9)
    got = score(target, hidden, weight, bias, rms_norm=True)
    torch.testing.assert_close(
        got, score(target, hidden.contiguous(), weight.clone(), bias, rms_norm=True), rtol=0, atol=0
    )
    check(target, hidden, weight, bias, rms_norm=True)


def test_column_slice_leaves_its_neighbours(target: Target) -> None:
    torch.manual_seed(fresh_seed())
    hidden, weight, bias = draw(target, 5, 40), draw(target, 3, 40), draw(target, 3)
    buffer = torch.full((7, 11), -123.0, device=target.device)
    ops.score(hidden, weight, bias, buffer[1:6, 4:7], backend=target.backend)
    alone = score(target, hidden, weight, bias)
    torch.testing.assert_close(buffer[1:6, 4:7], alone, rtol=0, atol=0)
    buffer[1:6, 4:7] = -123.0
    assert bool((buffer == -123.0).all())


@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_row_does_not_depend_on_its_batch(
    target: Target, dtype: torch.dtype, rms_norm: bool
) -> None:
    """The same bits alone, in any batch and at any place: every rank must decide alike."""
    torch.manual_seed(fresh_seed())
    rows = 5 if target.backend == "triton" else 17
    hidden = draw(target, rows, 519, dtype=dtype)
    weight, bias = draw(target, 6, 519, dtype=dtype), draw(target, 6)
    together = score(target, hidden, weight, bias, rms_norm=rms_norm)
    order = torch.randperm(rows)
    hidden[order[0]] = math.nan  # not even a poisoned neighbour shows
    shuffled = score(target, hidden[order], weight, bias, rms_norm=rms_norm)
    torch.testing.assert_close(shuffled[1:], together[order][1:], rtol=0, atol=0)
    for n in order[1:4].tolist():
        alone = score(target, hidden[n : n + 1], weight, bias, rms_norm=rms_norm)
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=0)


def test_large_batch_is_its_rows(target: Target) -> None:
    """Enough rows to cross the reference's chunks and the size above which the GIL is released."""
    if target.backend == "triton":
        pytest.skip("the interpreter takes a millisecond per row")
    torch.manual_seed(fresh_seed())
    hidden, weight, bias = draw(target, 1100, 1031), draw(target, 5, 1031), draw(target, 5)
    got = score(target, hidden, weight, bias)
    for n in (0, 812, 813, 1099):
        alone = score(target, hidden[n : n + 1], weight, bias)
        torch.testing.assert_close(alone[0], got[n], rtol=0, atol=0)


def test_probe_does_not_depend_on_its_bank(target: Target) -> None:
    """On the CPU, blocks of probes and single ones add in the same order."""
    if target.backend == "triton":
        pytest.skip("its blocks follow the number of probes, which is fixed for a monitor")
    torch.manual_seed(fresh_seed())
    hidden, weight, bias = draw(target, 2, 1000), draw(target, 7, 1000), draw(target, 7)
    together = score(target, hidden, weight, bias, rms_norm=True)
    for p in range(7):
        alone = score(target, hidden, weight[p : p + 1], bias[p : p + 1], rms_norm=True)
        torch.testing.assert_close(alone[:, 0], together[:, p], rtol=0, atol=0)


@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "rms"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_poisoned_row_is_unscored_in_every_column(
    target: Target, dtype: torch.dtype, poison: float, rms_norm: bool
) -> None:
    torch.manual_seed(fresh_seed())
    weight, bias = draw(target, 5, 70), draw(target, 5)
    weight[2] = 0.0
    for column in (0, 69):
        hidden = draw(target, 3, 70, dtype=dtype)
        hidden[1, column] = poison
        finite = score(target, hidden, weight, bias, rms_norm=rms_norm).isfinite()
        assert finite.all(dim=1).tolist() == [True, False, True]
        assert not bool(finite[1].any())


def test_overflowing_sum_of_squares_is_unscored(target: Target) -> None:
    """1 / sqrt(inf) is 0, and every logit would be its bias: a finite lie."""
    hidden = torch.full((2, 20), 1e19, device=target.device)
    hidden[1] = 1e18  # 2e37: still finite
    weight = torch.full((2, 20), 1e-3, device=target.device)
    got = score(target, hidden, weight, torch.zeros(2, device=target.device), rms_norm=True)
    assert bool(got[0].isnan().all())
    torch.testing.assert_close(got[1], torch.full((2,), 0.02, device=target.device))


def test_zero_row_under_rms_norm(target: Target) -> None:
    zero = torch.zeros(2, 33, device=target.device)
    bias = draw(target, 3)
    got = score(target, zero, draw(target, 3, 33), bias, rms_norm=True)
    torch.testing.assert_close(got, bias.expand(2, 3), rtol=0, atol=0)


def test_no_rows(target: Target) -> None:
    assert score(target, draw(target, 0, 8), draw(target, 2, 8), draw(target, 2)).shape == (0, 2)
