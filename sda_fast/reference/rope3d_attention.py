"""What rope3d_attention means: norm q and k, rotate them by their places, then plain attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sda_fast.reference.dense_attention import dense_attention

UNPAIRED = "q_coords and k_coords must be given together, or both be None"


NORM_EPS = 1e-6


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dim: ``x / sqrt(mean(x ** 2) + 1e-6) * weight``.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).

    Args:
        x: [..., D], any float dtype.
        weight: [D], likewise.

    Returns:
        [..., D] in the dtype of x, computed in at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), NORM_EPS).to(x.dtype)


def rope3d(x: Tensor, coords: Tensor, axes: Sequence[int], theta: float = 1e4) -> Tensor:
    """Rotary embedding over several axes, interleaved pairs, as FLUX applies it.

    The head dim is cut into one block per axis. In the block of axis ``a``, of size ``d``, the pair
    ``(x[2i], x[2i+1])`` turns by the angle ``coords[a] * theta ** (-2i / d)``.
    Source: Su et al., RoFormer (arXiv 2104.09864), applied per axis.

    Args:
        x: [B, S, H, D], any float dtype.
        coords: [S, A] or [B, S, A] float, one column per axis.
        axes: A even sizes that sum to D.
        theta: base of the frequencies.

    Returns:
        [B, S, H, D] in the dtype of x; the rotation itself is done in at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    coords = coords.to(dtype)
    angles = []
    for axis, size in enumerate(axes):
        pair = torch.arange(0, size, 2, dtype=torch.float64, device=x.device)
        angles.append(coords[..., axis, None] * (theta ** (-pair / size)).to(dtype))
    angle = torch.cat(angles, dim=-1)[..., None, :]
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """Sizes of (level, y, x) for a head dim: the ratio 2:3:3, (16, 24, 24) for 64.

    Raises:
        ValueError: head_dim is not a multiple of 16, so the ratio gives odd sizes.
    """
    if head_dim % 16:
        raise ValueError(f"axes must be given: D = {head_dim} is not a multiple of 16")
    return head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8


def rope3d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_coords: Tensor | None,
    k_coords: Tensor | None,
    scale: float | None = None,
    axes: tuple[int, int, int] | None = None,
    theta: float = 1e4,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotated attention; see sda_fast.ops.rope3d_attention for arguments and results.

    Any device and any float dtype; float64 inputs give the yardstick. Here lse has a gradient.

    Raises:
        ValueError: one of q_coords and k_coords is None and the other is not.
    """
    if (q_coords is None) != (k_coords is None):
        raise ValueError(f"rope3d_attention: {UNPAIRED}")
    mask = None
    if lengths is not None:
        seen = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        mask = seen[:, None, None]
        # whatever padding holds: a NaN times 0 would be one
        k, v = (t.where(seen[..., None, None], 0.0) for t in (k, v))
    if norms is not None:
        q, k = head_norm(q, norms[0]), head_norm(k, norms[1])
    if q_coords is not None and k_coords is not None:
        axes = default_axes(q.shape[-1]) if axes is None else axes
        q, k = rope3d(q, q_coords, axes, theta), rope3d(k, k_coords, axes, theta)
    out, lse = dense_attention(q, k, v, mask, scale)
    return (out, lse) if return_lse else out
