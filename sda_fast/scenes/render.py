"""The renderer: scenes to pictures, batched, anti-aliased by signed distance."""

import math

import torch
from torch import Tensor

from sda_fast.scenes.world import COLORS, SHAPES, TONES, Scene, SceneObject

LIGHTER = 1.7
"""Second tone of a gradient or of stripes, as a multiple of the first."""
STRIPE = 0.25
"""Period of the diagonal stripes, in units of the picture's side."""


def render(scenes: list[Scene], size: int) -> Tensor:
    """Draw scenes.

    Args:
        scenes: what to draw.
        size: side of the picture in pixels.

    Returns:
        [B, 3, size, size] f32 in [0, 1]. Edges are one pixel wide.

    Raises:
        ValueError: there are no scenes, or size is below 1.
    """
    if not scenes or size < 1:
        raise ValueError(
            f"scenes must hold a scene and size be at least 1, got {len(scenes)} and {size}"
        )
    picture = _backgrounds(scenes, size)
    most = max(len(scene.objects) for scene in scenes)
    for slot in range(most):
        rows = [i for i, scene in enumerate(scenes) if len(scene.objects) > slot]
        objects = [scenes[i].objects[slot] for i in rows]
        alpha = coverage(objects, size)[:, None]
        color = torch.tensor([COLORS[o.color] for o in objects])[:, :, None, None]
        picture[rows] += alpha * (color - picture[rows])
    return picture


def coverage(objects: list[SceneObject], size: int) -> Tensor:
    """Return how much of each pixel each object covers: [len(objects), size, size] in [0, 1]."""
    place = torch.tensor([(o.y, o.x, o.radius) for o in objects])[:, :, None, None]
    centre = (torch.arange(size) + 0.5) / size
    # object coordinates: circumradius 1, y down
    y = (centre[:, None] - place[:, 0]) / place[:, 2]
    x = (centre[None, :] - place[:, 1]) / place[:, 2]
    distance = torch.empty(len(objects), size, size)
    for shape in {o.shape for o in objects}:
        rows = [i for i, o in enumerate(objects) if o.shape == shape]
        distance[rows] = _signed_distance(shape, y[rows], x[rows])
    return (0.5 - distance * place[:, 2] * size).clamp(0, 1)


def _signed_distance(shape: str, y: Tensor, x: Tensor) -> Tensor:
    """Return the distance to the shape's edge, < 0 inside; shapes have circumradius about 1.

    Formulas after Inigo Quilez, https://iquilezles.org/articles/distfunctions2d/.
    """
    if shape == "circle":
        return torch.hypot(y, x) - 0.95
    if shape == "square":
        return _box(y, x, 0.74, 0.74)
    if shape == "triangle":
        return torch.maximum(_edge(y, x, 90, 0.55), _edge(y, x.abs(), -30, 0.5))
    if shape == "cross":
        return torch.minimum(_box(y, x, 0.92, 0.32), _box(y, x, 0.32, 0.92))
    if shape == "diamond":
        return _box((y + x) * math.sqrt(0.5), (y - x) * math.sqrt(0.5), 0.7, 0.7)
    if shape == "ring":
        return (torch.hypot(y, x) - 0.72).abs() - 0.23
    if shape == "star":
        return _star(y, x)
    if shape == "heart":
        return _heart(y, x)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def _box(y: Tensor, x: Tensor, half_height: float, half_width: float) -> Tensor:
    dy, dx = y.abs() - half_height, x.abs() - half_width
    outside = torch.hypot(dy.clamp_min(0), dx.clamp_min(0))
    return outside + torch.maximum(dy, dx).clamp_max(0)


def _edge(y: Tensor, x: Tensor, degrees: float, offset: float) -> Tensor:
    """Half plane whose outward normal has this angle; 90 points down."""
    angle = math.radians(degrees)
    return x * math.cos(angle) + y * math.sin(angle) - offset


def _star(y: Tensor, x: Tensor) -> Tensor:
    """Five points: fold the plane into one tenth, then the distance to a straight edge."""
    tenth = math.pi / 5
    angle = torch.atan2(x, -y).abs()
    angle = (torch.remainder(angle + tenth, 2 * tenth) - tenth).abs()
    radius = torch.hypot(y, x)
    along, across = radius * angle.cos(), radius * angle.sin()
    # edge from the tip (1, 0) to the inner corner at angle pi / 5 and radius 0.45
    corner = (0.45 * math.cos(tenth), 0.45 * math.sin(tenth))
    length = math.hypot(corner[0] - 1, corner[1])
    return ((along - 1) * corner[1] - across * (corner[0] - 1)) / length


def _heart(y: Tensor, x: Tensor) -> Tensor:
    """Two discs over a wedge whose sides touch them."""
    x = x.abs()
    lobe = torch.hypot(x - 0.42, y + 0.3) - 0.5
    wedge = torch.maximum(_edge(y, x, 45, 0.585), -y)
    return torch.minimum(lobe, wedge)


def _backgrounds(scenes: list[Scene], size: int) -> Tensor:
    tone = torch.tensor([TONES[s.tone] for s in scenes]).reshape(-1, 3, 1, 1)
    centre = (torch.arange(size) + 0.5) / size
    y, x = centre[:, None], centre[None, :]
    # anti-aliased: a triangle wave, steepened until its edges are one pixel wide
    wave = ((x + y) / STRIPE * 2) % 2 - 1
    stripes = ((0.5 - wave.abs()) * STRIPE / 2 * size * math.sqrt(0.5) + 0.5).clamp(0, 1)
    amount = {
        "plain": torch.zeros(size, size),
        "gradient": y.expand(size, size),
        "striped": stripes,
    }
    share = torch.stack([amount[s.background] for s in scenes])
    return (tone * (1 + (LIGHTER - 1) * share[:, None])).clamp(0, 1)
