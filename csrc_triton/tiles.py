"""Which implementation and which tile runs: a frozen table, each entry with its measurement.

Nothing is tuned while a program runs: the first step of a training run and the first picture of a
server cost what every other one costs, and all ranks choose alike. ``python -m bench tune`` sweeps
tiles and prints entries; the compile gate checks every tile that stands here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("fused", "split")
"""Of joint attention; every pass has both."""

KERNELS = ("forward", "dq", "dkdv")
"""Of joint attention, in the order in which a training step runs them."""

ROPE3D_KERNELS = ("rope3d_forward", "rope3d_dq", "rope3d_dkdv")
"""Of attention with rotated queries and keys."""

HEAD_DIMS = (16, 32, 64, 128)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one kernel.

    Attributes:
        block_m: queries of a tile.
        block_n: keys of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over the inner loop.
        block_masked: keys (of dkdv: queries) taken at once where the mask is applied; it divides
            block_n (of dkdv: block_m).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_masked: int = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """What the choice may depend on: never the values, so that equal shapes always run alike.

    Attributes:
        dtype: of q, k and v.
        head_dim: D.
        num_txt: txt tokens.
        num_img: img tokens, those of a source picture included.
        batch_heads: B * H.
    """

    dtype: torch.dtype
    head_dim: int
    num_txt: int
    num_img: int
    batch_heads: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One choice and where it holds; of several that hold, the first counts.

    Attributes:
        kernel: one of KERNELS or of ROPE3D_KERNELS.
        tile: what to launch it with.
        chosen_by: the measurement, or what stood in for one.
        implementation: one of IMPLEMENTATIONS, or None for each.
        dtypes: where it holds.
        head_dims: where it holds.
        min_img: holds from this many img tokens on.
        min_batch_heads: holds from this B * H on.
        min_txt: holds from this many txt tokens on.
    """

    kernel: str
    tile: Tile
    chosen_by: str
    implementation: str | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: tuple[int, ...] = HEAD_DIMS
    min_img: int = 0
    min_batch_heads: int = 0
    min_txt: int = 0

    def holds(self, kernel: str, implementation: str, problem: Problem) -> bool:
        """Whether this entry speaks of the kernel, the implementation and the problem."""
        named = self.kernel == kernel and self.implementation in (None, implementation)
        return named and _within(self, problem)


@dataclass(frozen=True, slots=True)
class Preference:
    """What "auto" takes and where it holds; of several that hold, the first counts.

    Attributes:
        direction: "forward" or "backward".
        implementation: one of IMPLEMENTATIONS.
        chosen_by: the measurement, or what stood in for one.
        dtypes: where it holds.
        head_dims: where it holds.
        min_img: holds from this many img tokens on.
        min_batch_heads: holds from this B * H on.
        min_txt: holds from this many txt tokens on.
    """

    direction: str
    implementation: str
    chosen_by: str
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: tuple[int, ...] = HEAD_DIMS
    min_img: int = 0
    min_batch_heads: int = 0
    min_txt: int = 0


def _within(choice: Entry | Preference, problem: Problem) -> bool:
    return (
        problem.dtype in choice.dtypes
        and problem.head_dim in choice.head_dims
        and problem.num_img >= choice.min_img
        and problem.batch_heads >= choice.min_batch_heads
        and problem.num_txt >= choice.min_txt
    )


GATE = "not timed yet; the widest tile that the compile gate passes for sm_90a without a spill"
SMALL = "not timed yet; the debug path: the widest tile that does not spill without tensor cores"

ENTRIES: tuple[Entry, ...] = (
    Entry("forward", Tile(128, 128, 8, 2), GATE),
    Entry("dq", Tile(128, 64, 8, 2, 32), GATE),
    Entry("dkdv", Tile(32, 128, 8, 3, 32), GATE),
    Entry("forward", Tile(16, 16, 8, 1, 16), SMALL, dtypes=(torch.float32,)),
    Entry("dq", Tile(16, 16, 8, 1, 16), SMALL, dtypes=(torch.float32,)),
    Entry("dkdv", Tile(16, 32, 8, 1, 16), SMALL, dtypes=(torch.float32,)),
)
"""Tiles of joint attention."""

