"""Device functions used by at least two kernels."""

import triton
import triton.language as tl

from csrc_triton import tile_lists

LOG2_E = 1.4426950408889634
"""Logits are kept in base 2 inside the kernels: multiply by this on the way in."""
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E_DEVICE = tl.constexpr(LOG2_E)
FIELDS = tl.constexpr(tile_lists.TILE_FIELDS)
TO_TXT = tl.constexpr(tile_lists.TO_TXT)
TO_IMG = tl.constexpr(tile_lists.TO_IMG)
AS_KEY = tl.constexpr(tile_lists.AS_KEY)


@triton.jit
def fold_masked_scores(acc, row_max, row_sum, scores, v):
    """Fold a tile of base-2 scores, -inf where a row does not see a key, into the running softmax.

    acc [M, D] f32, row_max and row_sum [M] f32, scores [M, N] f32, v [N, D].
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a finite pivot: -inf - (-inf) is never formed while a row has seen nothing
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - pivot[:, None])
    decay = tl.exp2(row_max - pivot)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit
def tile_of_program(tiles_ptr, num_tiles, num_heads):
    """(record of the tile, batch, head) of this program; batch and head int64, for strides."""
    pid = tl.program_id(0)
    # tiles of one head run together: its k and v stay in L2
    head = (pid // num_tiles).to(tl.int64)
    return tiles_ptr + (pid % num_tiles) * FIELDS, head // num_heads, head % num_heads


@triton.jit
def rows_ptr(ptr, start, rows, stride, HEAD_DIM: tl.constexpr):
    """Pointers [rows, HEAD_DIM] to tokens start + rows, in int64: strides may be of any size."""
    d = tl.arange(0, HEAD_DIM)
    return (
        ptr + tl.cast(start, tl.int64) * stride + rows[:, None].to(tl.int64) * stride + d[None, :]
    )


@triton.jit
def token_bits(token, in_range, shape_ptr, row_bits_ptr, col_bits_ptr, role):
    """(row bits, column bits) of each token in a role; empty sets out of range."""
    num_txt = tl.load(shape_ptr)
    patch = token - num_txt
    num_img = tl.load(shape_ptr + 4)
    of_source = patch >= num_img
    width = tl.where(of_source, tl.load(shape_ptr + 5), tl.load(shape_ptr + 3))
    patch = tl.where(of_source, patch - num_img, patch)
    row = patch // width
    col = patch - row * width
    row = num_txt + row + tl.where(of_source, tl.load(shape_ptr + 2), 0)
    col = num_txt + col + tl.where(of_source, tl.load(shape_ptr + 3), 0)
    is_txt = token < num_txt
    row = tl.where(is_txt, token, row) + role * tl.load(shape_ptr + 6)
    col = tl.where(is_txt, token, col) + role * tl.load(shape_ptr + 7)
    row_bits = tl.load(row_bits_ptr + row, mask=in_range, other=0)
    return row_bits, tl.load(col_bits_ptr + col, mask=in_range, other=0)


@triton.jit
def bits_meet(a, b):
    """[len(a), len(b)]: whether the row bits and the column bits of a and b both meet."""
    rows = (a[0][:, None] & b[0][None, :]) != 0
    return rows & ((a[1][:, None] & b[1][None, :]) != 0)


@triton.jit
def gather_txt_keys(
    k_ptr, v_ptr, stride_ks, stride_vs, entries_ptr, begin, end,
    shape_ptr, row_bits_ptr, col_bits_ptr, q_bits,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """k, v [BLOCK, HEAD_DIM] of the txt tokens listed from begin, and which query sees which."""
    place = begin + tl.arange(0, BLOCK)
    listed = place < end
    token = tl.load(entries_ptr + place, mask=listed, other=0)
    n, d = token.to(tl.int64)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    k = tl.load(k_ptr + n * stride_ks + d, mask=listed[:, None], other=0.0)
    v = tl.load(v_ptr + n * stride_vs + d, mask=listed[:, None], other=0.0)
    k_bits = token_bits(token, listed, shape_ptr, row_bits_ptr, col_bits_ptr, AS_KEY)
    return k, v, bits_meet(q_bits, k_bits)


@triton.jit
def load_img_keys(
    k_ptr, v_ptr, stride_ks, stride_vs, start, length,
    shape_ptr, row_bits_ptr, col_bits_ptr, q_bits,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """k, v [BLOCK, HEAD_DIM] of the image tokens from start, and which query sees which."""
    columns = tl.arange(0, BLOCK)
    in_range = columns < length - start
    k_rows = rows_ptr(k_ptr, start, columns, stride_ks, HEAD_DIM)
    v_rows = rows_ptr(v_ptr, start, columns, stride_vs, HEAD_DIM)
    # zeros past the end: 0 * NaN would reach every row
    k = tl.load(k_rows, mask=in_range[:, None], other=0.0)
    v = tl.load(v_rows, mask=in_range[:, None], other=0.0)
    token = start + columns
    k_bits = token_bits(token, in_range, shape_ptr, row_bits_ptr, col_bits_ptr, AS_KEY)
    return k, v, bits_meet(q_bits, k_bits)
