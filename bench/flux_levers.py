"""FastFlux taken apart: each of its levers pulled alone, and one after the other.

A lever that is not pulled is undone from here, by putting plain torch in the place of the function
that the library's modules call; the library knows nothing of it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from sda_fast import fast_blocks, fast_flux, flux_layout, packed_linear
from sda_fast.hierarchy import Hierarchy

LEVERS = {
    "attention": "hierarchical kernel instead of a dense mask",
    "norm-rope": "norm, rotation and joint layout of q and k in one launch",
    "norms": "adaLN, and gated residual with the next adaLN, in one launch each",
    "packing": "linears of one input as one product; attention into the concatenation",
    "ahead": "modulation ahead of time",
    "graph": "CUDA graph",
}
"""What they are, in the order in which they are added."""
EPS = 1e-6

Patch = tuple[Any, str, Callable[..., Any]]
"""A module, a name in it, and what stands there meanwhile."""


@contextmanager
def pulled(levers: Collection[str]) -> Iterator[None]:
    """While open, FastFlux runs with these levers alone; "ahead" and "graph" are the caller's."""
    patches = _patches(levers)
    before = [getattr(module, name) for module, name, _ in patches]
    try:
        for module, name, plain in patches:
            setattr(module, name, plain)
        yield
    finally:
        for (module, name, _), own in zip(patches, before, strict=True):
            setattr(module, name, own)


def _patches(levers: Collection[str]) -> list[Patch]:
    found: list[Patch] = []
    attend = flux_layout.hierarchical_attention
    if "attention" not in levers:
        attend = dense_attention
    if "packing" not in levers:
        # as where a linear is wrapped: each by itself, and their results put side by side
        found.append((packed_linear, "is_plain", lambda module: False))
        attend = _beside(attend)
    found.append((flux_layout, "hierarchical_attention", attend))
    if "norm-rope" not in levers:
        found.append((fast_blocks, "norm_rope", plain_norm_rope))
    if "norms" not in levers:
        found.append((fast_blocks, "gated_ada_norm", plain_gated_ada_norm))
        found.append((fast_flux, "ada_norm", plain_ada_norm))
    return found


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Hierarchy, h: int, w: int, *, out: Tensor | None = None,
    **about: Any,
) -> Tensor:  # fmt: skip
    """As ``sda_fast.ops.hierarchical_attention``, by SDPA with a dense mask."""
    options = tuple(sorted((key, value) for key, value in about.items() if value is not None))
    mask = _mask(tree, h, w, options, q.device)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    found = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    return found if out is None else out.copy_(found)


@lru_cache(maxsize=1)
def _mask(tree: Hierarchy, h: int, w: int, options: tuple, device: torch.device) -> Tensor:
    return tree.attention_mask(h, w, **dict(options))[None, None].to(device)


def _beside(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention in memory of its own, copied to where it is wanted."""

    def beside(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        found = attend(*args, **kwargs)
        return found if out is None else out.copy_(found)

    return beside


def plain_norm_rope(
    streams: Sequence[Tensor], norms: Sequence[tuple[Tensor, Tensor]],
    rotary: tuple[Tensor, Tensor], heads: int, values: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As ``sda_fast.ops.norm_rope``, by the steps of diffusers' FluxAttnProcessor."""
    width = heads * rotary[0].shape[-1]
    parts = [
        [x[..., i * width : (i + 1) * width].unflatten(-1, (heads, -1)) for x in streams]
        for i in range(2 + values)
    ]
    for i in range(2):
        parts[i] = [
            F.rms_norm(x, weights[i].shape, weights[i], EPS)
            for x, weights in zip(parts[i], norms, strict=True)
        ]
    q, k, *v = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in parts)
    tables: Any = rotary
    turned: list[Any] = [apply_rotary_emb(x, tables, sequence_dim=1) for x in (q, k)]
    return turned[0], turned[1], v[0] if values else None


def plain_ada_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As ``sda_fast.ops.ada_norm``, by the steps of diffusers' blocks."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


def plain_gated_ada_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``sda_fast.ops.gated_ada_norm``, by the steps of diffusers' blocks."""
    residual = x + gate[:, None] * y
    return residual, plain_ada_norm(residual, shift, scale)
