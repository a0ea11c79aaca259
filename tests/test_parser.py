import pytest
import torch
from torch.nn.functional import interpolate

from sda_fast.scenes.parser import MOST, parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import ceiling, row
from sda_fast.scenes.world import (
    COLORS,
    FULL,
    SMALL,
    TONES,
    Scene,
    SceneObject,
    sample_scenes,
)

WORLDS = [pytest.param(SMALL, id="small"), pytest.param(FULL, id="full")]
PLACE = 1 / 32


def agrees(parsed: Scene, truth: Scene) -> bool:
    """Every object in colour, shape, size and place, nothing else, and the background."""
    left = list(parsed.objects)
    for o in truth.objects:
        near = [p for p in left if max(abs(p.y - o.y), abs(p.x - o.x)) <= PLACE]
        if len(near) != 1 or (near[0].shape, near[0].color, near[0].size) != (
            o.shape,
            o.color,
            o.size,
        ):
            return False
        left.remove(near[0])
    return not left and (parsed.background, parsed.tone) == (truth.background, truth.tone)


def share_right(world, split, n, sigma=0.0, seed=7):
    truth = sample_scenes(world, split, seed, n)
    pictures = render(truth, world.size)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    parsed = parse(pictures + sigma * noise, world)
    return sum(map(agrees, parsed, truth)) / n


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", ["test", "held_out_pairs", "held_out_count"])
def test_clean_renders_are_read_right(world, split):
    assert share_right(world, split, 100) >= 0.99


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", ["test", "held_out_count"])
def test_noisy_renders_are_read_right(world, split):
    assert share_right(world, split, 100, sigma=0.05) >= 0.97


@pytest.mark.parametrize("world", WORLDS)
def test_the_ceiling_is_the_promised_one(world):
    for sigma, promised in ((0.0, 0.99), (0.05, 0.97)):
        rates = row(ceiling(world, 50, sigma))
        miou = rates.pop("miou")
        assert min(rates.values()) >= promised
        assert miou >= 0.95


def test_a_picture_may_be_blurred_and_tinted():
    """What a small diffusion model does: soft edges and a slowly varying cast."""
    truth = sample_scenes(SMALL, "test", 3, 100)
    g = torch.Generator().manual_seed(3)
    soft = interpolate(interpolate(render(truth, 32), scale_factor=0.75, mode="area"), 32)
    cast = 0.05 * interpolate(torch.randn(100, 3, 6, 6, generator=g), 32, mode="bicubic")
    parsed = parse((soft + cast).clamp(0, 1), SMALL)
    assert sum(map(agrees, parsed, truth)) >= 90


@pytest.mark.parametrize("tone", TONES)
def test_a_faint_object_keeps_its_colour(tone):
    """Yellow at seven tenths over a dark ground is nearer to orange than to yellow."""
    scenes = [Scene((SceneObject("square", c, "small", 0.4, 0.6),), "plain", tone) for c in COLORS]
    ground = render([Scene((), "plain", tone)], 32)
    faint = ground + 0.7 * (render(scenes, 32) - ground)
    assert [scene.objects[0].color for scene in parse(faint, SMALL)] == list(COLORS)


@pytest.mark.parametrize("world", WORLDS)
def test_near_objects_of_one_colour_stay_apart(world):
    """Side by side at the smallest legal gap, in both directions."""
    step = 0.11 + 0.15 + 0.05
    for angle in (0.0, 0.4, 0.8, 1.2):
        a = torch.tensor(angle)
        dy, dx = float(step * a.sin()), float(step * a.cos())
        pair = (
            SceneObject("square", "red", "small", 0.35, 0.35),
            SceneObject("square", "red", "medium", 0.35 + dy, 0.35 + dx),
        )
        scene = Scene(pair, "striped", "plum")
        assert agrees(parse(render([scene], world.size), world)[0], scene)


@pytest.mark.parametrize("world", WORLDS)
def test_touching_objects_are_told_apart(world):
    """Not a legal scene, but a model may paint one."""
    pair = (
        SceneObject("circle", "green", "large", 0.4, 0.3),
        SceneObject("circle", "green", "large", 0.4, 0.68),
    )
    scene = Scene(pair, "plain", "slate")
    assert agrees(parse(render([scene], world.size), world)[0], scene)


@pytest.mark.parametrize("world", WORLDS)
def test_specks_are_no_objects(world):
    truth = sample_scenes(world, "test", 5, 8)
    clean = parse(render(truth, world.size), world)
    empty = [Scene((), s.background, s.tone) for s in truth]
    pictures = render(empty, world.size)
    assert all(not scene.objects for scene in parse(pictures, world))
    side = world.size // 12
    pictures[:, :, 5 : 5 + side, 7 : 7 + side] = torch.tensor([0.9, 0.12, 0.14])[:, None, None]
    assert all(not scene.objects for scene in parse(pictures, world))
    assert all(scene.objects for scene in clean)


def test_a_picture_is_read_alike_alone_and_in_a_batch():
    pictures = render(sample_scenes(FULL, "test", 4, 11), FULL.size)
    pictures += 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(4))
    batch = parse(pictures, FULL)
    assert parse(pictures, FULL) == batch
    for i in (0, 10):
        (alone,) = parse(pictures[i : i + 1], FULL)
        assert agrees(alone, batch[i])


def test_any_picture_is_read():
    """Pure noise, flat colours, half precision, none at all: an answer of legal words."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.rand(4, 3, 32, 32, generator=g)
    pictures[1], pictures[2] = 0, 1
    for dtype in (torch.float32, torch.bfloat16):
        scenes = parse(pictures.to(dtype), SMALL)
        assert len(scenes) == 4
        assert all(len(scene.objects) <= MOST for scene in scenes)
        assert render(scenes, 32).isfinite().all()
    assert parse(torch.zeros(0, 3, 32, 32), SMALL) == []


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(3, 32, 32), r"pictures must be a float \[B, 3, 32, 32\], got .*\[3, 32, 32\]"),
        (torch.zeros(1, 3, 64, 64), r"pictures must be .*got .*\[1, 3, 64, 64\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"pictures must be a float .*uint8"),
        (torch.full((1, 3, 32, 32), float("nan")), "pictures must be finite"),
    ],
)
def test_refuses(pictures, message):
    with pytest.raises(ValueError, match=message):
        parse(pictures, SMALL)
