"""FLUX's adaptive norms: every shift, scale and gate of a forward in one row, ahead of time.

A third of FLUX's weights turns one vector a sample, made of time, guidance and pooled text, into
these numbers. They depend on no token, so that all steps of a picture can be had in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OF_NORM = 6  # AdaLayerNormZero: shift, scale and gate of the attention, then of the MLP
OF_SINGLE = 3  # AdaLayerNormZeroSingle: shift, scale and gate
OF_OUT = 2  # AdaLayerNormContinuous: scale, then shift

Norm = tuple[Tensor, Tensor]
"""shift and scale, [B, C] each."""


@dataclass(frozen=True, slots=True)
class Modulation:
    """What modulates one forward, as views of its rows.

    Attributes:
        rows: R of [B, C]: six for the image and six for the text of each double block, three for
            each single block, two for the end.
        num_double: double blocks.
        num_single: single blocks.
    """

    rows: Sequence[Tensor]
    num_double: int
    num_single: int

    def double(self, block: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of the image and of the text: shift, scale, gate, then the same for the MLP; [B, C]."""
        first = 2 * OF_NORM * block
        both = self._some(first, 2 * OF_NORM)
        return both[:OF_NORM], both[OF_NORM:]

    def single(self, block: int) -> list[Tensor]:
        """shift, scale and gate of a single block, [B, C] each."""
        return self._some(2 * OF_NORM * self.num_double + OF_SINGLE * block, OF_SINGLE)

    def last(self) -> Norm:
        """shift and scale of the norm before the output."""
        scale, shift = self._some(len(self.rows) - OF_OUT, OF_OUT)
        return shift, scale

    def after_double(self, block: int) -> tuple[Norm, Norm]:
        """What norms the image and the text after a double block."""
        if block + 1 < self.num_double:
            img, txt = self.double(block + 1)
            return (img[0], img[1]), (txt[0], txt[1])
        joint = self.after_single(-1)
        return joint, joint

    def after_single(self, block: int) -> Norm:
        """What norms all tokens after a single block; -1 stands for before the first one."""
        if block + 1 < self.num_single:
            shift, scale, _ = self.single(block + 1)
            return shift, scale
        return self.last()

    def _some(self, first: int, count: int) -> list[Tensor]:
        return list(self.rows[first : first + count])


def modulation_linears(transformer: Any) -> list[nn.Module]:
    """The linears that make the rows, in the rows' order: 3.23 of FLUX.1's 11.9 B parameters."""
    norms = [
        norm
        for block in transformer.transformer_blocks
        for norm in (block.norm1, block.norm1_context)
    ]
    norms += [block.norm for block in transformer.single_transformer_blocks]
    return [norm.linear for norm in (*norms, transformer.norm_out)]


def rows_of(transformer: Any) -> int:
    """R, the rows of a transformer's modulation."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    return 2 * OF_NORM * double + OF_SINGLE * single + OF_OUT


def modulation_rows(
    transformer: Any, timestep: Tensor, pooled: Tensor, guidance: Tensor | None
) -> Tensor:
    """Every shift, scale and gate for each of N samples or steps.

    Args:
        transformer: a FluxTransformer2DModel.
        timestep: [N] in [0, 1].
        pooled: [N, P].
        guidance: [N], for a transformer that has guidance embeddings, else None.

    Returns:
        [N, R, C], see ``Modulation``; each weight is read once for all N.
    """
    given = (timestep,) if guidance is None else (timestep, guidance)
    times = [time.to(transformer.dtype) * 1000 for time in given]
    vector = F.silu(transformer.time_text_embed(*times, pooled))
    rows = [_linear(linear, vector) for linear in modulation_linears(transformer)]
    return torch.cat(rows, -1).unflatten(-1, (-1, transformer.inner_dim))


def _linear(linear: Any, vector: Tensor) -> Tensor:
    """The linear of a vector, wherever its weights were put."""
    if all(p.device == vector.device for p in linear.parameters()):
        return linear(vector)
    fetched = {name: p.to(vector.device) for name, p in linear.named_parameters()}
    return torch.func.functional_call(linear, fetched, (vector,))
