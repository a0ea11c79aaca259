"""Which samples a step takes: a pure function of the seed and the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.batch import seed_of

Size = tuple[int, int]
"""Height and width in pixels."""

# what a seed is drawn for: the same numbers must not come twice
SAMPLES, BATCHES = 101, 102

ROWS = 1 << 16  # samples that find their bucket at a time


def bucket_sizes(resolution: int, multiple: int, most_aspect: float = 2.0) -> tuple[Size, ...]:
    """Sizes of about one area that pictures are cropped to.

    Args:
        resolution: side of the square, in pixels; a multiple of ``multiple``.
        multiple: of which every side is one: 16 for FLUX, 8 of its VAE times 2 of a patch.
        most_aspect: the longer side over the shorter, at most.

    Returns:
        (height, width), the square first, then ever longer ones, each wide and high.

    Raises:
        ValueError: a number that cannot be.
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise ValueError(
            f"resolution must be a multiple of {multiple}, at least once, got {resolution}"
        )
    if not most_aspect >= 1:
        raise ValueError(f"most_aspect must be at least 1, got {most_aspect}")
    sizes: dict[Size, None] = {(resolution, resolution): None}
    for short in range(resolution - multiple, 0, -multiple):
        long = round(resolution**2 / short / multiple) * multiple
        if long > most_aspect * short:
            break
        sizes |= {(short, long): None, (long, short): None}
    return tuple(sizes)


def assign_buckets(sizes: ArrayLike, buckets: Sequence[Size]) -> NDArray[np.int16]:
    """The bucket of each picture: the one of the nearest aspect, in its logarithm.

    Args:
        sizes: [n, 2] height and width of each picture, upright, at least 1.
        buckets: (height, width) of each; of equally near ones the first is taken.

    Returns:
        [n] numbers of buckets.

    Raises:
        ValueError: there is no bucket.
    """
    if not buckets:
        raise ValueError("buckets must hold at least one size, got none")
    sides = np.asarray(sizes)
    shapes = np.log([height / width for height, width in buckets])
    numbers = np.empty(len(sides), np.int16)
    for start in range(0, len(sides), ROWS):
        rows = sides[start : start + ROWS].astype(np.float64)
        away = np.abs(np.log(rows[:, :1] / rows[:, 1:]) - shapes)
        numbers[start : start + ROWS] = away.argmin(1)
    return numbers


