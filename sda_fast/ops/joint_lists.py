"""From a hierarchy to the few integers a token and a tile that the kernels of joint attention read.

Each token has a set of node rows and a set of node columns, of all levels, as bits; a query attends
to a key iff both pairs of sets meet. A txt key shows its own node, a patch every node it touches.
A txt query shows its node, its ancestors and descendants toward txt and its own node toward image
keys, under "overlap" everything; under "isolated" image queries show the nodes of one level only
toward image keys. So all rules are one test, for single tokens in the kernels and for blocks of
tokens here: a block of raster-ordered patches is at most a few runs of whole rows and columns, and
a run shows some tokens the union of its sets and every token their intersection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from csrc_triton.tile_lists import AS_KEY, TO_IMG, TO_TXT, TileLists
from csrc_triton.tiles import Tile
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops.device_tables import keep, to_device

CACHED = 64  # lists kept; of 512 to 2048 px pictures they take 5 to 150 KB each
ALIGN = 16  # bytes: tables begin at multiples of it, so that a kernel is compiled once for all
TORCH = {4: torch.int32, 8: torch.int64}  # by bytes


Sizes = tuple[int, int, int]
"""Tokens of a tile, of a step of its dense range and of a masked block."""


@dataclass(frozen=True)
class Layout:
    """The tokens of one joint sequence and who may attend to whom; ``attention_mask``'s arguments.

    Attributes:
        tokens_per_node: of the hierarchy.
        h: rows of image tokens.
        w: columns of image tokens.
        rule: "overlap", "local" or "isolated".
        extra_text: prompt tokens after the positions.
        isolate_level: read by "isolated" only.
        source: () or (rows, columns) of a source picture's tokens.
    """

    tokens_per_node: tuple[int, ...]
    h: int
    w: int
    rule: str
    extra_text: int
    isolate_level: int
    source: tuple[int, ...]

    @property
    def num_txt(self) -> int:
        """Positions and extra text."""
        return Hierarchy(self.tokens_per_node).num_tokens + self.extra_text

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of the image and of the source picture, if any."""
        return [(self.h, self.w), *([(self.source[0], self.source[1])] if self.source else [])]

    @property
    def num_img(self) -> int:
        """Image tokens, those of the source picture included."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def length(self) -> int:
        """S."""
        return self.num_txt + self.num_img

    @property
    def dense_from(self) -> int | None:
        """The first query from which on all queries see all image keys; None if none does."""
        return {"overlap": 0, "local": self.num_txt, "isolated": None}[self.rule]

    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """Node rows and node columns of each role of ``csrc_triton.tile_lists``, as bits.

        Returns:
            [3, num_txt + h + source rows] and [3, num_txt + w + source columns], int64.
        """
        tree = Hierarchy(self.tokens_per_node)
        level = np.pad(tree.token_level.numpy(), (0, self.extra_text))
        found = []
        for place, sides in (
            (tree.token_row, [rows for rows, _ in self.grids]),
            (tree.token_col, [cols for _, cols in self.grids]),
        ):
            node = np.pad(place.numpy(), (0, self.extra_text))
            own = np.left_shift(1, 2**level - 1 + node)
            family = np.zeros_like(own)
            patches = [np.zeros(side, np.int64) for side in sides]
            only = 0
            for at in range(tree.num_levels):
                bits, up = np.left_shift(1, 2**at - 1 + np.arange(2**at)), np.arange(2**at)
                lifted = np.where(level >= at, node >> np.maximum(level - at, 0), -1)
                below = up[None] >> np.maximum(at - level, 0)[:, None]
                kin = np.where(level[:, None] >= at, lifted[:, None] == up, below == node[:, None])
                family |= (kin * bits).sum(1)
                for patch, side in zip(patches, sides, strict=True):
                    i = np.arange(side)[:, None]
                    touched = (i << at < (up + 1) * side) & (i + 1 << at > up * side)
                    patch |= (touched * bits).sum(1)
                only = int(bits.sum()) if at == self.isolate_level else only
            patch = np.concatenate(patches)
            txt = (family, own) if self.rule != "overlap" else (np.full_like(own, -1),) * 2
            to_img = patch & only if self.rule == "isolated" else patch
            roles = [(txt[0], patch), (txt[1], to_img), (own, patch)]
            found.append(np.stack([np.concatenate(role) for role in roles]))
        return found[0], found[1]


@dataclass(frozen=True)
class Runs:
    """Blocks of tokens, each as some runs in which every row goes with every column.

    Attributes:
        blocks: (first token, last token + 1) of each of n blocks.
        union: [n, R, 2] row and column bits of any token of the run; 0 for no run.
        common: [n, R, 2] row and column bits of all tokens of the run; all for no run.
    """

    blocks: list[tuple[int, int]]
    union: np.ndarray
    common: np.ndarray

    def some(self, other: "Runs", i: int) -> np.ndarray:
        """[n] whether any token of block i of the other meets any of each block of this one."""
        return np.any(_meet(self.union, other.union[i]), axis=(1, 2))

    def every(self, other: "Runs", i: int) -> np.ndarray:
        """[n] whether all tokens of block i of the other surely meet all of each block of this."""
        return np.all(_meet(self.common, other.common[i]), axis=(1, 2))


def query_lists(layout: Layout, tile: Tile, beyond_dense: bool, device: torch.device) -> TileLists:
    """Lists of the kernels that own tiles of queries.

    Args:
        layout: of the sequence.
        tile: of the kernel.
        beyond_dense: leave out the pairs of queries from ``layout.dense_from`` on and image keys.
        device: where the lists go.

    Raises:
        RuntimeError: a CUDA graph is being captured and the lists are not there yet.
    """
    sizes = _sizes(tile.block_m, tile.block_n, tile)
    return _kept(_query_lists, layout, sizes, beyond_dense, device)


def key_lists(layout: Layout, tile: Tile, beyond_dense: bool, device: torch.device) -> TileLists:
    """Lists of the kernel that owns tiles of keys: the transpose of ``query_lists``."""
    sizes = _sizes(tile.block_n, tile.block_m, tile)
    return _kept(_key_lists, layout, sizes, beyond_dense, device)


def _sizes(owned: int, step: int, tile: Tile) -> Sizes:
    if step % tile.block_masked:
        raise ValueError(f"block_masked must divide the {step} tokens of a step, got {tile}")
    return owned, step, tile.block_masked


@lru_cache(maxsize=CACHED)
def _query_lists(
    layout: Layout, sizes: Sizes, beyond_dense: bool, device: torch.device
) -> TileLists:
    owned, step, masked = sizes
    bits = layout.bits()
    txt = _runs(layout, bits, 1, AS_KEY, of_txt=True)
    img = _runs(layout, bits, masked, AS_KEY, of_txt=False)
    tiles, entries = [], []
    for of_txt in (True, False):
        to_txt, to_img = (_runs(layout, bits, owned, role, of_txt) for role in (TO_TXT, TO_IMG))
        for i, (start, stop) in enumerate(to_txt.blocks):
            seen = np.flatnonzero(txt.some(to_txt, i))
            some, every = img.some(to_img, i), img.every(to_img, i)
            if beyond_dense and layout.dense_from is not None and start >= layout.dense_from:
                some[:] = every[:] = False
            blocks, dense = _masked_and_dense(img.blocks, some, every, step, masked)
            first = len(entries)
            entries += [*seen.tolist(), *blocks]
            split = first + len(seen)
            tiles.append([start, stop, first, split, split, len(entries), *dense])
    return _on_device(layout, bits, tiles, entries, device)


@lru_cache(maxsize=CACHED)
def _key_lists(layout: Layout, sizes: Sizes, beyond_dense: bool, device: torch.device) -> TileLists:
    owned, step, masked = sizes
    bits = layout.bits()
    tiles, entries = [], []
    for of_txt in (True, False):
        keys = _runs(layout, bits, owned, AS_KEY, of_txt)
        role = TO_TXT if of_txt else TO_IMG
        queries = [_runs(layout, bits, masked, role, side) for side in (True, False)]
        from_blocks = [block for side in queries for block in side.blocks]
        starts = np.array([start for start, _ in from_blocks])
        for i, (start, stop) in enumerate(keys.blocks):
            some = np.concatenate([side.some(keys, i) for side in queries])
            every = np.concatenate([side.every(keys, i) for side in queries])
            if beyond_dense and not of_txt and layout.dense_from is not None:
                some &= starts < layout.dense_from
                every &= starts < layout.dense_from
            blocks, dense = _masked_and_dense(from_blocks, some, every, step, masked)
            first = len(entries)
            entries += blocks
            tiles.append([start, stop, first, first, first, len(entries), *dense])
    return _on_device(layout, bits, tiles, entries, device)


def _masked_and_dense(
    blocks: list[tuple[int, int]], some: np.ndarray, every: np.ndarray, step: int, size: int
) -> tuple[list[int], tuple[int, int]]:
    """First tokens of the blocks that need the mask, and the longest range that does not.

    Blocks are of size tokens, or shorter at an end; the range is a multiple of step tokens.
    """
    whole = every & np.array([stop - start == size for start, stop in blocks], dtype=bool)
    first = last = begin = 0
    for i in range(len(blocks) + 1):
        if i == len(blocks) or not whole[i]:
            if i - begin > last - first:
                first, last = begin, i
            begin = i + 1
    last -= (last - first) % (step // size)
    outside = [*range(first), *range(last, len(blocks))]
    dense = (blocks[first][0], blocks[last - 1][1]) if last > first else (0, 0)
    return [blocks[i][0] for i in outside if some[i]], dense


def _runs(
    layout: Layout, bits: tuple[np.ndarray, np.ndarray], size: int, role: int, of_txt: bool
) -> Runs:
    """The txt or the image tokens in blocks of one size, in a role."""
    rows, cols = (table[role] for table in bits)
    num_txt, length = layout.num_txt, layout.length
    first, last = (0, num_txt) if of_txt else (num_txt, length)
    blocks = [(i, min(i + size, last)) for i in range(first, last, size)]
    if of_txt:
        parts = [[(slice(t, t + 1),) * 2 for t in range(*block)] for block in blocks]
    else:
        parts = [_img_runs(layout, start - num_txt, stop - num_txt) for start, stop in blocks]
    width = max(map(len, parts), default=0)
    union = np.zeros((len(blocks), width, 2), np.int64)
    common = np.full((len(blocks), width, 2), -1, np.int64)
    for i, block in enumerate(parts):
        for j, run in enumerate(block):
            for axis, (table, part) in enumerate(zip((rows, cols), run, strict=True)):
                union[i, j, axis] = np.bitwise_or.reduce(table[part])
                common[i, j, axis] = np.bitwise_and.reduce(table[part])
    return Runs(blocks, union, common)


def _img_runs(layout: Layout, start: int, stop: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of the runs of patches start to stop, as places in a table of bits."""
    runs, before, row_before, col_before = [], 0, layout.num_txt, layout.num_txt
    for rows, cols in layout.grids:
        begin, end = max(start - before, 0), min(stop - before, rows * cols)
        while begin < end:
            row, col = divmod(begin, cols)
            # all whole rows at once, else the rest of a row that is begun or not finished
            whole = (end - begin) // cols if col == 0 else 0
            last_col = cols if whole else min(cols, col + end - begin)
            across = slice(row_before + row, row_before + row + max(whole, 1))
            runs.append((across, slice(col_before + col, col_before + last_col)))
            begin += max(whole, 1) * (last_col - col)
        before, row_before, col_before = before + rows * cols, row_before + rows, col_before + cols
    return runs


