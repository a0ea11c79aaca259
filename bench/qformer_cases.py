"""The inputs of ``bench qformer``: rotated attention and the whole adapter, ``op-b16-s1369``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import THREE_LEVELS, select
from bench.check import Places
from sda_fast.coords import patch_coords
from sda_fast.hierarchy import Hierarchy

SIDES = (27, 37, 64)
"""Patches to a side of the picture: S = 729, 1369, 4096."""
BATCHES = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class QFormerCase:
    """Positions that read the patches of square pictures.

    Attributes:
        kind: "op", attention alone, or "adapter", features to embedding.
        batch: B.
        side: patches to a side, S = side ** 2.
        heads: H.
        head_dim: D.
        tree: of the N positions.
        dtype: of inputs and weights.
        config: what the adapter's differs in from the preset "reference".
        size: the start of the name.
    """

    kind: str
    batch: int
    side: int
    heads: int = 16
    head_dim: int = 64
    tree: Hierarchy = THREE_LEVELS
    dtype: torch.dtype = torch.bfloat16
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    size: str = ""

    @property
    def name(self) -> str:
        """What records and options call it."""
        return f"{self.size}{self.kind}-b{self.batch}-s{self.seq_len}"

    @property
    def seq_len(self) -> int:
        """S, patches of a picture."""
        return self.side**2

    def places(self, device: torch.device) -> Places:
        """Coordinates of positions [N, 3] and patches [S, 3]."""
        grid = self.side, self.side
        return self.tree.token_coords(*grid).to(device), patch_coords(*grid).to(device)

    def adapter(self, device: torch.device, seed: int = 0) -> nn.Module:
        """A SemanticAdapter with random weights, the same at every call."""
        from sda_fast.adapter import SemanticAdapter
        from sda_fast.adapter_config import PRESETS

        given = {
            "tokens_per_node": self.tree.tokens_per_node,
            "width": self.heads * self.head_dim,
            "num_heads": self.heads,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = SemanticAdapter(**PRESETS["reference"].config | given | self.config)
        # its own warns at every dtype
        return nn.Module.to(adapter, device, self.dtype)

    def inputs(self, device: torch.device, channels: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """Random and the same at every call.

        Args:
            device: where.
            channels: of a patch's features and of a position, for an adapter.

        Returns:
            q [B, N, H, D], k and v [B, S, H, D] and the gradient of out [B, N, H, D]; for an
            adapter the features [B, S, F] and the gradient of the embedding [B, N, C].
        """
        generator = torch.Generator(device).manual_seed(0)
        one, heads = self.tree.num_tokens, (self.heads, self.head_dim)
        shapes = [(one, *heads), (self.seq_len, *heads), (self.seq_len, *heads), (one, *heads)]
        if self.kind == "adapter":
            shapes = [(self.seq_len, channels[0]), (one, channels[1])]
        draw = {"generator": generator, "dtype": self.dtype, "device": device}
        return [torch.randn((self.batch, *shape), **draw) for shape in shapes]


def _small(kind: str, batch: int, side: int) -> QFormerCase:
    config = {"in_features": 24, "num_layers": 2, "out_features": 20}
    shape = 2, 16, Hierarchy((4, 2)), torch.float32
    return QFormerCase(kind, batch, side, *shape, config, "small-")


GOALS = (
    QFormerCase("op", 1, 37),
    QFormerCase("op", 16, 37),
    QFormerCase("op", 16, 64),
    QFormerCase("adapter", 1, 37),
)
"""Those with a goal, by worth: a run that is cut short has measured the first ones."""
EVERY = tuple(
    QFormerCase(kind, batch, side)
    for kind in ("op", "adapter")
    for side in SIDES
    for batch in BATCHES
)
SMALL = (_small("op", 1, 4), _small("op", 2, 6), _small("adapter", 2, 4))
GROUPS = {"goals": GOALS, "all": EVERY, "small": SMALL}
"""Names for several cases at once."""
CASES = {case.name: case for case in (*EVERY, *SMALL)}


def select_qformer(text: str) -> list[QFormerCase]:
    """The cases of a list like ``goals,adapter-*``, in its order, each once.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, GROUPS, CASES)


def moved_bytes(case: QFormerCase, backward: bool) -> int:
    """Of q, k, v and out, each moved once; with the backward of their gradients too."""
    tokens = 2 * (case.tree.num_tokens + case.seq_len)
    one_way = case.batch * tokens * case.heads * case.head_dim * case.dtype.itemsize
    return (2 if backward else 1) * one_way
