"""Attention of few queries to many keys, both rotated by their place as they are loaded: forward.

    s_ij = scale * <R(q_i), R(k_j)>        R turns by (level, y, x), after a norm if one is given;
                                           nothing rotated or normed is written
    o_i = sum_j softmax(s_i)_j v_j         lse_i = log sum_j exp(s_ij)

A program owns one tile of queries and one part of the keys. Where there is more than one part, the
parts' results are merged by lse in a second, small kernel. A sample without keys gives 0 and -inf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.primitives import LN_2, LOG2_E, fold_masked_scores
from csrc_triton.rope3d import (
    Transform,
    inverse_rms,
    load_row_tile,
    load_turn,
    load_weight,
    padded_width,
    store_row_tile,
    turn,
)
from csrc_triton.tiles import Tile

MERGED = 16
"""Queries of a program that merges parts."""


@triton.jit
def load_transformed(
    ptr, coords_ptr, pairs_ptr, weight_ptr, rows, in_range, stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] tokens, normed, turned and rounded back to their dtype."""
    x = load_row_tile(ptr, rows, in_range, stride, HEAD_DIM, WIDTH)
    if NORM or ROTATE:
        y = x.to(tl.float32)
        if NORM:
            weight = load_weight(weight_ptr, HEAD_DIM, WIDTH)
            y *= inverse_rms(y, HEAD_DIM)[:, None] * weight[None, :]
        if ROTATE:
            exact: tl.constexpr = x.dtype == tl.float32
            sine, cosine = load_turn(coords_ptr, pairs_ptr, rows, in_range, WIDTH // 2, exact)
            y = turn(y, sine, cosine, ROWS, WIDTH)
        x = y.to(x.dtype)
    return x


@triton.jit
def keys_of_part(part, keys_per_part, num_keys, lengths_ptr, b, HAS_LENGTHS: tl.constexpr):
    """First and last+1 key of a part that the sample has."""
    if HAS_LENGTHS:
        num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + b))
    start = part * keys_per_part
    return start, tl.minimum(start + keys_per_part, num_keys)


@triton.jit(
    do_not_specialize=["num_heads", "num_queries", "num_keys", "num_parts", "keys_per_part"]
)
def _rope3d_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr,
    q_coords_ptr, q_pairs_ptr, q_weight_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_op,
    stride_qcb, stride_kcb,
    num_heads, num_queries, num_keys, num_parts, keys_per_part, scale_log2,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, one part of the keys.

    Grid: (cdiv(N, BLOCK_M) * num_parts * B * H,). out is [parts, B, N, H, D], lse [parts, B, H, N].
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    tile, part = pid % num_tiles, pid // num_tiles % num_parts
    head = (pid // (num_tiles * num_parts)).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    k_coords_ptr += b * stride_kcb

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < num_queries
    q = load_transformed(
        q_ptr + b * stride_qb + h * stride_qh, q_coords_ptr + b * stride_qcb, q_pairs_ptr,
        q_weight_ptr, m, in_rows, stride_qs, BLOCK_M, HEAD_DIM, WIDTH, ROTATE, NORM,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    start, stop = keys_of_part(part, keys_per_part, num_keys, lengths_ptr, b, HAS_LENGTHS)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_range = n < stop
        k = load_transformed(
            k_ptr, k_coords_ptr, k_pairs_ptr, k_weight_ptr, n, in_range, stride_ks,
            BLOCK_N, HEAD_DIM, WIDTH, ROTATE, NORM,
        )  # fmt: skip
        v = load_row_tile(v_ptr, n, in_range, stride_vs, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(in_range[None, :], scores, float("-inf"))
        acc, row_max, row_sum = fold_masked_scores(acc, row_max, row_sum, scores, v)

    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    part_offset = part.to(tl.int64)
    out_ptr += part_offset * stride_op + b * stride_ob + h * stride_oh
    store_row_tile(out_ptr, acc / total[:, None], m, in_rows, stride_os, HEAD_DIM, WIDTH)
    lse_ptr += (part_offset * (tl.num_programs(0) // (num_tiles * num_parts)) + head) * num_queries
    tl.store(lse_ptr + m, (row_max + tl.log2(total)) * LN_2, mask=in_rows)


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_parts"])
def _merge_parts_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr,
    stride_pp, stride_pb, stride_ps, stride_ph,
    stride_ob, stride_os, stride_oh,
    num_heads, num_rows, num_parts,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge attention over parts of the keys by lse. Grid: (cdiv(N, BLOCK_M) * B * H,)."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // num_tiles).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    m = pid % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < num_rows
    num_bh = tl.num_programs(0) // num_tiles
    part_ptr += b * stride_pb + h * stride_ph

    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in range(num_parts):
        place = part_lse_ptr + (part * num_bh + head) * num_rows + m
        part_lse = tl.load(place, mask=in_rows, other=float("-inf"))
        new_max = tl.maximum(row_max, part_lse)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay, weight = tl.exp(row_max - pivot), tl.exp(part_lse - pivot)
        x = load_row_tile(
            part_ptr + tl.cast(part, tl.int64) * stride_pp, m, in_rows, stride_ps, HEAD_DIM, WIDTH
        )  # fmt: skip
        acc = acc * decay[:, None] + x * weight[:, None]
        row_max, row_sum = new_max, row_sum * decay + weight
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    out_ptr += b * stride_ob + h * stride_oh
    store_row_tile(out_ptr, acc / total[:, None], m, in_rows, stride_os, HEAD_DIM, WIDTH)
    tl.store(lse_ptr + head * num_rows + m, row_max + tl.log(total), mask=in_rows)


def launch_rope3d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    transforms: tuple[Transform, Transform],
    lengths: Tensor | None,
    scale: float,
    num_parts: int,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Return out [B, N, H, D] contiguous, dtype of q, and lse [B, H, N] f32.

    Args:
        q: [B, N, H, D], last stride 1.
        k: [B, S, H, D], likewise.
        v: as k.
        transforms: of the queries and of the keys, alike but for the values.
        lengths: [B] int32, keys of each sample; None for S.
        scale: positive.
        num_parts: parts of the keys, each to programs of its own.
        tile: what to launch with.
    """
    batch, num_queries, heads, head_dim = q.shape
    num_keys, width = k.shape[1], padded_width(head_dim)
    f32 = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, num_queries, **f32)
    parts, part_lse = out[None], lse[None]
    if num_parts > 1:
        parts = torch.empty(num_parts, *q.shape, **f32)
        part_lse = torch.empty(num_parts, *lse.shape, **f32)
    keys_per_part = triton.cdiv(triton.cdiv(num_keys, num_parts), tile.block_n) * tile.block_n
    of_q, of_k = transforms
    tiles = triton.cdiv(num_queries, tile.block_m) * batch * heads
    _rope3d_attention_kernel[(tiles * num_parts,)](
        q, k, v, parts, part_lse, lse if lengths is None else lengths,
        *of_q.pointers(lse), *of_k.pointers(lse),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *parts.stride()[1:4], parts.stride(0),
        of_q.stride_b, of_k.stride_b,
        heads, num_queries, num_keys, num_parts, keys_per_part, scale * LOG2_E,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROTATE=of_q.coords is not None,
        NORM=of_q.weight is not None,
        HAS_LENGTHS=lengths is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if num_parts > 1:
        _merge_parts_kernel[(triton.cdiv(num_queries, MERGED) * batch * heads,)](
            parts, part_lse, out, lse, *parts.stride()[:4], *out.stride()[:3],
            heads, num_queries, num_parts,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_M=MERGED,
            num_warps=4,
        )  # fmt: skip
    return out, lse
