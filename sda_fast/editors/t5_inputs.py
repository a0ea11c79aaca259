"""What each position of a T5 editor may see, as tables of a hierarchy."""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sda_fast.hierarchy import Hierarchy


@lru_cache(maxsize=32)
def order_mask(tree: Hierarchy) -> Tensor:
    """Bool [1, 1, N, N]: each position sees itself and those before it."""
    n = tree.num_tokens
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


@lru_cache(maxsize=32)
def level_mask(tree: Hierarchy) -> Tensor:
    """Bool [1, 1, N, N]: each position sees those of its own level and of the levels above."""
    levels = torch.cat([torch.full((s.stop - s.start,), i) for i, s in enumerate(spans(tree))])
    return (levels[:, None] >= levels[None])[None, None]


@lru_cache(maxsize=32)
def spans(tree: Hierarchy) -> tuple[slice, ...]:
    """Positions of each level that has some, from the root on."""
    counts = [n * 4**level for level, n in enumerate(tree.tokens_per_node)]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    return tuple(slice(a, a + n) for a, n in zip(starts, counts, strict=True) if n)


@lru_cache(maxsize=32)
def above_table(tree: Hierarchy) -> Tensor:
    """[N, N] f32: row i averages those positions of the nearest ancestor that come to position i.

    The positions of a node are shared out to all positions below it on the next level that has
    some, in their order: with (32, 8, 4) the 32 of the root go to the 4 x 8 of its children one to
    one. Rows of the uppermost level are zero.
    """
    table = torch.zeros(tree.num_tokens, tree.num_tokens)
    held = [node for node in tree.nodes() if node.stop > node.start]
    levels = sorted({node.level for node in held})
    for upper, lower in pairwise(levels):
        step = lower - upper
        for node in (node for node in held if node.level == upper):
            below = [
                position
                for child in held
                if child.level == lower
                and (child.row >> step, child.col >> step) == (node.row, node.col)
                for position in range(child.start, child.stop)
            ]
            mine = range(node.start, node.stop)
            for place, position in enumerate(below):
                first = place * len(mine) // len(below)
                last = max(first + 1, (place + 1) * len(mine) // len(below))
                table[position, node.start + first : node.start + last] = 1 / (last - first)
    return table


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool, True = may attend -> zeros and the lowest numbers of a dtype, to be added to scores."""
    low = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, low)
