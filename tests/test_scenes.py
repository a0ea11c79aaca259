import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from sda_fast.scenes import captions, edits
from sda_fast.scenes.captions import CELLS, COLUMNS, SYNONYMS, caption, place
from sda_fast.scenes.edits import OPERATIONS, held_out_operation, sample_edits
from sda_fast.scenes.render import coverage, render
from sda_fast.scenes.score import Sums, ceiling, iou, match, psnr, row, score
from sda_fast.scenes.world import (
    COLORS,
    EXTENTS,
    FULL,
    GAP,
    SHAPES,
    SIZES,
    SMALL,
    Scene,
    SceneObject,
    clear_of,
    sample_scenes,
)

WORLDS = [pytest.param(SMALL, id="small"), pytest.param(FULL, id="full")]
SPLITS = ("train", "test", "held_out_pairs", "held_out_count")
EDIT_SPLITS = (*SPLITS, "held_out_operations")


def assert_legal(scene):
    for i, o in enumerate(scene.objects):
        margin = o.radius + GAP / 2 - 1e-12
        assert margin <= min(o.y, o.x, 1 - o.y, 1 - o.x)
        assert all(clear_of(o, other) for other in scene.objects[:i])


# --- renderer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_render_is_pure_and_a_batch_is_its_pictures(world):
    scenes = sample_scenes(world, "test", 1, 12)
    pictures = render(scenes, world.size)
    assert pictures.shape == (12, 3, world.size, world.size)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(pictures, render(scenes, world.size))
    for i in (0, 7, 11):
        assert torch.equal(pictures[i : i + 1], render(scenes[i : i + 1], world.size))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_is_drawn_where_its_box_says(shape):
    size = 256
    o = SceneObject(shape, "red", "large", 0.44, 0.57)
    inside = coverage([o], size)[0] > 0.5
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    drawn = torch.stack([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / size
    assert (drawn - torch.tensor(o.box)).abs().max() <= 2 / size
    assert set(EXTENTS) == set(SHAPES)


def test_the_inside_has_the_colour_and_the_outside_the_background():
    o = SceneObject("square", "cyan", "medium", 0.3, 0.6)
    empty, drawn = render([Scene((), "striped", "olive"), Scene((o,), "striped", "olive")], 64)
    assert torch.allclose(drawn[:, int(0.3 * 64), int(0.6 * 64)], torch.tensor(COLORS["cyan"]))
    y0, x0, y1, x1 = (round(64 * edge) for edge in o.box)
    untouched = torch.ones(64, 64, dtype=torch.bool)
    untouched[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
    assert torch.equal(drawn[:, untouched], empty[:, untouched])
    assert not torch.equal(drawn, empty)


def test_edges_are_anti_aliased():
    """The covered area of a disc is right at any sub-pixel place, which hard edges are not."""
    for shift in (0.0, 0.2, 0.37, 0.5):
        o = SceneObject("circle", "red", "small", 0.5 + shift / 32, 0.5 + shift / 64)
        area = coverage([o], 32).sum().item()
        exact = math.pi * (0.95 * o.radius * 32) ** 2
        assert abs(area - exact) <= 0.01 * exact
    soft = coverage([o], 32)
    assert ((soft > 0.05) & (soft < 0.95)).sum() >= 8


def test_backgrounds_differ():
    kinds = [Scene((), kind, "slate") for kind in ("plain", "gradient", "striped")]
    plain, gradient, striped = render(kinds, 32)
    assert plain.flatten(1).std(1).max() < 1e-6
    assert (gradient.diff(dim=1) > 0).all()
    assert gradient.diff(dim=2).abs().max() == 0
    assert len(striped[0].unique()) > 2
    assert torch.equal(striped, striped.transpose(1, 2))


def test_render_refuses():
    with pytest.raises(ValueError, match=r"shape must be one of .*'moon'"):
        coverage([SceneObject("moon", "red", "small", 0.5, 0.5)], 8)
    for scenes, size in (([], 32), ([Scene((), "plain", "plum")], 0)):
        with pytest.raises(ValueError, match=f"got {len(scenes)} and {size}"):
            render(scenes, size)


# --- splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", SPLITS)
def test_split_rules(world, split):
    scenes = sample_scenes(world, split, 0, 200)
    pairs = [[world.held_out(o.shape, o.color) for o in s.objects] for s in scenes]
    counts = {len(s.objects) for s in scenes}
    if split == "held_out_pairs":
        assert all(map(any, pairs))
    else:
        assert not any(map(any, pairs))
    assert counts == ({world.held_out_count} if split == "held_out_count" else set(world.counts))
    assert {o.shape for s in scenes for o in s.objects} == set(SHAPES[: world.shapes])
    for scene in scenes:
        assert_legal(scene)


@pytest.mark.parametrize("world", WORLDS)
def test_splits_are_seeded_and_apart(world):
    assert world.held_out_count not in world.counts
    held = [(s, c) for s in SHAPES[: world.shapes] for c in COLORS if world.held_out(s, c)]
    assert [shape for shape, _ in held] == list(SHAPES[: world.shapes])
    drawn = {split: sample_scenes(world, split, 3, 60) for split in SPLITS}
    assert drawn["train"] == sample_scenes(world, "train", 3, 60)
    assert drawn["train"] != sample_scenes(world, "train", 4, 60)
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not set(drawn[a]) & set(drawn[b])


@pytest.mark.parametrize(
    ("split", "seed", "n", "message"),
    [("validation", 0, 1, "split must be"), ("test", -1, 1, "seed -1"), ("test", 0, -1, "n -1")],
)
def test_sampling_refuses(split, seed, n, message):
    for sample in (sample_scenes, sample_edits):
        with pytest.raises(ValueError, match=message):
            sample(SMALL, split, seed, n)


# --- captions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_captions_hold_known_words_and_every_object(world):
    rng = np.random.default_rng(0)
    for scene in sample_scenes(world, "test", 2, 100):
        for text in (caption(scene), caption(scene, rng)):
            words = text.replace("-", "- ").split()
            assert set(words) <= set(captions.WORDS)
            assert {scene.background, scene.tone} <= set(words)
            assert all(f"at {place(o.y, o.x)}" in text for o in scene.objects)
            for o in scene.objects:
                assert words.count(o.color) >= 1
    assert len(set(captions.WORDS)) == len(captions.WORDS)


def test_paraphrases_differ_and_are_seeded():
    (scene,) = sample_scenes(FULL, "held_out_count", 0, 1)
    texts = [caption(scene, np.random.default_rng(i)) for i in range(20)]
    assert len(set(texts)) >= 15
    assert texts == [caption(scene, np.random.default_rng(i)) for i in range(20)]
    assert caption(scene) == caption(scene)


@pytest.mark.parametrize(
    ("y", "x", "name"),
    [(0.0, 0.0, "a-1"), (0.999, 0.999, "p-16"), (1.0, 0.0, "a-16"), (0.7, 0.4, "g-12")],
)
def test_places_are_named_as_on_a_chess_board(y, x, name):
    assert place(y, x) == name


# --- edits ------------------------------------------------------------------------------------

PLAIN = {said: word for word, synonyms in SYNONYMS.items() for said in synonyms}
GRAMMAR = {
    "add": r"(?:add|put) a (?P<new>.+) at (?P<cell>\S+)|at (?P<there>\S+) add a (?P<given>.+)",
    "remove": r"(?:remove|delete) (?P<old>.+)|take (?P<gone>.+) away",
    "replace": r"(?:replace|swap|turn) (?P<old>.+) (?:with|for|into) a (?P<new>.+)",
    "move": r"(?:move|shift|put) (?P<old>the .+) (?:to|at) (?P<cell>\S+)",
    "recolour": r"(?:make|paint|turn) (?P<old>.+) (?P<color>\S+)",
}
SAME = {"there": "cell", "given": "new", "gone": "old"}


def attributes(text):
    words = [PLAIN.get(word, word) for word in text.split()]
    kinds = {"size": SIZES, "color": COLORS, "shape": SHAPES}
    return {kind: word for word in words for kind, known in kinds.items() if word in known}


def named(text, objects):
    """The indices of all the objects that this name fits."""
    where = re.search(r" at (\S+)$", text)
    wanted = attributes(text)
    return [
        i
        for i, o in enumerate(objects)
        if all(getattr(o, k) == v for k, v in wanted.items())
        and (where is None or place(o.y, o.x) == where[1])
    ]


def middle(cell):
    column, row_ = cell.split("-")
    return {"y": (int(row_) - 0.5) / CELLS, "x": (COLUMNS.index(column) + 0.5) / CELLS}


def obey(source, instruction):
    """Read an instruction apart from the grammar that wrote it: the operation and its result."""
    reads = ((name, re.fullmatch(pattern, instruction)) for name, pattern in GRAMMAR.items())
    operation, found = next((name, match) for name, match in reads if match)
    said = {SAME.get(k, k): v for k, v in found.groupdict().items() if v is not None}
    objects = list(source.objects)
    if operation == "add":
        new = SceneObject(**attributes(said["new"]), **middle(said["cell"]))
        return operation, [*objects, new]
    (index,) = named(said["old"], objects)
    old = objects[index]
    changes = {
        "remove": lambda: [],
        "replace": lambda: [replace(old, **attributes(said["new"]))],
        "move": lambda: [replace(old, **middle(said["cell"]))],
        "recolour": lambda: [replace(old, color=said["color"])],
    }
    return operation, objects[:index] + changes[operation]() + objects[index + 1 :]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", EDIT_SPLITS)
def test_source_and_instruction_give_the_target(world, split):
    drawn = sample_edits(world, split, 5, 120)
    assert drawn == sample_edits(world, split, 5, 120)
    for edit in drawn:
        operation, objects = obey(edit.source, edit.instruction)
        assert operation == edit.operation, edit.instruction
        assert tuple(objects) == edit.target.objects, edit.instruction
        assert edit.source != edit.target
        words = edit.instruction.replace("-", "- ").split()
        assert set(words) <= set(edits.WORDS)
    allowed = set(OPERATIONS)
    if world is SMALL and split == "held_out_count":
        allowed.remove("add")  # five objects are none of its counts
    if world is SMALL and split == "held_out_operations":
        allowed.remove("replace")  # it is held out of diamonds
    assert {edit.operation for edit in drawn} == allowed
    assert len(set(edits.WORDS)) == len(edits.WORDS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", EDIT_SPLITS)
def test_targets_are_legal(world, split):
    for edit in sample_edits(world, split, 6, 120):
        assert_legal(edit.target)
        new = set(edit.target.objects) - set(edit.source.objects)
        if split != "held_out_pairs":
            assert not any(world.held_out(o.shape, o.color) for o in edit.target.objects)
        elif edit.operation != "move":
            assert all(world.held_out(o.shape, o.color) for o in new)
        counts = {*world.counts, len(edit.source.objects)}
        assert len(edit.target.objects) in counts
        index = edit.object_index
        holder = edit.target if edit.operation == "add" else edit.source
        other = edit.source if edit.operation == "add" else edit.target
        assert holder.objects[index] not in other.objects


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", EDIT_SPLITS)
def test_each_shape_has_an_operation_that_is_never_trained_on_it(world, split):
    drawn = sample_edits(world, split, 8, 120)
    kept = {held_out_operation(edit.shape) == edit.operation for edit in drawn}
    assert kept == {split == "held_out_operations"}
    seen = {(edit.shape, edit.operation) for edit in drawn}
    if split == "held_out_operations":
        assert seen == {(shape, held_out_operation(shape)) for shape in SHAPES[: world.shapes]}
    else:
        # whatever is held out of a shape, others are trained on it
        assert {shape for shape, _ in seen} == set(SHAPES[: world.shapes])
    assert sample_edits(world, split, 8, 7) == drawn[:7]


def test_a_scene_without_such_an_edit_is_passed_over():
    sources = sample_scenes(SMALL, "test", 8, 400)
    circles = [
        s for s in sources if len(s.objects) == 3 and {o.shape for o in s.objects} == {"circle"}
    ]
    assert circles
    edited = {edit.source for edit in sample_edits(SMALL, "held_out_operations", 8, 400)}
    assert not edited & set(circles)
    assert len(edited & set(sources)) > 300


@pytest.mark.parametrize("world", WORLDS)
def test_only_pixels_in_the_boxes_change(world):
    drawn = sample_edits(world, "train", 7, 60)
    before = render([e.source for e in drawn], world.size)
    after = render([e.target for e in drawn], world.size)
    centre = (torch.arange(world.size) + 0.5) / world.size
    for edit, a, b in zip(drawn, before, after, strict=True):
        allowed = torch.zeros(world.size, world.size, dtype=torch.bool)
        for y0, x0, y1, x1 in edit.boxes:
            rows, columns = (centre >= y0) & (centre <= y1), (centre >= x0) & (centre <= x1)
            allowed |= rows[:, None] & columns
        assert torch.equal(a[:, ~allowed], b[:, ~allowed]), edit
        assert not torch.equal(a, b)
        assert 0 < allowed.float().mean() < 0.6


# --- score ------------------------------------------------------------------------------------

RED = SceneObject("circle", "red", "small", 0.3, 0.3)
BLUE = SceneObject("square", "blue", "large", 0.7, 0.7)
TRUTH = Scene((RED, BLUE), "plain", "plum")


def test_a_perfect_scene_scores_one():
    rates = row(score([TRUTH], [TRUTH]))
    assert rates == pytest.approx(dict.fromkeys(rates, 1.0))


def test_score_by_hand():
    """One object displaced by its half width and misread, one missing, two invented."""
    seen = replace(RED, x=RED.x + 0.95 * RED.radius, color="white", shape="circle", size="small")
    ghosts = (replace(BLUE, y=0.1, x=0.9), replace(BLUE, y=0.9, x=0.1))
    sums = score([Scene((*ghosts, seen), "plain", "olive")], [TRUTH])
    third = 1 / 3  # two equal boxes, half over each other
    wanted = Sums(scenes=1, truth=2, parsed=3, matched=1, shape=1, size=1, iou=sums.iou)
    assert sums == wanted
    assert row(sums) == pytest.approx(
        {"precision": 1 / 3, "recall": 0.5, "count": 0, "color": 0, "shape": 1, "size": 1,
         "miou": third / 2, "background": 0}
    )  # fmt: skip


def test_sums_add_up_and_empty_sums_rate_zero():
    empty = Scene((), "plain", "plum")
    a, b = score([TRUTH], [TRUTH]), score([empty], [TRUTH])
    assert a + b == score([TRUTH, empty], [TRUTH, TRUTH])
    assert row(a + b)["recall"] == 0.5
    assert row(a + b)["miou"] == pytest.approx(0.5)
    assert set(row(Sums()).values()) == {0.0}


def test_matching_is_exact_where_greedy_is_not():
    """Greedy would take the nearest pair first and leave the other two out of reach."""
    o = [replace(RED, x=x) for x in (0.30, 0.41, 0.43, 0.55)]
    parsed, truth = (o[0], o[2]), (o[1], o[3])
    assert match(parsed, truth) == [(o[0], o[1]), (o[2], o[3])]
    assert match((o[3],), (o[0],)) == []
    assert match((), truth) == []
    assert match((BLUE, RED), (RED, BLUE)) == [(RED, RED), (BLUE, BLUE)]


def test_iou():
    box = (0.0, 0.0, 0.5, 0.5)
    assert iou(box, box) == 1
    assert iou(box, (0.25, 0.0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert iou(box, (0.6, 0.6, 0.9, 0.9)) == 0
    assert iou(box, (0.6, 0.0, 0.9, 0.5)) == 0


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[0] += 0.1
    assert psnr(a, b)[0] == pytest.approx(20, abs=1e-4)
    assert psnr(a, b)[1] == math.inf
    with pytest.raises(ValueError, match="a and b must have one shape"):
        psnr(a, b[:1])


def test_score_refuses_lists_of_two_lengths():
    with pytest.raises(ValueError, match="parsed must have one scene a truth, got 1 for 2"):
        score([TRUTH], [TRUTH, TRUTH])


def test_the_ceiling_falls_with_noise():
    assert ceiling(SMALL, 6) == ceiling(SMALL, 6)
    clean, drowned = (row(ceiling(SMALL, 12, sigma)) for sigma in (0.0, 0.8))
    assert clean["miou"] > 0.95 > drowned["miou"]
