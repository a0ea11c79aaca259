"""Hierarchical joint attention, backward: two kernels, no atomics, bitwise repeatable.

With p_ij = exp(s_ij - lse_i), delta_i = <dO_i, O_i> and dp_ij = <dO_i, v_j>:

    dv_j = sum_i p_ij dO_i
    ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i

The scores are computed anew from lse, as in FlashAttention-2 (arXiv 2307.08691). The dq kernel owns
tiles of queries and reads the forward's lists; it writes delta on its way. The dkdv kernel owns
tiles of keys and reads their transpose. Both add to partial gradients over the pairs that their
lists leave out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.primitives import (
    AS_KEY,
    LOG2_E,
    LOG2_E_DEVICE,
    TO_IMG,
    TO_TXT,
    bits_meet,
    gather_txt_keys,
    load_img_keys,
    rows_ptr,
    tile_of_program,
    token_bits,
)
from csrc_triton.tile_lists import TileLists
from csrc_triton.tiles import Tile


@triton.jit
def _load_lse(lse_ptr, rows, in_rows):
    """lse in base 2, finite: a row that sees nothing is masked wherever it is used."""
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E_DEVICE)


@triton.jit
def _add_dq(dq, q, d_out, lse, delta, k, v, visible, scale_log2, MASKED: tl.constexpr):
    """Add what a tile of keys gives to dq, not yet scaled."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "partial_start"])
def _joint_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, partial_ptr,
    shape_ptr, row_bits_ptr, col_bits_ptr, tiles_ptr, entries_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_gb, stride_gs, stride_gh,
    stride_dqb, stride_dqs, stride_dqh,
    stride_pb, stride_ps, stride_ph,
    num_tiles, num_heads, partial_start, scale, scale_log2,
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
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    length = tl.load(shape_ptr + 1)
    start, stop = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    rows = tl.arange(0, BLOCK_M)
    in_rows = rows < stop - start

    # [BLOCK_M, HEAD_DIM]
    q_rows = rows_ptr(q_ptr + b * stride_qb + h * stride_qh, start, rows, stride_qs, HEAD_DIM)
    g_rows = rows_ptr(d_out_ptr + b * stride_gb + h * stride_gh, start, rows, stride_gs, HEAD_DIM)
    o_rows = rows_ptr(out_ptr + b * stride_ob + h * stride_oh, start, rows, stride_os, HEAD_DIM)
    d_out = tl.load(g_rows, mask=in_rows[:, None], other=0.0)
    out = tl.load(o_rows, mask=in_rows[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row_offset = (b * num_heads + h) * length + start
    tl.store(delta_ptr + row_offset + rows, delta, mask=in_rows)
    lse = _load_lse(lse_ptr + row_offset, rows, in_rows)
    q = tl.load(q_rows, mask=in_rows[:, None], other=0.0)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # as in the forward pass: gathered txt keys, masked blocks, dense range
    q_bits = token_bits(start + rows, in_rows, shape_ptr, row_bits_ptr, col_bits_ptr, TO_TXT)
    begin, end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    for i in range(begin, end, BLOCK_MASKED):
        k, v, visible = gather_txt_keys(
            k_ptr, v_ptr, stride_ks, stride_vs, entries_ptr, i, end,
            shape_ptr, row_bits_ptr, col_bits_ptr, q_bits, BLOCK_MASKED, HEAD_DIM,
        )  # fmt: skip
        dq = _add_dq(dq, q, d_out, lse, delta, k, v, visible, scale_log2, MASKED=True)

    if HAS_BLOCKS:
        q_bits = token_bits(start + rows, in_rows, shape_ptr, row_bits_ptr, col_bits_ptr, TO_IMG)
        for i in range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)):
            n = tl.load(entries_ptr + i)
            k, v, visible = load_img_keys(
                k_ptr, v_ptr, stride_ks, stride_vs, n, length,
                shape_ptr, row_bits_ptr, col_bits_ptr, q_bits, BLOCK_MASKED, HEAD_DIM,
            )  # fmt: skip
            dq = _add_dq(dq, q, d_out, lse, delta, k, v, visible, scale_log2, MASKED=True)
    if HAS_DENSE:
        columns, n = tl.arange(0, BLOCK_N), tl.load(tile_ptr + 6)
        k_rows = rows_ptr(k_ptr, n, columns, stride_ks, HEAD_DIM)
        v_rows = rows_ptr(v_ptr, n, columns, stride_vs, HEAD_DIM)
        for _ in range(n, tl.load(tile_ptr + 7), BLOCK_N):
            k, v = tl.load(k_rows), tl.load(v_rows)
            dq = _add_dq(dq, q, d_out, lse, delta, k, v, None, scale_log2, MASKED=False)
            k_rows += tl.cast(stride_ks, tl.int64) * BLOCK_N
            v_rows += tl.cast(stride_vs, tl.int64) * BLOCK_N

    dq *= scale
    if FROM_PARTIAL:
        known = in_rows & (start >= partial_start)
        partial_ptr += b * stride_pb + h * stride_ph
        first = tl.maximum(start - partial_start, 0)
        p_rows = rows_ptr(partial_ptr, first, rows, stride_ps, HEAD_DIM)
        dq += tl.load(p_rows, mask=known[:, None], other=0.0).to(tl.float32)
    dq_rows = rows_ptr(dq_ptr + b * stride_dqb + h * stride_dqh, start, rows, stride_dqs, HEAD_DIM)
    tl.store(dq_rows, dq.to(dq_ptr.dtype.element_ty), mask=in_rows[:, None])