def fold_rare(numbers: NDArray[np.int16], buckets: Sequence[Size], least: int) -> NDArray[np.int16]:
    """Give the pictures of rare buckets to the nearest common one, in the logarithm of the aspect.

    A batch is of one bucket: a rare one would be filled up with few pictures again and again.

    Args:
        numbers: [n] bucket of each picture.
        buckets: (height, width) of each.
        least: pictures of a bucket that is not rare; where all are, the commonest stays.

    Returns:
        [n] numbers of buckets.
    """
    counts = np.bincount(numbers, minlength=len(buckets))
    common = np.flatnonzero(counts >= min(least, counts.max()))
    shapes = np.log([height / width for height, width in buckets])
    nearest = common[np.abs(shapes[:, None] - shapes[common]).argmin(1)]
    return nearest.astype(numbers.dtype)[numbers]


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> int:
    """The bucket of one picture, as ``assign_buckets`` finds it."""
    return int(assign_buckets([[height, width]], buckets)[0])


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step takes.

    Attributes:
        epoch: from 0.
        bucket: that all of them are of.
        indices: of the samples, one a place.
    """

    epoch: int
    bucket: int
    indices: tuple[int, ...]


class Order:
    """The samples of every step, and what takes the place of one that cannot be read.

    In an epoch every sample comes at least once. A batch is of one bucket; the last of a bucket
    is filled up from the beginning of that bucket's own order. The batches of all buckets come
    mixed. All of it is new in every epoch and the same for a seed (and a version of numpy, whose
    generator it is).

    Held are 8 bytes a sample below 2**31 samples: the samples by bucket, and that of the epoch.

    Args:
        buckets: [n] bucket of each sample, at least 0.
        batch_size: samples of a step, over all ranks.
        seed: at least 0.

    Attributes:
        batch_size: as given.
        steps_per_epoch: batches of all buckets.

    Raises:
        ValueError: there are no samples, or a number that cannot be.
    """

    def __init__(
        self, buckets: Sequence[int] | NDArray[np.integer], batch_size: int, seed: int
    ) -> None:
        numbers = np.asarray(buckets)
        if numbers.ndim != 1 or not len(numbers):
            raise ValueError(f"buckets must be one for each sample, got shape {numbers.shape}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0 or numbers.min() < 0:
            raise ValueError(f"seed and buckets must be at least 0, got {seed} and {numbers.min()}")
        self.batch_size, self.seed = batch_size, seed
        counts = np.bincount(numbers)
        self._known = np.flatnonzero(counts)
        self._ends = np.cumsum(counts[self._known])
        self._starts = self._ends - counts[self._known]
        index = np.int32 if len(numbers) < 2**31 else np.int64
        self._members = np.empty(len(numbers), index)
        for bucket, start, end in zip(self._known, self._starts, self._ends, strict=True):
            self._members[start:end] = np.flatnonzero(numbers == bucket)
        # batches are numbered bucket after bucket; these are where each bucket's begin
        batches = -(-(self._ends - self._starts) // batch_size)
        self._first = np.cumsum(batches) - batches
        self.steps_per_epoch = int(batches.sum())
        self._epoch, self._shuffled, self._batches = -1, self._members, self._first
        self._strides: list[int] = []

    def draw(self, step: int) -> Draw:
        """The samples of a step, which counts from 1.

        Raises:
            ValueError: step is below 1.
        """
        epoch, bucket, begin = self._locate(step)
        start, end = self._starts[bucket], self._ends[bucket]
        rows = start + (begin + np.arange(self.batch_size)) % (end - start)
        return Draw(epoch, int(self._known[bucket]), tuple(self._shuffled[rows].tolist()))

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """Another sample of the bucket, for one that cannot be read.

        Attempts 1, 2, ... give other samples each, until the bucket has no more.

        Args:
            step: from 1.
            place: of the sample in the step, from 0.
            attempt: how many of this place could not be read.

        Raises:
            ValueError: step is below 1.
        """
        _, bucket, begin = self._locate(step)
        start, count = self._starts[bucket], int(self._ends[bucket] - self._starts[bucket])
        row = (begin + place + attempt * self._strides[bucket]) % count
        return int(self._shuffled[start + row])

    def _locate(self, step: int) -> tuple[int, int, int]:
        """(epoch, which of the known buckets, where in its order the batch begins)."""
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
        epoch, turn = divmod(step - 1, self.steps_per_epoch)
        self._shuffle(epoch)
        batch = int(self._batches[turn])
        bucket = int(np.searchsorted(self._first, batch, side="right")) - 1
        return epoch, bucket, (batch - int(self._first[bucket])) * self.batch_size

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._shuffled, self._strides = self._members.copy(), []
        for bucket, start, end in zip(self._known, self._starts, self._ends, strict=True):
            rng = np.random.default_rng(seed_of(self.seed, SAMPLES, epoch, int(bucket)))
            rng.shuffle(self._shuffled[start:end])
            self._strides.append(_stride(int(end - start), rng))
        rng = np.random.default_rng(seed_of(self.seed, BATCHES, epoch))
        self._batches = rng.permutation(self.steps_per_epoch)
        self._epoch = epoch


def _stride(count: int, rng: np.random.Generator) -> int:
    """A random step that meets each of count samples before any twice."""
    if count < 3:
        return 1
    while math.gcd(stride := int(rng.integers(1, count)), count) > 1:
        pass
    return stride
