"""What FLUX's adaptive norms mean: a norm without weights, scaled and shifted by sample."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ada_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift``; see sda_fast.ops.ada_norm for the arguments.

    Any device and any float dtype, computed in at least float32 and rounded once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    unit = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (unit * (1 + scale.to(dtype)[:, None]) + shift.to(dtype)[:, None]).to(x.dtype)


def gated_ada_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``s = x + gate * y`` and ada_norm of s; see sda_fast.ops.gated_ada_norm for the arguments.

    Any device and any float dtype; s is computed in at least float32 and rounded before the norm.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    s = (x.to(dtype) + gate.to(dtype)[:, None] * y.to(dtype)).to(x.dtype)
    return s, ada_norm(s, shift, scale, eps)
