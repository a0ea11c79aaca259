"""RMSNorm of a head and rotary embedding, in registers: what rope3d and norm_rope kernels share.

    norm(x) = x / sqrt(mean(x ** 2) + EPS) * weight        (Zhang and Sennrich, arXiv 1910.07467)

In the block of axis a, of size d, the pair (x[2i], x[2i+1]) turns by coords[a] * theta ** (-2i / d)
(Su et al., arXiv 2104.09864, applied per axis).
"""

from dataclasses import dataclass
from math import pi

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-6)

# pi / 2 in three parts, the first two of so few bits that small multiples of them are exact
# (Cody and Waite, Software Manual for the Elementary Functions, 1980)
TWO_OVER_PI, HALF_PI = tl.constexpr(2 / pi), tl.constexpr(pi / 2)
HIGH = tl.constexpr(1.5703125)
MIDDLE = tl.constexpr(0.0004837512969970703125)
LOW = tl.constexpr(pi / 2 - 1.5703125 - 0.0004837512969970703125)

# sine and cosine of f, |f| <= pi / 4: Taylor terms, the next ones are below 3e-8
S3, S5 = tl.constexpr(-1 / 6), tl.constexpr(1 / 120)
S7, S9 = tl.constexpr(-1 / 5040), tl.constexpr(1 / 362880)
C2, C4 = tl.constexpr(-1 / 2), tl.constexpr(1 / 24)
C6, C8 = tl.constexpr(-1 / 720), tl.constexpr(1 / 40320)


@dataclass(frozen=True)
class Transform:
    """What the tokens of one sequence go through as they are loaded: a norm, then a rotation.

    Attributes:
        coords: [S, 3] or [B, S, 3] f32: level, y, x; last two dimensions contiguous. None for no
            rotation.
        pairs: [2, WIDTH / 2] f32 of each pair of elements: its axis, and its angle a unit; None
            likewise.
        weight: [D] contiguous, of the norm; None for no norm.
    """

    coords: Tensor | None = None
    pairs: Tensor | None = None
    weight: Tensor | None = None

    def pointers(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """coords, pairs and weight for a launch; what is not there is never read."""
        coords, pairs, weight = (
            unused if t is None else t for t in (self.coords, self.pairs, self.weight)
        )
        return coords, pairs, weight

    @property
    def stride_b(self) -> int:
        """From one sample's coordinates to the next one's; 0 where all share them."""
        return self.coords.stride(0) if self.coords is not None and self.coords.ndim == 3 else 0


def padded_width(head_dim: int) -> int:
    """Elements of a row of a tile: the power of two that holds D, at least 32."""
    return max(32, triton.next_power_of_2(head_dim))


def pair_table(axes: tuple[int, int, int], theta: float) -> Tensor:
    """The axis and the angle a unit of each pair, on the CPU; beyond D none turns."""
    axis, angles = [], []
    for number, size in enumerate(axes):
        axis += [float(number)] * (size // 2)
        angles += [theta ** (-2 * i / size) for i in range(size // 2)]
    missing = padded_width(2 * len(axis)) // 2 - len(axis)
    table = [axis + [0.0] * missing, angles + [0.0] * missing]
    return torch.tensor(table, dtype=torch.float32, device="cpu")


@triton.jit
def sine_cosine(angle, EXACT: tl.constexpr):
    """Sine and cosine in f32; exactly 0 and 1 at 0.

    To 1e-7 or, in fewer registers, to 1e-7 times the angle: half precision sees no difference.
    """
    turns = angle * TWO_OVER_PI
    n = tl.floor(turns + 0.5)
    if EXACT:
        f = ((angle - n * HIGH) - n * MIDDLE) - n * LOW
        # an angle so large that it is no more than a guess must still give a sine and a cosine
        f = tl.minimum(tl.maximum(f, -0.8), 0.8)
    else:
        f = (turns - n) * HALF_PI
    f2 = f * f
    s = f * (1.0 + f2 * (S3 + f2 * (S5 + f2 * (S7 + f2 * S9))))
    c = 1.0 + f2 * (C2 + f2 * (C4 + f2 * (C6 + f2 * C8)))
    quarter = n.to(tl.int32)
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return sine, tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def load_turn(
    coords_ptr, pairs_ptr, rows, in_range, HALF: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Sine and cosine [rows, HALF] of each token and pair."""
    i = tl.arange(0, HALF)
    axis, angle = tl.load(pairs_ptr + i), tl.load(pairs_ptr + HALF + i)
    place = coords_ptr + rows * 3
    level = tl.load(place, mask=in_range, other=0.0)
    y = tl.load(place + 1, mask=in_range, other=0.0)
    x = tl.load(place + 2, mask=in_range, other=0.0)
    along = tl.where(axis == 1.0, y[:, None], x[:, None])
    along = tl.where(axis == 0.0, level[:, None], along)
    return sine_cosine(along * angle, EXACT)


@triton.jit
def turn(x, sine, cosine, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The pairs of x [ROWS, WIDTH] f32 turned forward; with -sine, backward."""
    # the two elements of a pair lie in one thread: neither step moves data
    even, odd = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
    pairs = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(pairs, [ROWS, WIDTH])


@triton.jit
def inverse_rms(x, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean(x ** 2) + EPS) of each row of x [ROWS, WIDTH] f32, zero beyond D."""
    return tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPS)


@triton.jit
def load_weight(ptr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] f32 weight of the norm, zero beyond D."""
    d = tl.arange(0, WIDTH)
    return tl.load(ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def norm_back(d_normed, x, weight, HEAD_DIM: tl.constexpr):
    """From gradients of normed rows, all f32, to those of the rows and, summed, of the weight."""
    inverse = inverse_rms(x, HEAD_DIM)[:, None]
    unit = x * inverse
    d_weight = tl.sum(d_normed * unit, 0)
    d_unit = d_normed * weight[None, :]
    along = tl.sum(d_unit * unit, 1) / HEAD_DIM
    return (d_unit - unit * along[:, None]) * inverse, d_weight


@triton.jit
def load_row_tile(ptr, rows, in_range, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] tokens, zero out of range and beyond D."""
    d = tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(ptr + offsets, mask=in_range[:, None] & (d < HEAD_DIM), other=0.0)


@triton.jit
def store_row_tile(
    ptr, x, rows, in_range, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write [rows, WIDTH] to the tokens in range."""
    d = tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + d[None, :]
    mask = in_range[:, None] & (d < HEAD_DIM)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)
