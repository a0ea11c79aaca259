"""What became of an edit, exactly: its picture, parsed, against the scene that it should show.

What the edit itself spoiled is told apart from what the decoder never had right: a second
comparison is with the picture that the same noise gives without the edit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sda_fast.scenes.edits import Box, Edit
from sda_fast.scenes.parser import parse
from sda_fast.scenes.score import REACH, iou, match
from sda_fast.scenes.world import Scene, SceneObject, World

STAYS = 0.7
"""Least IoU of the boxes of an object that stayed where it was."""
Pairs = list[tuple[SceneObject, SceneObject]]
"""(parsed, true), as ``match`` gives them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Pictures and what they show.

    Attributes:
        pictures: [B, 3, H, W] float in [0, 1].
        scenes: B, parsed.
    """

    pictures: Tensor
    scenes: list[Scene]

    @classmethod
    def of(cls, pictures: Tensor, world: World) -> "Shown":
        """Parse pictures, [B, 3, world.size, world.size] float.

        Raises:
            ValueError: as ``parse``.
        """
        return cls(pictures, parse(pictures, world))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one edit; the object concerned is "the named one", its new state "the goal".

    Attributes:
        success: the named object is as the instruction wants it. Unless it was to be removed, an
            object of the goal's shape, colour and size is matched to it on place (see
            score.match); after a move it is nearer to the new place than to the old one. After
            a move or a removal nothing is left within REACH of the old place but objects that are
            matched to others of the target.
        preserved: all other objects of the target and its background are there: same shape, colour
            and size, boxes of an IoU of at least STAYS, same kind and tone of ground.
        kept: likewise, but the others are those of the picture without the edit, as parsed.
        over_edit: success, but something besides the named object differs from the picture
            without the edit: it is not kept, or an object is there that was not, nor was wanted.
        place: IoU of the goal's box and that of the object matched to it, 0 if none is; None where
            the named object was to be removed.
    """

    success: bool
    preserved: bool
    kept: bool
    over_edit: bool
    place: float | None


@dataclass(frozen=True, slots=True)
class EditSums:
    """Sums over edits; sums of several sets of edits add up, see ``edit_rates``.

    Attributes:
        edits: how many.
        success: see Verdict, and so preserved, kept and over_edit.
        preserved: see there.
        kept: see there.
        over_edit: see there.
        goals: edits with a goal.
        place: of their IoUs.
        squared: of the mean squared difference, outside the boxes of the edit, of the pictures with
            and without it.
        outside: of the mean absolute difference there.
        inside: of that inside the boxes.
    """

    edits: float = 0
    success: float = 0
    preserved: float = 0
    kept: float = 0
    over_edit: float = 0
    goals: float = 0
    place: float = 0
    squared: float = 0
    outside: float = 0
    inside: float = 0


def score_edits(edits: Sequence[Edit], after: Shown, before: Shown) -> list[EditSums]:
    """Judge edited pictures one by one.

    Args:
        edits: B.
        after: what was drawn of each.
        before: what the same noise gives without the edit.

    Raises:
        ValueError: there are not as many pictures as edits, or of unequal shapes.
    """
    shapes = [list(shown.pictures.shape) for shown in (after, before)]
    if shapes[0] != shapes[1] or len(edits) != len(after.pictures):
        raise ValueError(
            f"after and before must hold a picture for each of {len(edits)} edits, got {shapes}"
        )
    found = []
    for i, edit in enumerate(edits):
        verdict = judge(edit, after.scenes[i], before.scenes[i])
        squared, outside, inside = differences(edit.boxes, after.pictures[i], before.pictures[i])
        found.append(
            EditSums(
                edits=1,
                success=verdict.success,
                preserved=verdict.preserved,
                kept=verdict.kept,
                over_edit=verdict.over_edit,
                goals=verdict.place is not None,
                place=verdict.place or 0.0,
                squared=squared,
                outside=outside,
                inside=inside,
            )
        )
    return found


