"""The operator: checks, schema, shape rule, gradient, dispatch. Importing it needs torch only."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops.cpu_attention import attention_backward, attention_forward, compute_dtype
from sda_fast.ops.inputs import cast_for_autocast, qkv_faults, refuse, require_kernel


@overload
def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Hierarchy,
    h: int,
    w: int,
    rule: str = "overlap",
    scale: float | None = None,
    extra_text: int = 0,
    *,
    isolate_level: int | None = None,
    source: tuple[int, int] | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Hierarchy,
    h: int,
    w: int,
    rule: str = "overlap",
    scale: float | None = None,
    extra_text: int = 0,
    *,
    isolate_level: int | None = None,
    source: tuple[int, int] | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Hierarchy,
    h: int,
    w: int,
    rule: str = "overlap",
    scale: float | None = None,
    extra_text: int = 0,
    *,
    isolate_level: int | None = None,
    source: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FLUX's joint attention in which tokens see each other by the rule of the hierarchy.

    The sequence is the tree's N positions, extra_text prompt tokens, the h*w image tokens in
    raster order and the tokens of a source picture, if any: S in all. Who may attend to whom is
    ``tree.attention_mask`` of the same arguments. Differentiable once in q, k and v. On the CPU
    bf16 and fp16 are computed in float32. Under autocast q, k and v are cast as in torch's own
    attention.

    Args:
        q: [B, S, H, D], bf16, fp16, fp32 or fp64; last stride 1, the others free.
        k: as q.
        v: as q.
        tree: the hierarchy of the first N tokens.
        h: rows of image tokens, at least 1.
        w: columns of image tokens, at least 1.
        rule: "overlap", "local" or "isolated".
        scale: multiplies the logits before the softmax. None means D ** -0.5.
        extra_text: prompt tokens after the tree's positions; they behave as the root.
        isolate_level: a level of the tree for "isolated"; None is the deepest.
        source: (rows, columns) of the tokens of a source picture, which follow the image.
        return_lse: return lse too.

    Returns:
        out [B, S, H, D], contiguous, dtype of q; with return_lse also lse [B, H, S], the natural
        log-sum-exp of the logits in float32 (float64 for fp64), which carries no gradient.

    Raises:
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device whose kernel is not built yet.
    """
    q, k, v = cast_for_autocast(q, k, v)
    faults = qkv_faults(q, k, v) + _layout_faults(tree, h, w, rule, extra_text)
    faults += _option_faults(tree, isolate_level, source)
    if not faults:
        length = tree.num_tokens + extra_text + h * w + (source[0] * source[1] if source else 0)
        faults = _length_faults(q, k, length)
    refuse("hierarchical_attention", faults)
    require_kernel("hierarchical_attention", q.device)
    out, lse = _forward(
        q, k, v, tree.tokens_per_node, h, w, rule,
        q.shape[-1] ** -0.5 if scale is None else scale, extra_text,
        tree.num_levels - 1 if isolate_level is None else isolate_level, source or (),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("sda_fast::hierarchical_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_node: Sequence[int], h: int, w: int, rule: str,
    scale: float, extra_text: int, isolate_level: int, source: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = tuple(tokens_per_node), h, w, rule, extra_text, isolate_level, tuple(source)
    out, lse = attention_forward(q, k, v, _bias(*layout, compute_dtype(q)), scale)
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, s, heads, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, s), dtype=compute_dtype(q))


@torch.library.custom_op(
    "sda_fast::hierarchical_attention_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens_per_node: Sequence[int], h: int, w: int, rule: str,
    scale: float, extra_text: int, isolate_level: int, source: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = tuple(tokens_per_node), h, w, rule, extra_text, isolate_level, tuple(source)
    bias = _bias(*layout, compute_dtype(q))
    dq, dk, dv = attention_backward(d_out, (q, k, v), out, lse, bias, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(_d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.layout = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, *ctx.saved_tensors, *ctx.layout), *(None,) * 8


_forward.register_autograd(_gradients, setup_context=_setup_context)


@lru_cache(maxsize=4)
def _bias(
    tokens_per_node: tuple[int, ...], h: int, w: int, rule: str, extra_text: int,
    isolate_level: int, source: tuple[int, ...], dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """[S, S] of 0 and -inf, shared, so never changed; None where all may attend to all."""
    grid = (source[0], source[1]) if source else None
    tree = Hierarchy(tokens_per_node)
    mask = tree.attention_mask(h, w, rule, extra_text, isolate_level, grid)
    if mask.all():
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device="cpu")
    return bias.masked_fill_(~mask, float("-inf"))


def _layout_faults(tree: Hierarchy, h: int, w: int, rule: str, extra_text: int) -> list[str]:
    faults = []
    if not isinstance(tree, Hierarchy):
        faults.append(f"tree must be a Hierarchy, got {type(tree).__name__}")
    for name, value, least in (("h", h, 1), ("w", w, 1), ("extra_text", extra_text, 0)):
        if not _is_count(value, least):
            faults.append(f"{name} must be an integer >= {least}, got {value!r}")
    if rule not in RULES:
        faults.append(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    return faults


def _length_faults(q: Tensor, k: Tensor, length: int) -> list[str]:
    return [
        f"{name} must have S = {length}: positions, extra text, h*w image and source tokens; "
        f"got S = {t.shape[1]}"
        for name, t in (("q", q), ("k", k))
        if t.shape[1] != length
    ]


def _option_faults(
    tree: Hierarchy, isolate_level: int | None, source: tuple[int, int] | None
) -> list[str]:
    faults = []
    levels = tree.num_levels if isinstance(tree, Hierarchy) else 0
    known = isolate_level is None or (_is_count(isolate_level, 0) and isolate_level < levels)
    if levels and not known:
        faults.append(
            f"isolate_level must be one of the tree's levels 0 to {levels - 1}, "
            f"got {isolate_level!r}"
        )
    if source is not None:
        pair = isinstance(source, (tuple, list)) and len(source) == 2
        if not pair or not all(_is_count(side, 1) for side in source):
            faults.append(f"source must be (rows, columns), integers >= 1, got {source!r}")
    return faults


def _is_count(value: object, least: int) -> bool:
    number = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return number and value >= least
