"""From FLUX's projections to joint q, k and v in one launch, and back in one.

    q = R(norm(x_q))    k = R(norm(x_k))    v = x_v    x one stream or two, joined txt first
    dx = norm'(R^-1(dq)) and so on                     since a rotation's transpose is its inverse

norm is the RMSNorm of a head, with the weights of its stream, and R turns interleaved pairs, both
as in ``csrc_triton.rope3d``, but with sines and cosines from a table. Each element is read and
written once, and a program's loads go out before it stores. Its tokens lie across the threads, its
heads one after another in their registers, so that they share what is read of the table.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.rope3d import inverse_rms, load_weight, norm_back, turn
from csrc_triton.tiles import RowTile


@triton.jit
def _share(num_heads, num_txt, num_img, batch, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """This program's share: whether of txt, sample, first head, first token of its stream, tokens
    that the stream has, tokens before it in the joint sequence."""
    groups = tl.cdiv(num_heads, HEADS)
    # groups of heads are next to each other: they read the same part of the table
    pid = tl.program_id(0)
    tile, txt_tiles = pid // (groups * batch), tl.cdiv(num_txt, TOKENS)
    of_txt = tile < txt_tiles
    first = tl.where(of_txt, tile, tile - txt_tiles) * TOKENS
    length, before = tl.where(of_txt, num_txt, num_img), tl.where(of_txt, 0, num_txt)
    return of_txt, (pid // groups % batch).to(tl.int64), pid % groups * HEADS, first, length, before


@triton.jit
def _offsets(head, token, stride_s, stride_h, stride_d, HEAD_DIM: tl.constexpr):
    """[rows, HEAD_DIM] int64, for strides of any size; a row is one head of one token."""
    d = tl.arange(0, HEAD_DIM).to(tl.int64)
    return (token.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h)[:, None] + d * stride_d


@triton.jit
def _load_turn(
    cos_ptr, sin_ptr, stride_cos, stride_sin, first, length, before,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sine and cosine [HEADS * TOKENS, HEAD_DIM / 2] of the rows, read once for all heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    s = first + tl.arange(0, TOKENS)
    inside = (s < length)[:, None]
    row = (before + s).to(tl.int64)[:, None]
    # the table holds each value twice
    column = 2 * tl.arange(0, HALF)[None, :]
    sine = tl.load(sin_ptr + row * stride_sin + column, mask=inside, other=0.0)
    cosine = tl.load(cos_ptr + row * stride_cos + column, mask=inside, other=0.0)
    sine = tl.broadcast_to(sine[None], [HEADS, TOKENS, HALF])
    cosine = tl.broadcast_to(cosine[None], [HEADS, TOKENS, HALF])
    rows: tl.constexpr = HEADS * TOKENS
    return tl.reshape(sine, [rows, HALF]), tl.reshape(cosine, [rows, HALF])


@triton.jit
def _weight(of_txt, txt_ptr, img_ptr, HEAD_DIM: tl.constexpr):
    """[HEAD_DIM] f32 weight of the norm of this stream; the dtypes of the two may differ."""
    of_img = load_weight(img_ptr, HEAD_DIM, HEAD_DIM)
    return tl.where(of_txt, load_weight(txt_ptr, HEAD_DIM, HEAD_DIM), of_img)


@triton.jit
def _forward(x, weight, sine, cosine, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows normed and turned, in f32."""
    x = x.to(tl.float32)
    return turn(
        x * inverse_rms(x, HEAD_DIM)[:, None] * weight[None, :], sine, cosine, ROWS, HEAD_DIM
    )


