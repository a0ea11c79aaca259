"""What an edit did, for a person: pictures side by side, and how far positions moved."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from sda_fast.cli.sheets import Tile, contact_sheet, draw_area, enlarge, save_png
from sda_fast.editors.result import EditResult, relative_change
from sda_fast.embedding import SemanticEmbedding

LONGEST = 100
"""Letters of a title: instructions may be longer than a sheet is wide."""


def as_one(result: EditResult) -> EditResult:
    """A chain of edits as a single one, from the first source to the last result."""
    edited = torch.stack([edit.edited for edit in result.history]).any(0)
    return EditResult(result.embedding, result.history[0].source, result.instructions, edited)


def compare(before: SemanticEmbedding, after: SemanticEmbedding) -> EditResult:
    """The difference of two embeddings of one tree and batch, as if an edit had made it."""
    edited = relative_change(before.tokens, after.tokens) > 0
    return EditResult(after, before, ("",) * len(after), edited)


def in_words(result: EditResult, row: int = 0) -> str:
    """How many positions of a picture were edited, and by how much of their length."""
    tree, change = result.embedding.tree, result.change[row]
    farthest = int(change.argmax())
    node = next(n.path for n in tree.nodes() if n.start <= farthest < n.stop)
    return (
        f"{int(result.edited[row].sum())} of {tree.num_tokens} positions edited; "
        f"change {change.mean():.2f}, at most {change.max():.2f} in {node}"
    )


def save_edit_sheet(
    rows: Sequence[Sequence[Tile]], result: EditResult, title: str, path: Path
) -> Path:
    """Write a sheet on which the area that may have changed is outlined, if it is not all.

    Args:
        rows: of pictures side by side, which are enlarged; one for each picture of the result.
        result: what was edited.
        title: on top; a long one is cut.
        path: of the PNG; the folder must be there.
    """
    shown = [[_outlined(tile, result, i) for tile in row] for i, row in enumerate(rows)]
    sheet = contact_sheet(shown, textwrap.shorten(title, LONGEST, placeholder=" …"))
    return save_png(sheet, path)


def _outlined(tile: Tile, result: EditResult, row: int) -> Tile:
    picture = enlarge(tile.picture)
    area = result.area(picture.height, picture.width)[row]
    return Tile(picture if area.all() else draw_area(picture, area), tile.label)
