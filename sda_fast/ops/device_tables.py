"""Small tables that kernels read on the device, made once and kept: how they get and stay there.

Caches hold them, so one of them may be dropped while kernels of some stream, or a CUDA graph that
was captured with it, still read it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

_captured: dict[int, Tensor] = {}  # what CUDA graphs read must never be freed


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept_table(make: Callable[..., Tensor], args: tuple, like: Tensor, wanted: str) -> Tensor:
    """``make(*args)`` on the device of a tensor, made once.

    Args:
        make: gives a tensor on the CPU.
        args: hashable.
        like: what is computed with it.
        wanted: see ``to_device``.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table is not there yet.
    """
    # a compiler makes a constant of it; what stands in for a tensor must not be kept
    if torch.compiler.is_compiling() or type(like) not in (Tensor, Parameter):
        return make(*args).to(like.device)
    table = _table(make, args, like.device, wanted)
    keep(table)
    return table


@lru_cache(maxsize=256)
def _table(make: Callable[..., Tensor], args: tuple, device: torch.device, wanted: str) -> Tensor:
    return to_device(make(*args), device, wanted)


def to_device(table: Tensor, device: torch.device, wanted: str) -> Tensor:
    """A table on the device, in memory that belongs to its default stream and to no graph.

    Args:
        table: on the CPU.
        device: where it is wanted.
        wanted: what must run before a capture, for the message.

    Raises:
        RuntimeError: a CUDA graph is being captured: a table made in there would be the graph's.
    """
    if capturing():
        raise RuntimeError(
            f"{wanted} before a CUDA graph is captured with them: its tables are copied to the "
            "device then"
        )
    if device.type != "cuda":
        # inference_mode would mark tensors that outlive it
        with torch.inference_mode(False):
            return table.to(device, copy=True)

    def move() -> Tensor:
        with torch.cuda.device(device):
            moved = table.to(device)
            torch.cuda.current_stream().synchronize()  # other streams will read it too
            return moved

    # warm-ups of torch.compile's CUDA graphs send what this thread allocates to a pool of theirs,
    # and count what stays there; another thread has neither that nor inference_mode
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(move).result()


def keep(table: Tensor) -> None:
    """Before kernels read a table: make its memory last as long as they may.

    Args:
        table: what ``to_device`` gave, or a view of it.
    """
    if capturing():
        _captured[table.untyped_storage().data_ptr()] = table
    elif table.is_cuda:
        # when a cache drops it, its memory must wait for the kernels of this stream
        table.record_stream(torch.cuda.current_stream(table.device))