ROPE3D_ENTRIES: tuple[Entry, ...] = (
    Entry("rope3d_forward", Tile(128, 64, 8, 2), GATE),
    Entry("rope3d_dq", Tile(128, 64, 8, 2), GATE),
    Entry("rope3d_dkdv", Tile(32, 64, 8, 2), GATE, head_dims=(128,)),
    Entry("rope3d_dkdv", Tile(64, 64, 4, 2), GATE),
    Entry("rope3d_forward", Tile(16, 16, 8, 1), SMALL, None, (torch.float32,), (128,)),
    Entry("rope3d_dq", Tile(16, 16, 8, 1), SMALL, None, (torch.float32,), (128,)),
    Entry("rope3d_dkdv", Tile(16, 16, 8, 1), SMALL, None, (torch.float32,), (128,)),
    Entry("rope3d_forward", Tile(16, 16, 4, 1), SMALL, dtypes=(torch.float32,)),
    Entry("rope3d_dq", Tile(16, 16, 4, 1), SMALL, dtypes=(torch.float32,)),
    Entry("rope3d_dkdv", Tile(16, 16, 4, 1), SMALL, dtypes=(torch.float32,)),
)
"""Tiles of attention with rotated queries and keys, by the padded head dim."""

PREFERRED: tuple[Preference, ...] = (
    Preference("forward", "fused", "not timed yet; serves every rule", dtypes=DTYPES),
    Preference("backward", "fused", "not timed yet; serves every rule", dtypes=DTYPES),
)
"""What "auto" takes."""


@dataclass(frozen=True, slots=True)
class RowTile:
    """Launch parameters of a kernel that goes once over heads of tokens, bound by memory.

    Attributes:
        tokens: of a program, side by side over its threads; a power of two.
        heads: of a program, one after another in a thread; a power of two.
        num_warps: warps of a program.
    """

    tokens: int
    heads: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class RowEntry:
    """One choice for such a kernel; the number of tokens follows from it.

    Attributes:
        kernel: one of NORM_ROPE_KERNELS.
        heads: as in RowTile.
        num_warps: likewise.
        chosen_by: the measurement, or what stood in for one.
    """

    kernel: str
    heads: int
    num_warps: int
    chosen_by: str


NORM_ROPE_KERNELS = ("norm_rope_forward", "norm_rope_backward")
"""From FLUX's projections to joint q, k and v, and back."""

WIDE = (
    "not timed yet; loads of 16 bytes, all out before the first store, and by the registers that "
    "the gate counts for D = 128 five programs or more fit a multiprocessor"
)

NORM_ROPE_ENTRIES: tuple[RowEntry, ...] = (
    RowEntry("norm_rope_forward", 4, 4, WIDE),
    RowEntry("norm_rope_backward", 2, 4, WIDE),
)


def choose_row_tile(kernel: str, dtype: torch.dtype, head_dim: int) -> RowTile:
    """The tile of one of NORM_ROPE_KERNELS: a row of each head is one load of 16 bytes a thread.

    Raises:
        ValueError: no entry is of this kernel.
    """
    for entry in NORM_ROPE_ENTRIES:
        if entry.kernel == kernel:
            tokens = entry.num_warps * 32 * 16 // (dtype.itemsize * head_dim)
            return RowTile(tokens, entry.heads, entry.num_warps)
    raise ValueError(f"kernel {kernel!r} has no tile")


_forced: dict[str, Tile] = {}


def choose_implementation(direction: str, problem: Problem) -> str:
    """The implementation that "auto" takes for a pass, "forward" or "backward"."""
    for choice in PREFERRED:
        if choice.direction == direction and _within(choice, problem):
            return choice.implementation
    return IMPLEMENTATIONS[0]


def choose_tile(kernel: str, implementation: str, problem: Problem) -> Tile:
    """The tile of a kernel.

    Raises:
        ValueError: no entry holds, so that the problem has no kernel.
    """
    if kernel in _forced:
        return _forced[kernel]
    for entry in ENTRIES + ROPE3D_ENTRIES:
        if entry.holds(kernel, implementation, problem):
            return entry.tile
    raise ValueError(f"kernel {kernel!r} of {implementation!r} has no tile for {problem}")


def choose_parts(tiles: int, blocks: int, processors: int) -> int:
    """Into how many parts keys are split, so that few tiles of queries still fill the GPU.

    Args:
        tiles: programs without a split.
        blocks: blocks of keys; each part but the last gets two at least, since to merge one costs
            about what it saves (by arithmetic, not timed yet), and no part is empty.
        processors: multiprocessors of the GPU.
    """
    parts = max(1, min(processors // tiles, -(-blocks // 2)))
    blocks_per_part = -(-blocks // parts)
    return -(-blocks // blocks_per_part)


@contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """While open, the named kernels run with these tiles, in the whole process: for tuning.

    Args:
        tiles: a Tile for each of some kernels, by name.

    Raises:
        ValueError: a name is no kernel.
    """
    known = KERNELS + ROPE3D_KERNELS
    unknown = sorted(set(tiles) - set(known))
    if unknown:
        raise ValueError(f"tiles must be named after {', '.join(known)}, got {unknown}")
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
