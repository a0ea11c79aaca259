"""What a linear in fp8 means: both operands rounded to e4m3 with one scale a row."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_LARGEST, SMALLEST = 448.0, 2.0**-100


class QuantisedRows(Protocol):
    """What ``quantise_rows`` gives, by name."""

    values: Tensor
    scale: Tensor


def fp8_linear(x: Tensor, weight: QuantisedRows, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of x and weight as e4m3 holds them; see sda_fast.ops.fp8_linear.

    Any device and any float dtype, computed in at least float32. Differentiable in x, straight
    through its rounding, by the rounded weight; the gradient itself is not rounded to e4m3.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rounded = _dequantise(*quantise_rows(x.detach()), dtype)
    x_there = rounded + (x - x.detach()).to(dtype) if x.requires_grad else rounded
    w = _dequantise(weight.values, weight.scale, dtype)
    return F.linear(x_there, w, None if bias is None else bias.to(dtype)).to(x.dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] of any float dtype -> values [..., K] e4m3 and scale [...] f32.

    The largest of a row becomes 448, the largest number of e4m3 (Micikevicius et al., arXiv
    2209.05433). Zeros have scale 1, a row below 2 ** -100 is scaled as if its largest were that,
    and a row with inf or NaN has no finite scale.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    # a tensor: torch divides by a number, and a number, through reciprocals
    limit = largest.new_full((), E4M3_LARGEST)
    largest = torch.where(largest == 0, limit, largest.clamp(min=SMALLEST))
    values = (x * (limit / largest)).to(torch.float8_e4m3fn)
    return values, (largest / limit).squeeze(-1)


def _dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) * scale.to(dtype)[..., None]