def edit_rates(sums: EditSums) -> dict[str, float]:
    """Rates of sums of edits; NaN or infinity where there is nothing to rate.

    success, preserved and kept are shares of the edits, over_edit of the successful ones; place is
    the mean IoU of those with a goal. psnr, in dB, is that of the squared difference outside the
    boxes, its mean over all edits; leakage is the mean change outside by that inside.
    """
    shares = {n: _ratio(getattr(sums, n), sums.edits) for n in ("success", "preserved", "kept")}
    squared = _ratio(sums.squared, sums.edits)
    return {
        **shares,
        "over_edit": _ratio(sums.over_edit, sums.success),
        "place": _ratio(sums.place, sums.goals),
        "psnr": -10 * math.log10(squared) if squared else math.inf,
        "leakage": _ratio(sums.outside, sums.inside),
    }


def judge(edit: Edit, after: Scene, before: Scene) -> Verdict:
    """Say what became of an edit; see Verdict.

    Args:
        edit: the edit.
        after: the edited picture, parsed.
        before: the picture without the edit, from the same noise, parsed.
    """
    goal = None if edit.operation == "remove" else edit.target.objects[edit.object_index]
    pairs = match(after.objects, edit.target.objects)
    reached = _partner(pairs, goal)
    success = _is_success(edit, after, pairs)
    others = [o for o in edit.target.objects if o is not goal]

    # what the picture without the edit shows besides the named object
    named = None if edit.operation == "add" else edit.source.objects[edit.object_index]
    shown = _partner(match(before.objects, edit.source.objects), named)
    rest = [o for o in before.objects if o is not shown]
    against = match(after.objects, (*rest, goal) if goal else tuple(rest))
    kept = _stay(against, rest) and _same_ground(after, before)
    appeared = len(after.objects) > len(against)
    return Verdict(
        success=success,
        preserved=_stay(pairs, others) and _same_ground(after, edit.target),
        kept=kept,
        over_edit=success and (appeared or not kept),
        place=None if goal is None else 0.0 if reached is None else iou(reached.box, goal.box),
    )


def differences(boxes: Sequence[Box], after: Tensor, before: Tensor) -> tuple[float, float, float]:
    """How two pictures differ outside and inside boxes.

    Args:
        boxes: regions (y0, x0, y1, x1) of the unit square; a pixel that touches one is inside.
        after: [3, H, W] float.
        before: the same shape.

    Returns:
        The mean squared difference outside, the mean absolute one outside, and that inside.
    """
    height, width = after.shape[1:]
    inside = torch.zeros(height, width, dtype=torch.bool)
    for y0, x0, y1, x1 in boxes:
        rows = slice(int(y0 * height), math.ceil(y1 * height))
        inside[rows, int(x0 * width) : math.ceil(x1 * width)] = True
    change = (after.double() - before.double()).cpu()
    beyond, within = change[:, ~inside], change[:, inside]
    found = beyond.square().mean(), beyond.abs().mean(), within.abs().mean()
    return found[0].item(), found[1].item(), found[2].item()


def _is_success(edit: Edit, after: Scene, pairs: Pairs) -> bool:
    old = None if edit.operation == "add" else edit.source.objects[edit.object_index]
    if edit.operation != "remove":
        goal = edit.target.objects[edit.object_index]
        reached = _partner(pairs, goal)
        if reached is None or not _alike(reached, goal):
            return False
        if edit.operation == "move" and old and _apart(reached, goal) >= _apart(reached, old):
            return False  # a short move's old place is within reach of its new one
    if old is None or edit.operation not in ("remove", "move"):
        return True
    spare = [p for p in after.objects if not any(p is taken for taken, _ in pairs)]
    return all(_apart(p, old) > REACH for p in spare)


def _stay(pairs: Pairs, objects: Sequence[SceneObject]) -> bool:
    """Whether each object has a partner that looks like it, where it is."""
    for o in objects:
        found = _partner(pairs, o)
        if found is None or not _alike(found, o) or iou(found.box, o.box) < STAYS:
            return False
    return True


def _partner(pairs: Pairs, true: SceneObject | None) -> SceneObject | None:
    """What was matched to an object; None if nothing was."""
    return next((p for p, t in pairs if t is true), None)


def _alike(a: SceneObject, b: SceneObject) -> bool:
    return (a.shape, a.color, a.size) == (b.shape, b.color, b.size)


def _apart(a: SceneObject, b: SceneObject) -> float:
    return math.hypot(a.y - b.y, a.x - b.x)


def _same_ground(a: Scene, b: Scene) -> bool:
    return (a.background, a.tone) == (b.background, b.tone)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
