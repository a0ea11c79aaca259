"""Softmax attention with a dense mask, written out. Any device, any float dtype."""

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that each query may attend to.

    Products are taken in the dtype of q, the softmax in at least float32.

    Args:
        q: [B, Sq, H, D], any float dtype.
        k: [B, Sk, H, D], as q.
        v: as k.
        mask: bool, True = may attend, [Sq, Sk] or what broadcasts to [B, H, Sq, Sk]; None for all.
        scale: multiplies the logits. None means D ** -0.5.

    Returns:
        out [B, Sq, H, D] in the dtype of q and lse [B, H, Sq], the natural log of the sum of exp
        of the logits, float32 (float64 for float64). A query that may attend to nothing gets out 0
        and lse -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = ((q @ k.mT) * scale).to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return (p.to(v.dtype) @ v).transpose(1, 2), lse
