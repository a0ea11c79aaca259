"""The operator: checks, schema, shape rule, gradient, dispatch. Importing it needs torch only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csrc_triton.tiles import DTYPES, HEAD_DIMS, NORM_ROPE_KERNELS, choose_row_tile
from sda_fast.ops.cpu_attention import compute_dtype
from sda_fast.ops.inputs import DTYPES as ANY_DTYPE
from sda_fast.ops.inputs import kernel_faults, on_device_of, refuse
from sda_fast.reference.norm_rope import norm_rope as in_torch
from sda_fast.reference.norm_rope import rotate
from sda_fast.reference.rope3d_attention import NORM_EPS

NAME = "norm_rope"
D_WORDS = f"D in {', '.join(map(str, HEAD_DIMS))}"

Streams = Sequence[Tensor]
Norms = Sequence[tuple[Tensor, Tensor]]
Rotary = tuple[Tensor, Tensor]


def norm_rope(
    streams: Streams, norms: Norms, rotary: Rotary, heads: int, values: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the projections of FLUX's streams to joint q, k and v, in one launch.

    Each head of q and of k is normed, ``x / sqrt(mean(x ** 2) + 1e-6) * weight``, and turned, pair
    by pair, ``(a cos - b sin, a sin + b cos)``, as diffusers' FluxAttnProcessor does with what its
    FluxPosEmbed gives; here computed in float32 and rounded once. Differentiable once in streams
    and norms, with work for the norms only where one requires a gradient. Autocast changes nothing.

    CUDA tensors run a Triton kernel, and its backward gives the same bits at every call. CPU
    tensors run it where Triton's interpreter is on and it takes such tensors, else plain torch.

    Args:
        streams: one or two [B, S_i, C], txt first; last stride 1, the others free, so that slices
            of a wider projection need no copy. Columns are q, k and v, each H * D wide; what
            follows is neither read nor given a gradient. The kernels take bf16, fp16 and fp32 and D
            16, 32, 64 and 128; the CPU takes fp64 and any even D too.
        norms: of each stream the weights of q and of k, [D] of any of these dtypes.
        rotary: cos and sin, [S, D] float32, S the sum of S_i, no gradient. Of the two values of a
            pair, which are the same, the second is not read.
        heads: H.
        values: whether to join v; else the third result is None and v is the caller's to take.

    Returns:
        q, k and v, [B, S, H, D], contiguous, in the dtype of the streams.

    Raises:
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
    """
    faults = _stream_faults(streams)
    if not faults:
        faults = _rotary_faults(streams, rotary) + _heads_faults(heads)
    if not faults:
        head_dim = rotary[0].shape[-1]
        faults = _width_faults(streams, heads, head_dim) + _norms_faults(streams, norms, head_dim)
        faults += _kernel_faults(streams, head_dim) if streams[0].device.type == "cuda" else []
    refuse(NAME, faults)
    if streams[0].device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{NAME} runs on CPU and CUDA tensors, got {streams[0].device}")
    width = (2 + values) * heads * rotary[0].shape[-1]
    # a view of all columns would cost a copy of its gradient
    taken = [x if x.shape[-1] == width else x.narrow(-1, 0, width) for x in streams]
    q, k, v = _forward(taken, [w for pair in norms for w in pair], *rotary, heads, values)
    return q, k, v if values else None


