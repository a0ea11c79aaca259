"""The kernel that quantises rows, on the GPU or in Triton's interpreter: bit by bit, and faults.

The interpreter rounds float32 to e4m3 away from zero at ties and loses carries between binades;
here it rounds as torch does, which test_fp8_linear holds against all numbers of e4m3.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from csrc_triton import quantise
from sda_fast import ops, reference
from sda_fast.reference.fp8_linear import quantise_rows

from .interpreter.bf16 import Builder
from .interpreter.sanitizer import sanitized
from .planting import plant

pytestmark = [
    pytest.mark.usefixtures("kernels", "e4m3"),
    # of NaN, inf and zeros, which the rows hold
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN = 0x7F
# one and several pieces of a row, even and ragged, below and above what registers hold
WIDTHS = (1, 64, 100, 3000, quantise.LONGEST + 1, 3 * quantise.PIECE)

UPSTREAM = Builder.create_fp_to_fp
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")


@pytest.fixture
def e4m3(monkeypatch):
    """Round as the hardware's cvt.rn.satfinite: to nearest, ties to even, 448 beyond it."""

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar != tl.float8e4nv or src.data.dtype != np.float32:
            return UPSTREAM(self, src, dst_type, rounding_mode)
        values = torch.from_numpy(np.atleast_1d(src.data)).clamp(-448, 448)
        bits = values.to(torch.float8_e4m3fn).view(torch.uint8)
        bits[values.isnan()] = NAN
        return TensorHandle(bits.numpy().reshape(src.data.shape), tl.float8e4nv)

    monkeypatch.setattr(Builder, "create_fp_to_fp", create_fp_to_fp)


