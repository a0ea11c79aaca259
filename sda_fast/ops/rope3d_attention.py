"""The operator: checks, schema, shape rule, gradient, dispatch. Importing it needs torch only."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

from csrc_triton.tiles import DTYPES
from sda_fast.ops import rope3d_kernels
from sda_fast.ops.cpu_attention import attention_backward, attention_forward, compute_dtype
from sda_fast.ops.inputs import (
    cast_for_autocast,
    holds_once,
    kernel_faults,
    on_device_of,
    qkv_faults,
    refuse,
    scale_faults,
)
from sda_fast.reference.rope3d_attention import (
    NORM_EPS,
    UNPAIRED,
    default_axes,
    head_norm,
    rope3d,
)

NAME = "rope3d_attention"
SMALLEST_THETA, LARGEST_THETA = 1e-6, 1e30  # beyond, frequencies leave float32


@overload
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
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
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
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """Attention whose q and k are rotated by their level, y and x, after a norm if one is given.

    Interleaved pairs, ``theta ** (-2i / size)`` within each axis, as in
    ``sda_fast.reference.rope3d``. Differentiable once in q, k, v and norms. Under autocast q, k and
    v are cast as in torch's own attention, the coordinates and norms are not.

    CUDA tensors run the Triton kernels: tokens are normed and turned in registers, and where there
    are few tiles of queries the keys are split over programs, by shapes alone; the backward gives
    the same bits at every call. CPU tensors run them too where Triton's interpreter is on and they
    take such tensors, else torch's attention, which computes bf16 and fp16 in float32. On a GPU the
    values of coords and lengths are read once for each tensor, and not inside a captured graph.

    Args:
        q: [B, N, H, D]; last stride 1, the others free. The kernels take bf16, fp16 and fp32 and
            even D up to 128; the CPU takes fp64 and any even D too.
        k: [B, S, H, D], as q.
        v: as k.
        q_coords: [N, 3] or [B, N, 3] float32 on q's device: level, y, x; finite, no gradient.
            None together with k_coords means no rotation: plain attention.
        k_coords: [S, 3] or [B, S, 3], as q_coords.
        scale: multiplies the logits before the softmax, positive. None means D ** -0.5.
        axes: even sizes of level, y and x in the head dim, their sum D. None means the ratio
            2:3:3, which is (16, 24, 24) for D = 64.
        theta: base of the frequencies, 1e-6 to 1e30.
        norms: weights, [D] float each, of RMSNorms over the heads of q and of k, before the
            rotation: ``x / sqrt(mean(x ** 2) + 1e-6) * weight``. None means no norm.
        lengths: [B] int32 on q's device, 0 to S: the keys of each sample come first, the rest is
            padding. A sample without keys gets out 0 and lse -inf. None means S for all.
        return_lse: return lse too.

    Returns:
        out [B, N, H, D], contiguous, dtype of q; with return_lse also lse [B, H, N], the natural
        log-sum-exp of the logits in float32 (float64 for fp64), which carries no gradient.

    Raises:
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
    """
    q, k, v = cast_for_autocast(q, k, v)
    faults = qkv_faults(q, k, v) + scale_faults(scale)
    if not faults:
        faults += _coords_faults(q, k, q_coords, k_coords) + _lengths_faults(q, lengths)
        faults += _norms_faults(q, norms)
        faults += _axes_faults(q.shape[-1], axes, theta, rotated=q_coords is not None)
        faults += _kernel_faults(q) if q.device.type == "cuda" else []
    refuse(NAME, faults)
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{NAME} runs on CPU and CUDA tensors, got {q.device}")
    if q_coords is not None and axes is None:
        axes = default_axes(q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_q, of_k = norms or (None, None)
    places = q_coords, k_coords, lengths
    out, lse = _forward(q, k, v, of_q, of_k, *places, scale, axes or (), theta)
    return (out, lse) if return_lse else out


@torch.library.custom_op("sda_fast::rope3d_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    q_coords: Tensor | None, k_coords: Tensor | None, lengths: Tensor | None,
    scale: float, axes: Sequence[int], theta: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # here, not in the checks: under torch.compile values are known only when the op runs
    refuse(NAME, _value_faults(k.shape[1], q_coords, k_coords, lengths))
    if _takes_kernels(q):
        with on_device_of(q):
            places, norms = _places(q_coords, k_coords, axes, theta), _norms(q_norm, k_norm)
            return rope3d_kernels.forward((q, k, v), places, norms, lengths, scale)
    k, v = _without_padding(k, v, lengths)
    q_ready = _turn(_normed(q, q_norm), q_coords, axes, theta)
    k_ready = _turn(_normed(k, k_norm), k_coords, axes, theta)
    bias = _padding_bias(q, k, lengths)
    out, lse = attention_forward(q_ready, k_ready, v, bias, scale)
    if lengths is not None:
        empty = lengths == 0
        out[empty], lse[empty] = 0.0, float("-inf")
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, n, heads, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, n), dtype=compute_dtype(q))


@torch.library.custom_op("sda_fast::rope3d_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None,
    q_coords: Tensor | None, k_coords: Tensor | None, lengths: Tensor | None,
    scale: float, axes: Sequence[int], theta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _takes_kernels(q):
        with on_device_of(q):
            places, norms = _places(q_coords, k_coords, axes, theta), _norms(q_norm, k_norm)
            rest = places, norms, lengths, scale
            return rope3d_kernels.backward(d_out, (q, k, v), (out, lse), *rest)
    k, v = _without_padding(k, v, lengths)
    q_ready = _turn(_normed(q, q_norm), q_coords, axes, theta)
    k_ready = _turn(_normed(k, k_norm), k_coords, axes, theta)
    bias = _padding_bias(q, k, lengths)
    # a row that saw nothing: with so large an lse its p is 0
    lse = lse.masked_fill(lse == float("-inf"), 1e30)
    dq, dk, dv = attention_backward(d_out, (q_ready, k_ready, v), out, lse, bias, scale)
    # the transpose of a rotation is the rotation by the opposite place
    dq = _turn(dq, None if q_coords is None else -q_coords, axes, theta)
    dk = _turn(dk, None if k_coords is None else -k_coords, axes, theta)
    dq, d_of_q = _norm_back(dq, q, q_norm)
    dk, d_of_k = _norm_back(dk, k, k_norm)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_of_q, d_of_k


@_backward.register_fake
def _(
    _d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _lse: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_of_q, d_of_k = (
        q.new_empty(0) if norm is None else norm.new_empty(norm.shape) for norm in (q_norm, k_norm)
    )
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *grads, d_of_q, d_of_k


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.options = rest[-3:]
    ctx.save_for_backward(q, k, v, *output, *rest[:-3])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once only: so a checkpoint wants it
    *grads, d_of_q, d_of_k = _backward(d_out, *saved, *ctx.options)
    d_norms = (None, None) if saved[5] is None else (d_of_q, d_of_k)
    return *grads, *d_norms, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _takes_kernels(q: Tensor) -> bool:
    """Whether the kernels run, or torch's attention on the CPU.

    Raises:
        ValueError: the kernels are the only way and cannot run.
    """
    faults = _kernel_faults(q)
    if q.device.type == "cpu" and faults:
        return False
    refuse(NAME, faults)
    return True


def _kernel_faults(q: Tensor) -> list[str]:
    return kernel_faults(q, range(2, 129, 2), "even D up to 128", DTYPES)


def _places(
    q_coords: Tensor | None, k_coords: Tensor | None, axes: Sequence[int], theta: float
) -> rope3d_kernels.Places | None:
    if q_coords is None or k_coords is None:
        return None
    return q_coords, k_coords, (axes[0], axes[1], axes[2]), theta


def _norms(q_norm: Tensor | None, k_norm: Tensor | None) -> rope3d_kernels.Norms | None:
    return None if q_norm is None or k_norm is None else (q_norm, k_norm)


def _without_padding(k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v with zeros for padding, whatever is there: a NaN times 0 would be one."""
    if lengths is None:
        return k, v
    padding = (torch.arange(k.shape[1], device=k.device) >= lengths[:, None])[..., None, None]
    return k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)


