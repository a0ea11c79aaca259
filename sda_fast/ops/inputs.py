"""What every attention operator asks of q, k and v before it starts."""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype where autocast is on, as torch's own attention does.

    Autocast does not reach custom operators by itself. float64 stays, as everywhere in autocast.
    """
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


def require_kernel(op: str, device: torch.device) -> None:
    """Refuse a device that the operator has no implementation for; the meta device only infers.

    Raises:
        NotImplementedError: the device is neither the CPU nor meta.
    """
    if device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"sda_fast.ops.{op}: {device.type.upper()} kernel not built yet; "
            f"use CPU tensors or sda_fast.reference.{op}"
        )