def draw(batch, length, width, dtype=torch.float32, device=None):
    """Rows of very different magnitudes, the first three of zeros, tiny and not finite."""
    x = torch.randn(batch, length, width) * torch.logspace(-4, 3, batch * length).view(
        batch, length, 1
    )
    rows = x.view(-1, width)
    rows[0] = 0
    rows[1] *= 1e-35
    rows[2, width // 2] = float("inf")
    rows[3, width // 3] = float("nan")
    return x.to(device, dtype)


def bits(values):
    """Of e4m3, with one NaN."""
    found = values.view(torch.uint8)
    return found.masked_fill((found & NAN) == NAN, NAN)


def assert_as_torch(x, factor=None):
    """The same scales and values, bit by bit; in float32 each step is one rounding."""
    values, scale = quantise.launch_quantise_rows(x, factor)
    rows = x.flatten(0, 1).float()
    right = quantise_rows(rows if factor is None else rows * factor)
    assert values.shape == rows.shape
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert torch.equal(bits(values), bits(right[0])), "values"
    both_nan = scale.isnan() & right[1].isnan()
    assert torch.equal(scale[~both_nan], right[1][~both_nan]), "scale"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantises_as_torch_does(width, dtype, device):
    assert_as_torch(draw(2, 3, width, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_columns_are_multiplied_first(width, dtype, device):
    factor = torch.randn(width, device=device) * 10
    assert_as_torch(draw(1, 5, width, dtype, device), factor)


def test_every_float16_is_rounded_as_torch_does(device):
    """Up to 448, so that the scale is 1: all numbers of e4m3, all ties, and what is between."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.abs() <= 448][None, None].to(device)
    assert every.max() == 448
    assert_as_torch(every)
    assert_as_torch(-every.float())


def test_strides_of_rows_are_read(device):
    x = draw(3, 4, 200, torch.float16, device)
    wide = torch.full((4, 5, 300), float("nan"), dtype=torch.float16, device=device)
    wide[1:, 1:, 50:250] = x
    view = wide[1:, 1:, 50:250]
    assert_as_torch(view)
    assert_as_torch(view.transpose(0, 1))
    assert_as_torch(x[:1].expand(3, -1, -1))


def test_rows_farther_apart_than_int32_reaches(device):
    apart = (1 << 31) + 5
    if device.type == "cuda":
        buffer = torch.empty(apart + 64, dtype=torch.float16, device=device)
    else:
        buffer = torch.from_numpy(np.zeros(apart + 64, np.float16))  # untouched, it costs nothing
    x = torch.as_strided(buffer, (1, 2, 64), (0, apart, 1))
    x.copy_(torch.randn(1, 2, 64))
    assert_as_torch(x)


@interpreted
def test_no_stray_access_and_no_race():
    for width in (100, quantise.LONGEST + 1):
        x = draw(2, 2, width + 7)[..., 3 : width + 3]
        with sanitized() as report:
            quantise.launch_quantise_rows(x, torch.randn(width))
        report.assert_clean()


def test_the_operator_takes_the_kernel(device, monkeypatch):
    """For weight, forward and backward; it gives what torch's quantisation gives."""
    calls, launch = [], quantise.launch_quantise_rows

    def record(x, factor=None):
        if x.shape[-1] > 3:  # the question whether the interpreter rounds has 3
            calls.append(factor)
        return launch(x, factor)

    monkeypatch.setattr(quantise, "launch_quantise_rows", record)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = ops.Fp8Weight.of(torch.randn(32, 48, device=device))
    x = torch.randn(2, 3, 48, device=device, dtype=dtype, requires_grad=True)
    y = ops.fp8_linear(x, weight)
    right = reference.fp8_linear(x, weight)
    assert (y - right).abs().max() <= 4 * torch.finfo(dtype).eps * right.abs().max()
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].isfinite().all()
    assert calls[:2] == [None, None]
    assert torch.equal(calls[2], weight.scale)
    assert len(calls) == 3


@interpreted
def test_an_interpreter_that_does_not_round_is_not_taken(monkeypatch):
    assert quantise.rounds_to_nearest()
    monkeypatch.setattr(Builder, "create_fp_to_fp", UPSTREAM)
    assert not quantise.rounds_to_nearest()
    w = torch.randn(64, 64)
    weight = ops.Fp8Weight.of(w)
    assert torch.equal(bits(weight.values), bits(quantise_rows(w)[0]))


# name: (the right words, the wrong ones)
FAULTS = {
    "samples not told apart": ("b * stride_xb", "0 * stride_xb"),
    "rows taken as dense": ("s * stride_xs", "s * WIDTH"),
    "sign kept": ("& 0x7FFFFFFF", "& -1"),
    "zeros without a scale": ("tl.where(largest == 0.0, LARGEST, SMALLEST)", "largest"),
    "tiny rows overflow": ("tl.where(largest == 0.0, LARGEST, SMALLEST), largest)",
                           "tl.where(largest == 0.0, LARGEST, largest), largest)"),
    "a NaN is no number": ("largest = bits.to(tl.float32, bitcast=True)",
                           "largest = tl.maximum(bits.to(tl.float32, bitcast=True), 0.0)"),
    "only the last piece counts": ("tl.maximum(bits, _magnitude(x))", "_magnitude(x)"),
    "scale of another format": ("LARGEST = tl.constexpr(448.0)", "LARGEST = tl.constexpr(240.0)"),
    "factor forgotten": ("if SCALED:", "if False:"),
    "factor in every second pass": ("x *= tl.load", "x = tl.load"),
    "scale and inverse exchanged": ("scale, inverse = _scales(tl.max(bits, 0))",
                                    "inverse, scale = _scales(tl.max(bits, 0))"),
    "an element past the end": ("inside = k < WIDTH", "inside = k <= WIDTH"),
    "written past the end": ("mask=k < WIDTH)", "mask=k <= WIDTH)"),
    "scales in one place": ("scale_ptr + pid, scale", "scale_ptr, scale"),
}  # fmt: skip


def noticed():
    """Whether a check above fails."""
    for width in (100, quantise.LONGEST + 1):
        x, factor = draw(2, 3, width + 9)[..., 3 : width + 3], torch.randn(width)
        try:
            with sanitized() as report:
                assert_as_torch(x)
                assert_as_torch(x, factor)
            report.assert_clean()
        except AssertionError:
            return True
    return False


@pytest.fixture
def spoil(monkeypatch, tmp_path):
    launchers = {quantise: ("launch_quantise_rows",)}
    return lambda right, wrong: plant(
        monkeypatch, tmp_path, ("quantise",), launchers, "quantise", right, wrong
    )


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_noticed(fault, spoil):
    spoil(*FAULTS[fault])
    assert noticed()


@interpreted
def test_the_kernel_as_it_is_passes_the_same_checks(spoil):
    spoil("448", "448")
    assert not noticed()
