"""The parser: pictures to scenes, by analysis and synthesis.

A picture is explained as the renderer would have drawn it: first the background, then object after
object, each time the one that takes most off the squared error, until nothing worth a template is
left. What an object at a centre takes off is its *gain*,

    sum over pixels |I - B|^2 - |I - B - T (C - B)|^2  =  sum 2 T D - T^2 E,
    D = (I - B) . (C - B),   E = |C - B|^2,

with picture I, background B, coverage T and palette colour C. Gains of all shapes, sizes, colours
and centres at once are correlations (FFT), taken at no more than GRID pixels a side; the best few
are then fitted at full resolution with sub-pixel centres (Gauss-Newton).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sda_fast.scenes.render import coverage, render
from sda_fast.scenes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    TONES,
    Scene,
    SceneObject,
    World,
)

GRID = 32
"""Largest side, in pixels, of the picture that is searched."""
CHUNK = 8
"""Pictures searched at once: as many as keep the gains in the processor's cache."""
CANDIDATES = 4
"""How many shapes and sizes are fitted at full resolution for each object found."""
STEPS = 3
"""Gauss-Newton steps of a fit."""
WORTH = 0.3
"""Least share of |T (C - B)|^2 an object takes off; 1 is a perfect object, 0 a half-faded one."""
FAINT = 0.75
"""Weakest an object's colour may be, as a share of the way there from the background."""
MOST = 8
"""More objects than this are not looked for."""
CLIP = 0.15
"""A pixel further than this from every background is an object's, however far it is."""


def parse(pictures: Tensor, world: World) -> list[Scene]:
    """Read the scenes off pictures.

    Args:
        pictures: [B, 3, world.size, world.size] float, nominally in [0, 1]; a noisy picture may
            leave that range.
        world: says how large a picture is and which shapes there are.

    Returns:
        B scenes, objects by falling gain (large and bright ones first), at most MOST of them.

    Raises:
        ValueError: pictures of another shape or dtype, or with a NaN or an infinity.
    """
    side = world.size
    if pictures.shape[1:] != (3, side, side) or not pictures.is_floating_point():
        got = f"{pictures.dtype} {list(pictures.shape)}"
        raise ValueError(f"pictures must be a float [B, 3, {side}, {side}], got {got}")
    if not pictures.isfinite().all():
        raise ValueError("pictures must be finite, got NaN or infinity")
    if not len(pictures):
        return []
    with torch.inference_mode():
        chunks = pictures.float().cpu().split(CHUNK)
        return [scene for chunk in chunks for scene in _parse(chunk, _tables(world))]


@dataclass(frozen=True)
class _Tables:
    """What the search looks up; G is the searched grid's side, K = shapes * sizes templates."""

    kinds: tuple[SceneObject, ...]  # K templates, centred
    grounds: tuple[Scene, ...]  # empty scenes, one a background and tone
    pictures: Tensor  # [grounds, 3, size, size]: the grounds, drawn
    colors: Tensor  # [colours, 3]
    spectra: Tensor  # [K, G, G // 2 + 1] complex: conjugated, centred on pixel (0, 0)
    energy: Tensor  # [grounds, colours, K, G, G]: sum T^2 E; inf where T would leave the picture