@torch.library.custom_op("sda_fast::norm_rope", mutates_args=())
def _forward(
    streams: Sequence[Tensor], norms: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _takes_kernels(streams, cos.shape[-1]):
        from csrc_triton.norm_rope import launch_norm_rope

        tile = choose_row_tile(NORM_ROPE_KERNELS[0], streams[0].dtype, cos.shape[-1])
        with on_device_of(streams[0]):
            ready = _ready(norms), _tables(cos, sin)
            q, k, v = launch_norm_rope(streams, *ready, heads, values, tile)
        return q, k, q.new_empty(0) if v is None else v
    pairs = list(zip(norms[::2], norms[1::2], strict=True))
    q, k, v = in_torch(streams, pairs, (cos, sin), heads, values)
    return q, k, q.new_empty(0) if v is None else v


@_forward.register_fake
def _(
    streams: Sequence[Tensor], _norms: Sequence[Tensor], cos: Tensor, _sin: Tensor, heads: int,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length = sum(x.shape[1] for x in streams)
    shape = streams[0].shape[0], length, heads, cos.shape[-1]
    q, k = streams[0].new_empty(shape), streams[0].new_empty(shape)
    return q, k, streams[0].new_empty(shape if values else 0)


@torch.library.custom_op("sda_fast::norm_rope_backward", mutates_args=())
def _backward(
    grads: Sequence[Tensor], streams: Sequence[Tensor], norms: Sequence[Tensor], cos: Tensor,
    sin: Tensor, learn: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the streams, then with learn those of the norms, in at least float32."""
    if _takes_kernels(streams, cos.shape[-1]):
        from csrc_triton.norm_rope import launch_norm_rope_backward

        tile = choose_row_tile(NORM_ROPE_KERNELS[1], streams[0].dtype, cos.shape[-1])
        with on_device_of(streams[0]):
            ready = _ready(norms), _tables(cos, sin)
            d_streams, d_norms = launch_norm_rope_backward(grads, streams, *ready, learn, tile)
        return d_streams if d_norms is None else [*d_streams, d_norms]
    return _backward_in_torch(grads, streams, norms, (cos, sin), learn)


@_backward.register_fake
def _(
    grads: Sequence[Tensor], streams: Sequence[Tensor], norms: Sequence[Tensor], cos: Tensor,
    _sin: Tensor, learn: bool,
) -> list[Tensor]:  # fmt: skip
    columns = len(grads) * grads[0].shape[2] * cos.shape[-1]
    d_streams = [x.new_empty((*x.shape[:2], columns)) for x in streams]
    if not learn:
        return d_streams
    shape = len(streams), 2, cos.shape[-1]
    return [*d_streams, streams[0].new_empty(shape, dtype=compute_dtype(streams[0]))]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    streams, norms, cos, sin, _heads, ctx.values = inputs
    ctx.num_streams = len(streams)
    ctx.save_for_backward(*streams, *norms, cos, sin)
    if not ctx.values:
        ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, *grads: Tensor) -> tuple[list[Tensor | None] | None, ...]:
    *saved, cos, sin = ctx.saved_tensors  # once only: so a checkpoint wants it
    streams, norms = saved[: ctx.num_streams], saved[ctx.num_streams :]
    needed = ctx.needs_input_grad[1]
    learn = any(needed)
    found = _backward(list(grads[: 2 + ctx.values]), streams, norms, cos, sin, learn)
    d_norms: list[Tensor | None] = [None] * len(norms)
    if learn:
        rows = zip(norms, found[-1].flatten(0, 1), needed, strict=True)
        d_norms = [row.to(weight.dtype) if wanted else None for weight, row, wanted in rows]
    return list(found[: ctx.num_streams]), d_norms, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _backward_in_torch(
    grads: Sequence[Tensor], streams: Streams, norms: Sequence[Tensor], rotary: Rotary, learn: bool
) -> list[Tensor]:
    dtype, (cos, sin) = compute_dtype(grads[0]), rotary
    # the transpose of a rotation is the rotation by the opposite angle
    d_normed = torch.stack([rotate(grad.to(dtype), (cos, -sin)) for grad in grads[:2]], 2)
    d_streams, d_norms, first = [], [], 0
    for x, of_q, of_k in zip(streams, norms[::2], norms[1::2], strict=True):
        own = slice(first, first + x.shape[1])
        heads = x.unflatten(-1, (-1, *grads[0].shape[2:]))[:, :, :2].to(dtype)
        weights = torch.stack([of_q.to(dtype), of_k.to(dtype)])[:, None]
        inverse = torch.rsqrt(heads.square().mean(-1, keepdim=True) + NORM_EPS)
        unit, d_unit = heads * inverse, d_normed[:, own] * weights
        dx = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * inverse
        dv = [grad[:, own, None] for grad in grads[2:]]
        d_streams.append(torch.cat([dx.to(x.dtype), *dv], 2).flatten(2))
        if learn:
            d_norms.append((d_normed[:, own] * unit).sum((0, 1, 3)))
        first = own.stop
    return [*d_streams, torch.stack(d_norms)] if learn else d_streams


def _takes_kernels(streams: Streams, head_dim: int) -> bool:
    """Whether the kernels run, or torch on the CPU.

    Raises:
        ValueError: the kernels are the only way and cannot run.
    """
    faults = _kernel_faults(streams, head_dim)
    if streams[0].device.type == "cpu" and faults:
        return False
    refuse(NAME, faults)
    return True


def _kernel_faults(streams: Streams, head_dim: int) -> list[str]:
    return kernel_faults(streams[0].narrow(-1, 0, head_dim), HEAD_DIMS, D_WORDS, DTYPES)


def _ready(norms: Sequence[Tensor]) -> list[Tensor]:
    return [weight.contiguous() for weight in norms]


def _tables(cos: Tensor, sin: Tensor) -> Rotary:
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    return cos, sin


def _stream_faults(streams: Streams) -> list[str]:
    if not isinstance(streams, tuple | list) or len(streams) not in (1, 2):
        found = f"{len(streams)}" if isinstance(streams, tuple | list) else type(streams).__name__
        return [f"streams must be one tensor or two, txt first, in a tuple, got {found}"]
    faults = []
    for i, x in enumerate(streams):
        name = f"streams[{i}]"
        if not isinstance(x, Tensor):
            faults.append(f"{name} must be a tensor, got {type(x).__name__}")
            continue
        if x.ndim != 3 or 0 in x.shape:
            faults.append(f"{name} must be [B, S, C] and not empty, got shape {tuple(x.shape)}")
        elif x.shape[-1] > 1 and x.stride(-1) != 1:
            faults.append(f"{name} must have a last stride of 1, got strides {x.stride()}")
        if x.dtype not in ANY_DTYPE:
            faults.append(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if not faults and len(streams) == 2:
        of_txt, of_img = ((len(x), x.dtype, x.device) for x in streams)
        if of_txt != of_img:
            faults.append(
                "streams must agree in B, dtype and device, got "
                + " and ".join(f"{b} {dtype} on {device}" for b, dtype, device in (of_txt, of_img))
            )
    return faults


def _heads_faults(heads: int) -> list[str]:
    good = isinstance(heads, int | torch.SymInt) and not isinstance(heads, bool) and heads > 0
    return [] if good else [f"heads must be a positive integer, got {heads!r}"]


def _rotary_faults(streams: Streams, rotary: Rotary) -> list[str]:
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        return [f"rotary must be two tables, cos and sin, got {type(rotary).__name__}"]
    faults, length = [], sum(x.shape[1] for x in streams)
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        about = f"{name} of rotary must be [{length}, D] float32, D even, on {streams[0].device}"
        if not isinstance(table, Tensor):
            faults.append(f"{about}, got {type(table).__name__}")
            continue
        fits = table.ndim == 2 and table.shape[0] == length and not table.shape[1] % 2
        fits = fits and table.numel() and table.dtype == torch.float32
        if not fits or table.device != streams[0].device:
            faults.append(f"{about}, got {tuple(table.shape)} {table.dtype} on {table.device}")
        if table.requires_grad:
            faults.append(f"{name} of rotary must not require a gradient: the operator gives none")
    if not faults and rotary[0].shape != rotary[1].shape:
        shapes = " and ".join(str(tuple(table.shape)) for table in rotary)
        faults.append(f"rotary must hold tables of one shape, got {shapes}")
    return faults


def _width_faults(streams: Streams, heads: int, head_dim: int) -> list[str]:
    wanted = f"3 * H * D = {3 * heads * head_dim} columns or more, q, k and v"
    return [
        f"streams[{i}] must have {wanted}, got {x.shape[-1]}"
        for i, x in enumerate(streams)
        if x.shape[-1] < 3 * heads * head_dim
    ]


def _norms_faults(streams: Streams, norms: Norms, head_dim: int) -> list[str]:
    if not isinstance(norms, tuple | list) or len(norms) != len(streams):
        found = f"{len(norms)}" if isinstance(norms, tuple | list) else type(norms).__name__
        return [f"norms must be a pair of weights for each of {len(streams)} streams, got {found}"]
    faults = []
    for i, pair in enumerate(norms):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            faults.append(f"norms[{i}] must be the weights of q and of k, got {pair!r:.40}")
            continue
        for name, weight in zip(("q", "k"), pair, strict=True):
            about = f"norms[{i}] must hold a [{head_dim}] float weight of {name}"
            if not isinstance(weight, Tensor):
                faults.append(f"{about}, got {type(weight).__name__}")
            elif (
                weight.shape != (head_dim,)
                or weight.dtype not in ANY_DTYPE
                or weight.device != streams[0].device
            ):
                found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
                faults.append(f"{about} on {streams[0].device}, got {found}")
    return faults
