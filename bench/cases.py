"""The inputs that suites measure, each named once: ``flux-1024-b1-tree32.8.4``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from sda_fast.hierarchy import Hierarchy

PATCH = 16
"""Pixels a side of what one image token shows."""
SIZES = {
    "flux-512": (512, 512),
    "flux-768": (768, 768),
    "flux-1024": (1024, 1024),
    "flux-2048": (2048, 2048),
    "flux-720x1280": (720, 1280),
}
"""Height and width of the pictures, in pixels."""
BATCHES = (1, 4, 8)
FLAT = Hierarchy((16,))
THREE_LEVELS = Hierarchy((32, 8, 4))
FIVE_LEVELS = Hierarchy((32, 8, 4, 2, 1))
"""512 positions."""


@dataclass(frozen=True, slots=True)
class Case:
    """One joint attention: whose tokens, in what shape.

    Attributes:
        picture: name of the image size, the start of the case's name.
        h: rows of image tokens.
        w: columns of image tokens.
        tree: of the txt positions.
        batch: B.
        heads: H; FLUX has 24.
        head_dim: D; FLUX has 128.
        dtype: of q, k and v.
        rule: of the mask.
        extra_text: prompt tokens after the tree's positions.
    """

    picture: str
    h: int
    w: int
    tree: Hierarchy = THREE_LEVELS
    batch: int = 1
    heads: int = 24
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    rule: str = "overlap"
    extra_text: int = 0

    @property
    def name(self) -> str:
        """What records and options call it; the rule and extra text only where not the default."""
        counts = ".".join(map(str, self.tree.tokens_per_node))
        parts = [self.picture, f"b{self.batch}", f"tree{counts}"]
        parts += [self.rule] if self.rule != "overlap" else []
        parts += [f"text{self.extra_text}"] if self.extra_text else []
        return "-".join(parts)

    @property
    def txt_len(self) -> int:
        """S_txt: positions and extra text."""
        return self.tree.num_tokens + self.extra_text

    @property
    def seq_len(self) -> int:
        """S: txt and image tokens."""
        return self.txt_len + self.h * self.w

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Random q, k, v and gradient of out, each [B, S, H, D], the same at every call."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.seq_len, self.heads, self.head_dim)
        draw = {"generator": generator, "dtype": self.dtype, "device": device}
        return [torch.randn(shape, **draw) for _ in range(4)]


def _flux(picture: str, tree: Hierarchy = THREE_LEVELS, batch: int = 1) -> Case:
    height, width = SIZES[picture]
    return Case(picture, height // PATCH, width // PATCH, tree, batch)


def _small(
    grid: tuple[int, int], tree: tuple[int, ...], batch: int, head_dim: int, rule: str, extra: int
) -> Case:
    """A case that a CPU takes milliseconds for."""
    h, w = grid
    shape = Hierarchy(tree), batch, 2, head_dim, torch.float32
    return Case(f"small-{h}x{w}", h, w, *shape, rule, extra)


GOALS = (
    _flux("flux-1024"),
    _flux("flux-2048"),
    _flux("flux-512"),
    _flux("flux-1024", FIVE_LEVELS),
)
"""Those with a goal, by worth: a run that is cut short has measured the first ones."""
FLUX = tuple(
    dict.fromkeys(
        GOALS
        + tuple(
            _flux(picture, tree, batch)
            for batch in BATCHES
            for tree in (THREE_LEVELS, FLAT, FIVE_LEVELS)
            for picture in SIZES
        )
    )
)
SMALL = (
    _small((8, 8), (4, 2, 1), 1, 16, "overlap", 0),
    _small((9, 7), (5, 0, 1), 2, 32, "overlap", 3),
    _small((16, 16), (8, 2, 1), 1, 64, "local", 0),
)
GROUPS = {"goals": GOALS, "flux": FLUX, "small": SMALL}
"""Names for several cases at once."""
CASES = {case.name: case for case in (*FLUX, *SMALL)}


def select(
    text: str, groups: Mapping[str, Sequence[Any]] = GROUPS, cases: Mapping[str, Any] = CASES
) -> list[Any]:
    """The cases of a list like ``goals,flux-768-*``, in its order, each once.

    Args:
        text: groups, names and patterns of names (``*``, ``?``), separated by commas.
        groups: names for several cases at once; those of "goals" are named in the error.
        cases: all, by name.

    Raises:
        ValueError: a part fits no case.
    """
    chosen: list[Any] = []
    for part in text.split(","):
        found = groups.get(part) or [c for name, c in cases.items() if fnmatchcase(name, part)]
        if not found:
            raise ValueError(
                f"cases must be of {', '.join(groups)} or names like {groups['goals'][0].name}, "
                f"got {part!r}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def names(cases: Iterable[Any]) -> str:
    """For a message."""
    return ", ".join(case.name for case in cases)
