"""Places of image patches on the canvas that the 3-D rotary embedding counts in."""

import torch
from torch import Tensor

CANVAS = 64.0  # units along the longer side of every picture


def patch_coords(h: int, w: int) -> Tensor:
    """Centres of an ``h x w`` grid of square patches; the twin of ``Hierarchy.token_coords(h, w)``.

    Args:
        h: rows of patches, at least 1.
        w: columns of patches, at least 1.

    Returns:
        [h*w, 3] float32 on the CPU, raster order: level (always 0), y, x; the longer side of the
        grid is 64 units.

    Raises:
        ValueError: h or w is not an integer of at least 1.
    """
    check_int("h", h, least=1)
    check_int("w", w, least=1)
    unit = CANVAS / max(h, w)
    y, x = ((torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) * unit for side in (h, w))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.nn.functional.pad(grid, (1, 0)).float()


def check_int(name: str, value: int, least: int) -> int:
    """Return value, an integer of at least ``least``; a bool or a float is no integer.

    Raises:
        ValueError: it is something else; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value
