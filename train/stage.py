"""What the loop asks of a stage, and the batches that all stages of the scenes world share."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.losses import sample_t
from sda_fast.scenes.captions import caption
from sda_fast.scenes.render import render
from sda_fast.scenes.world import FULL, SMALL, World, sample_scenes
from train.batch import Batch, micro_batches, seed_of
from train.config import TrainConfig
from train.ranks import Ranks

WORLDS: dict[str, World] = {"small": SMALL, "full": FULL}
HELD_OUT = 10**6
"""Seed of the scenes that a run is looked at by."""
SHEET_PICTURES = 16


class Stage(Protocol):
    """One thing to train. What a step draws depends on the seed, step and place alone."""

    @property
    def trained(self) -> nn.Module:
        """What the optimizer, the EMA and the checkpoints hold."""
        ...

    @property
    def num_pictures(self) -> float:
        """How many there are to draw; infinite for scenes, which are made."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What checkpoints say of it, JSON; one whose entries differ is not gone on from."""
        ...

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of each step, from the step first on, without an end."""
        ...

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """The same for some places of one step, whichever rank had them."""
        ...

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch; "loss" is what is minimised, the rest is logged."""
        ...

    def flops(self, batch: Batch) -> float:
        """FLOPs of the frozen decoder, forward and gradient of its input; 0: none are counted."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Numbers on what is never trained on, "loss" among them; all ranks call it."""
        ...

    def sheet(self) -> Tensor | None:
        """Return a picture [3, H, W] in [0, 1] of what the model does now, or None."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained in ``from_pretrained`` layout."""
        ...


def scene_batches(
    config: TrainConfig, ranks: Ranks, first: int
) -> Generator[list[Batch], None, None]:
    """Micro-batches of new scenes of the train split, drawn for each step; see Stage."""
    places = shares(config, ranks)
    step = first
    while True:
        yield scene_batch(config, "train", step, places)
        step += 1


def scene_batch(
    config: TrainConfig, split: Literal["train", "test"], step: int, places: list[range]
) -> list[Batch]:
    """Scenes of a step with their captions; step 0 are those that a run is looked at by."""
    world = WORLDS[config.world]
    seed = config.seed * 10**9 + step if step else HELD_OUT
    scenes = sample_scenes(world, split, seed, max(share.stop for share in places))
    rng = np.random.default_rng([1, seed])
    texts = [caption(scene, rng) for scene in scenes]
    return [
        Batch(
            step=step,
            places=tuple(share),
            ids=tuple(f"scene {seed}/{place}" for place in share),
            tensors={"pictures": render([scenes[place] for place in share], world.size)},
            size=(world.size, world.size),
            texts=tuple(texts[place] for place in share),
        )
        for share in places
    ]


def shares(config: TrainConfig, ranks: Ranks) -> list[range]:
    """Places of this rank's micro-batches.

    Raises:
        ValueError: batch_size cannot be shared out so.
    """
    micro = config.micro_batch or max(1, config.batch_size // ranks.world)
    return micro_batches(config.batch_size, micro, ranks.rank, ranks.world)


def draw_noise(batch: Batch, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Times and noise of a batch: of each picture by itself, whoever computes it.

    Args:
        batch: of the step.
        seed: of the run.
        like: [B, S, C] packed latents.

    Returns:
        (t [B] f32, noise as like).
    """
    t, noise = [], torch.empty_like(like)
    for row, place in enumerate(batch.places):
        generator = torch.Generator(like.device).manual_seed(seed_of(seed, batch.step, place))
        t.append(sample_t(1, like.shape[1], generator))
        torch.randn(
            like.shape[1:], generator=generator, dtype=like.dtype, device=like.device,
            out=noise[row],
        )  # fmt: skip
    return torch.cat(t), noise


def mean_over(ranks: Ranks, count: int, sums: dict[str, float]) -> dict[str, float]:
    """Means over all ranks of what each has summed over ``count`` pictures; all call it."""
    values = torch.tensor([count, *sums.values()], dtype=torch.float64, device=ranks.device)
    total, *rest = ranks.sum(values)
    return {name: value / total for name, value in zip(sums, rest, strict=True)}


def mean_over_shares(
    ranks: Ranks, every: list[range], measure: Callable[[range], dict[str, Tensor]]
) -> dict[str, float]:
    """Means of what is measured of all places, whatever the number of ranks and the shares.

    Args:
        ranks: all of which call it.
        every: all places, in shares.
        measure: gives scalars, means over a share.
    """
    sums: dict[str, float] = {}
    count = 0
    for turn in range(-(-len(every) // ranks.world)):
        number = turn * ranks.world + ranks.rank
        # all ranks take as many turns, as a sharded decoder wants; some are not counted
        share = every[number % len(every)]
        weight = len(share) if number < len(every) else 0
        for name, value in measure(share).items():
            sums[name] = sums.get(name, 0.0) + (weight * value.item() if weight else 0.0)
        count += weight
    return mean_over(ranks, count, sums)


class SceneStage(Protocol):
    """A stage of scenes whose losses are its own measure."""

    config: TrainConfig
    ranks: Ranks

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See Stage."""
        ...


def evaluate_scenes(stage: SceneStage, pictures: int = 64) -> dict[str, float]:
    """The losses of a stage on unseen scenes, on each rank the same."""
    batch = scene_batch(stage.config, "test", 0, [range(pictures)])[0]
    return {name: value.item() for name, value in stage.losses(batch).items()}


def sheet_of(*rows: Tensor) -> Tensor:
    """Tile batches of pictures, sixteen to a line: [3, H, W]."""
    lines = [torch.cat(list(batch[:SHEET_PICTURES]), dim=2) for batch in rows]
    return torch.cat([line.float().cpu() for line in lines], dim=1)


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator of this seed."""
    return torch.Generator().manual_seed(seed)
