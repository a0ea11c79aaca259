"""What an editor's network says of a batch of embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """New positions, and which of them are to be taken.

    Attributes:
        tokens: [B, N, C].
        gate: [B, N] logits: a position is taken where its own is positive; None: all are.
    """

    tokens: Tensor
    gate: Tensor | None = None

    def over(self, source: Tensor) -> Tensor:
        """[B, N, C]: the new positions where the gate is open, elsewhere those of source."""
        if self.gate is None:
            return self.tokens
        return torch.where(self.gate[..., None] > 0, self.tokens, source)
