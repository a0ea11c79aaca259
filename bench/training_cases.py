"""The inputs of ``bench training``: whole training steps of one size, ``training-512-b8``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import PATCH, select
from bench.encode import TINY, EncodeCase
from bench.flux_cases import FluxCase
from bench.qformer_cases import QFormerCase
from sda_fast.hierarchy import Hierarchy
from sda_fast.shapes import FLUX_VAE

TINY_VAE = FLUX_VAE | {
    "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 4, "sample_size": 64,
}  # fmt: skip
KINDS = ("training", "trainer")
"""What a case is about: a step, measured beside others, or the trainer's own run."""


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """Pictures of one size through a whole training step.

    Attributes:
        flux: kind, image tokens, micro-batch, transformer, tree and dtype of what is frozen.
        encode: the encoders, and the adapter's configuration.
        vae: of an AutoencoderKL.
    """

    flux: FluxCase
    encode: EncodeCase
    vae: dict[str, Any] = field(default_factory=lambda: FLUX_VAE, hash=False)

    @property
    def name(self) -> str:
        """What records and options call it."""
        return self.flux.name

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.flux.kind

    @property
    def seq_len(self) -> int:
        """S: txt and image tokens."""
        return self.flux.seq_len

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width in pixels."""
        h, w = self.flux.grid
        return PATCH * h, PATCH * w

    def pictures(self) -> Tensor:
        """[B, 3, H, W] uint8 on the CPU: noise, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.flux.batch, 3, *self.picture)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def _square(kind: str, pixels: int, batch: int, reps: int) -> TrainingCase:
    side = pixels // PATCH
    flux = FluxCase(kind, (side, side), batch, reps, goal=True)
    adapter = QFormerCase("adapter", batch, 27)
    return TrainingCase(flux, EncodeCase(adapter, picture=(pixels, pixels)))


def _small(kind: str) -> TrainingCase:
    tree, dtype = Hierarchy((3, 2, 1)), torch.float32
    flux = FluxCase(kind, (4, 6), 2, 12, True, "tiny", tree, dtype, "small-")
    config = {"in_features": 24, "num_layers": 2, "out_features": 32}
    adapter = QFormerCase("adapter", 2, 4, 2, 16, tree, dtype, config, "small-")
    clip = TINY | {"intermediate_size": 24}
    encode = EncodeCase(adapter, 32, (64, 96), clip, TINY | {"mlp_ratio": 2})
    return TrainingCase(flux, encode, TINY_VAE)


GOALS = (
    _square("training", 512, 8, 8),
    _square("training", 1024, 2, 8),
    _square("trainer", 512, 8, 1),
)
"""By worth: a run that is cut short has measured the first ones."""
SMALL = tuple(_small(kind) for kind in KINDS)
GROUPS = {"goals": GOALS, "small": SMALL}
CASES = {case.name: case for case in (*GOALS, *SMALL)}


def select_training(text: str) -> list[TrainingCase]:
    """The cases of a list, in its order, each once.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, GROUPS, CASES)
