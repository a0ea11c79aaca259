"""Scenes: what can be in a picture, and seeded sampling of the splits."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "star", "heart")
COLORS = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.16, 0.75, 0.22),
    "blue": (0.20, 0.35, 0.98),
    "yellow": (0.98, 0.88, 0.12),
    "cyan": (0.15, 0.86, 0.90),
    "magenta": (0.92, 0.22, 0.82),
    "orange": (0.99, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
}
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.20}
"""Circumradius, in units of the picture's side."""
EXTENTS = {
    "circle": (-0.95, -0.95, 0.95, 0.95),
    "square": (-0.74, -0.74, 0.74, 0.74),
    "triangle": (-1.0, -0.895, 0.55, 0.895),
    "cross": (-0.92, -0.92, 0.92, 0.92),
    "diamond": (-0.99, -0.99, 0.99, 0.99),
    "ring": (-0.95, -0.95, 0.95, 0.95),
    "star": (-1.0, -0.951, 0.809, 0.951),
    "heart": (-0.8, -0.92, 0.827, 0.92),
}
"""Top, left, bottom and right edge of each shape from its centre, in units of the circumradius."""
TONES = {
    "charcoal": (0.12, 0.12, 0.14),
    "slate": (0.20, 0.26, 0.34),
    "olive": (0.26, 0.30, 0.16),
    "plum": (0.30, 0.17, 0.28),
}
BACKGROUNDS = ("plain", "gradient", "striped")
GAP = 0.05
"""Smallest distance between two objects, and from an object to the border, is GAP and GAP / 2."""

Split = Literal["train", "test", "held_out_pairs", "held_out_count"]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; y and x are its centre in units of the picture's side, y down."""

    shape: str
    color: str
    size: str
    y: float
    x: float

    @property
    def radius(self) -> float:
        """Circumradius in units of the picture's side."""
        return SIZES[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tightest (y0, x0, y1, x1) around what is drawn, in units of the picture's side."""
        top, left, bottom, right = (edge * self.radius for edge in EXTENTS[self.shape])
        return self.y + top, self.x + left, self.y + bottom, self.x + right


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: objects that do not touch, on a background of one kind and tone."""

    objects: tuple[SceneObject, ...]
    background: str
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Which part of the grammar is used, and how large a picture is.

    Attributes:
        shapes: how many of SHAPES appear, from the first.
        counts: numbers of objects in the train and test splits.
        held_out_count: number of objects of the held_out_count split, never trained on.
        size: side of the square picture in pixels.
        text_tokens: captions are padded to this length; every plain one fits, and every
            paraphrase of the splits that are trained on.
    """

    shapes: int
    counts: tuple[int, ...]
    held_out_count: int
    size: int
    text_tokens: int

    def held_out(self, shape: str, color: str) -> bool:
        """Whether this pair is kept from the train and test splits: one colour a shape."""
        return list(COLORS).index(color) == (3 * SHAPES.index(shape) + 1) % len(COLORS)


SMALL = World(shapes=4, counts=(1, 2, 3), held_out_count=4, size=32, text_tokens=40)
FULL = World(shapes=8, counts=(1, 2, 3, 5), held_out_count=4, size=64, text_tokens=50)


def sample_scenes(world: World, split: Split, seed: int, n: int) -> list[Scene]:
    """Draw n scenes; the same arguments give the same scenes on every machine.

    Args:
        world: the part of the grammar to draw from.
        split: "train" and "test" share one distribution; in "held_out_pairs" every scene has
            at least one shape and colour never trained together; "held_out_count" has a number
            of objects never trained on.
        seed: any integer >= 0.
        n: how many.

    Raises:
        ValueError: an unknown split, or a negative seed or n.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    if seed < 0 or n < 0:
        raise ValueError(f"seed and n must be >= 0, got seed {seed} and n {n}")
    rng = np.random.Generator(np.random.PCG64([get_args(Split).index(split), seed]))
    return [_sample_scene(world, split, rng) for _ in range(n)]


def _sample_scene(world: World, split: Split, rng: np.random.Generator) -> Scene:
    count = world.held_out_count if split == "held_out_count" else int(rng.choice(world.counts))
    while True:
        objects: list[SceneObject] = []
        for _ in range(count):
            wants_held_out = split == "held_out_pairs" and not objects
            placed = place_object(world, objects, rng, held_out=wants_held_out)
            if placed is None:
                break
            objects.append(placed)
        else:
            order = rng.permutation(count)
            background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
            tone = list(TONES)[rng.integers(len(TONES))]
            return Scene(tuple(objects[i] for i in order), background, tone)


def place_object(
    world: World,
    others: list[SceneObject],
    rng: np.random.Generator,
    held_out: bool = False,
    tries: int = 20,
) -> SceneObject | None:
    """Draw one object that touches none of the others; None if no place was found."""
    pairs = [
        (shape, color)
        for shape in SHAPES[: world.shapes]
        for color in COLORS
        if world.held_out(shape, color) == held_out
    ]
    shape, color = pairs[rng.integers(len(pairs))]
    size = list(SIZES)[rng.integers(len(SIZES))]
    for _ in range(tries):
        margin = SIZES[size] + GAP / 2
        y, x = (float(rng.uniform(margin, 1 - margin)) for _ in range(2))
        candidate = SceneObject(shape, color, size, y, x)
        if all(clear_of(candidate, other) for other in others):
            return candidate
    return None


def clear_of(a: SceneObject, b: SceneObject) -> bool:
    """Whether the circumcircles of a and b are at least GAP apart."""
    return (a.y - b.y) ** 2 + (a.x - b.x) ** 2 >= (a.radius + b.radius + GAP) ** 2
