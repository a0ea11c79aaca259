"""Contact sheets: pictures side by side with titles, and a hierarchy drawn over a picture."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from sda_fast.files import write_whole
from sda_fast.hierarchy import Hierarchy

LEVEL_COLORS = ("#ffb300", "#2de2c5", "#ff5fa8", "#8ab4ff", "#c5f05a", "#ffffff")
"""One a level, the root first; light enough for dark pictures, drawn on a dark edge."""
PAPER, INK, FAINT = "#16181d", "#f2f3f5", "#9aa1ad"
GAP, HEAD, LABEL = 10, 48, 32
"""Pixels: between tiles, of the title, of the words under a tile."""
TITLE_SIZE, LABEL_SIZE = 20, 13
RIM = 3
"""Pixels: of the outline of an area."""
TILE = 192
"""Longer side of a picture on a sheet, in pixels, as near as whole multiples allow."""


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet and the words under it."""

    picture: Image.Image
    label: str = ""


def enlarge(picture: Image.Image, side: int = TILE) -> Image.Image:
    """Scale a picture so that its longer side is about ``side`` pixels.

    Small pictures grow by a whole factor and keep their square pixels; large ones are resampled.
    """
    factor = round(side / max(picture.size))
    if factor >= 1:
        size = picture.width * factor, picture.height * factor
        return picture.resize(size, Image.Resampling.NEAREST)
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def draw_hierarchy(picture: Image.Image, tree: Hierarchy) -> Image.Image:
    """Outline the nodes of every level that holds positions: the root thickest, deepest first.

    Args:
        picture: RGB, already as large as it will be shown.
        tree: the hierarchy; levels without positions are left out.

    Returns:
        A new picture of the same size.
    """
    drawn = picture.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    for level in reversed(range(tree.num_levels)):
        if tree.tokens_per_node[level] == 0:
            continue
        cells, width = 2**level, line_width(tree, level)
        for edge, color in ((2, "#000000"), (0, LEVEL_COLORS[level])):
            for i in range(cells + 1):
                _line(canvas, drawn.size, i / cells, width + edge, color)
    return drawn


def draw_node(picture: Image.Image, tree: Hierarchy, path: str) -> Image.Image:
    """Outline one node; otherwise as ``draw_hierarchy``.

    Raises:
        ValueError: the tree has no such node.
    """
    drawn = picture.convert("RGB")
    level = tree.node(path).level
    y0, x0, y1, x1 = tree.box(path)
    box = (x0 * drawn.width, y0 * drawn.height, x1 * drawn.width - 1, y1 * drawn.height - 1)
    width = line_width(tree, level) + 1
    canvas = ImageDraw.Draw(drawn)
    canvas.rectangle(box, outline="#000000", width=width + 2)
    canvas.rectangle(box, outline=LEVEL_COLORS[level], width=width)
    return drawn


def draw_area(picture: Image.Image, area: Tensor) -> Image.Image:
    """Outline a part of a picture, whatever its shape.

    Args:
        picture: RGB, already as large as it will be shown.
        area: bool [height, width] of the picture, on the CPU.

    Returns:
        A new picture of the same size.
    """
    drawn = picture.convert("RGB")
    for width, color in ((RIM + 2, "#000000"), (RIM, LEVEL_COLORS[0])):
        drawn.paste(color, mask=_rim(area, width))
    return drawn


def line_width(tree: Hierarchy, level: int) -> int:
    """Pixels of the outline of a level: 1 for the deepest, 2 more for each level above it."""
    return 1 + 2 * (tree.num_levels - 1 - level)


def contact_sheet(
    rows: Sequence[Sequence[Tile]],
    title: str,
    legend: Sequence[tuple[str, str]] = (),
    group: int = 1,
) -> Image.Image:
    """Lay out tiles in rows, each tile's label under it.

    Args:
        rows: rows of tiles; a column is as wide as its widest tile.
        title: the line on top.
        legend: (colour, words) pairs for the line at the bottom.
        group: how many tiles belong together; between groups the gap is wider.

    Returns:
        An RGB picture.

    Raises:
        ValueError: there is no tile.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("rows must hold at least one tile, got none")
    widths = [max(_width(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    left = [2 * GAP + sum(widths[:i]) + i * GAP + i // group * GAP for i in range(columns)]
    heights = [max(tile.picture.height for tile in row) + LABEL for row in rows]
    legend_left = [2 * GAP]
    for _, words in legend:
        legend_left.append(legend_left[-1] + _length(words) + 40)
    width = max(left[-1] + widths[-1], 2 * GAP + _length(title, TITLE_SIZE), legend_left[-1])
    height = HEAD + sum(heights) + (LABEL if legend else 0) + GAP
    sheet = Image.new("RGB", (width + 2 * GAP, height), PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((2 * GAP, 12), title, fill=INK, font=_font(TITLE_SIZE))
    y = HEAD
    for row, row_height in zip(rows, heights, strict=True):
        for x, tile in zip(left, row, strict=False):
            sheet.paste(tile.picture, (x, y))
            canvas.text((x, y + tile.picture.height + 4), tile.label, fill=FAINT, font=_font())
        y += row_height
    for x, (color, words) in zip(legend_left, legend, strict=False):
        canvas.rectangle((x, y + 6, x + 16, y + 14), fill=color)
        canvas.text((x + 22, y + 1), words, fill=INK, font=_font())
    return sheet


def level_legend(tree: Hierarchy) -> list[tuple[str, str]]:
    """(colour, words) for each level that holds positions, for ``contact_sheet``."""
    return [
        (
            LEVEL_COLORS[level],
            f"level {level}: {_plural(4**level, 'node')} of {_plural(count, 'position')}",
        )
        for level, count in enumerate(tree.tokens_per_node)
        if count
    ]


def save_png(picture: Image.Image, path: str | PathLike[str]) -> Path:
    """Write a PNG, whole or not at all; the folder must be there."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return write_whole(path, stream.getvalue())


def save_gif(
    pictures: Sequence[Image.Image], path: str | PathLike[str], milliseconds: int = 150
) -> Path:
    """Write an endless GIF, whole or not at all; the folder must be there.

    Args:
        pictures: its frames, at least one, of one size; a GIF keeps 256 colours of each.
        path: what is there already is replaced.
        milliseconds: for which a frame stays; the format counts in tens of them. Equal neighbours
            become one frame that stays for the time of all.
    """
    stream = io.BytesIO()
    first, *rest = pictures
    first.save(
        stream, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0
    )
    return write_whole(path, stream.getvalue())


def _rim(area: Tensor, width: int) -> Image.Image:
    """A mask of the outermost pixels of an area; beyond the picture is outside."""
    whole = ImageOps.expand(Image.fromarray(area.byte().mul(255).numpy()), width)
    inner = whole.filter(ImageFilter.MinFilter(2 * width + 1))
    return ImageOps.crop(ImageChops.subtract(whole, inner), width)


def _line(
    canvas: ImageDraw.ImageDraw, size: tuple[int, int], at: float, width: int, color: str
) -> None:
    """Both lines of one division, kept inside the picture at its border."""
    for along, length in enumerate(size):
        start = min(max(math.floor(at * length - width / 2), 0), length - width)
        other = size[1 - along] - 1
        first, last = (start, 0), (start + width - 1, other)
        canvas.rectangle((first, last) if along == 0 else (first[::-1], last[::-1]), fill=color)


def _font(size: int = LABEL_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _length(words: str, size: int = LABEL_SIZE) -> int:
    return math.ceil(_font(size).getlength(words))


def _width(tile: Tile) -> int:
    return max(tile.picture.width, _length(tile.label))


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
