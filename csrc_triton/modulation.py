"""Adaptive layer norm of FLUX's blocks, with the gated residual ahead of it: both passes.

    s = x + gate * y                       rounded to the dtype of x; without a residual s = x
    u = (s - mean(s)) * rstd               rstd = 1 / sqrt(var(s) + eps), of each token
    n = u * (1 + scale) + shift            shift, scale and gate are rows of a sample

(Peebles and Xie, arXiv 2212.09748.) With du = dn * (1 + scale), and d_s of what else reads s:

    dx = d_s + rstd * (du - mean(du) - u * mean(du * u))           dy = gate * dx
    d_shift = sum of dn        d_scale = sum of dn * u             d_gate = sum of y * dx

A program holds a whole row in registers, so that every element is read and written once. Kept for
the backward are s and, 8 bytes a token, mean and rstd: of the four sums over a row, each pair of
which waits for the one before, that leaves the backward one pair. Where the modulation learns, a
program adds up some rows of one sample and a second step adds up programs: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""Wanted where programs add up rows, two on each of an H100's 132 processors: more would hide more
of the latency and write more sums (by arithmetic, not timed yet)."""
ROWS = (8, 64)
"""Fewest and most rows that a program adds up."""


@triton.jit
def _load_row(ptr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr = False):
    """[BLOCK] f32 elements of a row, zero beyond C; KEEP those that other programs read, too."""
    c = tl.arange(0, BLOCK)
    # a token is not read again soon, the modulation of its sample by every program
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    return tl.load(ptr + c, mask=c < CHANNELS, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def _store_row(ptr, row, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the C elements of a row."""
    c = tl.arange(0, BLOCK)
    tl.store(ptr + c, row.to(ptr.dtype.element_ty), mask=c < CHANNELS)


@triton.jit
def _mean(row, CHANNELS: tl.constexpr):
    """Of a row that is zero beyond C."""
    return tl.sum(row, 0) * (1.0 / CHANNELS)


@triton.jit(do_not_specialize=["length", "eps"])
def _ada_norm_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, s_ptr, normed_ptr, stats_ptr,
    stride_xb, stride_xs, stride_yb, stride_ys, stride_gate, stride_shift, stride_scale,
    length, eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """One program: one token. Grid: (B * S,). s and normed are contiguous, stats [B, S, 2]."""
    pid = tl.program_id(0)
    b, token = (pid // length).to(tl.int64), (pid % length).to(tl.int64)
    row = pid.to(tl.int64)
    s = _load_row(x_ptr + b * stride_xb + token * stride_xs, CHANNELS, BLOCK)
    if GATED:
        y = _load_row(y_ptr + b * stride_yb + token * stride_ys, CHANNELS, BLOCK)
        gate = _load_row(gate_ptr + b * stride_gate, CHANNELS, BLOCK, True)
        # what is normed is what the residual carries on
        s = (s + gate * y).to(s_ptr.dtype.element_ty).to(tl.float32)
        _store_row(s_ptr + row * CHANNELS, s, CHANNELS, BLOCK)

    # a float32 mean of a large row is off by more than a small spread: its rest is taken off, too
    rough = _mean(s, CHANNELS)
    off = tl.where(tl.arange(0, BLOCK) < CHANNELS, s - rough, 0.0)
    rest = _mean(off, CHANNELS)
    variance = tl.maximum(_mean(off * off, CHANNELS) - rest * rest, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    # as late as this: they come from L1, and their registers hold more rows in flight before
    scale = _load_row(scale_ptr + b * stride_scale, CHANNELS, BLOCK, True)
    shift = _load_row(shift_ptr + b * stride_shift, CHANNELS, BLOCK, True)
    normed = (off - rest) * rstd * (1.0 + scale) + shift
    _store_row(normed_ptr + row * CHANNELS, normed, CHANNELS, BLOCK)
    tl.store(stats_ptr + row * 2, rough + rest)
    tl.store(stats_ptr + row * 2 + 1, rstd)


@triton.jit(do_not_specialize=["length", "num_parts"])
def _ada_norm_backward_kernel(
    d_s_ptr, d_normed_ptr, s_ptr, y_ptr, gate_ptr, scale_ptr, stats_ptr,
    dx_ptr, dy_ptr, d_gate_ptr, d_shift_ptr, d_scale_ptr,
    stride_gb, stride_gs, stride_nb, stride_ns, stride_sb, stride_ss, stride_yb, stride_ys,
    stride_gate, stride_scale,
    length, num_parts,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    OF_GATE: tl.constexpr,
    OF_SHIFT: tl.constexpr,
    OF_SCALE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one sample. Grid: (B * num_parts,).

    dx and dy are contiguous; of the modulation each program writes its own row, [B * parts, C] f32.
    """
    pid = tl.program_id(0)
    b = (pid // num_parts).to(tl.int64)
    first = pid % num_parts * ROWS
    d_gate = tl.zeros([BLOCK], tl.float32)
    d_shift, d_scale = d_gate, d_gate

    for place in range(first, tl.minimum(first + ROWS, length)):
        token = tl.cast(place, tl.int64)
        row = b * length + token
        d_normed = _load_row(d_normed_ptr + b * stride_nb + token * stride_ns, CHANNELS, BLOCK)
        s = _load_row(s_ptr + b * stride_sb + token * stride_ss, CHANNELS, BLOCK)
        d_s, y = s, s  # names of what is not there, and not used then
        if GATED:
            d_s = _load_row(d_s_ptr + b * stride_gb + token * stride_gs, CHANNELS, BLOCK)
        if OF_GATE:
            y = _load_row(y_ptr + b * stride_yb + token * stride_ys, CHANNELS, BLOCK)
        mean, rstd = tl.load(stats_ptr + row * 2), tl.load(stats_ptr + row * 2 + 1)
        # beyond C it is not zero, but there it meets zeros of d_normed only, or is not stored
        unit = (s - mean) * rstd
        scale = _load_row(scale_ptr + b * stride_scale, CHANNELS, BLOCK, True)
        d_unit = d_normed * (1.0 + scale)
        straight, turned = _mean(d_unit, CHANNELS), _mean(d_unit * unit, CHANNELS)
        dx = (d_unit - straight - unit * turned) * rstd
        if GATED:
            dx += d_s
            gate = _load_row(gate_ptr + b * stride_gate, CHANNELS, BLOCK, True)
            _store_row(dy_ptr + row * CHANNELS, dx * gate, CHANNELS, BLOCK)
        _store_row(dx_ptr + row * CHANNELS, dx, CHANNELS, BLOCK)
        if OF_GATE:
            d_gate += dx * y
        if OF_SHIFT:
            d_shift += d_normed
        if OF_SCALE:
            d_scale += d_normed * unit

    own = pid.to(tl.int64) * CHANNELS
    if OF_GATE:
        _store_row(d_gate_ptr + own, d_gate, CHANNELS, BLOCK)
    if OF_SHIFT:
        _store_row(d_shift_ptr + own, d_shift, CHANNELS, BLOCK)
    if OF_SCALE:
        _store_row(d_scale_ptr + own, d_scale, CHANNELS, BLOCK)


def launch_ada_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    residual: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, the normed s, both [B, S, C] contiguous, and stats [B, S, 2] f32: mean and rstd.

    Without a residual s is x itself.

    Args:
        x: [B, S, C], last stride 1.
        shift: [B, C], last stride 1.
        scale: likewise.
        eps: positive.
        residual: y, as x, and gate, as shift; x + gate * y is what is normed.
    """
    batch, length, channels = x.shape
    s = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty(batch, length, 2, dtype=torch.float32, device=x.device)
    y, gate = (x, shift) if residual is None else residual
    block = triton.next_power_of_2(channels)
    _ada_norm_kernel[(batch * length,)](
        x, y, gate, shift, scale, s, normed, stats,
        *x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0),
        length, eps,
        CHANNELS=channels,
        BLOCK=block,
        GATED=residual is not None,
        num_warps=warps(block),
    )  # fmt: skip
    return s, normed, stats


def launch_ada_norm_backward(
    d_normed: Tensor,
    s: Tensor,
    stats: Tensor,
    scale: Tensor,
    learns: tuple[bool, bool, bool],
    residual: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the gradients of tokens, [B, S, C] contiguous, and those of gate, shift and scale.

    The former are dx and, with a residual, dy; the latter [B, C] f32, None for what does not learn.

    Args:
        d_normed: [B, S, C], last stride 1.
        s: of the forward pass.
        stats: likewise.
        scale: likewise.
        learns: whether gate, shift and scale do.
        residual: the gradient of s, as d_normed, gate, and y, which may be None where gate does
            not learn.
    """
    batch, length, channels = s.shape
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    tokens = [dx] if residual is None else [dx, torch.empty_like(dx)]
    d_s, gate, y = (d_normed, scale, None) if residual is None else residual
    y = s if y is None else y
    rows = rows_per_program(batch * length) if any(learns) else 1
    parts = triton.cdiv(length, rows)
    # a program's own row of each sum
    sums = [
        torch.empty(batch * parts, channels, dtype=torch.float32, device=s.device) if one else None
        for one in learns
    ]
    block = triton.next_power_of_2(channels)
    strides = [stride for t in (d_s, d_normed, s, y) for stride in t.stride()[:2]]
    _ada_norm_backward_kernel[(batch * parts,)](
        d_s, d_normed, s, y, gate, scale, stats,
        dx, tokens[-1], *(stats if t is None else t for t in sums),
        *strides, gate.stride(0), scale.stride(0),
        length, parts,
        CHANNELS=channels,
        BLOCK=block,
        ROWS=rows,
        GATED=residual is not None,
        OF_GATE=learns[0],
        OF_SHIFT=learns[1],
        OF_SCALE=learns[2],
        num_warps=warps(block),
    )  # fmt: skip
    # a sum over a dimension is added in one order: the same bits at every call
    of_rows = [None if t is None else t.view(batch, parts, channels).sum(1) for t in sums]
    return tokens, of_rows


def warps(block: int) -> int:
    """Of a program: 32 elements a thread.

    By the registers that the compile gate shows, an H100's processor holds 9 rows of C = 3072 of
    the forward pass at once, 5 of the backward and 4 with a residual; with 16 elements a thread it
    is 6, 4 and 2. Not timed yet.
    """
    return min(8, max(1, block // 1024))


def rows_per_program(rows: int) -> int:
    """How many of all rows a program adds up: a power of two, by shapes alone."""
    fewest, most = ROWS
    return min(most, max(fewest, triton.next_power_of_2(rows // PROGRAMS)))
