"""Attention with rotated queries and keys, backward: no atomics, bitwise repeatable.

With the rotated q' = R(q) and k' = R(k), p_ij = exp(s_ij - lse_i) and delta_i = <dO_i, O_i>:

    dv_j = sum_i p_ij dO_i                 ds_ij = p_ij (<dO_i, v_j> - delta_i)
    dq_i = scale * R^-1(sum_j ds_ij k'_j)  dk_j = scale * R^-1(sum_i ds_ij q'_i)

since the transpose of a rotation is its inverse; through a norm they go on to x and its weight. The
dkdv kernel owns blocks of keys. The dq kernel owns tiles of queries and, as in the forward pass, a
part of the keys; a second pass adds up, and so it does what each program finds for the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.primitives import LOG2_E, LOG2_E_DEVICE
from csrc_triton.rope3d import (
    Transform,
    load_row_tile,
    load_turn,
    load_weight,
    norm_back,
    padded_width,
    store_row_tile,
    turn,
)
from csrc_triton.rope3d_attention import keys_of_part, load_transformed
from csrc_triton.tiles import Tile


@triton.jit
def _load_lse(lse_ptr, rows, in_rows):
    """lse in base 2; +inf where a row saw nothing or is not there, so that its p is 0."""
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E_DEVICE)


@triton.jit
def _back(
    d_x, ptr, d_weight_ptr, coords_ptr, pairs_ptr, weight_ptr, rows, in_range, stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Gradients [ROWS, WIDTH] f32 of transformed tokens -> gradients of the tokens.

    Stores those of the norm's weight in the program's row of d_weight.
    """
    if ROTATE:
        exact: tl.constexpr = ptr.dtype.element_ty == tl.float32
        sine, cosine = load_turn(coords_ptr, pairs_ptr, rows, in_range, WIDTH // 2, exact)
        d_x = turn(d_x, -sine, cosine, ROWS, WIDTH)
    if NORM:
        # read again: to keep it in registers all along the loop costs more
        x = load_row_tile(ptr, rows, in_range, stride, HEAD_DIM, WIDTH).to(tl.float32)
        weight = load_weight(weight_ptr, HEAD_DIM, WIDTH)
        d_x, d_weight = norm_back(d_x, x, weight, HEAD_DIM)
        d = tl.arange(0, WIDTH)
        own = d_weight_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM
        tl.store(own + d, d_weight, mask=d < HEAD_DIM)
    return d_x


@triton.jit(
    do_not_specialize=["num_heads", "num_queries", "num_keys", "num_parts", "keys_per_part"]
)
def _rope3d_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, d_weight_ptr, lengths_ptr,
    q_coords_ptr, q_pairs_ptr, q_weight_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_gb, stride_gs, stride_gh,
    stride_db, stride_ds, stride_dh, stride_dp,
    stride_qcb, stride_kcb,
    num_heads, num_queries, num_keys, num_parts, keys_per_part, scale, scale_log2,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, one part of the keys; writes delta, too.

    Grid: (cdiv(N, BLOCK_M) * num_parts * B * H,). dq is [parts, B, N, H, D].
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    tile, part = pid % num_tiles, pid // num_tiles % num_parts
    head = (pid // (num_tiles * num_parts)).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    q_coords_ptr += b * stride_qcb
    k_coords_ptr += b * stride_kcb

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < num_queries
    q_ptr += b * stride_qb + h * stride_qh
    q = load_transformed(
        q_ptr, q_coords_ptr, q_pairs_ptr, q_weight_ptr, m, in_rows, stride_qs,
        BLOCK_M, HEAD_DIM, WIDTH, ROTATE, NORM,
    )  # fmt: skip
    out_ptr += b * stride_ob + h * stride_oh
    d_out_ptr += b * stride_gb + h * stride_gh
    d_out = load_row_tile(d_out_ptr, m, in_rows, stride_gs, HEAD_DIM, WIDTH)
    out = load_row_tile(out_ptr, m, in_rows, stride_os, HEAD_DIM, WIDTH)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    # every part finds the same delta; one of them writes it
    tl.store(delta_ptr + head * num_queries + m, delta, mask=in_rows & (part == 0))
    lse = _load_lse(lse_ptr + head * num_queries, m, in_rows)

    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    start, stop = keys_of_part(part, keys_per_part, num_keys, lengths_ptr, b, HAS_LENGTHS)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_range = n < stop
        k = load_transformed(
            k_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr, n, in_range, stride_ks,
            BLOCK_N, HEAD_DIM, WIDTH, ROTATE, NORM,
        )  # fmt: skip
        v = load_row_tile(v_ptr, n, in_range, stride_vs, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        # a key out of range has score 0, whose p may be infinite
        p = tl.where(in_range[None, :], p, 0.0)
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")

    dq = _back(
        dq * scale, q_ptr, d_weight_ptr, q_coords_ptr, q_pairs_ptr, q_weight_ptr,
        m, in_rows, stride_qs, BLOCK_M, HEAD_DIM, WIDTH, ROTATE, NORM,
    )  # fmt: skip
    dq_ptr += part.to(tl.int64) * stride_dp + b * stride_db + h * stride_dh
    store_row_tile(dq_ptr, dq, m, in_rows, stride_ds, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def _rope3d_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, d_weight_ptr, lengths_ptr,
    q_coords_ptr, q_pairs_ptr, q_weight_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_db, stride_ds, stride_dh,
    stride_qcb, stride_kcb,
    num_heads, num_queries, num_keys, scale, scale_log2,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one head. Grid: (cdiv(S, BLOCK_N) * B * H,)."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    pid = tl.program_id(0)
    head = (pid // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_ptr += b * stride_qb + h * stride_qh
    d_out_ptr += b * stride_gb + h * stride_gh
    lse_ptr += head * num_queries
    delta_ptr += head * num_queries
    q_coords_ptr += b * stride_qcb
    k_coords_ptr += b * stride_kcb

    n = pid % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_keys = n < num_keys
    in_sample = in_keys
    if HAS_LENGTHS:
        in_sample = n < tl.minimum(num_keys, tl.load(lengths_ptr + b))
    k_ptr += b * stride_kb + h * stride_kh
    k = load_transformed(
        k_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr, n, in_sample, stride_ks,
        BLOCK_N, HEAD_DIM, WIDTH, ROTATE, NORM,
    )  # fmt: skip
    v = load_row_tile(
        v_ptr + b * stride_vb + h * stride_vh, n, in_sample, stride_vs, HEAD_DIM, WIDTH
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for first in range(0, num_queries, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        in_rows = m < num_queries
        q = load_transformed(
            q_ptr, q_coords_ptr, q_pairs_ptr, q_weight_ptr, m, in_rows, stride_qs,
            BLOCK_M, HEAD_DIM, WIDTH, ROTATE, NORM,
        )  # fmt: skip
        d_out = load_row_tile(d_out_ptr, m, in_rows, stride_gs, HEAD_DIM, WIDTH)
        lse = _load_lse(lse_ptr, m, in_rows)
        delta = tl.load(delta_ptr + m, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")

    # a key out of range, whose p may be infinite, has gathered what no key of the sample sees
    d_offset = b * stride_db + h * stride_dh
    dv = tl.where(in_sample[:, None], dv, 0.0)
    store_row_tile(dv_ptr + d_offset, dv, n, in_keys, stride_ds, HEAD_DIM, WIDTH)
    dk = tl.where(in_sample[:, None], dk, 0.0)
    dk = _back(
        dk * scale, k_ptr, d_weight_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr,
        n, in_sample, stride_ks, BLOCK_N, HEAD_DIM, WIDTH, ROTATE, NORM,
    )  # fmt: skip
    store_row_tile(dk_ptr + d_offset, dk, n, in_keys, stride_ds, HEAD_DIM, WIDTH)


def launch_rope3d_dq(
    d_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    transforms: tuple[Transform, Transform],
    lengths: Tensor | None,
    scale: float,
    num_parts: int,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [B, N, H, D] contiguous, delta [B, H, N] f32 and d_weight [D] f32 of the norm of q.

    Without a norm d_weight is empty.

    Args:
        d_out: [B, N, H, D], last stride 1.
        qkv: of the forward pass.
        results: its out and lse.
        transforms: as in the forward pass, and so are the others.
        lengths: keys of each sample, or None.
        scale: positive.
        num_parts: parts of the keys.
        tile: what to launch with.
    """
    (q, k, v), (out, lse) = qkv, results
    batch, num_queries, heads, head_dim = q.shape
    num_keys = k.shape[1]
    delta = torch.empty_like(lse)
    dtype = torch.float32 if num_parts > 1 else q.dtype
    parts = torch.empty(num_parts, *q.shape, dtype=dtype, device=q.device)
    keys_per_part = triton.cdiv(triton.cdiv(num_keys, num_parts), tile.block_n) * tile.block_n
    of_q, of_k = transforms
    strides = [s for t in (q, k, v, out, d_out) for s in t.stride()[:3]]
    tiles = triton.cdiv(num_queries, tile.block_m) * batch * heads
    d_weight = _rows_of_weight(of_q, tiles * num_parts, q)
    _rope3d_dq_kernel[(tiles * num_parts,)](
        q, k, v, out, d_out, lse, delta, parts, d_weight, lse if lengths is None else lengths,
        *of_q.pointers(lse), *of_k.pointers(lse),
        *strides, *parts.stride()[1:4], parts.stride(0),
        of_q.stride_b, of_k.stride_b,
        heads, num_queries, num_keys, num_parts, keys_per_part, scale, scale * LOG2_E,
        HEAD_DIM=head_dim,
        WIDTH=padded_width(head_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROTATE=of_q.coords is not None,
        NORM=of_q.weight is not None,
        HAS_LENGTHS=lengths is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    # a sum over a dimension is added in one order: the same bits at every call
    dq = parts[0] if num_parts == 1 else parts.sum(0).to(q.dtype)
    return dq, delta, d_weight.sum(0)


def launch_rope3d_dkdv(
    d_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    delta: Tensor,
    transforms: tuple[Transform, Transform],
    lengths: Tensor | None,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dk and dv, [B, S, H, D] contiguous, and d_weight [D] f32 of the norm of k.

    0 for keys that a sample does not have; without a norm d_weight is empty.

    Args:
        d_out: [B, N, H, D], last stride 1.
        qkv: of the forward pass.
        lse: likewise.
        delta: what the dq kernel wrote.
        transforms: as in the forward pass, and so are the others.
        lengths: keys of each sample, or None.
        scale: positive.
        tile: what to launch with.
    """
    q, k, v = qkv
    batch, num_queries, heads, head_dim = q.shape
    num_keys = k.shape[1]
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    of_q, of_k = transforms
    strides = [s for t in (q, k, v, d_out, dk) for s in t.stride()[:3]]
    tiles = triton.cdiv(num_keys, tile.block_n) * batch * heads
    d_weight = _rows_of_weight(of_k, tiles, q)
    _rope3d_dkdv_kernel[(tiles,)](
        q, k, v, d_out, lse, delta, dk, dv, d_weight, lse if lengths is None else lengths,
        *of_q.pointers(lse), *of_k.pointers(lse), *strides,
        of_q.stride_b, of_k.stride_b,
        heads, num_queries, num_keys, scale, scale * LOG2_E,
        HEAD_DIM=head_dim,
        WIDTH=padded_width(head_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROTATE=of_q.coords is not None,
        NORM=of_q.weight is not None,
        HAS_LENGTHS=lengths is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return dk, dv, d_weight.sum(0)


def _rows_of_weight(transform: Transform, programs: int, like: Tensor) -> Tensor:
    """[programs, D] f32 for what each program finds for the norm's weight; empty without one."""
    weight = transform.weight
    if weight is None:
        return torch.empty(0, 0, device=like.device)
    return torch.empty(programs, len(weight), dtype=torch.float32, device=like.device)