@triton.jit
def _add_dkdv(dk, dv, k, v, q, d_out, lse, delta, visible, scale_log2, MASKED: tl.constexpr):
    """Add what a tile of queries gives to dk, not yet scaled, and dv; all is [keys, queries]."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "partial_start"])
def _joint_attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    partial_dk_ptr, partial_dv_ptr,
    shape_ptr, row_bits_ptr, col_bits_ptr, tiles_ptr, entries_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_db, stride_ds, stride_dh,
    stride_pb, stride_ps, stride_ph,
    num_tiles, num_heads, partial_start, scale, scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASKED: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    FROM_PARTIAL: tl.constexpr,
):  # fmt: skip
    """One program owns up to BLOCK_N keys of one head. Grid: (num_tiles * B * H,)."""
    tile_ptr, b, h = tile_of_program(tiles_ptr, num_tiles, num_heads)
    q_ptr += b * stride_qb + h * stride_qh
    d_out_ptr += b * stride_gb + h * stride_gh
    num_txt, length = tl.load(shape_ptr), tl.load(shape_ptr + 1)
    row_offset = (b * num_heads + h) * length
    lse_ptr += row_offset
    delta_ptr += row_offset

    start, stop = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    keys = tl.arange(0, BLOCK_N)
    in_keys = keys < stop - start
    # [BLOCK_N, HEAD_DIM]
    k_rows = rows_ptr(k_ptr + b * stride_kb + h * stride_kh, start, keys, stride_ks, HEAD_DIM)
    v_rows = rows_ptr(v_ptr + b * stride_vb + h * stride_vh, start, keys, stride_vs, HEAD_DIM)
    k = tl.load(k_rows, mask=in_keys[:, None], other=0.0)
    v = tl.load(v_rows, mask=in_keys[:, None], other=0.0)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)

    if HAS_BLOCKS:
        queries = tl.arange(0, BLOCK_MASKED)
        # how queries look depends on the kind of key; a tile of keys has one kind
        role = tl.where(start < num_txt, TO_TXT, TO_IMG)
        k_bits = token_bits(start + keys, in_keys, shape_ptr, row_bits_ptr, col_bits_ptr, AS_KEY)
        for i in range(tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)):
            m = tl.load(entries_ptr + i)
            # a block of queries is of txt or of img, never of both
            in_rows = queries < tl.where(m < num_txt, num_txt, length) - m
            q_rows = rows_ptr(q_ptr, m, queries, stride_qs, HEAD_DIM)
            g_rows = rows_ptr(d_out_ptr, m, queries, stride_gs, HEAD_DIM)
            q = tl.load(q_rows, mask=in_rows[:, None], other=0.0)
            d_out = tl.load(g_rows, mask=in_rows[:, None], other=0.0)
            lse = _load_lse(lse_ptr + m, queries, in_rows)
            delta = tl.load(delta_ptr + m + queries, mask=in_rows, other=0.0)
            q_bits = token_bits(m + queries, in_rows, shape_ptr, row_bits_ptr, col_bits_ptr, role)
            visible = bits_meet(k_bits, q_bits)
            dk, dv = _add_dkdv(
                dk, dv, k, v, q, d_out, lse, delta, visible, scale_log2, MASKED=True
            )  # fmt: skip
    if HAS_DENSE:
        queries, m = tl.arange(0, BLOCK_M), tl.load(tile_ptr + 6)
        q_rows = rows_ptr(q_ptr, m, queries, stride_qs, HEAD_DIM)
        g_rows = rows_ptr(d_out_ptr, m, queries, stride_gs, HEAD_DIM)
        for start_m in range(m, tl.load(tile_ptr + 7), BLOCK_M):
            q, d_out = tl.load(q_rows), tl.load(g_rows)
            lse = tl.load(lse_ptr + start_m + queries) * LOG2_E_DEVICE
            delta = tl.load(delta_ptr + start_m + queries)
            dk, dv = _add_dkdv(dk, dv, k, v, q, d_out, lse, delta, None, scale_log2, MASKED=False)
            q_rows += tl.cast(stride_qs, tl.int64) * BLOCK_M
            g_rows += tl.cast(stride_gs, tl.int64) * BLOCK_M

    dk *= scale
    if FROM_PARTIAL:
        known = in_keys & (start >= partial_start)
        first = tl.maximum(start - partial_start, 0)
        p_offset = b * stride_pb + h * stride_ph
        pk_rows = rows_ptr(partial_dk_ptr + p_offset, first, keys, stride_ps, HEAD_DIM)
        pv_rows = rows_ptr(partial_dv_ptr + p_offset, first, keys, stride_ps, HEAD_DIM)
        dk += tl.load(pk_rows, mask=known[:, None], other=0.0).to(tl.float32)
        dv += tl.load(pv_rows, mask=known[:, None], other=0.0).to(tl.float32)
    d_offset = b * stride_db + h * stride_dh
    dk_rows = rows_ptr(dk_ptr + d_offset, start, keys, stride_ds, HEAD_DIM)
    dv_rows = rows_ptr(dv_ptr + d_offset, start, keys, stride_ds, HEAD_DIM)
    tl.store(dk_rows, dk.to(dk_ptr.dtype.element_ty), mask=in_keys[:, None])
    tl.store(dv_rows, dv.to(dv_ptr.dtype.element_ty), mask=in_keys[:, None])


def launch_joint_attention_dq(
    d_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    lists: TileLists,
    tile: Tile,
    partial: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (dq [B, S, H, D] contiguous, delta [B, H, S] f32).

    Args:
        d_out: [B, S, H, D], last stride 1.
        qkv: of the forward pass.
        out: likewise.
        lse: likewise, [B, H, S] f32 contiguous.
        scale: likewise.
        lists: those of the forward pass, for this tile.
        tile: what to launch with.
        partial: gradient over the pairs that lists leaves out, [B, R, H, D], and the first of its
            rows.
    """
    q, k, v = qkv
    batch, length, heads, head_dim = q.shape
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    p_dq, p_start = (dq, 0) if partial is None else partial
    strides = [s for t in (q, k, v, out, d_out, dq, p_dq) for s in t.stride()[:3]]
    _joint_attention_dq_kernel[(lists.num_tiles * batch * heads,)](
        q, k, v, out, d_out, lse, delta, dq, p_dq,
        lists.shape, lists.row_bits, lists.col_bits, lists.tiles, lists.entries, *strides,
        lists.num_tiles, heads, p_start, scale, scale * LOG2_E,
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
    return dq, delta


def launch_joint_attention_dkdv(
    d_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    delta: Tensor,
    scale: float,
    lists: TileLists,
    tile: Tile,
    partial: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dk and dv, [B, S, H, D] contiguous.

    Args:
        d_out: [B, S, H, D], last stride 1.
        qkv: of the forward pass.
        lse: likewise, [B, H, S] f32 contiguous.
        delta: what the dq kernel wrote.
        scale: as in the forward pass.
        lists: tiles of tile.block_n keys, ranges of tile.block_m and blocks of tile.block_masked
            queries.
        tile: what to launch with.
        partial: gradients over the pairs that lists leaves out, two [B, R, H, D] of equal strides,
            and the first of their rows.
    """
    q, k, v = qkv
    batch, _, heads, head_dim = q.shape
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    p_dk, p_dv, p_start = (dk, dv, 0) if partial is None else partial
    strides = [s for t in (q, k, v, d_out, dk, p_dk) for s in t.stride()[:3]]
    _joint_attention_dkdv_kernel[(lists.num_tiles * batch * heads,)](
        q, k, v, d_out, lse, delta, dk, dv, p_dk, p_dv,
        lists.shape, lists.row_bits, lists.col_bits, lists.tiles, lists.entries, *strides,
        lists.num_tiles, heads, p_start, scale, scale * LOG2_E,
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
    return dk, dv
