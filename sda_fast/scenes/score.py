"""How well parsed scenes agree with the true ones: sums, and the rates of a table."""

from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.world import Scene, SceneObject, Split, World, sample_scenes

REACH = 0.15
"""Furthest apart the centres of two matched objects may be, in units of the picture's side."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Sums:
    """Counts over pairs of a parsed and a true scene; sums of two sets of pairs add up.

    Attributes:
        scenes: pairs of scenes.
        truth: objects in the true scenes.
        parsed: objects in the parsed scenes.
        matched: objects matched on place alone (see match).
        count: scenes with the right number of objects.
        color: matched objects of the right colour; shape and size likewise.
        shape: see color.
        size: see color.
        iou: sum over matched objects of the IoU of the two boxes.
        background: scenes with the right kind and tone of background.
    """

    scenes: int = 0
    truth: int = 0
    parsed: int = 0
    matched: int = 0
    count: int = 0
    color: int = 0
    shape: int = 0
    size: int = 0
    iou: float = 0.0
    background: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def score(parsed: list[Scene], truth: list[Scene]) -> Sums:
    """Compare scenes pair by pair.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(parsed) != len(truth):
        raise ValueError(f"parsed must have one scene a truth, got {len(parsed)} for {len(truth)}")
    return sum((_score(p, t) for p, t in zip(parsed, truth, strict=True)), Sums())


def row(sums: Sums) -> dict[str, float]:
    """Turn sums into the rates of a table row, each in [0, 1]; 0 where there is nothing to rate.

    precision = matched / parsed and recall = matched / truth, in objects, on place alone;
    count and background = right / scenes; color, shape and size = right / matched;
    miou = sum of IoU / truth, so an object that was not found counts 0.
    """
    return {
        "precision": sums.matched / max(sums.parsed, 1),
        "recall": sums.matched / max(sums.truth, 1),
        "count": sums.count / max(sums.scenes, 1),
        "color": sums.color / max(sums.matched, 1),
        "shape": sums.shape / max(sums.matched, 1),
        "size": sums.size / max(sums.matched, 1),
        "miou": sums.iou / max(sums.truth, 1),
        "background": sums.background / max(sums.scenes, 1),
    }


def match(
    parsed: tuple[SceneObject, ...], truth: tuple[SceneObject, ...]
) -> list[tuple[SceneObject, SceneObject]]:
    """Pair objects on place alone: as many as possible, then the least sum of distances.

    Only centres at most REACH apart (Euclidean) pair; each object is in one pair at most. Exact, by
    dynamic programming over the sets of parsed objects already used.

    Returns:
        Pairs (parsed, true), in the order of truth.
    """

    @cache
    def best(i: int, used: int) -> tuple[int, float, tuple[tuple[int, int], ...]]:
        """Fewest unmatched, least distance and the pairs of truth[i:], without those used."""
        if i == len(truth):
            return 0, 0.0, ()
        missed, total, pairs = best(i + 1, used)
        options = [(missed + 1, total, pairs)]
        for j, p in enumerate(parsed):
            distance = ((p.y - truth[i].y) ** 2 + (p.x - truth[i].x) ** 2) ** 0.5
            if distance <= REACH and not used >> j & 1:
                missed, total, pairs = best(i + 1, used | 1 << j)
                options.append((missed, total + distance, ((j, i), *pairs)))
        return min(options)

    return [(parsed[j], truth[i]) for j, i in best(0, 0)[2]]


def iou(a: Box, b: Box) -> float:
    """Return intersection over union, in area, of two boxes (y0, x0, y1, x1)."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(height, 0.0) * max(width, 0.0)
    areas = sum((y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in (a, b))
    return both / (areas - both)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return 10 log10(1 / mean (a - b)^2) of each picture, in dB: f32 [B]; inf where equal.

    Args:
        a: [B, 3, H, W] in [0, 1].
        b: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {list(a.shape)} and {list(b.shape)}")
    return -10 * (a.float() - b.float()).square().flatten(1).mean(1).log10()


def ceiling(world: World, n: int, sigma: float = 0.0, split: Split = "test", seed: int = 0) -> Sums:
    """Score the parser on renders: the best any picture model can reach under it.

    Args:
        world: to draw scenes from.
        n: how many scenes.
        sigma: standard deviation of Gaussian noise added to the pictures, in units of [0, 1].
        split: of the scenes.
        seed: of the scenes and of the noise.
    """
    truth = sample_scenes(world, split, seed, n)
    pictures = render(truth, world.size)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return score(parse(pictures + sigma * noise, world), truth)


def _score(parsed: Scene, truth: Scene) -> Sums:
    pairs = match(parsed.objects, truth.objects)
    return Sums(
        scenes=1,
        truth=len(truth.objects),
        parsed=len(parsed.objects),
        matched=len(pairs),
        count=int(len(parsed.objects) == len(truth.objects)),
        color=sum(p.color == t.color for p, t in pairs),
        shape=sum(p.shape == t.shape for p, t in pairs),
        size=sum(p.size == t.size for p, t in pairs),
        iou=sum(iou(p.box, t.box) for p, t in pairs),
        background=int((parsed.background, parsed.tone) == (truth.background, truth.tone)),
    )
