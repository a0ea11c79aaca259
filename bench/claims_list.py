"""The claims: which variants answer them, by what numbers, and when they count as confirmed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A rate: one sum over scenes by another.

    Attributes:
        label: of its column.
        top: column of a record's scenes.
        bottom: likewise.
        digits: behind the point.
    """

    label: str
    top: str
    bottom: str
    digits: int = 3


METRICS = {
    "miou": Metric("layout mIoU", "iou", "truth"),
    "recall": Metric("recall", "matched", "truth"),
    "color": Metric("colour", "color", "matched"),
    "shape": Metric("shape", "shape", "matched"),
    "mean_cosine": Metric("mean cosine", "mean_cosine", "scenes"),
    "rank": Metric("effective rank", "rank", "scenes", digits=1),
    "new": Metric("new object found", "new", "scenes"),
    "stayed": Metric("old objects found", "stayed", "old"),
    "success": Metric("success", "success", "edits"),
    "preserved": Metric("others preserved", "preserved", "edits"),
    "kept": Metric("others kept", "kept", "edits"),
    **{f"share_{name}": Metric(label, name, f"{name}_of") for name, label in (
        ("place", "place"), ("color", "colour"), ("shape", "shape"), ("size", "size"),
        ("background", "background"),
    )},
}  # fmt: skip
"""By name; those of pictures that were parsed are as in sda_fast.scenes.score."""

