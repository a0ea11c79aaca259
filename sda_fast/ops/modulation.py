"""FLUX's adaptive norms: checks, schemas, shape rules, gradients, dispatch. Needs torch only.

Kept for the backward are the input, which the residual keeps alive anyway, and 8 bytes a token of
float32 mean and rstd; a normed copy never is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csrc_triton.tiles import DTYPES as KERNEL_DTYPES
from sda_fast.ops.inputs import DTYPES, LARGEST, kernel_faults, on_device_of, refuse

ADA_NORM, GATED_ADA_NORM = "ada_norm", "gated_ada_norm"
MAX_CHANNELS = 8192
"""Of the kernels: a row is held in registers."""


def ada_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the channels, without weights, then ``* (1 + scale) + shift``.

    As in diffusers' AdaLayerNormZero and AdaLayerNormContinuous (Peebles and Xie, arXiv
    2212.09748), but computed in float32 and rounded once. Differentiable once in all three; shift
    and scale cost the backward nothing where they need no gradient. Autocast changes nothing.

    CUDA tensors run one Triton kernel in each pass, which reads and writes every element once; the
    backward gives the same bits at every call. CPU tensors run it too where Triton's interpreter is
    on and it takes such tensors, else torch. Squares must stay finite in float32.

    Args:
        x: [B, S, C]; last stride 1, the others free. The kernels take bf16, fp16 and fp32 and C up
            to 8192; the CPU takes fp64 and any C too.
        shift: [B, C] bf16, fp16, fp32 or fp64 on x's device; last stride 1, that of the batch free.
        scale: as shift.
        eps: added to the variance, positive.

    Returns:
        [B, S, C], contiguous, dtype of x.

    Raises:
        TypeError: x, shift or scale is no tensor.
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
    """
    _check(ADA_NORM, {"x": x}, {"shift": shift, "scale": scale}, eps)
    return _forward(x, shift, scale, eps)[0]


