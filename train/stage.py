"""What the loop asks of a stage, and the batches that all stages of the scenes world share."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.scenes.captions import caption
from sda_fast.scenes.render import render
from sda_fast.scenes.world import FULL, SMALL, Scene, World, sample_scenes

WORLDS: dict[str, World] = {"small": SMALL, "full": FULL}


class Stage(Protocol):
    """One thing to train. Randomness of a step comes from its seed alone, so a run can resume."""

    @property
    def trained(self) -> nn.Module:
        """What the optimizer, the EMA and the checkpoints hold."""
        ...

    def losses(self, seed: int) -> dict[str, Tensor]:
        """Draw the batch of this seed; "loss" is what is minimised, the rest is logged."""
        ...

    def sheet(self) -> Tensor | None:
        """Return a picture [3, H, W] in [0, 1] of what the model does now, or None."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained in ``from_pretrained`` layout."""
        ...


def draw_scenes(world: World, seed: int, n: int) -> tuple[list[Scene], Tensor, list[str]]:
    """Return scenes of the train split, their pictures [n, 3, H, W] in [0, 1], and captions."""
    scenes = sample_scenes(world, "train", seed, n)
    rng = np.random.default_rng([1, seed])
    return scenes, render(scenes, world.size), [caption(scene, rng) for scene in scenes]


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator of this seed."""
    return torch.Generator().manual_seed(seed)
