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
        self._quantised: tuple[Fp8Weight, Tensor | None] | None = None
        self._seen: list[tuple] = []
        self.generation = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., sum of what the linears give]."""
        linears: Sequence[Any] = self._find()
        if not self.joins(linears):
            self._quantised, self._seen = None, []
            parts = [linear(x) for linear in linears]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if self._fp8:
            return fp8_linear(x, *self._quantise_where_needed(weights, biases))
        # nothing is kept here: the memory lives and goes with the linears' own weights
        return F.linear(x, _packed(weights), _packed(biases) if biases else None)

    def pack(self, anew: bool = False) -> None:
        """Do now what the first call would do.

        Args:
            anew: quantise again, whether or not a change of the weights can be seen.
        """
        linears: Sequence[Any] = self._find()
        if not self.joins(linears):
            self._quantised, self._seen = None, []
            return
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if self._fp8:
            self._seen = [] if anew else self._seen
            self._quantise_where_needed(weights, biases)
        else:
            for parts in filter(None, (weights, biases)):
                _packed(parts)

    def joins(self, linears: Sequence[Any] | None = None) -> bool:
        """Whether the linears, those of now, are one product; else each is called as it is."""
        linears = self._find() if linears is None else linears
        if len(linears) == 1 and not self._fp8:
            return False
        if not all(map(is_plain, linears)):
            return False
        alike = {(m.bias is None, m.weight.dtype, m.weight.device) for m in linears}
        return len(alike) == 1

    def _quantise_where_needed(
        self, weights: list[Tensor], biases: list[Tensor]
    ) -> tuple[Fp8Weight, Tensor | None]:
        # a write through .data leaves no trace: see FastFlux.pack
        seen = [(t.data_ptr(), t.dtype, t.device, t._version) for t in (*weights, *biases)]
        if self._quantised is None or seen != self._seen:
            with torch.no_grad(), torch.inference_mode(False):
                weight = Fp8Weight.of(torch.cat([t.data for t in weights]))
                bias = torch.cat([t.data for t in biases]) if biases else None
            self._quantised, self._seen = (weight, bias), seen
            self.generation += 1
        return self._quantised


def is_plain(module: Any) -> bool:
    """Whether a module is an ``nn.Linear`` and nothing else: no wrapper, no hook, no training."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """All parts one after the other, in the very memory that the parts are then views of."""
    first, rows = parts[0].data, sum(map(len, parts))
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if first.is_contiguous() and rows * first.stride(0) <= room:
        whole = first.as_strided((rows, *first.shape[1:]), first.stride())
        if _lie_in(parts, whole):
            return whole
    # what is made here outlives any mode
    with torch.no_grad(), torch.inference_mode(False):
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
