"""fp8_linear on the CPU, where sums are exact: rounding by the arithmetic of e4m3 and no more.

An e4m3 number has 3 mantissa bits: between 2 ** e and 2 ** (e + 1) they lie 2 ** (e - 3) apart, and
below 2 ** -6 they lie 2 ** -9 apart. Rounding to nearest errs by half of that at most, and, where
it errs evenly, by 1 / sqrt(12) of it RMS. All that is allowed here follows from these spacings.
"""

from importlib import import_module

import pytest
import torch

from sda_fast import ops, reference
from sda_fast.reference.fp8_linear import quantise_rows

module = import_module("sda_fast.ops.fp8_linear")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, DEPTH, WIDTH = 48, 512, 96


def draw(shape=(ROWS, DEPTH), dtype=torch.float32, width=WIDTH):
    """x, weight and bias."""
    x = torch.randn(shape).to(dtype)
    return x, torch.randn(width, shape[-1]) / shape[-1] ** 0.5, torch.randn(width).to(dtype)


def dequantise(values, scale):
    return values.double() * scale.double()[..., None]


def spacing(x, scale):
    """Of e4m3 numbers around x / scale, times scale."""
    exponent = torch.frexp(x.double() / scale.double()[..., None])[1] - 1
    return torch.exp2(exponent.clamp(min=-6) - 3.0) * scale.double()[..., None]


def half_spacing(x, scale):
    """What rounding errs by at most; the two float32 roundings ahead of it count, too."""
    return spacing(x, scale) / 2 + 2**-21 * x.abs().double()


def rms(t):
    return t.double().square().mean().sqrt().item()


def gradient(y, x, d_y):
    return torch.autograd.grad(y, x, d_y)[0]


def same_bits(a, b):
    as_bits = lambda t: t.contiguous().view(torch.uint8)
    return a.dtype == b.dtype and torch.equal(as_bits(a), as_bits(b))


# --- quantisation ---------------------------------------------------------------------------------


def test_values_are_the_nearest_of_all_e4m3_numbers_and_ties_go_to_even():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = every[every.isfinite()].unique()
    assert numbers.max() == 448
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), 100 * torch.randn(999)])
    x = x[x.abs() <= 448].float()
    assert x.max() == 448  # the scale is 1
    values, scale = quantise_rows(x)
    assert scale == 1
    distance = (x.double()[:, None] - numbers).abs()
    error = (values.double() - x).abs()
    assert torch.equal(error, distance.amin(1))
    tied = (distance == error[:, None]).sum(1) == 2
    assert int(tied.sum()) == len(ties)
    assert (values.view(torch.uint8)[tied] & 1).eq(0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5e2])
def test_the_largest_of_a_row_is_448_and_no_element_is_off_by_more_than_half_a_spacing(
    scale, dtype
):
    x = (scale * torch.randn(64, 1000)).to(dtype)
    values, row_scale = quantise_rows(x)
    assert values.double().abs().amax(-1).eq(448).all()
    torch.testing.assert_close(
        row_scale.double() * 448, x.abs().amax(-1).double(), rtol=2e-7, atol=0
    )
    error = (dequantise(values, row_scale) - x).abs()
    assert (error <= half_spacing(x.float(), row_scale)).all()
    # what the documentation says of it
    normal = x.abs() >= 2**-6 * row_scale[:, None]
    assert (error <= x.abs().double() * (1 / 17 + 2**-20))[normal].all()
    assert error[normal].square().sum().sqrt() / x[normal].double().norm() == pytest.approx(
        0.0255, abs=0.001
    )


def test_rows_of_zeros_tiny_rows_and_rows_that_are_not_finite():
    x = torch.randn(5, 8)
    x[0], x[1] = 0, x[1] * 1e-38
    x[2, 3], x[3, 2] = float("-inf"), float("nan")
    values, scale = quantise_rows(x)
    assert scale[0] == 1
    assert values[:2].double().eq(0).all()
    assert scale[1] == torch.tensor(2.0**-100) / 448
    assert scale[2] == float("inf")
    assert dequantise(values, scale)[2].isnan().all()
    assert values[3].double().isnan().all()
    y = ops.fp8_linear(x, ops.Fp8Weight.of(torch.randn(4, 8)))
    assert y[:2].eq(0).all()
    assert y[2:4].isnan().all()
    assert y[4].isfinite().all()


# --- the error of a product -----------------------------------------------------------------------


def allowed(a, b):
    """Of a @ b.T, each given as (exact, what rounding errs by at most)."""
    (x, dx), (w, dw) = ((t.abs().double(), d) for t, d in (a, b))
    return dx @ w.T + x @ dw.T + dx @ dw.T


