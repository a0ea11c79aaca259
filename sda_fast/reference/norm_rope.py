"""What norm_rope means: norm the heads of q and of k, join the streams, rotate."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sda_fast.reference.rope3d_attention import head_norm


def norm_rope(
    streams: Sequence[Tensor],
    norms: Sequence[tuple[Tensor, Tensor]],
    rotary: tuple[Tensor, Tensor],
    heads: int,
    values: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Joint q, k and v; see sda_fast.ops.norm_rope for arguments and results.

    Any device, any float dtype of all of them; float64 inputs give the yardstick.
    """
    shape = 2 + values, heads, rotary[0].shape[-1]
    parts = [x[..., : prod(shape)].unflatten(-1, shape).unbind(2) for x in streams]
    q, k, *v = zip(*parts, strict=True)
    of_q, of_k = zip(*norms, strict=True)
    joint_v = torch.cat(v[0], 1) if values else None
    return _normed_turned(q, of_q, rotary), _normed_turned(k, of_k, rotary), joint_v


def _normed_turned(
    parts: Sequence[Tensor], weights: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
) -> Tensor:
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    normed = [head_norm(x.to(dtype), w) for x, w in zip(parts, weights, strict=True)]
    return rotate(torch.cat(normed, 1), rotary).to(parts[0].dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn interleaved pairs by a table of their cosines and sines.

    The pair ``(a, b)`` becomes ``(a cos - b sin, a sin + b cos)``. Source: Su et al., RoFormer
    (arXiv 2104.09864).

    Args:
        x: [B, S, H, D], float32 or float64.
        rotary: cos and sin, [S, D] float, each value twice; the first of the two counts.

    Returns:
        [B, S, H, D] in the dtype of x.
    """
    cos, sin = (table[:, None, ::2].to(x.dtype) for table in rotary)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
