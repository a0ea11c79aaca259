"""What every editor takes and gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

TOUCHED = 0.3
"""An editor that writes every position anew touched those that changed by this share of their
length: what rounding and a picture's context move is below it (scenes: 70 % of positions)."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class EditResult:
    """One edit of a batch of embeddings; edits chain through ``parent``.

    Attributes:
        embedding: what came out, B pictures.
        source: what went in, of the same tree, width and batch.
        instructions: one a picture.
        edited: bool [B, N]: positions that the editor means to have changed.
        parent: the edit before this one; None for the first.
    """

    embedding: SemanticEmbedding
    source: SemanticEmbedding
    instructions: tuple[str, ...]
    edited: Tensor
    parent: "EditResult | None" = None

    @cached_property
    def change(self) -> Tensor:
        """[B, N] f32: length of the difference by that of the source's vector; 0: bit for bit."""
        return relative_change(self.source.tokens, self.embedding.tokens)

    @property
    def touched(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the nodes with an edited position, for each picture."""
        tree = self.embedding.tree
        return tuple(
            tuple(node.path for node in tree.nodes() if row[tree.span(node.path)].any())
            for row in self.edited.cpu()
        )

    @property
    def boxes(self) -> tuple[tuple[Box, ...], ...]:
        """Regions (y0, x0, y1, x1) of the unit square where a picture may change, for each.

        Those of the touched nodes below which none is touched: a node above others only says more
        of the same place. A change at the root alone allows the whole picture.
        """
        tree = self.embedding.tree
        return tuple(tuple(tree.box(path) for path in _finest(paths)) for paths in self.touched)

    def area(self, height: int, width: int) -> Tensor:
        """Where the picture may change, as pixels or patches that touch ``boxes``.

        Args:
            height: rows of the answer.
            width: columns.

        Returns:
            bool [B, height, width] on the CPU.
        """
        found = torch.zeros(len(self.instructions), height, width, dtype=torch.bool)
        for row, boxes in zip(found, self.boxes, strict=True):
            for y0, x0, y1, x1 in boxes:
                # a patch that straddles a border belongs to both sides
                rows = slice(int(y0 * height), math.ceil(y1 * height))
                row[rows, int(x0 * width) : math.ceil(x1 * width)] = True
        return found

    @property
    def history(self) -> tuple["EditResult", ...]:
        """This edit and those before it, the first one first."""
        found: list[EditResult] = [self]
        last = self.parent
        while last is not None:
            found.append(last)
            last = last.parent
        return tuple(reversed(found))

    def undo(self, edits: int = 1) -> "SemanticEmbedding | EditResult":
        """What was there before the last edits: an earlier result, or the first embedding.

        Raises:
            ValueError: edits is not between 1 and the length of the history.
        """
        history = self.history
        if isinstance(edits, bool) or not isinstance(edits, int) or not 1 <= edits <= len(history):
            raise ValueError(f"edits must be 1 to {len(history)}, got {edits!r}")
        return history[-edits - 1] if edits < len(history) else history[0].source


@runtime_checkable
class Editor(Protocol):
    """Anything that edits embeddings by words."""

    def edit(
        self,
        emb: "SemanticEmbedding | EditResult",
        instruction: str | Sequence[str],
    ) -> EditResult:
        """Edit each picture of a batch.

        Args:
            emb: B pictures, or an earlier edit of them, which becomes the result's parent.
            instruction: one for all pictures, or one for each.

        Raises:
            ValueError: emb or an instruction does not fit; nothing was changed.
        """
        ...


def relative_change(source: Tensor, target: Tensor) -> Tensor:
    """``|target - source| / |source|`` of each vector: [..., C] twice -> [...] f32; 0 / 0 is 0."""
    wide = torch.promote_types(source.dtype, torch.float32)
    length = source.to(wide).norm(dim=-1)
    moved = (target.to(source.device, wide) - source.to(wide)).norm(dim=-1)
    return torch.where(moved == 0, 0.0, moved / length).float()


def unpack_source(
    emb: "SemanticEmbedding | EditResult", tree: Hierarchy | None, channels: int | None
) -> tuple[SemanticEmbedding, EditResult | None]:
    """(embedding, parent) of what an editor was given.

    Args:
        emb: of the caller.
        tree: that the editor was made for; None for any.
        channels: likewise.

    Raises:
        ValueError: it is neither, or of another hierarchy or width.
    """
    parent = emb if isinstance(emb, EditResult) else None
    source = parent.embedding if parent else emb
    if not isinstance(source, SemanticEmbedding):
        raise ValueError(
            f"emb must be a SemanticEmbedding or an EditResult, got {type(emb).__name__}"
        )
    if tree is not None and source.tree != tree:
        raise ValueError(
            f"emb must be of the editor's hierarchy {tree.tokens_per_node}, "
            f"got {source.tree.tokens_per_node}"
        )
    width = source.tokens.shape[2]
    if channels is not None and width != channels:
        raise ValueError(f"emb must have the editor's {channels} channels, got {width}")
    return source, parent


def spread_instructions(instruction: str | Sequence[str], count: int) -> tuple[str, ...]:
    """One instruction for each of ``count`` pictures, spaces at its ends taken off.

    Raises:
        ValueError: an instruction is empty or no text, or there are not as many as pictures.
    """
    if not isinstance(instruction, Sequence):
        raise ValueError(f"instruction must be a text or texts, got {type(instruction).__name__}")
    given = (instruction,) * count if isinstance(instruction, str) else tuple(instruction)
    if len(given) != count:
        raise ValueError(f"instruction must be one, or one for each of {count}, got {len(given)}")
    for text in given:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"instruction must be a text that says something, got {text!r}")
    return tuple(text.strip() for text in given)


def _finest(paths: Sequence[str]) -> list[str]:
    """Paths that no other one lies below."""
    below = [path.rstrip("/") + "/" for path in paths]
    return [
        path
        for path, prefix in zip(paths, below, strict=True)
        if not any(other != path and other.startswith(prefix) for other in paths)
    ]
