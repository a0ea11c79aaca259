"""The quadtree of nodes: which positions belong to which part of the image, and who may attend.

The integer rule of ``overlap`` and the three mask rules are those the adapter was trained with.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sda_fast.coords import CANVAS, check_int

RULES = ("overlap", "local", "isolated")
MAX_LEVELS = 6


class Node(NamedTuple):
    """One rectangle of one level; it holds the positions ``start`` to ``stop`` (exclusive)."""

    path: str
    level: int
    row: int
    col: int
    start: int
    stop: int


@dataclass(frozen=True)
class Hierarchy:
    """A quadtree whose level ``l`` splits the image into ``2**l x 2**l`` nodes.

    Positions run level by level, the nodes of a level row-major. A node is addressed by its path:
    ``/`` is the root, ``/1/2`` child 2 of child 1, and a child's index is ``2*row + col``.
    Instances are immutable, hashable and comparable.

    Attributes:
        tokens_per_node: how many positions each node of each level holds; 1 to 6 levels, integers
            of at least 0, not all 0. Any sequence is taken and kept as a tuple.

    Raises:
        ValueError: tokens_per_node is something else.
    """

    tokens_per_node: tuple[int, ...] = (32, 8, 4)

    def __post_init__(self) -> None:
        given = self.tokens_per_node
        if not isinstance(given, (tuple, list)) or not 1 <= len(given) <= MAX_LEVELS:
            raise ValueError(
                f"tokens_per_node must be a tuple of 1 to {MAX_LEVELS} integers, got {given!r}"
            )
        for level, count in enumerate(given):
            check_int(f"tokens_per_node[{level}]", count, least=0)
        if not any(given):
            raise ValueError(f"tokens_per_node must hold a position somewhere, got {given!r}")
        object.__setattr__(self, "tokens_per_node", tuple(given))

    @property
    def num_levels(self) -> int:
        """L, the number of levels."""
        return len(self.tokens_per_node)

    @property
    def num_nodes(self) -> int:
        """Nodes of all levels, those without positions included."""
        return sum(4**level for level in range(self.num_levels))

    @property
    def num_tokens(self) -> int:
        """N, the number of positions."""
        return sum(count * 4**level for level, count in enumerate(self.tokens_per_node))

    @property
    def token_level(self) -> Tensor:
        """[N] int64, the level of each position's node."""
        return _token_table(self)[0]

    @property
    def token_row(self) -> Tensor:
        """[N] int64, the row of each position's node in the ``2**level`` rows of its level."""
        return _token_table(self)[1]

    @property
    def token_col(self) -> Tensor:
        """[N] int64, the column of each position's node."""
        return _token_table(self)[2]

    def nodes(self) -> Iterator[Node]:
        """All nodes, level by level, row-major: the order of the positions."""
        for level in range(self.num_levels):
            for row in range(2**level):
                for col in range(2**level):
                    yield self._node(level, row, col)

    def node(self, path: str) -> Node:
        """The node of a path.

        Raises:
            ValueError: the tree has no such node.
        """
        children = path[1:].split("/") if isinstance(path, str) and path != "/" else []
        known = isinstance(path, str) and path.startswith("/") and len(children) < self.num_levels
        if not known or any(child not in ("0", "1", "2", "3") for child in children):
            raise ValueError(
                f"path must be '/' or up to {self.num_levels - 1} child indices 0 to 3 like "
                f"'/1/2' in a tree of {self.num_levels} levels, got {path!r}"
            )
        row = col = 0
        for child in map(int, children):
            row, col = 2 * row + child // 2, 2 * col + child % 2
        return self._node(len(children), row, col)

    def span(self, path: str) -> slice:
        """The positions of one node, without its descendants."""
        node = self.node(path)
        return slice(node.start, node.stop)

    def box(self, path: str) -> tuple[float, float, float, float]:
        """The node's rectangle (y0, x0, y1, x1) as fractions of the image, each in [0, 1]."""
        node = self.node(path)
        cells = 2**node.level
        return node.row / cells, node.col / cells, (node.row + 1) / cells, (node.col + 1) / cells

    def subtree(self, path: str) -> Tensor:
        """[N] bool, True at the positions of the node and of all its descendants."""
        node = self.node(path)
        level, row, col = _token_table(self)
        up = (level - node.level).clamp_min(0)
        return (level >= node.level) & (row >> up == node.row) & (col >> up == node.col)

    def overlap(self, h: int, w: int) -> Tensor:
        """Which patches of an ``h x w`` grid touch which positions' nodes.

        Patch row ``y`` overlaps node row ``i`` of ``g`` iff ``y*g < (i+1)*h and (y+1)*g > i*h``;
        columns alike. A patch that straddles a border belongs to both nodes.

        Args:
            h: rows of patches, at least 1.
            w: columns of patches, at least 1.

        Returns:
            [h*w, N] bool on the CPU, patches in raster order.

        Raises:
            ValueError: h or w is not an integer of at least 1.
        """
        return _overlap(check_int("h", h, 1), check_int("w", w, 1), *_token_table(self))

    def attention_mask(
        self,
        h: int,
        w: int,
        rule: str = "overlap",
        extra_text: int = 0,
        isolate_level: int | None = None,
        source: tuple[int, int] | None = None,
    ) -> Tensor:
        """The dense mask of joint attention: what every faster path must agree with.

        The sequence is the tree's N positions, then extra_text tokens (they behave as the root),
        the image patches in raster order, and the patches of a source picture, if any: each obeys
        the rule at its own place of its own grid.

        ========== ============= =========== =============================== =====================
        rule       img to txt    txt to img  txt to txt                      img to img
        ========== ============= =========== =============================== =====================
        overlap    own regions   all         all                             all
        local      own regions   own region  same node, ancestor, descendant all
        isolated   own regions   own region  same node, ancestor, descendant shares a node of
                                                                             isolate_level
        ========== ============= =========== =============================== =====================

        Args:
            h: rows of image patches, at least 1.
            w: columns of image patches, at least 1.
            rule: one of RULES.
            extra_text: tokens of an ordinary prompt after the tree's positions, at least 0.
            isolate_level: a level of the tree, None for the deepest; only `isolated` reads it.
            source: (rows, columns) of the source picture's patches.

        Returns:
            [S, S] bool on the CPU, a new tensor at each call; True where query (row) may attend to
            key (column). S = N + extra_text + h*w + source rows * source columns.

        Raises:
            ValueError: an argument is out of range.
        """
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        check_int("extra_text", extra_text, 0)
        isolate_level = self.check_isolate_level(isolate_level)
        grids = [(check_int("h", h, 1), check_int("w", w, 1))]
        if source is not None:
            grids.append(check_grid("source", source))

        table = [torch.nn.functional.pad(t, (0, extra_text)) for t in _token_table(self)]
        num_txt = self.num_tokens + extra_text
        num_img = sum(rows * cols for rows, cols in grids)
        own = torch.cat([_overlap(*grid, *table) for grid in grids])
        mask = torch.ones([num_txt + num_img] * 2, dtype=torch.bool, device="cpu")
        mask[num_txt:, :num_txt] = own
        if rule != "overlap":
            mask[:num_txt, num_txt:] = own.T
            mask[:num_txt, :num_txt] = _related(*table)
        if rule == "isolated":
            mask[num_txt:, num_txt:] = _share_node(grids, 2**isolate_level)
        return mask

    def check_isolate_level(self, isolate_level: int | None) -> int:
        """The level that `isolated` compares nodes of: the given one, or the deepest for None.

        Raises:
            ValueError: it is not a level of this tree.
        """
        if isolate_level is None:
            return self.num_levels - 1
        if check_int("isolate_level", isolate_level, 0) >= self.num_levels:
            raise ValueError(
                f"isolate_level must be below the {self.num_levels} levels of the tree, "
                f"got {isolate_level}"
            )
        return isolate_level

    def token_coords(self, height: float = 1.0, width: float = 1.0) -> Tensor:
        """Level and node centre of each position, on a canvas whose longer side is 64 units.

        Args:
            height: height of the picture in any unit; only its ratio to the width matters.
            width: width of the picture.

        Returns:
            [N, 3] float32 on the CPU: level, y, x.

        Raises:
            ValueError: height or width is not a positive finite number.
        """
        for name, side in (("height", height), ("width", width)):
            if not (math.isfinite(side) and side > 0):
                raise ValueError(f"{name} must be a positive finite number, got {side!r}")
        unit = CANVAS / max(height, width)
        level, row, col = (t.double() for t in _token_table(self))
        cells = 2**level
        y = (row + 0.5) / cells * (height * unit)
        x = (col + 0.5) / cells * (width * unit)
        return torch.stack([level, y, x], dim=-1).float()

    def to_json(self) -> str:
        """A JSON text that is the same for equal trees."""
        return json.dumps({"tokens_per_node": self.tokens_per_node}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Hierarchy":
        """The tree that ``to_json`` wrote.

        Raises:
            ValueError: the text is not JSON or describes no legal tree.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # nested too deep, digits without end
            raise ValueError(f"text must be the JSON of a hierarchy, got {text[:80]!r}") from error
        if not isinstance(data, dict) or set(data) != {"tokens_per_node"}:
            raise ValueError(f"text must hold tokens_per_node and nothing else, got {text[:80]!r}")
        return cls(data["tokens_per_node"])

    def _node(self, level: int, row: int, col: int) -> Node:
        bits = range(level - 1, -1, -1)
        path = "/" + "/".join(str(2 * (row >> b & 1) + (col >> b & 1)) for b in bits)
        count = self.tokens_per_node[level]
        before = sum(c * 4**k for k, c in enumerate(self.tokens_per_node[:level]))
        start = before + (row * 2**level + col) * count
        return Node(path, level, row, col, start, start + count)


def check_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Return grid as (rows, columns), two integers of at least 1.

    Raises:
        ValueError: it is something else; the message names the argument.
    """
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"{name} must be a pair (rows, columns), got {grid!r}")
    return check_int(f"{name}[0]", grid[0], 1), check_int(f"{name}[1]", grid[1], 1)


