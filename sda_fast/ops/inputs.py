"""What every attention operator asks of q, k and v before it starts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LARGEST = torch.finfo(torch.float32).max / 2  # kernels multiply a scale by log2(e)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype where autocast is on, as torch's own attention does.

    Autocast does not reach custom operators by itself. float64 stays, as everywhere in autocast.

    Raises:
        TypeError: one of them is no tensor.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)
    )
    return q, k, v


def qkv_faults(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Every reason why q, k and v cannot enter attention together; empty if there is none.

    The number of keys may differ from the number of queries; k and v agree in everything.
    """
    faults = []
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            faults.append(f"{name} must be [B, S, H, D], got shape {tuple(t.shape)}")
            continue
        if 0 in t.shape:
            faults.append(f"{name} must not be empty, got shape {tuple(t.shape)}")
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            faults.append(f"{name} must have a last stride of 1, got strides {t.stride()}")
        if t.dtype not in DTYPES:
            faults.append(f"{name} must be bfloat16, float16, float32 or float64, got {t.dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            faults.append(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            faults.append(f"{name} must be on the device of q, {q.device}, got {t.device}")
    if q.ndim == k.ndim == v.ndim == 4:
        if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
            faults.append(f"k must have B, H, D of q {tuple(q.shape)}, got {tuple(k.shape)}")
        if v.shape != k.shape:
            faults.append(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    return faults


def refuse(op: str, faults: list[str]) -> None:
    """Do nothing if there are no faults.

    Raises:
        ValueError: names the operator and lists every fault.
    """
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def kernel_faults(
    q: Tensor, head_dims: Sequence[int], words: str, dtypes: Sequence[torch.dtype]
) -> list[str]:
    """Every reason why Triton kernels cannot take tensors like q; empty if there is none.

    Args:
        q: [B, S, H, D]; its device, dtype and D count.
        head_dims: the D that the kernels are built for.
        words: how a message names them.
        dtypes: the dtypes that they are built for.
    """
    faults = []
    if q.shape[-1] not in head_dims:
        faults.append(f"q must have {words} for the kernels, got {q.shape[-1]}")
    if q.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        faults.append(f"q must be {known} for the kernels, got {q.dtype}")
    if torch.compiler.is_compiling():
        return faults  # the op asks again when it runs: what is here then counts
    if q.device.type == "cpu" and not interpreted():
        faults.append(
            "q must be on a CUDA device for the kernels, got cpu; Triton's own switch "
            "TRITON_INTERPRET=1 runs them on the CPU, slowly"
        )
    elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and not _interprets_bfloat16():
        faults.append(
            "q must be float16 or float32 in Triton's interpreter, which gets bfloat16 wrong, "
            f"got {q.dtype}"
        )
    # a fake tensor may be on a device that is not here
    if q.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            found = ".".join(map(str, capability))
            faults.append(f"q must be on a GPU of compute capability 8.0 or newer, got {found}")
    return faults


def on_device_of(q: Tensor) -> AbstractContextManager[object]:
    """While open, kernels are launched on q's GPU, whichever is the current one."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET, as Triton reads it)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _interprets_bfloat16() -> bool:
    from csrc_triton.interpreter import bfloat16_is_right

    return bfloat16_is_right()


def scale_faults(scale: float | None) -> list[str]:
    """Why the kernels, which take the maximum before they scale, cannot take a scale."""
    if scale is None or (isinstance(scale, Real) and 0 < scale <= LARGEST):
        return []
    return [f"scale must be a positive finite number, got {scale!r}"]


_held: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (its version, what held)


def holds_once(t: Tensor, condition: Callable[[Tensor], Tensor], about: object = None) -> bool:
    """Whether the values of a tensor hold, asked once while it is not changed if that waits.

    On a GPU the answer waits for the device; inside a captured graph it cannot be had and is taken
    to be yes.

    Args:
        t: the tensor.
        condition: t -> [] bool.
        about: what else the condition depends on.
    """
    if t.device.type == "cpu":
        return bool(condition(t))
    # tensors of inference mode count no versions, so that a change would go unseen
    asked = (-1 if t.is_inference() else t._version, about)
    if asked[0] >= 0 and _held.get(t) == asked:
        return True
    if torch.cuda.is_current_stream_capturing():
        return True
    held = bool(condition(t))
    if held:
        _held[t] = asked
    return held


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two [B, S, H, D] views may have an element in common.

    Told apart are other storages, other ranges of one, and other columns of the same steps.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    low, start = int(a.storage_offset()), int(b.storage_offset())
    high, stop = low + _reach(a, range(4)), start + _reach(b, range(4))
    if high < start or stop < low:
        return False
    if a.stride() != b.stride():
        return True
    dims = [dim for dim in range(4) if a.shape[dim] > 1]
    for step in {a.stride(dim) for dim in dims if a.stride(dim) > 1}:
        inner = [dim for dim in dims if a.stride(dim) < step]
        whole = all(a.stride(dim) % step == 0 for dim in dims if dim not in inner)
        width, apart = _reach(a, inner) + 1, abs(low - start) % step
        if whole and width <= apart <= step - width:
            return False
    return True


def _reach(t: Tensor, dims: Sequence[int]) -> int:
    """Offset of the last element along some dimensions from the first."""
    return sum((t.shape[dim] - 1) * t.stride(dim) for dim in dims)
