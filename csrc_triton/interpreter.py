"""Whether Triton's CPU interpreter multiplies bfloat16: as it comes it multiplies bit patterns."""

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def _square_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """out = x @ x, f32, for one square tile."""
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, tl.dot(x, x))


@lru_cache(maxsize=1)
def bfloat16_is_right() -> bool:
    """Multiply once and see; the answer stays for the process."""
    x = torch.full((16, 16), 1.5, dtype=torch.bfloat16)
    out = torch.zeros(16, 16)
    _square_kernel[(1,)](x, out, SIZE=16)
    return bool((out == 36.0).all())
