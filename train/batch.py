"""What a rank computes on at a time, and which pictures of a step those are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: some of the pictures of a step, all of one size.

    Attributes:
        step: of the run, from 1.
        places: which of the step's pictures these are, of all ranks, from 0.
        ids: names of the pictures, as a person finds them.
        tensors: "pictures" [B, 3, H, W], uint8 or in [0, 1], or what was precomputed of them:
            "features" [B, S, F] and "latents" [B, C, h, w].
        size: height and width in pixels, after cropping.
        broken: pictures that could not be read, with the reason; others took their places.
        texts: captions, where there are some.
    """

    step: int
    places: tuple[int, ...]
    ids: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    size: tuple[int, int]
    broken: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()


def micro_batches(batch_size: int, micro: int, rank: int, world: int) -> list[range]:
    """Places of each micro-batch of a rank.

    Whatever the number of ranks, all of them together see places 0 to batch_size - 1.

    Args:
        batch_size: pictures of a step, over all ranks.
        micro: pictures of a micro-batch.
        rank: of the process.
        world: number of ranks.

    Raises:
        ValueError: batch_size is no multiple of micro * world.
    """
    turns, rest = divmod(batch_size, micro * world)
    if rest or not turns:
        raise ValueError(
            f"batch_size must be a multiple of micro_batch times ranks, {micro} x {world}, "
            f"got {batch_size}"
        )
    starts = [(turn * world + rank) * micro for turn in range(turns)]
    return [range(start, start + micro) for start in starts]


def seed_of(*keys: int) -> int:
    """A seed below 2**63 that depends on every key and on their order; each at least 0."""
    # their number too: zeros at the end would not count
    return int(np.random.SeedSequence([len(keys), *keys]).generate_state(1, np.uint64)[0] >> 1)
