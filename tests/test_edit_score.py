"""Edits judged: what was done, what else happened, and mistakes that must be noticed."""

import math
from dataclasses import astuple, replace
from itertools import pairwise

import pytest
import torch

from sda_fast.scenes.edit_score import (
    EditSums,
    Shown,
    differences,
    edit_rates,
    judge,
    score_edits,
)
from sda_fast.scenes.edits import FAR, OPERATIONS, sample_chains, sample_edits
from sda_fast.scenes.render import render
from sda_fast.scenes.score import REACH
from sda_fast.scenes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    SMALL,
    TONES,
    Scene,
    SceneObject,
)

EDITS = sample_edits(SMALL, "test", 11, 60)
PERFECT = (True, True, True, False)
"""success, preserved, kept, over_edit."""


def said(edit, after, before=None):
    """A verdict without its place; before is the true source unless given."""
    return astuple(judge(edit, after, edit.source if before is None else before))[:4]


def of(*operations, others=0):
    """Edits of some operations that leave at least so many other objects alone."""
    return [
        e
        for e in EDITS
        if e.operation in operations and len(e.source.objects) - (e.operation != "add") >= others
    ]


def other(edit):
    """The index in the target of an object that the edit is not about."""
    named = None if edit.operation == "remove" else edit.object_index
    return next(i for i in range(len(edit.target.objects)) if i != named)


def changed(scene, index, **new):
    """The scene with an object that is otherwise."""
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **new)
    return replace(scene, objects=tuple(objects))


def without(scene, index):
    return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def with_object(scene, o):
    return replace(scene, objects=(*scene.objects, o))


def unlike(name, names):
    names = list(names)
    return names[(names.index(name) + 1) % len(names)]


def test_every_operation_is_there():
    assert {edit.operation for edit in EDITS} == set(OPERATIONS)
    assert len(of(*OPERATIONS, others=1)) > 30


@pytest.mark.parametrize("split", ["test", "held_out_pairs", "held_out_operations"])
def test_a_perfect_picture_is_a_success_and_the_source_is_none(split):
    """All the way: drawn, parsed, judged; the parser reads clean pictures without a fault."""
    edits = sample_edits(SMALL, split, 5, 40)
    before, after = (
        Shown.of(render([getattr(e, which) for e in edits], SMALL.size), SMALL)
        for which in ("source", "target")
    )
    for edit, perfect in zip(edits, score_edits(edits, after, before), strict=True):
        counts = perfect.success, perfect.preserved, perfect.kept, perfect.over_edit
        assert counts == PERFECT, edit
        assert perfect.goals == (edit.operation != "remove")
        assert perfect.place > 0.9 or edit.operation == "remove"
        assert perfect.squared < 1e-12  # all that differs lies in the boxes
        assert perfect.inside > 0
    for none in score_edits(edits, before, before):
        assert (none.success, none.preserved, none.kept, none.over_edit) == (0, 1, 1, 0)
        assert (none.squared, none.outside, none.inside) == (0, 0, 0)


def test_the_true_scenes_give_the_same_verdicts():
    for edit in EDITS:
        assert said(edit, edit.target) == PERFECT
        assert said(edit, edit.source) == (False, True, True, False)
        order = replace(edit.target, objects=edit.target.objects[::-1])
        assert said(edit, order) == PERFECT


@pytest.mark.parametrize(("what", "names"), [("color", COLORS), ("shape", SHAPES), ("size", SIZES)])
def test_a_named_object_of_a_wrong_attribute_is_no_success(what, names):
    for edit in of("add", "recolour", "move", "replace"):
        goal = edit.target.objects[edit.object_index]
        wrong = {what: unlike(getattr(goal, what), names)}
        assert said(edit, changed(edit.target, edit.object_index, **wrong))[0] is False


def test_a_named_object_elsewhere_or_gone_is_no_success():
    for edit in of("add", "recolour", "move", "replace"):
        goal = edit.target.objects[edit.object_index]
        elsewhere = changed(edit.target, edit.object_index, y=(goal.y + 0.5) % 1)
        assert said(edit, elsewhere)[0] is False
        gone = judge(edit, without(edit.target, edit.object_index), edit.source)
        assert (gone.success, gone.preserved, gone.place) == (False, True, 0.0)


def test_a_short_move_that_did_not_happen_is_no_success():
    """Old and new place are within reach of each other, so that either would be matched."""
    old = SceneObject("circle", "red", "small", 0.5, 0.5)
    new = replace(old, y=0.5 + (FAR + REACH) / 2)
    scenes = (Scene((o,), "plain", "slate") for o in (old, new))
    edit = replace(of("move")[0], source=next(scenes), target=next(scenes), object_index=0)
    assert said(edit, edit.target) == PERFECT
    assert said(edit, edit.source)[0] is False
    halfway = changed(edit.source, 0, y=0.5 + 0.4 * (FAR + REACH) / 2)
    assert said(edit, halfway)[0] is False


@pytest.mark.parametrize("color", [None, "white"])
def test_what_is_left_at_the_old_place_is_no_success(color):
    """Neither the object itself nor another in its place."""
    for edit in of("move", "remove"):
        old = edit.source.objects[edit.object_index]
        if edit.operation == "move":
            new = edit.target.objects[edit.object_index]
            if math.hypot(new.y - old.y, new.x - old.x) < REACH:
                continue
        left = replace(old, color=color or old.color)
        assert said(edit, with_object(edit.target, left))[0] is False