@triton.jit
def _backward(d_y, x, weight, sine, cosine, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """From gradients of normed and turned rows to those of the rows and of the weight, in f32."""
    d_normed = turn(d_y.to(tl.float32), -sine, cosine, ROWS, HEAD_DIM)
    return norm_back(d_normed, x.to(tl.float32), weight, HEAD_DIM)


@triton.jit(do_not_specialize=["num_heads", "num_txt", "num_img", "batch"])
def _norm_rope_kernel(
    txt_ptr, img_ptr, q_ptr, k_ptr, v_ptr,
    txt_q_norm_ptr, txt_k_norm_ptr, img_q_norm_ptr, img_k_norm_ptr, cos_ptr, sin_ptr,
    stride_tb, stride_ts, stride_ib, stride_is, stride_cos, stride_sin,
    num_heads, num_txt, num_img, batch,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of TOKENS tokens of one stream of one sample.

    Grid: ((cdiv(S_txt, TOKENS) + cdiv(S_img, TOKENS)) * B * cdiv(H, HEADS),).
    """
    ROWS: tl.constexpr = HEADS * TOKENS
    of_txt, b, h, first, length, before = _share(num_heads, num_txt, num_img, batch, TOKENS, HEADS)
    row = tl.arange(0, ROWS)
    h, s = h + row // TOKENS, first + row % TOKENS
    inside = ((h < num_heads) & (s < length))[:, None]
    width = num_heads * HEAD_DIM
    x_ptr = tl.where(of_txt, txt_ptr, img_ptr) + b * tl.where(of_txt, stride_tb, stride_ib)
    x_ptr += _offsets(h, s, tl.where(of_txt, stride_ts, stride_is), HEAD_DIM, 1, HEAD_DIM)
    q = tl.load(x_ptr, mask=inside, other=0.0)
    k = tl.load(x_ptr + width, mask=inside, other=0.0)
    sine, cosine = _load_turn(
        cos_ptr, sin_ptr, stride_cos, stride_sin, first, length, before, TOKENS, HEADS, HEAD_DIM
    )  # fmt: skip
    q_weight = _weight(of_txt, txt_q_norm_ptr, img_q_norm_ptr, HEAD_DIM)
    k_weight = _weight(of_txt, txt_k_norm_ptr, img_k_norm_ptr, HEAD_DIM)

    to = b * (num_txt + num_img) * width + _offsets(h, before + s, width, HEAD_DIM, 1, HEAD_DIM)
    if VALUES:
        tl.store(v_ptr + to, tl.load(x_ptr + 2 * width, mask=inside, other=0.0), mask=inside)
    q = _forward(q, q_weight, sine, cosine, ROWS, HEAD_DIM)
    tl.store(q_ptr + to, q.to(q_ptr.dtype.element_ty), mask=inside)
    k = _forward(k, k_weight, sine, cosine, ROWS, HEAD_DIM)
    tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_heads", "num_txt", "num_img", "batch"])
def _norm_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, txt_ptr, img_ptr, d_txt_ptr, d_img_ptr, d_weight_ptr,
    txt_q_norm_ptr, txt_k_norm_ptr, img_q_norm_ptr, img_k_norm_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_tb, stride_ts, stride_ib, stride_is, stride_cos, stride_sin,
    num_heads, num_txt, num_img, batch,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    LEARN: tl.constexpr,
):  # fmt: skip
    """One program: as in the forward pass; with LEARN its sums of the weights' gradients, too.

    d_txt and d_img are contiguous, d_weight [programs, 2, HEAD_DIM] f32: of q, of k.
    """
    ROWS: tl.constexpr = HEADS * TOKENS
    of_txt, b, h, first, length, before = _share(num_heads, num_txt, num_img, batch, TOKENS, HEADS)
    row = tl.arange(0, ROWS)
    h, s = h + row // TOKENS, first + row % TOKENS
    inside = ((h < num_heads) & (s < length))[:, None]
    joint = before + s
    dq_ptr += b * stride_qb + _offsets(h, joint, stride_qs, stride_qh, stride_qd, HEAD_DIM)
    dk_ptr += b * stride_kb + _offsets(h, joint, stride_ks, stride_kh, stride_kd, HEAD_DIM)
    dq = tl.load(dq_ptr, mask=inside, other=0.0)
    dk = tl.load(dk_ptr, mask=inside, other=0.0)
    width = num_heads * HEAD_DIM
    x_ptr = tl.where(of_txt, txt_ptr, img_ptr) + b * tl.where(of_txt, stride_tb, stride_ib)
    x_ptr += _offsets(h, s, tl.where(of_txt, stride_ts, stride_is), HEAD_DIM, 1, HEAD_DIM)
    q = tl.load(x_ptr, mask=inside, other=0.0)
    k = tl.load(x_ptr + width, mask=inside, other=0.0)
    sine, cosine = _load_turn(
        cos_ptr, sin_ptr, stride_cos, stride_sin, first, length, before, TOKENS, HEADS, HEAD_DIM
    )  # fmt: skip
    q_weight = _weight(of_txt, txt_q_norm_ptr, img_q_norm_ptr, HEAD_DIM)
    k_weight = _weight(of_txt, txt_k_norm_ptr, img_k_norm_ptr, HEAD_DIM)

    columns = (2 + VALUES) * width
    to = tl.where(of_txt, d_txt_ptr, d_img_ptr) + b * length * columns
    to += _offsets(h, s, columns, HEAD_DIM, 1, HEAD_DIM)
    if VALUES:
        dv_ptr += b * stride_vb + _offsets(h, joint, stride_vs, stride_vh, stride_vd, HEAD_DIM)
        tl.store(to + 2 * width, tl.load(dv_ptr, mask=inside, other=0.0), mask=inside)
    dq, d_q_weight = _backward(dq, q, q_weight, sine, cosine, ROWS, HEAD_DIM)
    tl.store(to, dq.to(d_img_ptr.dtype.element_ty), mask=inside)
    dk, d_k_weight = _backward(dk, k, k_weight, sine, cosine, ROWS, HEAD_DIM)
    tl.store(to + width, dk.to(d_img_ptr.dtype.element_ty), mask=inside)
    if LEARN:
        own = d_weight_ptr + tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM + tl.arange(0, HEAD_DIM)
        tl.store(own, d_q_weight)
        tl.store(own + HEAD_DIM, d_k_weight)


def launch_norm_rope(
    streams: Sequence[Tensor],
    norms: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    heads: int,
    values: bool,
    tile: RowTile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q, k and v [B, S, H, D], contiguous, dtype of the streams; v None without values.

    Args:
        streams: one or two [B, S_i, >= 3 * H * D], or 2 without values; last stride 1.
        norms: weights of q and of k of each stream, [D] contiguous.
        rotary: cos and sin, [S, D] f32, every value twice; last stride 1.
        heads: H.
        values: whether v is copied.
        tile: what to launch with.
    """
    img, head_dim = streams[-1], rotary[0].shape[-1]
    shape = len(img), sum(x.shape[1] for x in streams), heads, head_dim
    empty = lambda: torch.empty(shape, dtype=img.dtype, device=img.device)
    q, k, v = empty(), empty(), empty() if values else None
    programs = _programs(streams, heads, tile)
    _norm_rope_kernel[(sum(programs),)](
        streams[0], img, q, k, q if v is None else v,
        *_of_both(norms), *rotary, *_strides(streams, rotary), heads, *_lengths(streams), len(img),
        HEAD_DIM=head_dim,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        VALUES=values,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return q, k, v


def launch_norm_rope_backward(
    grads: Sequence[Tensor],
    streams: Sequence[Tensor],
    norms: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    learn: bool,
    tile: RowTile,
) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients of the streams and, with learn, of the norms; no atomics.

    Those of the streams are contiguous, [B, S_i, 3 * H * D] or, without dv, 2 * H * D; those of
    the norms [number of streams, 2, D] f32, of q and of k.

    Args:
        grads: dq, dk and, where v was copied, dv, [B, S, H, D], any strides.
        streams: of the forward pass, as the others.
        norms: weights of q and of k of each stream.
        rotary: cos and sin.
        learn: whether the gradients of the norms are wanted.
        tile: what to launch with.
    """
    img, (batch, _, heads, head_dim) = streams[-1], grads[0].shape
    columns = len(grads) * heads * head_dim
    d_streams = [
        torch.empty(batch, x.shape[1], columns, dtype=x.dtype, device=x.device) for x in streams
    ]
    programs = _programs(streams, heads, tile)
    rows = sum(programs) if learn else 0
    d_weight = torch.empty(rows, 2, head_dim, dtype=torch.float32, device=img.device)
    dq, dk, dv = grads[0], grads[1], grads[-1]
    strides = [stride for grad in (dq, dk, dv) for stride in grad.stride()]
    _norm_rope_backward_kernel[(sum(programs),)](
        dq, dk, dv, streams[0], img, d_streams[0], d_streams[-1], d_weight,
        *_of_both(norms), *rotary, *strides, *_strides(streams, rotary),
        heads, *_lengths(streams), batch,
        HEAD_DIM=head_dim,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        VALUES=len(grads) == 3,
        LEARN=learn,
        num_warps=tile.num_warps,
    )  # fmt: skip
    if not learn:
        return d_streams, None
    # a sum over a dimension is added in one order: the same bits at every call
    sums = [part.sum(0) for part in d_weight.split([n for n in programs if n])]
    return d_streams, torch.stack(sums)


def _lengths(streams: Sequence[Tensor]) -> tuple[int, int]:
    """Tokens of txt and of img; a stream alone takes the place of img."""
    return streams[0].shape[1] if len(streams) == 2 else 0, streams[-1].shape[1]


def _programs(streams: Sequence[Tensor], heads: int, tile: RowTile) -> list[int]:
    """Of txt, which come first, and of img."""
    of_a_tile = len(streams[0]) * triton.cdiv(heads, tile.heads)
    return [triton.cdiv(length, tile.tokens) * of_a_tile for length in _lengths(streams)]


def _strides(streams: Sequence[Tensor], rotary: tuple[Tensor, Tensor]) -> list[int]:
    tables = [table.stride(0) for table in rotary]
    return [*streams[0].stride()[:2], *streams[-1].stride()[:2], *tables]


def _of_both(norms: Sequence[Tensor]) -> list[Tensor]:
    """Weights of txt and of img; those of a stream alone stand for both."""
    return [*norms[:2], *norms[-2:]]
