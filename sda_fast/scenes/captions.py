"""The grammar: a scene to a caption, with paraphrases."""

import numpy as np

from sda_fast.scenes.world import BACKGROUNDS, COLORS, SHAPES, SIZES, TONES, Scene, SceneObject

CELLS = 16
"""Places are named as on a chess board of CELLS x CELLS: column letter, row number from 1, top."""
SYNONYMS = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus"),
    "small": ("small", "little"), "large": ("large", "big"),
}  # fmt: skip
COLUMNS = "abcdefghijklmnop"
WORDS = (
    *SHAPES, *COLORS, *SIZES, *TONES, *BACKGROUNDS, "disc", "box", "plus", "little", "big",
    "a", "at", "on", "and", "with", "background", "there", "is", ",",
    *(f"{letter}-" for letter in COLUMNS), *(str(row + 1) for row in range(CELLS)),
)  # fmt: skip
"""Every word a caption can hold. A column is written with a dash ("g-12") to tell it from "a"."""


def place(y: float, x: float) -> str:
    """Name the cell of a centre, such as "g-12"."""
    row, column = (min(int(value * CELLS), CELLS - 1) for value in (y, x))
    return f"{COLUMNS[column]}-{row + 1}"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene.

    Args:
        scene: what to describe.
        rng: picks among paraphrases and orders; None gives the plain form, objects in order.
    """
    objects = list(scene.objects)
    if rng is not None:
        objects = [objects[i] for i in rng.permutation(len(objects))]
    ground = f"on a {scene.background} {scene.tone} background"
    phrases = [_phrase(o, rng) for o in objects]
    joiner = " , " if rng is None or rng.random() < 0.7 else " and "
    return f"{joiner.join(phrases)} {ground}".strip()


def _phrase(o: SceneObject, rng: np.random.Generator | None) -> str:
    size, color, shape, where = o.size, o.color, o.shape, place(o.y, o.x)
    form = 0
    if rng is not None:
        size, shape = (str(rng.choice(SYNONYMS.get(word, (word,)))) for word in (size, shape))
        form = int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    return (
        f"a {size} {color} {shape} at {where}",
        f"at {where} a {size} {color} {shape}",
        f"a {color} {shape} at {where} is {size}",
    )[form]
