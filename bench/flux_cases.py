"""The inputs of ``bench flux`` and ``bench flux-train``: a FLUX step, ``step-1024-b1``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import PATCH, THREE_LEVELS, select
from sda_fast.hierarchy import Hierarchy
from sda_fast.shapes import FLUX_DEV

CONFIGS: dict[str, dict[str, Any]] = {
    "dev": FLUX_DEV,
    "tiny": {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
    },
}  # fmt: skip
"""Transformers, by name."""
KINDS = ("step", "text", "levers", "loop", "norm-rope", "norm-rope-single")
"""What a case of ``bench flux`` is about: one step, one with the text tokens of others, FastFlux
taken apart, all steps of a picture, and the norm and rotation of q and k in either block."""
STEPS = 28
"""Of a picture."""
GUIDANCE, TIME = 3.5, 0.5
DISTINCT = 2
"""Different pictures in a batch: more repeat them, and what is exact is worked out for these."""


@dataclass(frozen=True, slots=True)
class FluxCase:
    """Pictures of one size through a FLUX transformer.

    Attributes:
        kind: one of KINDS, or "train".
        grid: rows and columns of image tokens.
        batch: B, pictures.
        reps: turns at most, as a step takes long.
        goal: every variant takes part, else those that matter most.
        model: a key of CONFIGS.
        tree: of the positions.
        dtype: of weights and inputs.
        size: the start of the name.
    """

    kind: str
    grid: tuple[int, int]
    batch: int = 1
    reps: int = 12
    goal: bool = False
    model: str = "dev"
    tree: Hierarchy = THREE_LEVELS
    dtype: torch.dtype = torch.bfloat16
    size: str = ""

    @property
    def name(self) -> str:
        """What records and options call it."""
        h, w = (side * PATCH for side in self.grid)
        pixels = f"{h}" if h == w else f"{h}x{w}"
        return f"{self.size}{self.kind}-{pixels}-b{self.batch}"

    @property
    def num_img(self) -> int:
        """S_img."""
        return self.grid[0] * self.grid[1]

    @property
    def num_txt(self) -> int:
        """S_txt, positions alone."""
        return self.tree.num_tokens

    @property
    def seq_len(self) -> int:
        """S: txt and image tokens."""
        return self.num_txt + self.num_img

    @property
    def config(self) -> dict[str, Any]:
        """Of the transformer."""
        return CONFIGS[self.model]

    @property
    def distinct(self) -> int:
        """Different pictures in the batch, which comes as repetitions of them in turn."""
        return next(n for n in range(min(self.batch, DISTINCT), 0, -1) if self.batch % n == 0)

    def inputs(self, device: torch.device, num_txt: int | None = None) -> dict[str, Tensor]:
        """What a FluxTransformer2DModel's forward takes, random and the same at every call.

        Args:
            device: where.
            num_txt: text tokens; None for the positions of the tree.
        """
        num_txt, config = num_txt or self.num_txt, self.config
        generator = torch.Generator(device).manual_seed(0)
        draw = {"generator": generator, "dtype": self.dtype, "device": device}
        repeat = self.batch // self.distinct

        def some(*shape: int) -> Tensor:
            one = torch.randn((self.distinct, *shape), **draw)
            return one.repeat(repeat, *[1] * len(shape))

        row, col = (torch.arange(side, device=device) for side in self.grid)
        row, col = torch.meshgrid(row, col, indexing="ij")
        ids = torch.stack([torch.zeros_like(row), row, col], -1).flatten(0, 1)
        every = {"dtype": torch.float32, "device": device}
        return {
            "hidden_states": some(self.num_img, config["in_channels"]),
            "pooled_projections": some(config["pooled_projection_dim"]),
            "encoder_hidden_states": some(num_txt, config["joint_attention_dim"]),
            "timestep": torch.full((self.batch,), TIME, **every),
            "guidance": torch.full((self.batch,), GUIDANCE, **every),
            "img_ids": ids.float(),
            "txt_ids": torch.zeros(num_txt, 3, device=device),
        }


def _square(kind: str, pixels: int, batch: int = 1, reps: int = 12, goal: bool = False) -> FluxCase:
    side = pixels // PATCH
    return FluxCase(kind, (side, side), batch, reps, goal)


def _small(kind: str, batch: int = 1) -> FluxCase:
    shape = True, "tiny", Hierarchy((3, 2, 1)), torch.float32
    return FluxCase(kind, (4, 6), batch, 12, *shape, "small-")


GOALS = (
    _square("step", 1024, goal=True),
    _square("step", 512, goal=True),
    _square("norm-rope", 1024, reps=50),
    _square("norm-rope", 512, reps=50),
    _square("norm-rope-single", 1024, reps=50),
    _square("norm-rope-single", 512, reps=50),
    _square("levers", 1024, reps=8),
    _square("levers", 512),
    _square("loop", 512, reps=3),
    _square("loop", 1024, reps=1),
    _square("step", 768),
    _square("text", 1024),
    _square("text", 512),
    _square("step", 512, 4, 8),
    _square("step", 1024, 4, 4),
    _square("step", 768, 4, 6),
)
"""By worth: a run that is cut short has measured the first ones."""
SMALL = (_small("step", 2), *(_small(kind) for kind in KINDS[1:]))
GROUPS = {"goals": GOALS, "small": SMALL}
CASES = {case.name: case for case in (*GOALS, *SMALL)}
TRAIN_GOALS = (
    _square("train", 512, 4, 8, goal=True),
    _square("train", 1024, 1, 8, goal=True),
    _square("train", 512, 8, 5),
    _square("train", 1024, 2, 5),
)
TRAIN_SMALL = (_small("train", 2),)
TRAIN_GROUPS = {"goals": TRAIN_GOALS, "small": TRAIN_SMALL}
TRAIN_CASES = {case.name: case for case in (*TRAIN_GOALS, *TRAIN_SMALL)}


def select_flux(text: str) -> list[FluxCase]:
    """The cases of ``bench flux`` in a list, in its order, each once.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, GROUPS, CASES)


def select_flux_train(text: str) -> list[FluxCase]:
    """Those of ``bench flux-train``.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, TRAIN_GROUPS, TRAIN_CASES)