@lru_cache(maxsize=4)
def _tables(world: World) -> _Tables:
    grid = min(world.size, GRID)
    middle = (grid // 2 + 0.5) / grid
    kinds = tuple(
        SceneObject(shape, next(iter(COLORS)), size, middle, middle)
        for shape in SHAPES[: world.shapes]
        for size in SIZES
    )
    grounds = tuple(Scene((), kind, tone) for kind in BACKGROUNDS for tone in TONES)
    pictures, colors = render(list(grounds), world.size), torch.tensor(list(COLORS.values()))
    templates = coverage(list(kinds), grid).roll((-(grid // 2),) * 2, (1, 2))
    difference = colors[:, :, None, None] - _shrunk(pictures, grid)[:, None]
    spectrum = torch.fft.rfft2(templates.square()).conj()
    spectrum = spectrum * torch.fft.rfft2(difference.square().sum(2))[:, :, None]
    energy = torch.fft.irfft2(spectrum, s=(grid, grid))
    reach = (torch.arange(grid) + 0.5) / grid
    reach = torch.minimum(reach, 1 - reach)
    radius = torch.tensor([o.radius for o in kinds])[:, None, None]
    outside = torch.minimum(reach[:, None], reach) < radius - 0.5 / grid
    energy.masked_fill_(outside, float("inf"))
    return _Tables(kinds, grounds, pictures, colors, torch.fft.rfft2(templates).conj(), energy)


def _shrunk(pictures: Tensor, grid: int) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pictures, grid)


def _parse(pictures: Tensor, tables: _Tables) -> list[Scene]:
    ground = _ground(pictures, tables)
    base = tables.pictures[ground]
    rest = pictures - base  # what no object explains yet
    found: list[list[SceneObject]] = [[] for _ in pictures]
    active = torch.arange(len(pictures))
    for _ in range(MOST):
        gain = _gains(rest[active], base[active], ground[active], tables)
        best, at = gain.flatten(1).max(1)
        active, gain, at = (x[best > 0] for x in (active, gain, at))
        if not len(active):
            break
        objects, drawn = _fit(rest[active], base[active], gain, at, tables)
        rest[active] -= drawn
        for picture, o in zip(active.tolist(), objects, strict=True):
            found[picture].append(o)
    grounds = (tables.grounds[i] for i in ground.tolist())
    return [replace(g, objects=tuple(o)) for g, o in zip(grounds, found, strict=True)]


def _ground(pictures: Tensor, tables: _Tables) -> Tensor:
    """Return the index of the ground with the least clipped squared error: int64 [B]."""
    error = [(pictures - ground).square().sum(1).clamp_max(CLIP**2) for ground in tables.pictures]
    return torch.stack([e.mean((1, 2)) for e in error]).argmin(0)


def _gains(rest: Tensor, base: Tensor, ground: Tensor, tables: _Tables) -> Tensor:
    """Return every object's gain, [B, colours, K, G, G]; -inf where it is not WORTH it."""
    grid = tables.energy.shape[-1]
    rest, base = _shrunk(rest, grid), _shrunk(base, grid)
    # D is linear in the colour: four correlations serve all of them
    maps = torch.cat([rest, (rest * base).sum(1, keepdim=True)], 1)
    spectrum = torch.fft.rfft2(maps)[:, :, None] * tables.spectra
    likeness = torch.fft.irfft2(spectrum, s=(grid, grid))
    dot = torch.einsum("nc,bckyx->bnkyx", tables.colors, likeness[:, :3]) - likeness[:, 3:]
    energy = tables.energy[ground]
    gain = dot.mul_(2).sub_(energy)
    return gain.masked_fill_(gain < WORTH * energy, float("-inf"))


def _fit(
    rest: Tensor, base: Tensor, gain: Tensor, at: Tensor, tables: _Tables
) -> tuple[list[SceneObject], Tensor]:
    """Refine the best object of each picture.

    Args:
        rest: [B, 3, size, size], what is not explained yet.
        base: [B, 3, size, size], the background.
        gain: [B, colours, K, G, G].
        at: int64 [B], the flat index of the largest gain.
        tables: of the world.

    Returns:
        The objects, and what each adds to its background, [B, 3, size, size].
    """
    batch, _, kinds, grid, _ = gain.shape
    color, _, row, column = torch.unravel_index(at, gain.shape[1:])
    # the same place, one grid pixel either way, for every template
    near = torch.nn.functional.pad(gain[torch.arange(batch), color], (1, 1, 1, 1), value=-torch.inf)
    near = near.unfold(2, 3, 1).unfold(3, 3, 1)[torch.arange(batch), :, row, column]
    best, offset = near.flatten(2).max(2)
    kind = best.topk(min(CANDIDATES, kinds), 1).indices
    offset = offset.gather(1, kind)
    y = (row[:, None] + offset // 3 - 0.5) / grid
    x = (column[:, None] + offset % 3 - 0.5) / grid
    difference = tables.colors[color][:, :, None, None] - base
    dot = (rest * difference).sum(1)[:, None]
    energy = difference.square().sum(1)[:, None]
    y, x, drawn, gain = _sharpen(tables, kind, y, x, dot, energy)
    winner = torch.arange(batch), gain.argmax(1)
    drawn = drawn[winner][:, None]
    color = _color(drawn, rest, base, tables)
    plain = _moved(tables, kind[winner], y[winner], x[winner])
    names = [list(COLORS)[c] for c in color.tolist()]
    objects = [replace(o, color=name) for o, name in zip(plain, names, strict=True)]
    return objects, drawn * (tables.colors[color][:, :, None, None] - base)


def _color(drawn: Tensor, rest: Tensor, base: Tensor, tables: _Tables) -> Tensor:
    """Return the colour, int64 [B], that takes most off at its best strength in [FAINT, 1].

    A small blurred object is nowhere its full colour: yellow over a dark ground comes near orange,
    but is a weaker yellow. The gain at strength a is 2 a sum T D - a^2 sum T^2 E.
    """
    difference = tables.colors[:, :, None, None] - base[:, None]
    dot = (drawn * rest)[:, None].mul(difference).sum((2, 3, 4))
    energy = (drawn.square()[:, None] * difference.square()).sum((2, 3, 4))
    strength = (dot / energy).clamp(FAINT, 1)
    return (strength * (2 * dot - strength * energy)).argmax(1)


def _sharpen(
    tables: _Tables, kind: Tensor, y: Tensor, x: Tensor, dot: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Climb the gain in y and x by Gauss-Newton: min over the centre of sum E (D / E - T)^2.

    Args:
        tables: of the world.
        kind: int64 [B, M], templates to fit.
        y: [B, M] centres to start from; x likewise.
        x: see y.
        dot: [B, 1, size, size], D.
        energy: [B, 1, size, size], E.

    Returns:
        y, x, the coverages [B, M, size, size] and the gains [B, M].
    """
    size = dot.shape[-1]
    for step in range(STEPS + 1):
        drawn = coverage(_moved(tables, kind, y, x), size).reshape(*kind.shape, size, size)
        if step == STEPS:
            break
        # a shifted template is a shifted picture of it: the slope in y is minus that along y
        padded = torch.nn.functional.pad(drawn, (1, 1, 1, 1))
        slope_y = (padded[..., :-2, 1:-1] - padded[..., 2:, 1:-1]) / 2
        slope_x = (padded[..., 1:-1, :-2] - padded[..., 1:-1, 2:]) / 2
        error = dot - energy * drawn
        yy, xx, yx = (
            (energy * a * b).sum((2, 3))
            for a, b in ((slope_y, slope_y), (slope_x, slope_x), (slope_y, slope_x))
        )
        gy, gx = (slope_y * error).sum((2, 3)), (slope_x * error).sum((2, 3))
        determinant = (yy * xx - yx.square()).clamp_min(1e-6)
        y = y + ((xx * gy - yx * gx) / determinant).clamp(-1, 1) / size
        x = x + ((yy * gx - yx * gy) / determinant).clamp(-1, 1) / size
    return y, x, drawn, (drawn * (2 * dot - energy * drawn)).sum((2, 3))


def _moved(tables: _Tables, kind: Tensor, y: Tensor, x: Tensor) -> list[SceneObject]:
    """Return one object for each element of kind, y and x."""
    places = zip(kind.flatten().tolist(), y.flatten().tolist(), x.flatten().tolist(), strict=True)
    return [replace(tables.kinds[k], y=v, x=u) for k, v, u in places]
