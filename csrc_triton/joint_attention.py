"""Hierarchical joint attention, forward.

    s_ij = scale * <q_i, k_j>            over the keys j that query i may attend to
    o_i  = sum_j softmax(s_i)_j v_j      0 where there is none
    lse_i = log sum_j exp(s_ij)          -inf where there is none

A program owns one tile of queries, txt or img. It folds, in this order: the txt keys that its rows
can see, gathered; image blocks that need the mask; a dense range of keys with no mask arithmetic.
Online softmax after Milakov & Gimelshein (arXiv 1805.02867), tiled as in FlashAttention-2
(arXiv 2307.08691). From a partial result over other keys (out, lse) it goes on where that stopped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.primitives import (
    LN_2,
    LOG2_E,
    LOG2_E_DEVICE,
    TO_IMG,
    TO_TXT,
    fold_masked_scores,
    gather_txt_keys,
    load_img_keys,
    rows_ptr,
    tile_of_program,
    token_bits,
)
from csrc_triton.tile_lists import TileLists
from csrc_triton.tiles import Tile

Partial = tuple[Tensor, Tensor, int]
"""Attention over a part of the keys: out [B, R, H, D], lse [B, H, R] f32 and the first of the R
rows; rows before it have seen nothing yet."""


@triton.jit
def _fold_masked(acc, row_max, row_sum, q, k, v, visible, scale_log2):
    """Fold a tile of keys of which each row sees only the visible ones."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    return fold_masked_scores(acc, row_max, row_sum, scores, v)


@triton.jit
def _fold_dense(acc, row_max, row_sum, q, k, v, scale_log2):
    """Fold a tile of keys that every row sees; scale_log2 > 0."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "partial_start"])
def _joint_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    shape_ptr, row_bits_ptr, col_bits_ptr, tiles_ptr, entries_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_pb, stride_ps, stride_ph,
    num_tiles, num_heads, partial_start, scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASKED: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    FROM_PARTIAL: tl.constexpr,
):  # fmt: skip
    """One program owns up to BLOCK_M queries of one head. Grid: (num_tiles * B * H,)."""
    tile_ptr, b, h = tile_of_program(tiles_ptr, num_tiles, num_heads)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    length = tl.load(shape_ptr + 1)

    start, stop = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    rows = tl.arange(0, BLOCK_M)
    in_rows = rows < stop - start
    # [BLOCK_M, HEAD_DIM]
    q_rows = rows_ptr(q_ptr, start, rows, stride_qs, HEAD_DIM)
    q = tl.load(q_rows, mask=in_rows[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if FROM_PARTIAL:
        known = in_rows & (start >= partial_start)
        first = tl.maximum(start - partial_start, 0)
        partial_ptr += b * stride_pb + h * stride_ph
        p_rows = rows_ptr(partial_ptr, first, rows, stride_ps, HEAD_DIM)
        acc += tl.load(p_rows, mask=known[:, None], other=0.0).to(tl.float32)
        partial_lse_ptr += (b * num_heads + h) * (length - partial_start) + first
        p_lse = tl.load(partial_lse_ptr + rows, mask=known, other=float("-inf"))
        row_max = p_lse * LOG2_E_DEVICE
        row_sum = tl.where(p_lse == float("-inf"), 0.0, 1.0)

    # what a query shows depends on the kind of key
    q_bits = token_bits(start + rows, in_rows, shape_ptr, row_bits_ptr, col_bits_ptr, TO_TXT)
    begin, end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    for i in range(begin, end, BLOCK_MASKED):
        k, v, visible = gather_txt_keys(
            k_ptr, v_ptr, stride_ks, stride_vs, entries_ptr, i, end,
            shape_ptr, row_bits_ptr, col_bits_ptr, q_bits, BLOCK_MASKED, HEAD_DIM,
        )  # fmt: skip
        acc, row_max, row_sum = _fold_masked(acc, row_max, row_sum, q, k, v, visible, scale_log2)

    if HAS_BLOCKS:
        q_bits = token_bits(start + rows, in_rows, shape_ptr, row_bits_ptr, col_bits_ptr, TO_IMG)
        for i in range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)):
            n = tl.load(entries_ptr + i)
            k, v, visible = load_img_keys(
                k_ptr, v_ptr, stride_ks, stride_vs, n, length,
                shape_ptr, row_bits_ptr, col_bits_ptr, q_bits, BLOCK_MASKED, HEAD_DIM,
            )  # fmt: skip
            acc, row_max, row_sum = _fold_masked(
                acc, row_max, row_sum, q, k, v, visible, scale_log2
            )  # fmt: skip
    if HAS_DENSE:
        columns, n = tl.arange(0, BLOCK_N), tl.load(tile_ptr + 6)
        k_rows = rows_ptr(k_ptr, n, columns, stride_ks, HEAD_DIM)
        v_rows = rows_ptr(v_ptr, n, columns, stride_vs, HEAD_DIM)
        for _ in range(n, tl.load(tile_ptr + 7), BLOCK_N):
            k = tl.load(k_rows)
            v = tl.load(v_rows)
            k_rows += tl.cast(stride_ks, tl.int64) * BLOCK_N
            v_rows += tl.cast(stride_vs, tl.int64) * BLOCK_N
            acc, row_max, row_sum = _fold_dense(acc, row_max, row_sum, q, k, v, scale_log2)

    # a row that has seen nothing: out 0, and lse is its maximum, -inf
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    out_ptr += b * stride_ob + h * stride_oh
    out_rows = rows_ptr(out_ptr, start, rows, stride_os, HEAD_DIM)
    out = acc / total[:, None]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None])
    lse = (row_max + tl.log2(total)) * LN_2
    lse_ptr += (b * num_heads + h) * length + start
    tl.store(lse_ptr + rows, lse, mask=in_rows)


def launch_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    lists: TileLists,
    tile: Tile,
    partial: Partial | None = None,
) -> Tensor:
    """Write out and return lse [B, H, S] f32; ``sda_fast.ops`` has checked the arguments.

    Args:
        q: [B, S, H, D], last stride 1.
        k: as q.
        v: as q.
        out: as q; written whole. It may be the partial result's own memory.
        scale: positive.
        lists: tiles of tile.block_m queries, ranges of tile.block_n and blocks of
            tile.block_masked keys.
        tile: what to launch with.
        partial: attention over the keys that lists leaves out.
    """
    batch, length, heads, head_dim = q.shape
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    p_out, p_lse, p_start = (out, lse, 0) if partial is None else partial
    _joint_attention_kernel[(lists.num_tiles * batch * heads,)](
        q, k, v, out, lse, p_out, p_lse,
        lists.shape, lists.row_bits, lists.col_bits, lists.tiles, lists.entries,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *p_out.stride()[:3],
        lists.num_tiles, heads, p_start, scale * LOG2_E,
        HEAD_DIM=head_dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_MASKED=tile.block_masked,
        HAS_BLOCKS=lists.has_blocks,
        HAS_DENSE=lists.has_dense,
        FROM_PARTIAL=partial is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return lse
