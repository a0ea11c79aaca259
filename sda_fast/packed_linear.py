"""Linears with one input as one product: their weights lie side by side, and stay their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear:
    """Several ``nn.Linear`` of one input, computed as one where they are no more than that.

    Their weights move into one tensor, of which each linear keeps its rows as a view: whatever is
    written into a weight is seen, and no memory is added. Where a linear is wrapped (LoRA), cast,
    quantised, hooked or trained, each is called as the module it is, and the results are put side
    by side.

    Args:
        find: gives the linears, as they are at each call.
    """

    def __init__(self, find: Callable[[], Sequence[nn.Module]]) -> None:
        self._find = find
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., sum of what the linears give]."""
        linears = self._find()
        if len(linears) == 1:
            return linears[0](x)
        if not all(map(is_plain, linears)) or len({m.bias is None for m in linears}) > 1:
            return torch.cat([linear(x) for linear in linears], -1)
        self._pack_where_needed(linears)
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    def pack(self) -> None:
        """Do now what the first call would do."""
        linears = self._find()
        if len(linears) > 1 and all(map(is_plain, linears)):
            self._pack_where_needed(linears)

    def _pack_where_needed(self, linears: Sequence[Any]) -> None:
        self._weight = _packed([linear.weight for linear in linears], self._weight)
        if linears[0].bias is not None:
            self._bias = _packed([linear.bias for linear in linears], self._bias)
        else:
            self._bias = None


def is_plain(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` and nothing else: no wrapper, no hook, no training."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    weight = module.weight
    trained = torch.is_grad_enabled() and weight.requires_grad
    return not (hooked or trained or type(weight) is not nn.Parameter)


def _packed(parts: Sequence[Tensor], whole: Tensor | None) -> Tensor:
    """All parts one after the other, in the very memory that the parts are then views of."""
    if whole is not None and _lie_in(parts, whole):
        return whole
    rows = sum(map(len, parts))
    # what is made here outlives any mode
    with torch.no_grad(), torch.inference_mode(False):
        first = parts[0].data
        room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
        if rows * first.stride(0) <= room and first.is_contiguous():
            whole = first.as_strided((rows, *first.shape[1:]), first.stride())
            if _lie_in(parts, whole):  # somebody has packed them before
                return whole
        whole = torch.cat([part.data for part in parts])
        start = 0
        for part in parts:
            part.data = whole[start : start + len(part)]
            start += len(part)
    return whole


def _lie_in(parts: Sequence[Tensor], whole: Tensor) -> bool:
    at, memory = whole.data_ptr(), whole.untyped_storage().data_ptr()
    for part in parts:
        here = part.data_ptr() == at and part.untyped_storage().data_ptr() == memory
        if not here or part.dtype != whole.dtype or not part.is_contiguous():
            return False
        at += part.numel() * part.element_size()
    return True
