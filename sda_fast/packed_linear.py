"""Linears with one input as one product: their weights lie side by side, and stay their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_fast.ops import Fp8Weight, fp8_linear


class PackedLinear:
    """One or several ``nn.Linear`` of one input, computed as one where they are no more than that.

    Their weights move into one tensor, of which each linear keeps its rows as a view: whatever is
    written into a weight is seen, and no memory is added. In fp8 a quantised copy is kept instead.
    Where a linear is wrapped (LoRA), cast, quantised, hooked or trained, each is called as the
    module it is, and the results are put side by side.

    Args:
        find: gives the linears, as they are at each call.
        fp8: multiply in fp8, where the linears are plain.

    Attributes:
        generation: how many times weights were quantised.
    """

    def __init__(self, find: Callable[[], Sequence[nn.Module]], fp8: bool = False) -> None:
        self._find = find
        self._fp8 = fp8
        self._weight: Tensor | Fp8Weight | None = None
        self._bias: Tensor | None = None
        self._seen: list[tuple] = []
        self.generation = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., sum of what the linears give]."""
        linears = self._find()
        if not self._joins(linears):
            parts = [linear(x) for linear in linears]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        self._pack_where_needed(linears)
        if isinstance(self._weight, Fp8Weight):
            return fp8_linear(x, self._weight, self._bias)
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    def pack(self, anew: bool = False) -> None:
        """Do now what the first call would do.

        Args:
            anew: quantise again, whether or not a change of the weights can be seen.
        """
        linears = self._find()
        if self._joins(linears):
            self._seen = [] if anew else self._seen
            self._pack_where_needed(linears)

    def _joins(self, linears: Sequence[nn.Module]) -> bool:
        """Whether the linears are one product, or each is called as it is."""
        if len(linears) == 1 and not self._fp8:
            return False
        return all(map(is_plain, linears)) and len({m.bias is None for m in linears}) == 1

    def _pack_where_needed(self, linears: Sequence[Any]) -> None:
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if self._fp8:
            return self._quantise_where_needed(weights, biases)
        whole = self._weight if isinstance(self._weight, Tensor) else None
        self._weight = _packed(weights, whole)
        self._bias = _packed(biases, self._bias) if biases else None
        return None

    def _quantise_where_needed(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        # a write through .data leaves no trace: see FastFlux.pack
        seen = [
            (t.data_ptr(), t.dtype, t.device, -1 if t.is_inference() else t._version)
            for t in (*weights, *biases)
        ]
        if seen == self._seen:
            return
        with torch.no_grad(), torch.inference_mode(False):
            self._weight = Fp8Weight.of(torch.cat([t.data for t in weights]))
            self._bias = torch.cat([t.data for t in biases]) if biases else None
        self._seen = seen
        self.generation += 1


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
