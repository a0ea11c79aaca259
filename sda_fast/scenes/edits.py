"""Exact edit pairs: a scene, an instruction, and the scene that the instruction makes of it."""

from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Literal, get_args

import numpy as np

from sda_fast.scenes import captions
from sda_fast.scenes.captions import CELLS, SYNONYMS, place
from sda_fast.scenes.world import (
    COLORS,
    GAP,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    World,
    clear_of,
    sample_scenes,
)

Box = tuple[float, float, float, float]
Operation = Literal["add", "remove", "recolour", "move", "replace"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
EditSplit = Literal["train", "test", "held_out_pairs", "held_out_count", "held_out_operations"]
"""The splits of scenes, and one of edits whose operation is never trained on their shape."""
FORMS: dict[Operation, tuple[str, ...]] = {
    "add": ("add a {new} at {cell}", "put a {new} at {cell}", "at {cell} add a {new}"),
    "remove": ("remove {old}", "delete {old}", "take {old} away"),
    "recolour": ("make {old} {color}", "paint {old} {color}", "turn {old} {color}"),
    "move": ("move {old} to {cell}", "shift {old} to {cell}", "put {old} at {cell}"),
    "replace": ("replace {old} with a {new}", "swap {old} for a {new}", "turn {old} into a {new}"),
}
WORDS = (
    *captions.WORDS, "add", "put", "remove", "delete", "take", "away", "make", "paint", "turn",
    "move", "shift", "replace", "swap", "the", "one", "to", "for", "into",
)  # fmt: skip
"""Every word an instruction can hold, after those of captions."""
FAR = 0.125
"""A move goes at least this far, in units of the picture's side."""
TRIES = 30
"""Draws of one operation before another is tried: a free place is rare, and adds should not be."""
ROUNDS = 40
"""Operations that are tried on a source before it is passed over."""
BLUR = 0.04
"""How far beyond its box an object may tint pixels, in units of the side, from 32 pixels on."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit; source and instruction together determine target.

    Attributes:
        source: the scene before.
        target: the scene after; objects that stay keep their order, a new one comes last.
        instruction: words of WORDS, one space between them.
        operation: what is done.
        object_index: of the object concerned, in target.objects for "add", else in source.objects.
        boxes: regions (y0, x0, y1, x1) of the unit square; every pixel that source and target
            show differently lies in one of them, its edge's blur included.
    """

    source: Scene
    target: Scene
    instruction: str
    operation: Operation
    object_index: int
    boxes: tuple[Box, ...]

    @property
    def shape(self) -> str:
        """Of the object concerned."""
        scene = self.target if self.operation == "add" else self.source
        return scene.objects[self.object_index].shape


def held_out_operation(shape: str) -> Operation:
    """The one operation that is never trained on objects of a shape.

    Adding a shape is an operation on the new object, all others are on the one that was there.
    """
    return OPERATIONS[SHAPES.index(shape) % len(OPERATIONS)]


def sample_edits(world: World, split: EditSplit, seed: int, n: int) -> list[Edit]:
    """Draw n edits; the same arguments give the same edits on every machine.

    The sources are sample_scenes(world, split, seed, n). New places are the middles of cells, so
    that an instruction tells them exactly. In the splits "train" and "test" a target is a scene
    like the sources: its number of objects is one of world.counts and its pairs of shape and
    colour are trained ones. In "held_out_count" the source's own number is allowed too; in
    "held_out_pairs" what an edit brings in or recolours becomes a held-out pair. In
    "held_out_operations" the sources are test scenes, those passed over of which no such edit is
    found, and each edit is the ``held_out_operation`` of its object's shape; in all other splits
    none is.

    Args:
        world: the part of the grammar to draw from.
        split: see above and world.Split.
        seed: any integer >= 0.
        n: how many.

    Raises:
        ValueError: an unknown split, or a negative seed or n.
    """
    return [edit for (edit,) in sample_chains(world, split, seed, n, length=1)]


def sample_chains(
    world: World, split: EditSplit, seed: int, n: int, length: int
) -> list[tuple[Edit, ...]]:
    """Draw n chains of edits, each of which starts from the scene that the one before it made.

    The first sources are those of sample_edits; one of which no chain is found is passed over.

    Args:
        world: see sample_edits, and so split, seed and n.
        split: see there.
        seed: see there.
        n: see there.
        length: edits of a chain.

    Raises:
        ValueError: an unknown split, a negative seed or n, or length is below 1.
    """
    if split not in get_args(EditSplit):
        raise ValueError(f"split must be one of {get_args(EditSplit)}, got {split!r}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    of_scenes: Split = "test" if split == "held_out_operations" else split
    # a stream of its own, apart from those of the scenes
    stream = len(get_args(Split)) + get_args(EditSplit).index(split)
    count = n
    while True:
        sources = sample_scenes(world, of_scenes, seed, count)
        rng = np.random.Generator(np.random.PCG64([stream, seed]))
        drawn = (_sample_chain(world, split, source, rng, length) for source in sources)
        chains = list(islice((chain for chain in drawn if chain is not None), n))
        if len(chains) == n:
            return chains
        count *= 2


def _sample_chain(
    world: World, split: EditSplit, source: Scene, rng: np.random.Generator, length: int
) -> tuple[Edit, ...] | None:
    """Draw edits one after the other; None if a scene on the way allows none."""
    chain: list[Edit] = []
    while len(chain) < length:
        edit = _sample_edit(world, split, chain[-1].target if chain else source, rng)
        if edit is None:
            return None
        chain.append(edit)
    return tuple(chain)


def _sample_edit(
    world: World, split: EditSplit, source: Scene, rng: np.random.Generator
) -> Edit | None:
    """Draw an edit of a scene; None if it allows none, as three circles when they are held out."""
    pairs = [
        (shape, color)
        for shape in SHAPES[: world.shapes]
        for color in COLORS
        if world.held_out(shape, color) == (split == "held_out_pairs")
    ]
    counts = {*world.counts, len(source.objects)}
    held_out = split == "held_out_operations"
    for _ in range(ROUNDS):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        after = len(source.objects) + {"add": 1, "remove": -1}.get(operation, 0)
        for _ in range(TRIES if after in counts else 0):
            edit = _try_edit(operation, source, pairs, rng)
            if edit is not None and (held_out_operation(edit.shape) == operation) == held_out:
                return edit
    return None


def _try_edit(
    operation: Operation,
    source: Scene,
    pairs: list[tuple[str, str]],
    rng: np.random.Generator,
) -> Edit | None:
    """Draw an object and what becomes of it; None if that is no change or not legal."""
    objects = source.objects
    index = len(objects) if operation == "add" else int(rng.integers(len(objects)))
    old = None if operation == "add" else objects[index]
    new = None if operation == "remove" else _draw(operation, old, pairs, rng)
    others = objects[:index] + objects[index + 1 :]
    if operation != "remove" and (new is None or not _legal(new, others)):
        return None
    placed = () if new is None else (new,)
    target = replace(source, objects=objects[:index] + placed + objects[index + 1 :])
    boxes = tuple(_padded(o.box) for o in (old, new) if o is not None)
    instruction = _instruct(operation, objects, index, new, rng)
    return Edit(source, target, instruction, operation, index, boxes)


def _draw(
    operation: Operation,
    old: SceneObject | None,
    pairs: list[tuple[str, str]],
    rng: np.random.Generator,
) -> SceneObject | None:
    """Draw what takes old's part; None if this draw would change nothing."""
    y, x = ((int(rng.integers(CELLS)) + 0.5) / CELLS for _ in range(2))
    size = list(SIZES)[rng.integers(len(SIZES))]
    if old is None:
        shape, color = pairs[rng.integers(len(pairs))]
        return SceneObject(shape, color, size, y, x)
    if operation == "move":
        far = (y - old.y) ** 2 + (x - old.x) ** 2 >= FAR**2
        return replace(old, y=y, x=x) if far else None
    if operation == "recolour":
        pairs = [pair for pair in pairs if pair[0] == old.shape and pair[1] != old.color]
        return replace(old, color=pairs[rng.integers(len(pairs))][1]) if pairs else None
    pairs = [pair for pair in pairs if pair[0] != old.shape]
    shape, color = pairs[rng.integers(len(pairs))]
    return SceneObject(shape, color, size, old.y, old.x)


def _legal(candidate: SceneObject, others: tuple[SceneObject, ...]) -> bool:
    margin = candidate.radius + GAP / 2
    inside = all(margin <= centre <= 1 - margin for centre in (candidate.y, candidate.x))
    return inside and all(clear_of(candidate, other) for other in others)


def _padded(box: Box) -> Box:
    y0, x0, y1, x1 = box
    return max(y0 - BLUR, 0.0), max(x0 - BLUR, 0.0), min(y1 + BLUR, 1.0), min(x1 + BLUR, 1.0)


def _instruct(
    operation: Operation,
    objects: tuple[SceneObject, ...],
    index: int,
    new: SceneObject | None,
    rng: np.random.Generator,
) -> str:
    words = {}
    if operation != "add":
        words["old"] = _name(objects, index, rng)
    if new is not None:
        described = (_word(word, rng) for word in (new.size, new.color, new.shape))
        words |= {"new": " ".join(described), "color": new.color, "cell": place(new.y, new.x)}
    forms = FORMS[operation]
    return forms[rng.integers(len(forms))].format(**words)


def _name(objects: tuple[SceneObject, ...], index: int, rng: np.random.Generator) -> str:
    """Name an object by as few of size, colour and shape as single it out, else by its place."""
    chosen = objects[index]
    for count in (1, 2, 3):
        unique = [
            names
            for names in combinations(("size", "color", "shape"), count)
            if sum(all(getattr(o, n) == getattr(chosen, n) for n in names) for o in objects) == 1
        ]
        if unique:
            names, where = unique[rng.integers(len(unique))], ""
            break
    else:
        names, where = ("color", "shape"), f" at {place(chosen.y, chosen.x)}"
    described = [_word(getattr(chosen, name), rng) for name in names]
    noun = [] if "shape" in names else ["one"]
    return " ".join(["the", *described, *noun]) + where


def _word(word: str, rng: np.random.Generator) -> str:
    return str(rng.choice(SYNONYMS.get(word, (word,))))
