"""Dense attention by the best kernel of the machine's torch that returns lse, and its backward.

The split implementation hands it the image keys. Its backward is fed the out and lse of *all* keys:
then the gradients it returns are the exact share of the keys it was given, since
p_ij = exp(s_ij - lse_i) and delta_i = <dO_i, O_i> are the only things it takes from them.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops import cpu_attention

aten = torch.ops.aten


def vendor_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v by the vendor's kernel.

    Args:
        q: [B, R, H, D], bf16 or fp16 (on the CPU any float dtype).
        k: [B, S, H, D], as q.
        v: as k.
        scale: multiplies the logits.

    Returns:
        out [B, R, H, D] in the dtype of q and lse [B, H, R], natural log, f32, contiguous.
    """
    if q.device.type == "cpu":
        out, lse = cpu_attention.attention_forward(q, k, v, None, scale)
        return out.to(q.dtype), lse
    heads_first = [_aligned(t).transpose(1, 2) for t in (q, k, v)]
    if takes_cudnn(q, k):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, False, False, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            *heads_first, 0.0, False, False, scale=scale
        )
    # cuDNN gives [B, H, R, 1]
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).contiguous()


def vendor_backward(
    d_out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """This key subset's share of the gradients of attention over more keys.

    Args:
        d_out: [B, R, H, D], any strides.
        qkv: as in the forward pass.
        out: [B, R, H, D], of the attention over all keys.
        lse: [B, H, R] f32, likewise.
        scale: as in the forward pass.
        deterministic: the same bits at every call. cuDNN's backward, the faster one on Hopper,
            adds up in any order and is taken only without it.

    Returns:
        dq, dk and dv, [B, ·, H, D] in the dtype of q.
    """
    q, k, _ = qkv
    if q.device.type == "cpu":
        grads = cpu_attention.attention_backward(d_out, qkv, out.to(q.dtype), lse, None, scale)
        dq, dk, dv = (g.to(q.dtype) for g in grads)
        return dq, dk, dv
    no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
    sizes = q.shape[1], k.shape[1], 0.0, False
    cudnn = takes_cudnn(q, k) and not deterministic
    # some releases of torch plan cuDNN's backward once for all strides of d_out and out
    given = [t.contiguous() if cudnn else _aligned(t) for t in (d_out, out)]
    grad, result = (t.transpose(1, 2) for t in given)
    tensors = grad, *(_aligned(t).transpose(1, 2) for t in qkv), result
    if cudnn:
        grads: Any = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse[..., None], no_seed, no_seed, None, None, None, *sizes, scale=scale
        )
    else:
        with _deterministic() if deterministic else nullcontext():
            grads = aten._scaled_dot_product_flash_attention_backward(
                *tensors, lse, None, None, *sizes, no_seed, no_seed, scale=scale
            )
    dq, dk, dv = (g.transpose(1, 2) for g in grads[:3])
    return dq, dk, dv


def takes_cudnn(q: Tensor, k: Tensor) -> bool:
    """Whether cuDNN's kernel is there and the faster one: from Hopper on (design figures).

    torch itself keeps sequences of one token from it.
    """
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return hopper and torch.backends.cudnn.is_available() and min(q.shape[1], k.shape[1]) > 1


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy: the vendors' kernels read 16 bytes at a time and do not check."""
    step = 16 // t.element_size()
    whole = all(s % step == 0 for s, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1)
    return t if whole and t.data_ptr() % 16 == 0 else t.contiguous()


_switch = threading.Lock()


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's switch, which the flash backward reads when it is called; as before on leaving.

    It is the whole process's, and autograd has a thread a GPU: one backward at a time. Set at its
    root, since torch's own function changes the compiler's setting too.
    """
    settings: Any = torch.utils.deterministic
    with _switch:
        before = torch.are_deterministic_algorithms_enabled()
        only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
        fill = settings.fill_uninitialized_memory
        # with warn_only the flash backward stays as it is
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(before, warn_only=only_warn)
            settings.fill_uninitialized_memory = fill