def _meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, R, R2] whether the bits a [n, R, 2] and b [R2, 2] meet in rows and in columns."""
    both = a[:, :, None] & b
    return (both[..., 0] != 0) & (both[..., 1] != 0)


def _on_device(
    layout: Layout,
    bits: tuple[np.ndarray, np.ndarray],
    tiles: list[list[int]],
    entries: list[int],
    device: torch.device,
) -> TileLists:
    wide = len(layout.tokens_per_node) > 5  # 2**5 - 1 bits are the most that int32 holds
    rows, cols = (table.astype(np.int64 if wide else np.int32) for table in bits)
    grids = layout.grids
    counts = [layout.num_txt, layout.length, layout.h, layout.w, layout.h * layout.w, grids[-1][1]]
    tables = [
        np.array([*counts, rows.shape[1], cols.shape[1]], np.int32),
        rows,
        cols,
        np.array(tiles, np.int32),
        np.array(entries or [0], np.int32),
    ]
    starts = np.cumsum([0, *(-(-table.nbytes // ALIGN) * ALIGN for table in tables)]).tolist()
    packed = np.zeros(starts[-1], np.uint8)
    for start, table in zip(starts, tables, strict=False):
        packed[start : start + table.nbytes] = np.frombuffer(table.tobytes(), np.uint8)
    ran = "hierarchical_attention must run once with these sizes"
    moved = to_device(torch.from_numpy(packed), device, ran)
    views = [
        moved[start : start + table.nbytes].view(TORCH[table.itemsize]).view(table.shape)
        for start, table in zip(starts, tables, strict=False)
    ]
    has_blocks, has_dense = (any(row[i] < row[i + 1] for row in tiles) for i in (4, 6))
    shape, row_bits, col_bits, records, listed = views
    return TileLists(
        shape, row_bits, col_bits, records, listed, has_blocks, has_dense, packed.nbytes
    )


def _kept(build: Callable[..., TileLists], *key: object) -> TileLists:
    lists = build(*key)
    keep(lists.entries)  # one memory with the others
    return lists
