"""A stand-in for CUDA graphs on a CPU: it repeats operators on the memory they had when recorded.

Like a graph it knows addresses, not names: weights changed in place are seen, weights that were
moved elsewhere are not, and Python runs at the recording alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


class Tape:
    """One recorded function."""

    def __init__(self, function, inputs: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() for t in inputs]
        # each value's fake mode would take down the stack, which is half of the time
        with patch("torch._subclasses.fake_tensor.traceback.extract_stack", list):
            self.operators = make_fx(lambda *tensors: function(*tensors))(*self.inputs)
        for name, t in [
            *self.operators.named_parameters(),
            *self.operators.named_buffers(),
            *((name, t) for name, t in vars(self.operators).items() if isinstance(t, Tensor)),
        ]:
            # this memory, whatever becomes of the tensor
            self.operators.__dict__.pop(name, None)
            self.operators._parameters.pop(name, None)
            self.operators.register_buffer(name, t.detach(), persistent=False)
        self.released = False

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        assert not self.released
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        return self.operators(*self.inputs).clone()

    def wait(self) -> None:
        assert not self.released

    def repeat(self) -> None:
        assert not self.released
        self.operators(*self.inputs)

    def release(self) -> None:
        self.released = True


@dataclass
class TapePool:
    """Records on the CPU, and remembers what."""

    tapes: list[Tape] = field(default_factory=list)

    def __call__(self, device: torch.device) -> "TapePool":
        return self

    def capture(self, function, inputs: Sequence[Tensor]) -> Tape:
        self.tapes.append(Tape(function, inputs))
        return self.tapes[-1]