def gated_ada_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gated residual ``s = x + gate * y`` and, in the same pass, ``ada_norm(s, shift, scale)``.

    The norm is taken of the rounded s, so that what a block reads is what the residual carries on;
    for gradients the rounding counts as none. All else is as in ``ada_norm``.

    Args:
        x: as in ``ada_norm``.
        y: as x: its shape, dtype and device; strides of its own.
        gate: as shift.
        shift: as in ``ada_norm``.
        scale: as shift.
        eps: as in ``ada_norm``.

    Returns:
        s and the normed s, [B, S, C] each, contiguous, dtype of x.

    Raises:
        TypeError: one of the first five is no tensor.
        ValueError: arguments do not fit; one message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
    """
    _check(GATED_ADA_NORM, {"x": x, "y": y}, {"gate": gate, "shift": shift, "scale": scale}, eps)
    s, normed, _ = _gated_forward(x, y, gate, shift, scale, eps)
    return s, normed


@torch.library.custom_op("sda_fast::ada_norm", mutates_args=())
def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _takes_kernels(ADA_NORM, x):
        from csrc_triton.modulation import launch_ada_norm

        with on_device_of(x):
            return launch_ada_norm(x, shift, scale, eps)[1:]
    return _norm_on_cpu(x, shift, scale, eps)


@_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_stats(x)


@torch.library.custom_op("sda_fast::gated_ada_norm", mutates_args=())
def _gated_forward(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _takes_kernels(GATED_ADA_NORM, x):
        from csrc_triton.modulation import launch_ada_norm

        with on_device_of(x):
            return launch_ada_norm(x, shift, scale, eps, (y, gate))
    dtype = _compute_dtype(x)
    s = (x.to(dtype) + gate.to(dtype)[:, None] * y.to(dtype)).to(x.dtype).contiguous()
    return s, *_norm_on_cpu(s, shift, scale, eps)


@_gated_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_stats(x)


@torch.library.custom_op("sda_fast::ada_norm_backward", mutates_args=())
def _backward(
    d_normed: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, learns: Sequence[bool]
) -> list[Tensor]:
    if _takes_kernels(ADA_NORM, x):
        from csrc_triton.modulation import launch_ada_norm_backward

        with on_device_of(x):
            tokens, (_, *sums) = launch_ada_norm_backward(
                _along_rows(d_normed), x, stats, scale, (False, learns[0], learns[1])
            )
    else:
        ds, *sums = _norm_back_on_cpu(d_normed, x, stats, scale, learns)
        tokens = [ds.to(x.dtype)]
    return [*tokens, *_learned(sums, (shift, scale))]


@_backward.register_fake
def _(
    _d_normed: Tensor, x: Tensor, _stats: Tensor, shift: Tensor, scale: Tensor,
    learns: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape), *_fake_learned((shift, scale), learns)]


@torch.library.custom_op("sda_fast::gated_ada_norm_backward", mutates_args=())
def _gated_backward(
    d_s: Tensor, d_normed: Tensor, s: Tensor, y: Tensor | None, stats: Tensor,
    gate: Tensor, shift: Tensor, scale: Tensor, learns: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    if _takes_kernels(GATED_ADA_NORM, s):
        from csrc_triton.modulation import launch_ada_norm_backward

        with on_device_of(s):
            tokens, sums = launch_ada_norm_backward(
                _along_rows(d_normed), s, stats, scale, (learns[0], learns[1], learns[2]),
                (_along_rows(d_s), gate, y),
            )  # fmt: skip
    else:
        ds, *sums = _norm_back_on_cpu(d_normed, s, stats, scale, learns[1:])
        ds = ds + d_s
        sums = [(ds * y).sum(1) if learns[0] and y is not None else None, *sums]
        tokens = [t.to(s.dtype) for t in (ds, ds * gate.to(ds.dtype)[:, None])]
    return [*tokens, *_learned(sums, (gate, shift, scale))]


@_gated_backward.register_fake
def _(
    _d_s: Tensor, _d_normed: Tensor, s: Tensor, _y: Tensor | None, _stats: Tensor,
    gate: Tensor, shift: Tensor, scale: Tensor, learns: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    tokens = [s.new_empty(s.shape) for _ in range(2)]
    return [*tokens, *_fake_learned((gate, shift, scale), learns)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, _eps = inputs
    ctx.save_for_backward(x, output[1], shift, scale)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_normed: Tensor, _d_stats: Tensor) -> tuple[Tensor | None, ...]:
    learns = list(ctx.needs_input_grad[1:3])
    dx, *sums = _backward(d_normed, *ctx.saved_tensors, learns)
    return dx, *_placed(sums, learns), None


def _gated_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _x, y, gate, shift, scale, _eps = inputs
    s, _normed, stats = output
    # y counts in the gradient of gate alone
    kept = y if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(s, kept, stats, gate, shift, scale)
    ctx.mark_non_differentiable(stats)


def _gated_gradients(
    ctx: Any, d_s: Tensor, d_normed: Tensor, _d_stats: Tensor
) -> tuple[Tensor | None, ...]:
    learns = list(ctx.needs_input_grad[2:5])
    dx, dy, *sums = _gated_backward(d_s, d_normed, *ctx.saved_tensors, learns)
    return dx, dy, *_placed(sums, learns), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
_gated_forward.register_autograd(_gated_gradients, setup_context=_gated_setup_context)


def _norm_on_cpu(s: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed s and stats [B, S, 2], mean and rstd, by torch's own layer norm."""
    dtype = _compute_dtype(s)
    unit, mean, rstd = torch.native_layer_norm(s.to(dtype), s.shape[-1:], None, None, eps)
    normed = unit * (1 + scale.to(dtype)[:, None]) + shift.to(dtype)[:, None]
    return normed.to(s.dtype), torch.cat([mean, rstd], -1)