Verdict = Literal["confirmed", "not confirmed", "undecided", "not measured"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """Something that must hold for a claim: of first less second, or of first less a level.

    Attributes:
        text: what is claimed.
        metric: a key of METRICS.
        first: a variant.
        second: a variant of the same records; None compares with level.
        level: a value of the metric.
        sense: what the difference must be. "above" is confirmed by an interval above 0, refuted by
            one below the margin; "below" likewise, mirrored; "near" is confirmed by one inside
            ± the margin, refuted by one outside.
        margin: the least difference that matters, as a share of second: a fixed one would call
            two adapters alike that have both learned little.
    """

    text: str
    metric: str
    first: str
    second: str | None = None
    level: float = 0.0
    sense: Literal["above", "below", "near"] = "above"
    margin: float = 0.0

    def verdict(self, low: float, high: float, margin: float = 0.0) -> Verdict:
        """What an interval of the difference says, with the margin as a difference."""
        if self.sense == "below":
            low, high = -high, -low
        if self.sense == "near":
            held = -margin < low and high < margin
            refuted = low > margin or high < -margin
        else:
            held, refuted = low > 0, high < margin
        return "confirmed" if held else "not confirmed" if refuted else "undecided"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim: as good as the worst of its parts."""
    order: tuple[Verdict, ...] = ("not confirmed", "not measured", "undecided", "confirmed")
    return min(verdicts, key=order.index)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the work.

    Attributes:
        text: the claim.
        how: what was done, for a reader of the table.
        variants: rows of its table, keys of VARIANTS.
        metrics: columns of its table, keys of METRICS.
        contrasts: all must hold.
    """

    text: str
    how: str
    variants: tuple[str, ...]
    metrics: tuple[str, ...]
    contrasts: tuple[Contrast, ...]


VARIANTS = {
    "base": "the shipped design: (4, 2, 1), 28 positions",
    "positions_64": "(16, 4, 2), 64 positions",
    "positions_128": "(32, 8, 4), 128 positions",
    "grid_28": "(0, 7): a grid of 4 nodes, 28 positions",
    "grid_32": "(0, 0, 2): a grid of 16 nodes, 32 positions",
    "no_rope": "the mask alone, no 3-D RoPE",
    "no_penalty": "no cosine penalty",
    "clip_alone": "CLIP alone, DINOv2 blinded",
    "probe": "positions of the picture",
    "probe_chance": "the same, asked for another scene",
    "probe_text": "text tokens of the scene's caption",
    "mix_none": "embedding alone",
    "mix_new": "and a caption of a new object",
    "mix_whole": "and a caption of all objects, the new one too",
    "way": "slerp, changes that go the right way",
    "way_whole": "slerp, ways without a wrong change",
    "way_shuffled": "its frames in random order, changes that go the right way",
    "way_faded": "pixels faded over, changes that go the right way",
    "overlap": "overlap",
    "local": "local",
    "isolated": "isolated",
    "shipped": "the shipped editor",
    "source": "no edit",
}
"""Labels of all variants; one named as a rule is the shipped model decoded by that rule."""
REBUILT = ("miou", "recall", "color", "shape")
SHARES = ("share_place", "share_color", "share_shape", "share_size", "share_background")
CLAIMS = {
    "positions": Claim(
        "64 positions are as good as 128",
        "Adapters of two hierarchies of three levels, trained alike.",
        ("positions_64", "positions_128"),
        REBUILT,
        (
            Contrast(
                "64 positions by 128", "miou", "positions_64", "positions_128",
                sense="near", margin=0.1,
            ),
        ),
    ),
    "hierarchy": Claim(
        "a hierarchy beats a single-level grid of equal tokens",
        "Only a grid of 4 nodes has exactly as many positions, 7 a node; of 16 nodes the nearest "
        "is 2 a node, which is four positions more.",
        ("base", "grid_28", "grid_32"),
        REBUILT,
        (
            Contrast("above the grid of 4", "miou", "base", "grid_28", margin=0.03),
            Contrast("above the grid of 16", "miou", "base", "grid_32", margin=0.03),
        ),
    ),
    "rope": Claim(
        "the mask alone, without 3-D RoPE, is not enough",
        "The same mask in the decoder; cross-attention with and without rotations.",
        ("base", "no_rope"),
        REBUILT,
        (Contrast("RoPE adds to the mask", "miou", "base", "no_rope", margin=0.03),),
    ),
    "penalty": Claim(
        "the cosine penalty prevents collapse",
        "Collapsed is what spreads over fewer than half as many directions as positions: an "
        "effective rank below 14 of 28.",
        ("base", "no_penalty"),
        ("mean_cosine", "rank", "miou"),
        (
            Contrast("collapsed without", "rank", "no_penalty", level=14.0, sense="below"),
            Contrast("not collapsed with it", "rank", "base", level=14.0),
        ),
    ),
    "dino": Claim(
        "DINO helps CLIP",
        "Blinded is a DINOv2 whose weights are all zero, hence its features; both adapters have "
        "the same parameters.",
        ("base", "clip_alone"),
        REBUILT,
        (Contrast("both above CLIP alone", "miou", "base", "clip_alone", margin=0.03),),
    ),
    "text-space": Claim(
        "the embedding lives in the text space",
        "A linear probe learns to tell colour and shape words from the text encoder's tokens of "
        "captions, never sees a picture, and reads the positions of unseen pictures of one object "
        "as they are. Chance is its answer held to another scene.",
        ("probe", "probe_chance", "probe_text"),
        ("share_color", "share_shape"),
        tuple(
            Contrast(f"{word} above chance", f"share_{name}", "probe", "probe_chance", margin=0.2)
            for name, word in (("color", "colour"), ("shape", "shape"))
        ),
    ),
    "mixing": Claim(
        "text and embedding tokens mix",
        "A caption is put after the positions, where it acts as level 0. An object is found where "
        "it should be, of whatever shape and colour.",
        ("mix_none", "mix_new", "mix_whole"),
        ("new", "stayed"),
        (
            Contrast("the text is followed", "new", "mix_new", "mix_none"),
            Contrast(
                "the embedding is kept", "stayed", "mix_new", "mix_none",
                sense="near", margin=0.10,
            ),
        ),
    ),
    "interpolation": Claim(
        "interpolation is meaningful: parsed attributes change monotonically",
        "Seven frames from one picture to another, all from the same noise; what each shares with "
        "either end should fall and rise. Share of the changes from frame to frame that do.",
        ("way", "way_whole", "way_shuffled", "way_faded"),
        SHARES,
        tuple(
            Contrast(f"{METRICS[name].label}: nine changes in ten", name, "way", level=0.9)
            for name in SHARES
        ),
    ),
    "rules": Claim(
        "the rule local does as well as overlap, which the adapter was trained with",
        "The shipped model, decoded by each rule.",
        ("overlap", "local", "isolated"),
        REBUILT,
        (
            Contrast(
                "local by overlap", "miou", "local", "overlap", sense="near",
                margin=0.05,
            ),
        ),
    ),
}  # fmt: skip
"""By name, in the order of the page."""
EDITING = Claim(
    "editing works purely in the embedding",
    "Unseen scenes and instructions; the decoder never sees the picture that is edited.",
    ("shipped", "source"),
    ("success", "preserved", "kept"),
    (
        Contrast("above no edit at all", "success", "shipped", "source"),
        Contrast("more than half of the edits succeed", "success", "shipped", level=0.5),
    ),
)
"""Answered by the records of ``bench edit``; its metrics are explained there."""
