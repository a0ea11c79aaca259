"""The operator: checks, schema, shape rule, gradient, dispatch. Importing it needs torch only."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from csrc_triton.tiles import DTYPES, HEAD_DIMS, IMPLEMENTATIONS
from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops import joint_kernels
from sda_fast.ops.cpu_attention import attention_backward, attention_forward, compute_dtype
from sda_fast.ops.inputs import (
    cast_for_autocast,
    kernel_faults,
    may_overlap,
    on_device_of,
    qkv_faults,
    refuse,
    scale_faults,
)
from sda_fast.ops.joint_kernels import split_faults
from sda_fast.ops.joint_lists import Layout

NAME = "hierarchical_attention"
D_WORDS = f"D in {', '.join(map(str, HEAD_DIMS))}"


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
    implementation: str = "auto",
    deterministic: bool = True,
    out: Tensor | None = None,
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
    implementation: str = "auto",
    deterministic: bool = True,
    out: Tensor | None = None,
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
    implementation: str = "auto",
    deterministic: bool = True,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """FLUX's joint attention in which tokens see each other by the rule of the hierarchy.

    The sequence is the tree's N positions, extra_text prompt tokens, the h*w image tokens in
    raster order and the tokens of a source picture, if any: S in all. Who may attend to whom is
    ``tree.attention_mask`` of the same arguments. Differentiable once in q, k and v. Under autocast
    q, k and v are cast as in torch's own attention.

    CUDA tensors run the Triton kernels; nothing of size S x S is made. CPU tensors run them too
    where Triton's interpreter is on and they take such tensors, else torch's attention with the
    mask, which computes bf16 and fp16 in float32. A CUDA graph may be captured once the same sizes
    have run. A NaN in k, v or the output's gradient may reach rows and keys that do not see it, as
    under any dense mask. Under "fused" a sample alone gives the bits that it gives in a batch; the
    vendors' kernels of "split" may choose by the batch.

    Args:
        q: [B, S, H, D]; last stride 1, the others free. The kernels take bf16, fp16 and fp32 and D
            of 16, 32, 64 or 128; the CPU takes fp64 and any D too.
        k: as q.
        v: as q.
        tree: the hierarchy of the first N tokens.
        h: rows of image tokens, at least 1.
        w: columns of image tokens, at least 1.
        rule: "overlap", "local" or "isolated".
        scale: multiplies the logits before the softmax, positive. None means D ** -0.5.
        extra_text: prompt tokens after the tree's positions; they behave as the root.
        isolate_level: a level of the tree for "isolated"; None is the deepest.
        source: (rows, columns) of the tokens of a source picture, which follow the image.
        return_lse: return lse too.
        implementation: "fused" (all in Triton), "split" (image keys by cuDNN or flash, the rest in
            Triton; not for "isolated", on CUDA half precision only), or "auto": by the measured
            table of ``csrc_triton/tiles.py``.
        deterministic: the backward gives the same bits at every call. False lets "split" take a
            vendor kernel that does not.
        out: write the result here instead: [B, S, H, D], dtype of q, last stride 1, the others
            free; not in elements of q, k or v. It has no backward.

    Returns:
        out [B, S, H, D], contiguous if not given, dtype of q; with return_lse also lse [B, H, S],
        the natural log-sum-exp of the logits in float32 (float64 for fp64), without gradient.

    Raises:
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
    """
    q, k, v = cast_for_autocast(q, k, v)
    faults = qkv_faults(q, k, v) + _layout_faults(tree, h, w, rule, extra_text)
    faults += _option_faults(tree, isolate_level, source)
    faults += _length_faults(q, k, tree, h, w, extra_text, source)
    faults += _choice_faults(q, scale, rule, implementation) + _out_faults(out, q, k, v)
    refuse(NAME, faults)
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{NAME} runs on CPU and CUDA tensors, got {q.device}")
    options = (
        tree.tokens_per_node, h, w, rule, extra_text,
        tree.num_levels - 1 if isolate_level is None else isolate_level, tuple(source or ()),
        q.shape[-1] ** -0.5 if scale is None else scale, implementation,
    )  # fmt: skip
    if out is None:
        out, lse = _forward(q, k, v, *options, deterministic)
    else:
        lse = _forward_out(q, k, v, out, *options)
    return (out, lse) if return_lse else out


def mask_bytes(
    q: Tensor,
    tree: Hierarchy,
    h: int,
    w: int,
    rule: str = "overlap",
    extra_text: int = 0,
    implementation: str = "auto",
) -> int:
    """Device bytes of all that stands in for the mask in a forward and a backward pass.

    Args:
        q: as the operator's; its dtype, shape and device choose the tiles.
        tree: as the operator's, and so are the others.
        h: rows of image tokens.
        w: columns of image tokens.
        rule: "overlap", "local" or "isolated" at the deepest level.
        extra_text: prompt tokens.
        implementation: "auto", "fused" or "split".
    """
    layout = Layout(tree.tokens_per_node, h, w, rule, extra_text, tree.num_levels - 1, ())
    return joint_kernels.mask_bytes(q, layout, implementation)


@torch.library.custom_op("sda_fast::hierarchical_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_node: Sequence[int], h: int, w: int, rule: str,
    extra_text: int, isolate_level: int, source: Sequence[int],
    scale: float, implementation: str, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = Layout(
        tuple(tokens_per_node), h, w, rule, extra_text, isolate_level, tuple(source)
    )  # fmt: skip
    if _takes_kernels(q, implementation, rule):
        with on_device_of(q):
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            return out, joint_kernels.forward((q, k, v), out, layout, scale, implementation)
    out, lse = attention_forward(q, k, v, _bias(layout, compute_dtype(q)), scale)
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("sda_fast::hierarchical_attention_out", mutates_args=("out",))
def _forward_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    tokens_per_node: Sequence[int], h: int, w: int, rule: str,
    extra_text: int, isolate_level: int, source: Sequence[int],
    scale: float, implementation: str,
) -> Tensor:  # fmt: skip
    layout = Layout(
        tuple(tokens_per_node), h, w, rule, extra_text, isolate_level, tuple(source)
    )  # fmt: skip
    refuse(NAME, _memory_faults(out, q, k, v))  # a traced tensor has no memory to look at
    if _takes_kernels(q, implementation, rule):
        with on_device_of(q):
            return joint_kernels.forward((q, k, v), out, layout, scale, implementation)
    found, lse = attention_forward(q, k, v, _bias(layout, compute_dtype(q)), scale)
    out.copy_(found)
    return lse


@_forward_out.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return _new_lse(q)


def _new_lse(q: Tensor) -> Tensor:
    b, s, heads, _ = q.shape
    return q.new_empty((b, heads, s), dtype=compute_dtype(q))


@torch.library.custom_op("sda_fast::hierarchical_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens_per_node: Sequence[int], h: int, w: int, rule: str,
    extra_text: int, isolate_level: int, source: Sequence[int],
    scale: float, implementation: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = Layout(
        tuple(tokens_per_node), h, w, rule, extra_text, isolate_level, tuple(source)
    )  # fmt: skip
    if _takes_kernels(q, implementation, rule):
        with on_device_of(q):
            return joint_kernels.backward(
                d_out, (q, k, v), (out, lse), layout, scale, implementation, deterministic
            )
    bias = _bias(layout, compute_dtype(q))
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
    return *_backward(d_out, *ctx.saved_tensors, *ctx.layout), *(None,) * 10


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _takes_kernels(q: Tensor, implementation: str, rule: str) -> bool:
    """Whether the kernels run, or torch's attention on the CPU.

    Raises:
        ValueError: the kernels are asked for, or the only way, and cannot run.
    """
    on_cpu = q.device.type == "cpu" and implementation == "auto"
    if on_cpu and kernel_faults(q, HEAD_DIMS, D_WORDS, DTYPES):
        return False
    # once more: when it was traced, neither the device nor the interpreter was there to be asked
    refuse(NAME, _choice_faults(q, None, rule, implementation))
    return True


@lru_cache(maxsize=4)
def _bias(layout: Layout, dtype: torch.dtype) -> Tensor | None:
    """[S, S] of 0 and -inf, shared, so never changed; None where all may attend to all."""
    grid = (layout.source[0], layout.source[1]) if layout.source else None
    mask = Hierarchy(layout.tokens_per_node).attention_mask(
        layout.h, layout.w, layout.rule, layout.extra_text, layout.isolate_level, grid
    )
    if mask.all():
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device="cpu")
    return bias.masked_fill_(~mask, float("-inf"))


def _choice_faults(q: Tensor, scale: float | None, rule: str, implementation: str) -> list[str]:
    faults = scale_faults(scale)
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        faults.append(f"implementation must be one of {known}, got {implementation!r}")
    elif q.ndim == 4:
        # on the CPU "auto" always finds a way
        if q.device.type == "cuda" or (q.device.type == "cpu" and implementation != "auto"):
            faults += kernel_faults(q, HEAD_DIMS, D_WORDS, DTYPES)
        if implementation == "split":
            faults += split_faults(q, rule)
    return faults


def _out_faults(out: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    if out is None:
        return []
    faults = []
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        faults.append(
            f"out must be like q ({tuple(q.shape)}, {q.dtype}, {q.device}), "
            f"got ({tuple(out.shape)}, {out.dtype}, {out.device})"
        )
    thin = [st for st, n in zip(out.stride(), out.shape, strict=True) if n > 1][:-1]
    if out.stride()[-1:] != (1,) or any(stride < out.shape[-1] for stride in thin):
        faults.append(
            f"out must have a last stride of 1 and no other below D, got strides {out.stride()}"
        )
    if not torch.compiler.is_compiling():
        faults += _memory_faults(out, q, k, v)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, out)):
        faults.append("out has no backward: it needs q, k, v and out that require no gradient")
    return faults


def _memory_faults(out: Tensor, *inputs: Tensor) -> list[str]:
    if out.ndim == 4 and any(t.ndim == 4 and may_overlap(out, t) for t in inputs):
        return ["out must not share memory with q, k or v: both are in use at once"]
    return []


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


def _length_faults(
    q: Tensor, k: Tensor, tree: Hierarchy, h: int, w: int, extra_text: int,
    source: tuple[int, int] | None,
) -> list[str]:  # fmt: skip
    """Whether S fits, where tree and sizes are such that it can be told."""
    if _layout_faults(tree, h, w, RULES[0], extra_text) or _option_faults(tree, None, source):
        return []
    length = tree.num_tokens + extra_text + h * w + (source[0] * source[1] if source else 0)
    return [
        f"{name} must have S = {length}: positions, extra text, h*w image and source tokens; "
        f"got S = {t.shape[1]}"
        for name, t in (("q", q), ("k", k))
        if t.ndim == 4 and t.shape[1] != length
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
