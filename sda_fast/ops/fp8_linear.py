"""A frozen linear in fp8: checks, schema, shape rule, gradient, dispatch. Needs torch only.

What ``torch._scaled_mm`` asks of operands with scales by row (torch 2.10 to 2.13): e4m3 [M, K] by
rows and [K, N] by columns, K and N multiples of 16; scales float32, contiguous, [M, 1] and [1, N];
a bias of the dtype of the result, which is bf16 or fp16 on every GPU that takes them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from csrc_triton.tiles import DTYPES
from sda_fast.ops.device_tables import capturing
from sda_fast.ops.inputs import kernel_faults, on_device_of, refuse
from sda_fast.reference.fp8_linear import quantise_rows

NAME = "fp8_linear"
E4M3 = torch.float8_e4m3fn
MULTIPLE = 16
"""Of which K and N must be multiples on a GPU."""
OLDEST_GPU = (8, 9)
"""Compute capability of the first tensor cores that take fp8."""
FEW_TILES, LONG_ROW = 72, 3072
"""A product of fewer 128 x 128 tiles over longer rows is scaled apart: on an H100 cuBLAS has found
no way to scale it by rows (M = 127 and 256, K = 9216, N = 3072; it did for M = 257 and for
K = 3072: github.com/pytorch/ao/issues/4582)."""

Quantised = tuple[Tensor, Tensor]
"""Rows [M, K] in e4m3 and their scales [M] in float32."""


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A linear's weight, quantised once and frozen; ``of`` makes one.

    It takes ``N * K + 4 * N`` bytes. The first backward adds a copy with the other order in memory,
    which the GPU wants there, of ``N * K + 4 * K`` bytes, that lives as long as ``values``: both
    together are as large as the weight in bf16.

    Attributes:
        values: [N, K] e4m3, contiguous.
        scale: [N] float32: row n of the weight is ``values[n] * scale[n]``.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        values, scale, faults = self.values, self.scale, []
        if values.ndim != 2 or values.dtype != E4M3 or not values.is_contiguous():
            found = f"{tuple(values.shape)} {values.dtype}, strides {values.stride()}"
            faults.append(f"values must be [N, K] {E4M3} and contiguous, got {found}")
        if scale.shape != values.shape[:1] or scale.dtype != torch.float32:
            found = f"{tuple(scale.shape)} {scale.dtype}"
            faults.append(f"scale must be [{len(values)}] torch.float32, got {found}")
        refuse("Fp8Weight", faults)

    @classmethod
    def of(cls, weight: Tensor) -> "Fp8Weight":
        """Quantise a weight, each row with a scale of its own; later changes of it are not seen.

        Args:
            weight: [N, K] bf16, fp16 or fp32, on CPU or CUDA, any strides. On CUDA N and K are
                multiples of 16.

        Raises:
            TypeError: weight is no tensor.
            ValueError: weight does not fit, is not finite, learns, or is on a GPU without fp8; one
                message lists every reason.
            NotImplementedError: weight is on a device other than CPU or CUDA.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"Fp8Weight: weight must be a tensor, got {type(weight).__name__}")
        refuse("Fp8Weight", _weight_faults(weight))
        if weight.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"Fp8Weight runs on CPU and CUDA tensors, got {weight.device}"
            )
        # what is made here outlives any mode
        with torch.no_grad(), torch.inference_mode(False):
            return cls(*_quantise(weight.detach().contiguous()))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now, with the copy for the backward if there is one."""
        _, *turned = _turned.get(self.values, (0,))
        return sum(t.nbytes for t in (self.values, self.scale, *turned))


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` with x and w in e4m3, one scale for each row of either: lossy and fast.

    x is quantised at each call, token by token, w was once. Differentiable once in x, straight
    through its rounding and with the rounded weight: ``dx = dy @ w``, where dy times the scales of
    w is quantised in turn. Nothing of x is kept for that. Relative to its magnitude an element is
    rounded by 1/17 at most and, with 3 mantissa bits, by 2.5 % RMS; elements below 2 ** -6 / 448 of
    the largest of their row lose more. A row of x that is not finite comes out NaN.

    CUDA tensors run one Triton kernel that quantises and ``torch._scaled_mm``, with the bias in its
    epilogue; its sums are those of Hopper's fast accumulation forward, and float32's backward. CPU
    tensors quantise likewise, by torch or, where Triton's interpreter is on and rounds to nearest,
    by the kernel; their sums are exact. Under autocast x is cast as torch's own linear does.

    Args:
        x: [..., K] bf16 or fp16, on the CPU fp32 too; last stride 1, the others free.
        weight: of ``Fp8Weight.of``, on x's device.
        bias: [N], a float dtype, cast to that of x; no gradient.

    Returns:
        [..., N], contiguous, dtype of x.

    Raises:
        TypeError: x or bias is no tensor or weight no Fp8Weight.
        ValueError: arguments do not fit, or the GPU is older than compute capability 8.9; one
            message lists every reason.
        NotImplementedError: the tensors are on a device other than CPU or CUDA.
        RuntimeError: the first backward with a weight runs while a CUDA graph is being captured.
    """
    for name, t in {"x": x, "bias": bias}.items():
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(t).__name__}")
    if not isinstance(weight, Fp8Weight):
        raise TypeError(f"{NAME}: weight must be an Fp8Weight, got {type(weight).__name__}")
    x = _cast_for_autocast(x)
    faults = _x_faults(x, weight)
    if bias is not None:
        faults += _bias_faults(x, bias, len(weight.values))
    if x.device.type == "cuda":
        faults += _cuda_faults("weight", weight.values)
    refuse(NAME, faults)
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{NAME} runs on CPU and CUDA tensors, got {x.device}")
    return _forward(x, weight.values, weight.scale, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("sda_fast::fp8_linear", mutates_args=())
def _forward(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = _multiply(_quantise(x), (values, scale), bias, x.dtype, fast=True)
    return y.view(*x.shape[:-1], len(values))


@_forward.register_fake
def _(x: Tensor, values: Tensor, _scale: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(values)))


@torch.library.custom_op("sda_fast::fp8_linear_backward", mutates_args=())
def _backward(d_y: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    d_y = d_y if d_y.stride(-1) == 1 else d_y.contiguous()
    turned = _turn(values)  # first: where it may not be made, nothing is launched
    # the sum runs over the rows of the weight: their scales go with what they are summed with
    dx = _multiply(_quantise(d_y, scale), turned, None, d_y.dtype, fast=False)
    return dx.view(*d_y.shape[:-1], values.shape[1])


@_backward.register_fake
def _(d_y: Tensor, values: Tensor, _scale: Tensor) -> Tensor:
    return d_y.new_empty((*d_y.shape[:-1], values.shape[1]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _x, values, scale, _bias = inputs
    ctx.save_for_backward(values, scale)


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(d_y, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _quantise(x: Tensor, factor: Tensor | None = None) -> Quantised:
    """x [..., K], times factor [K] -> values [M, K] e4m3 and scale [M] f32."""
    x = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
    if _takes_kernels(x):
        from csrc_triton.quantise import launch_quantise_rows

        with on_device_of(x):
            return launch_quantise_rows(x, factor)
    rows = x.flatten(0, 1).float()
    return quantise_rows(rows if factor is None else rows * factor)


def _multiply(
    rows: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """[M, N] of quantised rows [M, K] and weight [N, K]."""
    if rows[0].device.type == "cpu":
        return _multiply_exactly(rows, weight, bias, dtype)
    with on_device_of(rows[0]):
        return _multiply_on_gpu(rows, weight, bias, dtype, fast=fast)


def _multiply_exactly(
    rows: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (a, a_scale), (b, b_scale) = rows, weight
    # multiples of 2 ** -18 below 2 ** 18 * K: float64 adds them without an error, in any order
    y = a.double() @ b.double().t()
    y = y * a_scale.double()[:, None] * b_scale.double()
    return (y if bias is None else y + bias.double()).to(dtype)


def _multiply_on_gpu(
    rows: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    (a, a_scale), (b, b_scale) = rows, weight
    tiles = -(-len(a) // 128) * -(-len(b) // 128)
    if tiles < FEW_TILES and a.shape[1] > LONG_ROW:
        one = torch.ones((), device=a.device)
        y = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        y = y.mul_(a_scale[:, None])
        return (y * b_scale if bias is None else torch.addcmul(bias.float(), y, b_scale)).to(dtype)
    if bias is not None and bias.data_ptr() % 16:
        bias = bias.clone()  # a slice of another: the epilogue loads 16 bytes
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None], bias=bias, out_dtype=dtype,
        use_fast_accum=fast,
    )  # fmt: skip


_turned: WeakIdKeyDictionary = WeakIdKeyDictionary()  # values -> (their version, turned, its scale)


def _turn(values: Tensor) -> Quantised:
    """The transpose [K, N] of a weight's values, contiguous, and a scale [K] of ones; made once."""
    held = _turned.get(values)
    if held is None or held[0] != values._version:
        if capturing():
            raise RuntimeError(
                f"{NAME}: run a backward with each weight before a CUDA graph is captured: it "
                "makes the copy of the weight that the backward reads"
            )
        turned = values.view(torch.uint8).t().contiguous().view(E4M3)
        held = (values._version, turned, torch.ones(len(turned), device=values.device))
        if values.device.type == "cuda":
            torch.cuda.current_stream(values.device).synchronize()  # other streams will read it too
        _turned[values] = held
    return held[1:]


def _takes_kernels(x: Tensor) -> bool:
    """Whether the kernel runs, or torch on the CPU.

    Raises:
        ValueError: the kernel is the only way and cannot run.
    """
    faults = kernel_faults(x, range(1, 1 << 31), "K", DTYPES)
    if x.device.type == "cpu":
        if faults:
            return False
        from csrc_triton.quantise import rounds_to_nearest

        return rounds_to_nearest()
    refuse(NAME, [f"x{fault.removeprefix('q')}" for fault in faults])
    return True


def _cast_for_autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device == "meta" or not x.is_floating_point() or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _weight_faults(weight: Tensor) -> list[str]:
    faults = []
    if weight.ndim != 2 or 0 in weight.shape:
        faults.append(f"weight must be [N, K] and not empty, got shape {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        faults.append(f"weight must be bfloat16, float16 or float32, got {weight.dtype}")
    elif weight.device.type in ("cpu", "cuda") and not weight.detach().isfinite().all():
        faults.append("weight must be finite, got inf or NaN")
    if weight.requires_grad and torch.is_grad_enabled():
        faults.append(
            "weight must not require a gradient: there is none in fp8; freeze it, or quantise it "
            "under torch.no_grad()"
        )
    if weight.device.type == "cuda" and weight.ndim == 2:
        faults += _cuda_faults("weight", weight)
    return faults


def _cuda_faults(name: str, weight: Tensor) -> list[str]:
    faults = []
    if any(size % MULTIPLE for size in weight.shape):
        faults.append(
            f"{name} must have multiples of {MULTIPLE} as N and K on CUDA, "
            f"got {tuple(weight.shape)}"
        )
    # a fake tensor may be on a device that is not here; what is compiled finds out as it runs
    if torch.cuda.is_available() and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(weight.device)
        if capability < OLDEST_GPU:
            wanted, found = (".".join(map(str, c)) for c in (OLDEST_GPU, capability))
            faults.append(
                f"{name} must be on a GPU of compute capability {wanted} or newer, whose tensor "
                f"cores take fp8, got {found}"
            )
    return faults


def _x_faults(x: Tensor, weight: Fp8Weight) -> list[str]:
    faults = []
    depth = weight.values.shape[1]
    if x.ndim < 1 or 0 in x.shape or x.shape[-1] != depth:
        faults.append(f"x must be [..., K = {depth}] and not empty, got shape {tuple(x.shape)}")
    elif x.shape[-1] > 1 and x.stride(-1) != 1:
        faults.append(f"x must have a last stride of 1, got strides {x.stride()}")
    known = DTYPES if x.device.type != "cuda" else (torch.bfloat16, torch.float16)
    if x.dtype not in known:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
        faults.append(f"x must be {words} on {x.device.type}, got {x.dtype}")
    if x.device != weight.values.device:
        faults.append(f"weight must be on the device of x, {x.device}, got {weight.values.device}")
    return faults


def _bias_faults(x: Tensor, bias: Tensor, width: int) -> list[str]:
    faults = []
    if bias.shape != (width,) or not bias.is_floating_point():
        found = f"{tuple(bias.shape)} {bias.dtype}"
        faults.append(f"bias must be [N = {width}] of a float dtype, got {found}")
    if bias.device != x.device:
        faults.append(f"bias must be on the device of x, {x.device}, got {bias.device}")
    if bias.requires_grad and torch.is_grad_enabled():
        faults.append("bias must not require a gradient: the operator gives none")
    return faults