def _token_table(tree: Hierarchy) -> tuple[Tensor, Tensor, Tensor]:
    """Level, row and column of each position's node, [N] int64 each."""
    # not cached: made under FakeTensorMode or inference_mode, a tensor must not outlive it
    levels, rows, cols = [], [], []
    for level, count in enumerate(tree.tokens_per_node):
        cells = 2**level
        node = torch.arange(cells * cells, device="cpu").repeat_interleave(count)
        levels.append(torch.full_like(node, level))
        rows.append(node // cells)
        cols.append(node % cells)
    return torch.cat(levels), torch.cat(rows), torch.cat(cols)


def _overlap(h: int, w: int, level: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """[h*w, T] bool: the integer rule, separable in rows and columns."""
    cells = 2**level
    y, x = (torch.arange(side, device="cpu")[:, None] for side in (h, w))
    rows = (y * cells < (row + 1) * h) & ((y + 1) * cells > row * h)
    cols = (x * cells < (col + 1) * w) & ((x + 1) * cells > col * w)
    return (rows[:, None] & cols[None]).flatten(0, 1)


def _related(level: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """[T, T] bool: the same node, an ancestor or a descendant."""
    up = (level[:, None] - level[None]).clamp_min(0)
    # entry (i, j): i's node lifted to j's level where j is shallower
    row, col = row[:, None] >> up, col[:, None] >> up
    return (row == row.T) & (col == col.T)


def _share_node(grids: list[tuple[int, int]], cells: int) -> Tensor:
    """[S_img, S_img] bool: the patches overlap one common node of a level of ``cells`` rows."""
    ranges = []
    for h, w in grids:
        y, x = (torch.arange(side, device="cpu") for side in (h, w))
        y, x = y.repeat_interleave(w), x.repeat(h)
        # first and last node row or column that the patch touches
        ranges.append(torch.stack([y * cells // h, ((y + 1) * cells - 1) // h]))
        ranges[-1] = torch.stack([*ranges[-1], x * cells // w, ((x + 1) * cells - 1) // w])
    top, bottom, left, right = torch.cat(ranges, dim=1)
    rows = (top[:, None] <= bottom) & (top <= bottom[:, None])
    cols = (left[:, None] <= right) & (left <= right[:, None])
    return rows & cols