def _padding_bias(q: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor | None:
    """[B, 1, N, S] of 0 and -inf; 0 for a sample without keys, which no softmax can serve."""
    if lengths is None:
        return None
    seen = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
    seen |= (lengths == 0)[:, None]
    bias = torch.zeros(seen.shape, dtype=compute_dtype(q), device=q.device)
    bias = bias.masked_fill_(~seen, float("-inf"))
    return bias[:, None, None].expand(-1, 1, q.shape[1], -1)


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    # cast first: a norm rounded back to half precision would lose what float32 gains
    x = x.to(compute_dtype(x))
    return x if weight is None else head_norm(x, weight)


def _norm_back(d_normed: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x, in the dtype of d_normed, and of the weight; without one as they are."""
    if weight is None:
        return d_normed, x.new_empty(0)
    x = x.to(d_normed.dtype)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
    unit, d_unit = x * inverse, d_normed * weight.to(x.dtype)
    dx = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * inverse
    return dx, (d_normed * unit).sum((0, 1, 2)).to(weight.dtype)


def _turn(x: Tensor, coords: Tensor | None, axes: Sequence[int], theta: float) -> Tensor:
    return x if coords is None else rope3d(x, coords, axes, theta)


def _coords_faults(
    q: Tensor, k: Tensor, q_coords: Tensor | None, k_coords: Tensor | None
) -> list[str]:
    if (q_coords is None) != (k_coords is None):
        return [UNPAIRED]
    faults = []
    for name, coords, t in (("q_coords", q_coords, q), ("k_coords", k_coords, k)):
        if coords is None:
            continue
        if not isinstance(coords, Tensor):
            faults.append(f"{name} must be a tensor or None, got {type(coords).__name__}")
            continue
        batch, length = t.shape[:2]
        if coords.shape != (length, 3) and coords.shape != (batch, length, 3):
            faults.append(
                f"{name} must be [{length}, 3] or [{batch}, {length}, 3], "
                f"got shape {tuple(coords.shape)}"
            )
        if coords.dtype != torch.float32:
            faults.append(f"{name} must be float32, got {coords.dtype}")
        if coords.device != t.device:
            faults.append(f"{name} must be on the device of q, {t.device}, got {coords.device}")
        if coords.requires_grad:
            faults.append(f"{name} must not require a gradient: the operator gives none")
    return faults


def _axes_faults(
    head_dim: int, axes: tuple[int, int, int] | None, theta: float, rotated: bool
) -> list[str]:
    faults = []
    if not (isinstance(theta, Real) and SMALLEST_THETA <= theta <= LARGEST_THETA):
        faults.append(
            f"theta must be a positive finite number of at least {SMALLEST_THETA:g} and at most "
            f"{LARGEST_THETA:g}, got {theta!r}"
        )
    if axes is None:
        if rotated and head_dim % 16:
            faults.append(f"axes must be given for D = {head_dim}, not a multiple of 16")
    elif not _are_axes(axes, head_dim):
        faults.append(f"axes must be 3 even sizes with the sum D = {head_dim}, got {axes}")
    return faults


def _are_axes(axes: Any, head_dim: int) -> bool:
    if not isinstance(axes, tuple | list) or len(axes) != 3:
        return False
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in axes)
    return whole and all(size >= 0 and size % 2 == 0 for size in axes) and sum(axes) == head_dim


def _norms_faults(q: Tensor, norms: tuple[Tensor, Tensor] | None) -> list[str]:
    if norms is None:
        return []
    if not isinstance(norms, tuple | list) or len(norms) != 2:
        return [f"norms must be two weights, of q and of k, got {type(norms).__name__}"]
    faults = []
    for name, weight in zip(("q", "k"), norms, strict=True):
        about = f"norms must hold a [{q.shape[-1]}] float weight of {name} on {q.device}"
        if not isinstance(weight, Tensor):
            faults.append(f"{about}, got {type(weight).__name__}")
        elif (
            weight.shape != q.shape[-1:]
            or not weight.is_floating_point()
            or weight.device != q.device
        ):
            found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
            faults.append(f"{about}, got {found}")
    return faults


def _lengths_faults(q: Tensor, lengths: Tensor | None) -> list[str]:
    if lengths is None:
        return []
    if not isinstance(lengths, Tensor):
        return [f"lengths must be a tensor or None, got {type(lengths).__name__}"]
    faults = []
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        faults.append(
            f"lengths must be [{q.shape[0]}] int32, got {tuple(lengths.shape)} {lengths.dtype}"
        )
    if lengths.device != q.device:
        faults.append(f"lengths must be on the device of q, {q.device}, got {lengths.device}")
    return faults


def _value_faults(
    num_keys: int, q_coords: Tensor | None, k_coords: Tensor | None, lengths: Tensor | None
) -> list[str]:
    faults = [
        f"{name} must be finite, got inf or NaN"
        for name, coords in (("q_coords", q_coords), ("k_coords", k_coords))
        if coords is not None and not holds_once(coords, lambda t: t.isfinite().all())
    ]
    within = lambda t: ((t >= 0) & (t <= num_keys)).all()
    if lengths is not None and not holds_once(lengths, within, num_keys):
        faults.append(f"lengths must be 0 to S = {num_keys}, got {lengths.tolist()}")
    return faults
