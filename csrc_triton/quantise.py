"""Rows to e4m3 with one float32 scale each, in one pass over memory.

    scale = max |x * factor| / 448        values = round(x * factor * (448 / max |x * factor|))

448 is the largest number of e4m3 (Micikevicius et al., arXiv 2209.05433); rounding is to nearest,
ties to even. Times a power of two a row gets other scales and the same values. What has no such
scale is defined as follows:

    all zeros                             scale 1
    a maximum below 2 ** -100             as if it were 2 ** -100, so that nothing overflows
    inf, but no NaN                       scale inf, values NaN where x is infinite and else 0
    NaN                                   scale NaN, all values NaN

so that a product with a row that is not finite is NaN throughout. A program holds a row of up to
LONGEST elements in registers; a longer one is read twice, the second time from the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(2.0**-100)
LONGEST = 16384
"""Elements that a program holds in registers."""
PIECE = 8192
"""Elements that it goes on by in a longer row."""


@triton.jit
def _load(ptr, factor_ptr, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """[BLOCK] f32 elements of a row times the factor, zero beyond WIDTH."""
    k = start + tl.arange(0, BLOCK)
    inside = k < WIDTH
    x = tl.load(ptr + k, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        # every program reads it
        x *= tl.load(factor_ptr + k, mask=inside, other=0.0, eviction_policy="evict_last")
    return x


@triton.jit
def _magnitude(x):
    """The bits of |x|, integers in the order of the magnitudes, with NaN above inf."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(bits):
    """Scale and its inverse for a row whose largest magnitude has these bits."""
    largest = bits.to(tl.float32, bitcast=True)
    # a NaN is not less, and stays
    largest = tl.where(largest < SMALLEST, tl.where(largest == 0.0, LARGEST, SMALLEST), largest)
    return tl.div_rn(largest, LARGEST), tl.div_rn(LARGEST, largest)


@triton.jit
def _store(ptr, x, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Round and write the elements up to WIDTH."""
    k = start + tl.arange(0, BLOCK)
    tl.store(ptr + k, x.to(ptr.dtype.element_ty), mask=k < WIDTH)


@triton.jit(do_not_specialize=["length"])
def _quantise_rows_kernel(
    x_ptr, factor_ptr, values_ptr, scale_ptr,
    stride_xb, stride_xs,
    length,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """One program: one row. Grid: (B * S,). values [B * S, WIDTH] and scale are contiguous."""
    pid = tl.program_id(0)
    b, s = (pid // length).to(tl.int64), (pid % length).to(tl.int64)
    x_ptr += b * stride_xb + s * stride_xs
    values_ptr += pid.to(tl.int64) * WIDTH

    if BLOCK >= WIDTH:
        x = _load(x_ptr, factor_ptr, 0, WIDTH, BLOCK, SCALED)
        scale, inverse = _scales(tl.max(_magnitude(x), 0))
        _store(values_ptr, x * inverse, 0, WIDTH, BLOCK)
    else:
        bits = tl.zeros([BLOCK], tl.int32)
        for start in range(0, WIDTH, BLOCK):
            x = _load(x_ptr, factor_ptr, start, WIDTH, BLOCK, SCALED)
            bits = tl.maximum(bits, _magnitude(x))
        scale, inverse = _scales(tl.max(bits, 0))
        for start in range(0, WIDTH, BLOCK):
            x = _load(x_ptr, factor_ptr, start, WIDTH, BLOCK, SCALED)
            _store(values_ptr, x * inverse, start, WIDTH, BLOCK)
    tl.store(scale_ptr + pid, scale)


def launch_quantise_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return values [B * S, K] e4m3 and scale [B * S] f32, both contiguous.

    Args:
        x: [B, S, K] bf16, fp16 or fp32, last stride 1, the others free.
        factor: [K] f32, contiguous: multiplies the columns first. None means 1.
    """
    batch, length, width = x.shape
    rows = batch * length
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if block > LONGEST:
        block = PIECE
    _quantise_rows_kernel[(rows,)](
        x, scale if factor is None else factor, values, scale,
        *x.stride()[:2],
        length,
        WIDTH=width,
        BLOCK=block,
        SCALED=factor is not None,
        num_warps=min(16, max(1, block // 1024)),  # 32 elements a thread; not timed yet
    )  # fmt: skip
    return values, scale


def rounds_to_nearest() -> bool:
    """Whether the CPU interpreter, if it is on, rounds to e4m3 as a GPU does.

    As it comes it rounds ties away from zero and loses what carries into the next binade.
    """
    x = torch.tensor([[[448.0, 400.0, -124.0]]])
    values, _ = launch_quantise_rows(x)
    return values.float().tolist() == [[448.0, 384.0, -128.0]]
