"""Intervals of what a few seeds gave on many scenes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

import torch
from torch import Tensor

from bench.bootstrap import bootstrap

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % of Student's t for 1 to 9 degrees of freedom; more take the last: too wide."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval.

    Attributes:
        mean: over seeds.
        low: where the interval begins; minus infinity with a single seed, which tells of none.
        high: likewise, where it ends.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Sample:
    """What makes a rate: for each seed, one sum over scenes by another.

    Attributes:
        top: [seeds, scenes] f64.
        bottom: likewise.
    """

    top: Tensor
    bottom: Tensor


def interval(first: Sample, second: Sample | None = None, level: float = 0.0) -> Interval | None:
    """The rate of first less that of second, or less a number, over seeds and scenes.

    Rates are subtracted seed by seed, as both had the same scenes, noise and order of training.
    Scenes are resampled for all seeds at once (bench.bootstrap). Seeds are too few to be resampled:
    the mean over them has Student's interval. The two stand for independent reasons to differ, so
    their distances from the mean add up in squares: Zou and Donner 2008,
    https://doi.org/10.1002/sim.3095.

    Args:
        first: of the same seeds and scenes as second.
        second: None for none.
        level: taken off where there is no second.

    Returns:
        None where a seed has nothing to rate.
    """
    seeds = len(first.top)
    samples = [first] if second is None else [first, second]
    columns = torch.cat([part for s in samples for part in (s.top, s.bottom)])

    def rates(sums: Sequence[float]) -> list[float]:
        """Tops and bottoms of first, seed by seed, and of second -> a difference for each seed."""
        parts = [sums[at : at + seeds] for at in range(0, len(sums), seeds)]
        found = [
            [t / b if b else math.nan for t, b in zip(*pair, strict=True)]
            for pair in zip(parts[::2], parts[1::2], strict=True)
        ]
        others = [level] * seeds if second is None else found[1]
        return [mine - its for mine, its in zip(found[0], others, strict=True)]

    each = rates(columns.sum(1).tolist())
    mean = sum(each) / seeds
    if math.isnan(mean):
        return None
    over_seeds = math.inf
    if seeds > 1:
        over_seeds = T975[min(seeds - 1, len(T975)) - 1] * stdev(each) / seeds**0.5
    scenes = bootstrap(columns.T, lambda sums: {"rate": sum(rates(sums)) / seeds})["rate"]
    below = math.hypot(over_seeds, mean - scenes["low"])
    above = math.hypot(over_seeds, scenes["high"] - mean)
    return Interval(mean, mean - below, mean + above)


def less(first: Interval, second: Interval) -> Interval:
    """The difference of two that were measured apart; see ``interval``."""
    mean = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Interval(mean, mean - below, mean + above)