def expected_rms(a, b):
    """Of a @ b.T, each given as (exact, spacing): of independent, even errors."""
    (x, sx), (w, sw) = ((t.double().square(), s.square() / 12) for t, s in (a, b))
    return (sx @ w.T + x @ sw.T + sx @ sw.T).mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_errs_by_what_its_operands_are_rounded_by(dtype):
    x, w, bias = draw(dtype=dtype)
    x *= torch.logspace(-3, 2, ROWS)[:, None]  # rows that one scale could not serve
    weight = ops.Fp8Weight.of(w)
    exact = x.double() @ w.double().T
    scale = quantise_rows(x)[1]
    half = allowed((x, half_spacing(x, scale)), (w, half_spacing(w, weight.scale)))
    for offset in (None, bias):
        right = exact if offset is None else exact + offset.double()
        error = (ops.fp8_linear(x, weight, offset).double() - right).abs()
        assert (error <= half + torch.finfo(dtype).eps / 2 * (right.abs() + half)).all()
    # each row of x by its own measure
    by = scale.double()[:, None]
    error, x, exact = (ops.fp8_linear(x, weight).double() - exact) / by, x / by, exact / by
    whole = (x, spacing(x, torch.ones(ROWS))), (w, spacing(w, weight.scale))
    assert rms(error) == pytest.approx(expected_rms(*whole), rel=0.05)
    # no rows whatever err by more than 2 ** -4 / sqrt(3) of their magnitude, RMS
    assert rms(error) <= 2**0.5 * 2**-4 / 3**0.5 * rms(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_errs_by_what_dy_is_rounded_by(dtype):
    """Of dy times the scales of the weight; the weight itself is the rounded one, exactly."""
    x, w, bias = draw(dtype=dtype)
    weight = ops.Fp8Weight.of(w)
    d_y = torch.randn(ROWS, WIDTH).to(dtype)
    x.requires_grad_()
    found = gradient(ops.fp8_linear(x, weight, bias), x, d_y).double()
    exact = d_y.double() @ dequantise(weight.values, weight.scale)
    folded = d_y.float() * weight.scale
    scale, values = quantise_rows(folded)[1], weight.values.double().T
    none = torch.zeros_like(values)
    limit = allowed((folded, half_spacing(folded, scale)), (values, none))
    assert (
        (found - exact).abs() <= limit + torch.finfo(dtype).eps / 2 * (exact.abs() + limit)
    ).all()
    assert rms(found - exact) == pytest.approx(
        expected_rms((folded, spacing(folded, scale)), (values, none)), rel=0.05
    )
    torch.testing.assert_close(
        gradient(reference.fp8_linear(x, weight, bias), x, d_y).double(), exact,
        rtol=2 * torch.finfo(dtype).eps, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33,), (5, 32), (2, 3, 100), (2, 2, 3, 48)])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_reference_rounded_once(biased, shape, dtype):
    x, w, bias = draw(shape, dtype, width=37)
    weight, bias = ops.Fp8Weight.of(w), bias if biased else None
    found = ops.fp8_linear(x, weight, bias)
    right = reference.fp8_linear(x.double(), weight, bias)
    assert (found.shape, found.dtype) == ((*shape[:-1], 37), dtype)
    assert found.is_contiguous()
    step = torch.finfo(dtype).eps / 2
    assert ((found - right).abs() <= step * (1 + 2**-10) * right.abs() + 1e-7).all()


