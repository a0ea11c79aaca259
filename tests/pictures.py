"""Small photographs' stand-ins: smooth colour ramps, as JPEG files."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, square: int = 10, wide: int = 4, side: int = 40) -> Path:
    """A folder of so many pictures of side x side and of side x 2 side pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(square + wide):
        width = side if number < square else 2 * side
        y, x = np.mgrid[0:side, 0:width]
        ramps = [x * a + y * b + c for a, b, c in rng.uniform(0.5, 3, (3, 3))]
        pixels = (np.stack(ramps, -1) * 2 % 256).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    return folder
