"""What an editor's network says of a batch of embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sda_fast.editors.result import TOUCHED, EditResult, relative_change
from sda_fast.embedding import SemanticEmbedding


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


def result_of(
    found: Prediction,
    tokens: Tensor,
    source: SemanticEmbedding,
    instructions: tuple[str, ...],
    parent: EditResult | None,
) -> EditResult:
    """What an editor's edit of an embedding comes to, on its device and in its dtype.

    Edited are the positions with an open gate or, without gates, those that changed by more than
    ``TOUCHED``. Where a gate is closed the source comes out bit for bit.

    Args:
        found: of the editor.
        tokens: source.tokens as the editor had them.
        source: what was edited.
        instructions: one a picture.
        parent: the edit before.

    Raises:
        FloatingPointError: the editor's numbers are not finite.
    """
    # a gate that is NaN would count as closed
    if not all(t.isfinite().all() for t in (found.tokens, found.gate) if t is not None):
        raise FloatingPointError("the editor gave NaN or infinity: its weights may be broken")
    new = found.over(tokens).to(source.tokens)
    if found.gate is None:
        edited = relative_change(source.tokens, new) > TOUCHED
    else:
        edited = (found.gate > 0).to(new.device)
        # not by way of the editor's dtype
        new = torch.where(edited[..., None], new, source.tokens)
    result = SemanticEmbedding(new, source.tree, source.pooled)
    return EditResult(result, source, instructions, edited, parent)