# --- what must not change anything ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_changes_the_scale_and_nothing_else(dtype):
    x = torch.randn(ROWS, DEPTH).to(dtype).float()  # times 2 ** -4, float16 would round again
    by_row = torch.exp2(torch.randint(-4, 5, (ROWS, 1)).float())
    (values, scale), (found, found_scale) = quantise_rows(x), quantise_rows(x * by_row)
    assert same_bits(found, values)
    assert same_bits(found_scale, scale * by_row[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_powers_of_two_go_through_product_and_gradient(dtype):
    """Of rows of x and rows of the weight; a gradient divided by the latter stays as it was."""
    x, w, _ = draw(dtype=dtype)
    d_y = torch.randn(ROWS, WIDTH).to(dtype)
    by_row = torch.exp2(torch.randint(-4, 5, (ROWS, 1)).float()).to(dtype)
    by_column = torch.exp2(torch.randint(-4, 5, (WIDTH,)).float()).to(dtype)
    weight, scaled = ops.Fp8Weight.of(w), ops.Fp8Weight.of(w * by_column.float()[:, None])
    x, more = x.requires_grad_(), (x * by_row).requires_grad_()
    y, found = ops.fp8_linear(x, weight), ops.fp8_linear(more, scaled)
    assert same_bits(found, y * by_row * by_column)
    dx = gradient(y, x, d_y)
    assert same_bits(gradient(found, more, d_y * by_row / by_column), dx * by_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_in_another_order(dtype):
    x, w, bias = draw(dtype=dtype)
    d_y = torch.randn(ROWS, WIDTH).to(dtype)
    x.requires_grad_()
    y = ops.fp8_linear(x, ops.Fp8Weight.of(w), bias)
    dx = gradient(y, x, d_y)
    rows, depth, width = map(torch.randperm, (ROWS, DEPTH, WIDTH))
    moved = x.detach()[rows][:, depth].requires_grad_()
    found = ops.fp8_linear(moved, ops.Fp8Weight.of(w[width][:, depth]), bias[width])
    assert same_bits(found, y[rows][:, width])
    assert same_bits(gradient(found, moved, d_y[rows][:, width]), dx[rows][:, depth])


def test_a_sample_alone_equals_it_in_a_batch():
    x, w, bias = draw((3, 16, DEPTH))
    x[0] *= 1e4
    weight, d_y = ops.Fp8Weight.of(w), torch.randn(3, 16, WIDTH)
    x.requires_grad_()
    y = ops.fp8_linear(x, weight, bias)
    dx = gradient(y, x, d_y)
    for i in range(3):
        alone = x.detach()[i : i + 1].requires_grad_()
        found = ops.fp8_linear(alone, weight, bias)
        assert same_bits(found, y[i : i + 1])
        assert same_bits(gradient(found, alone, d_y[i : i + 1]), dx[i : i + 1])


def test_strided_inputs_and_gradients_equal_dense_ones():
    x, w, bias = draw((2, 6, 64))
    weight = ops.Fp8Weight.of(w)
    wide = torch.full((3, 8, 100), float("nan"))
    wide[1:, 2:, 10:74] = x
    dense, view = (t.clone().requires_grad_() for t in (x, x))
    strided = wide[1:, 2:, 10:74].requires_grad_()
    y = ops.fp8_linear(strided, weight, bias)
    assert same_bits(y, ops.fp8_linear(dense, weight, bias))
    assert same_bits(weight.values, ops.Fp8Weight.of(w.mT.contiguous().mT).values)
    for d_y in (torch.randn(WIDTH, 6, 2).permute(2, 1, 0), torch.randn(6, WIDTH).expand(2, -1, -1)):
        found = gradient(ops.fp8_linear(view, weight), view, d_y)
        right = gradient(ops.fp8_linear(dense, weight), dense, d_y.contiguous())
        assert same_bits(found, right)


# --- planted faults -------------------------------------------------------------------------------


def truncated(x):
    """Towards zero in place of the nearest."""
    values, scale = quantise_rows(x)
    bits = values.view(torch.uint8)
    bits -= (values.double().abs() * scale.double()[:, None] > x.abs()).to(torch.uint8)
    return values, scale


def of_tensor(x):
    """One scale for all rows."""
    return quantise_rows(x.flatten())[0].view(x.shape), x.abs().amax().expand(len(x)) / 448


FAULTS = {
    "nothing": ("_turn", lambda right: right),
    "rounding towards zero": ("quantise_rows", lambda _: truncated),
    "one scale for all rows": ("quantise_rows", lambda _: of_tensor),
    "scales of the weight left out of the gradient": (
        "_quantise", lambda right: lambda x, factor=None: right(x),
    ),
    "scales of the weight in the forward pass, too": (
        "_quantise", lambda right: lambda x, factor=None: right(x, torch.full(x.shape[-1:], 1.01)),
    ),
    "a copy in the order of the weight": (
        "_turn", lambda right: lambda t: (t.view(*t.shape[::-1]), right(t)[1]),
    ),
    "a gradient scaled twice": ("_turn", lambda right: lambda t: (right(t)[0], right(t)[1] * 1.02)),
    "bias forgotten": (
        "_multiply_exactly", lambda right: lambda rows, w, bias, dtype: right(rows, w, None, dtype),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_operator_is_noticed(fault, monkeypatch):
    name, spoil = FAULTS[fault]
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    noticed = []
    for check in (
        test_the_product_errs_by_what_its_operands_are_rounded_by,
        test_the_gradient_errs_by_what_dy_is_rounded_by,
    ):
        try:
            check(torch.float32)
        except AssertionError:
            noticed.append(check)
    assert bool(noticed) == (fault != "nothing")