def _norm_back_on_cpu(
    d_normed: Tensor, s: Tensor, stats: Tensor, scale: Tensor, learns: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of s, not rounded yet and contiguous, and of shift and scale, if those learn."""
    mean, rstd = stats.split(1, -1)
    d_normed = d_normed.to(stats.dtype).contiguous()
    unit = (s - mean) * rstd
    d_unit = d_normed * (1 + scale.to(stats.dtype)[:, None])
    turned = (d_unit * unit).mean(-1, keepdim=True)
    ds = (d_unit - d_unit.mean(-1, keepdim=True) - unit * turned) * rstd
    d_shift = d_normed.sum(1) if learns[0] else None
    return ds, d_shift, (d_normed * unit).sum(1) if learns[1] else None


def _learned(sums: Sequence[Tensor | None], rows: Sequence[Tensor]) -> list[Tensor]:
    """The sums of those rows that learn, in the dtypes of the rows."""
    of_rows = zip(sums, rows, strict=True)
    return [total.to(row.dtype) for total, row in of_rows if total is not None]


def _fake_learned(rows: Sequence[Tensor], learns: Sequence[bool]) -> list[Tensor]:
    return [row.new_empty(row.shape) for row, one in zip(rows, learns, strict=True) if one]


def _placed(sums: Sequence[Tensor], learns: Sequence[bool]) -> list[Tensor | None]:
    """The sums where autograd wants them, None for rows that do not learn."""
    left = iter(sums)
    return [next(left) if one else None for one in learns]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_stats(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2), dtype=_compute_dtype(x))


def _along_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _takes_kernels(op: str, x: Tensor) -> bool:
    """Whether the kernels run, or torch on the CPU.

    Raises:
        ValueError: the kernels are the only way and cannot run.
    """
    faults = _kernel_faults(x)
    if x.device.type == "cpu" and faults:
        return False
    refuse(op, faults)
    return True


def _kernel_faults(x: Tensor) -> list[str]:
    channels = range(1, MAX_CHANNELS + 1)
    faults = kernel_faults(x, channels, f"C up to {MAX_CHANNELS}", KERNEL_DTYPES)
    return [f"x{fault.removeprefix('q')}" for fault in faults]


def _check(op: str, tokens: dict[str, Tensor], rows: dict[str, Tensor], eps: float) -> None:
    """Refuse arguments that do not fit; see ``ada_norm`` for the errors."""
    for name, t in (tokens | rows).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    x = tokens["x"]
    faults = [] if 0 < eps <= LARGEST else [f"eps must be a positive finite number, got {eps}"]
    for name, t in tokens.items():
        faults += _tokens_faults(name, t, x)
    if x.ndim == 3:
        for name, t in rows.items():
            faults += _row_faults(name, t, x)
    if not faults and x.device.type == "cuda":
        faults += _kernel_faults(x)
    refuse(op, faults)
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{op} runs on CPU and CUDA tensors, got {x.device}")


def _tokens_faults(name: str, t: Tensor, x: Tensor) -> list[str]:
    faults = []
    if t.ndim != 3 or 0 in t.shape:
        faults.append(f"{name} must be [B, S, C] and not empty, got shape {tuple(t.shape)}")
    elif t.shape != x.shape:
        faults.append(f"{name} must have the shape of x {tuple(x.shape)}, got {tuple(t.shape)}")
    faults += _stride_faults(name, t)
    if t.dtype not in DTYPES:
        faults.append(f"{name} must be bfloat16, float16, float32 or float64, got {t.dtype}")
    if t.dtype != x.dtype:
        faults.append(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        faults.append(f"{name} must be on the device of x, {x.device}, got {t.device}")
    return faults


def _row_faults(name: str, t: Tensor, x: Tensor) -> list[str]:
    faults = _stride_faults(name, t)
    shape = x.shape[0], x.shape[2]
    if t.shape != shape:
        faults.append(f"{name} must be [B, C] {tuple(shape)}, got shape {tuple(t.shape)}")
    if t.dtype not in DTYPES:
        faults.append(f"{name} must be bfloat16, float16, float32 or float64, got {t.dtype}")
    if t.device != x.device:
        faults.append(f"{name} must be on the device of x, {x.device}, got {t.device}")
    return faults


def _stride_faults(name: str, t: Tensor) -> list[str]:
    if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
        return [f"{name} must have a last stride of 1, got strides {t.stride()}"]
    return []