def test_others_that_changed_are_noticed():
    edits = of(*OPERATIONS, others=1)
    for edit in edits:
        i = other(edit)
        o = edit.target.objects[i]
        spoiled = (
            changed(edit.target, i, color=unlike(o.color, COLORS)),
            changed(edit.target, i, shape=unlike(o.shape, SHAPES[:4])),
            changed(edit.target, i, size=unlike(o.size, SIZES)),
            changed(edit.target, i, y=o.y + 0.05, x=o.x + 0.05),
            without(edit.target, i),
            replace(edit.target, tone=unlike(edit.target.tone, TONES)),
            replace(edit.target, background=unlike(edit.target.background, BACKGROUNDS)),
        )
        for after in spoiled:
            assert said(edit, after) == (True, False, False, True)


def test_an_object_that_nobody_wanted_is_an_over_edit_only():
    for edit in of("recolour"):
        more = with_object(edit.target, SceneObject("cross", "white", "small", 0.02, 0.02))
        assert said(edit, more) == (True, True, True, True)


def test_an_edit_that_failed_is_no_over_edit():
    for edit in of("recolour", others=1):
        assert said(edit, without(edit.source, other(edit))) == (False, False, False, False)


def test_what_the_decoder_never_had_right_is_not_held_against_the_edit():
    for edit in of(*OPERATIONS, others=1):
        i = other(edit)
        wrong = unlike(edit.target.objects[i].color, COLORS)
        at = next(j for j, o in enumerate(edit.source.objects) if o == edit.target.objects[i])
        before, after = changed(edit.source, at, color=wrong), changed(edit.target, i, color=wrong)
        assert said(edit, after, before) == (True, False, True, False)
        # put right: as it should be, but not what was asked for
        assert said(edit, edit.target, before) == (True, True, False, True)


def test_an_object_that_was_never_drawn_can_still_be_named():
    for edit in of("recolour", "remove"):
        before = without(edit.source, edit.object_index)
        assert said(edit, edit.target, before) == PERFECT


def test_place_is_how_well_the_goal_was_hit():
    for edit in EDITS:
        found = judge(edit, edit.target, edit.source).place
        assert found is None if edit.operation == "remove" else found == pytest.approx(1)
    edit = of("add")[0]
    goal = edit.target.objects[edit.object_index]
    half = goal.box[3] - goal.box[1]
    beside = changed(edit.target, edit.object_index, x=goal.x + half / 3)
    assert judge(edit, beside, edit.source).place == pytest.approx(0.5)


def test_differences_are_told_apart_by_the_boxes():
    before, after = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    after[:, 2:4, 2:4] = 0.5
    after[0, 7, 7] = 1.0
    squared, outside, inside = differences(((0.25, 0.25, 0.5, 0.5),), after, before)
    assert inside == 0.5
    assert squared == outside == pytest.approx(1 / (3 * 60))
    # a pixel that is only touched is inside
    touched = differences(((0.24, 0.25, 0.51, 0.51),), after, before)
    assert touched[2] == pytest.approx(0.5 * 4 / 12)
    assert touched[0] == pytest.approx(1 / (3 * 52))


def test_sums_become_rates():
    sums = EditSums(
        edits=8, success=4, preserved=6, kept=2, over_edit=3, goals=5, place=4.0,
        squared=0.08, outside=0.4, inside=1.6,
    )  # fmt: skip
    assert edit_rates(sums) == {
        "success": 0.5, "preserved": 0.75, "kept": 0.25, "over_edit": 0.75, "place": 0.8,
        "psnr": pytest.approx(20), "leakage": 0.25,
    }  # fmt: skip
    nothing = edit_rates(EditSums(edits=2, preserved=2, kept=2))
    assert nothing["success"] == 0
    assert nothing["psnr"] == math.inf
    assert all(math.isnan(nothing[name]) for name in ("over_edit", "place", "leakage"))
    assert all(math.isnan(v) for n, v in edit_rates(EditSums()).items() if n != "psnr")


def test_pictures_and_edits_must_come_in_pairs():
    scenes = [edit.source for edit in EDITS[:2]]
    shown = Shown.of(render(scenes, SMALL.size), SMALL)
    one = Shown(shown.pictures[:1], shown.scenes[:1])
    with pytest.raises(ValueError, match=r"for each of 2 edits, got \[\[1, 3, 32, 32\], \[2, 3"):
        score_edits(EDITS[:2], one, shown)
    with pytest.raises(ValueError, match="for each of 1 edits"):
        score_edits(EDITS[:1], shown, shown)


def test_a_chain_goes_on_where_it_was():
    chains = sample_chains(SMALL, "test", 3, 10, length=4)
    assert len(chains) == 10
    for chain in chains:
        assert len(chain) == 4
        for edit, later in pairwise(chain):
            assert later.source == edit.target
        assert all(len(edit.target.objects) in SMALL.counts for edit in chain)
    assert chains == sample_chains(SMALL, "test", 3, 10, length=4)
    assert chains[:4] == sample_chains(SMALL, "test", 3, 4, length=4)
    alone = sample_chains(SMALL, "test", 11, 60, length=1)
    assert [edit for (edit,) in alone] == EDITS
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        sample_chains(SMALL, "test", 3, 10, length=0)
    with pytest.raises(ValueError, match="split must be one of"):
        sample_chains(SMALL, "tests", 3, 10, length=1)
