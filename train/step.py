"""One step of all ranks together: they update alike, or none does."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from train.batch import Batch, seed_of
from train.state import State

GLOBAL = 1
"""Sets seeds of the global generator apart from those of pictures."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all ranks know after a step.

    Attributes:
        losses: means over all pictures.
        grad_norm: before clipping.
        finite: all numbers of all ranks were, and the step was taken.
        ended: some rank was told to end the run.
        failed: some rank could not write.
        broken: pictures that could not be read so far, over all ranks.
        drawn: pictures that were drawn so far, over all ranks.
    """

    losses: dict[str, float]
    grad_norm: float
    finite: bool
    ended: bool
    failed: bool
    broken: int
    drawn: int


@dataclass(frozen=True, slots=True)
class Notices:
    """What a rank has to tell the others; see Outcome."""

    ended: bool = False
    failed: bool = False
    broken: int = 0
    drawn: int = 0


def seed_step(seed: int, step: int, rank: int) -> None:
    """What draws from the global generator draws the same when a rank takes a step again."""
    torch.manual_seed(seed_of(seed, step, rank, GLOBAL))


def take_step(
    state: State, step: int, batches: list[Batch], notices: Callable[[], Notices]
) -> Outcome:
    """Learn from a batch, if every loss of every rank and the gradient are finite.

    Args:
        state: changed in place.
        step: from 1.
        batches: of this rank.
        notices: of this rank; asked for once the gradients are there.
    """
    config, ranks = state.config, state.ranks
    seed_step(config.seed, step, ranks.rank)
    losses, norm = state.backward(batches)
    numbers = torch.stack([*losses.values(), norm]).double()
    told = torch.tensor(astuple(notices()), dtype=torch.float64, device=ranks.device)
    faults = (~numbers.isfinite()).any().double()[None]
    bad, *sums = ranks.sum(torch.cat([faults, numbers, told]))
    finite = bad == 0
    if finite:
        state.update(step)
    state.forget()
    means = [value / ranks.world for value in sums[: len(numbers)]]
    named = dict(zip(losses, means, strict=False))
    ended, failed, broken, drawn = sums[len(numbers) :]
    return Outcome(named, means[-1], finite, ended > 0, failed > 0, int(broken), int(drawn))
