"""Is a variant right? Asked before it is timed, by the yardstick that the tests go by.

A result's largest error against float64 may be a ratio times that of plain torch in the variant's
own dtype, plus two roundings, and must stay under a cap. Plain torch goes head by head, so that a
sequence of any benchmark size fits the card.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sda_fast.reference.dense_attention import dense_attention
from sda_fast.reference.rope3d_attention import default_axes, rope3d

Places = tuple[Tensor, Tensor]
"""Coordinates of q [N, 3] and of k [S, 3], float32: both are turned by them."""

NAMES = ("out", "dq", "dk", "dv")
RATIO = {"out": 1.25, "dq": 2.0, "dk": 2.0, "dv": 2.0}
OUTPUT_CAP = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 2e-5}
"""Absolute: v is drawn with unit variance."""
GRADIENT_CAP = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 2e-5}
"""Relative to the largest exact magnitude."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What is exact, and how far from it a result may be.

    Attributes:
        exact: by NAMES, [B, S, H, D] float64.
        limit: largest error allowed, by NAMES.
    """

    exact: dict[str, Tensor]
    limit: dict[str, float]

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """What is wrong with out, or with out, dq, dk and dv; empty if nothing is."""
        found = []
        for name, result in zip(NAMES, results, strict=False):
            exact = self.exact[name]
            if result.shape != exact.shape:
                found.append(f"{name} is {list(result.shape)}, not {list(exact.shape)}")
                continue
            # batch by batch: float64 copies of all would be large
            errors = [(r.double() - x).abs().max() for r, x in zip(result, exact, strict=True)]
            error = torch.stack(errors).max().item()
            if not error <= self.limit[name]:  # NaN is not
                found.append(f"{name} is off by {error:.2e}, allowed {self.limit[name]:.2e}")
        return found


def yardstick(
    inputs: Sequence[Tensor], mask: Tensor | None, places: Places | None = None
) -> Yardstick:
    """Work out the exact results of an attention and how close is close enough.

    A kernel that multiplies turned operands in half precision rounds them, as plain torch does: its
    out is held to plain torch's error where that is worse than the cap.

    Args:
        inputs: q and the gradient of out [B, N, H, D], between them k and v [B, S, H, D].
        mask: [N, S] bool, None for all True.
        places: turn q and k by the reference rotation; None turns nothing.
    """
    q, k = inputs[:2]
    shapes = zip(NAMES, (q, q, k, k), strict=True)
    exact = {name: like.new_empty(like.shape, dtype=torch.float64) for name, like in shapes}
    eager_error = dict.fromkeys(NAMES, 0.0)
    slack = dict.fromkeys(NAMES, 0.0)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one = [t[b : b + 1, :, h : h + 1] for t in inputs]
            right = _plain([t.double() for t in one], mask, places)
            plain = _plain(one, mask, places)
            for name, x, e in zip(NAMES, right, plain, strict=True):
                exact[name][b, :, h] = x[0, :, 0]
                eager_error[name] = max(eager_error[name], (e.double() - x).abs().max().item())
            for name, value in _unavoidable(one, right).items():
                slack[name] = max(slack[name], value)
    limit = {}
    for name in NAMES:
        largest = exact[name].abs().max().item()
        cap = OUTPUT_CAP[q.dtype] if name == "out" else GRADIENT_CAP[q.dtype] * largest
        allowed = RATIO[name] * eager_error[name] + torch.finfo(q.dtype).eps * largest
        if name == "out" and places is not None and q.dtype != torch.float32:
            cap = max(cap, allowed)
        limit[name] = min(allowed, cap) + slack[name]
    return Yardstick(exact, limit)


def _plain(
    inputs: Sequence[Tensor], mask: Tensor | None, places: Places | None
) -> tuple[Tensor, ...]:
    """out, dq, dk and dv in the dtype of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    q, k, v = leaves
    if places is not None:
        axes = default_axes(q.shape[-1])
        q, k = (rope3d(x, coords, axes) for x, coords in zip((q, k), places, strict=True))
    out, _ = dense_attention(q, k, v, mask)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


def _unavoidable(inputs: Sequence[Tensor], right: Sequence[Tensor]) -> dict[str, float]:
    """What rounded float32 logits cost, and rowsum(dO * O) of a rounded out; of one head."""
    q, k, v, d_out = (t.double() for t in inputs)
    scale = q.shape[-1] ** -0.5
    eps = torch.finfo(torch.float32).eps
    logit = 2 * eps * scale * q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item()
    d_p = (d_out[0, :, 0] @ v[0, :, 0].mT).abs().max().item()
    delta = (d_out * right[0]).square().sum(-1).sqrt().max().item()
    d_s = (logit * d_p + torch.finfo(inputs[0].dtype).eps / 2 * delta) * scale
    return {
        "out": logit * right[0].abs().max().item(),
        "dq": d_s * k.abs().max().item(),
        "dk": d_s * q.abs().max().item(),
        "dv": logit * right[3].abs().max().item(),
    }
