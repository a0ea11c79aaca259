"""Pictures of ``bench attention``: bars and a roofline, as SVG with the same bytes each time."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.attention_report import (
    GOAL_CASES,
    AttentionSide,
    attention_sides,
    of_roof,
)
from bench.records import Record
from bench.sides import PASSES
from sda_fast.files import write_whole

TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""TFLOP/s."""
MARKERS = dict(zip(PASSES, ("o", "s"), strict=True))
_POINTS = {"textcoords": "offset points", "fontsize": 8}
INK, OURS, MASKED, UNMASKED = "#333333", "#1f6fb2", "#b9bec4", "#e0a458"


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that is drawn from records.

    Attributes:
        name: of the file.
        title: what a reader who does not see it is told.
        data: what it shows; its digest is written into the file.
        draw: makes it a matplotlib figure.
    """

    name: str
    title: str
    data: Any
    draw: Callable[[], Any]

    @property
    def digest(self) -> str:
        """Sixteen hex digits of what it shows."""
        return hashlib.sha256(json.dumps(self.data).encode()).hexdigest()[:16]

    def is_current(self, folder: Path) -> bool:
        """Whether the file in the folder shows these very numbers."""
        file = folder / self.name
        return file.is_file() and f"data {self.digest}" in file.read_text(encoding="utf-8")

    def write(self, folder: Path) -> Path:
        """Draw it into the folder, which is made if it is not there."""
        import matplotlib

        told = {"Date": None, "Creator": None, "Description": f"data {self.digest}"}
        stable = {"svg.hashsalt": "sda-fast", "svg.fonttype": "none", "font.size": 9}
        with matplotlib.rc_context(stable):
            drawn = io.StringIO()
            self.draw().savefig(drawn, format="svg", metadata=told, bbox_inches="tight")
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())
        return write_whole(folder / self.name, f"{text}\n")


def attention_pictures(records: Sequence[Record]) -> list[Picture]:
    """What there is to draw of the cases with goals; nothing without records of their card."""
    found = [side for side in attention_sides(records).values() if side.case in GOAL_CASES]
    if not found:
        return []
    points = {side.case: _points(side) for side in found}
    roofs = next(iter(found[0].records.values()))["roofs"]
    return [
        Picture(
            "attention_bars.svg", "how near each variant comes to the matmul roof",
            points, lambda: _bars(points),
        ),
        Picture(
            "attention_roofline.svg", "FLOP/s over FLOPs a byte, under the roofs of the card",
            [points, roofs], lambda: _roofline(points, roofs),
        ),
    ]  # fmt: skip


Point = dict[str, Any]


def _points(side: AttentionSide) -> dict[str, list[Point]]:
    """What is drawn of a case: by pass, variants in their order."""
    return {
        name: [
            {
                "label": record["label"].strip("*"),
                "color": _color(record),
                "ms": record["p50_ms"],
                "of_roof": of_roof(record),
                "flops": record["flops"],
                "bytes": record["bytes"],
            }
            for (_, passed), record in side.records.items()
            if passed == name and record["p50_ms"] is not None
        ]
        for name in PASSES
    }


def _color(record: Record) -> str:
    if record["variant"].startswith("ours"):
        return OURS
    return MASKED if record["masked"] else UNMASKED


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(points: dict[str, dict[str, list[Point]]]) -> Any:
    """A panel a case and pass: how much of the matmul roof each variant reaches."""
    longest = max(len(p) for passes in points.values() for p in passes.values())
    figure, axes = _figure(11, (0.24 * longest + 0.9) * len(points), len(points), len(PASSES))
    for row, (case, passes) in zip(axes, points.items(), strict=True):
        for axis, (name, variants) in zip(row, passes.items(), strict=True):
            places = range(len(variants))
            shares = [100 * point["of_roof"] for point in variants]
            axis.barh(places, shares, color=[point["color"] for point in variants])
            axis.set_yticks(places, [point["label"] for point in variants])
            for place, point, share in zip(places, variants, shares, strict=True):
                for x, text in ((128, f"{share:.0f} %"), (188, f"{point['ms']:#.3g} ms")):
                    axis.text(x, place, text, va="center", ha="right", color=INK)
            axis.invert_yaxis()
            axis.set_xlim(0, 190)
            axis.set_xticks(range(0, 101, 25))
            axis.axvline(100, color=INK, linewidth=0.8, linestyle=":")
            axis.set_title(f"{case}, {name}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("% of the bf16 matmul roof (work the mask allows)")
    return figure


def _roofline(points: dict[str, dict[str, list[Point]]], roofs: dict[str, float]) -> Any:
    """Achieved FLOP/s over FLOPs a byte, under the two roofs of the card."""
    figure, axes = _figure(8, 4.8)
    axis = axes[0, 0]
    copy, matmul = roofs["copy"] / 1e12, roofs["matmul"] / 1e12
    drawn = [
        (point["flops"] / point["bytes"], point["flops"] / point["ms"] / 1e9, point["color"], name)
        for passes in points.values()
        for name in PASSES
        for point in passes[name]
    ]
    ridge = matmul / copy
    low, high = min(ridge / 8, *(x / 2 for x, *_ in drawn)), 2 * max(x for x, *_ in drawn)
    axis.plot([low, ridge, high], [low * copy, matmul, matmul], color=INK, linewidth=1)
    axis.annotate(f"matmul, {matmul:.0f} TFLOP/s", (ridge, matmul), (4, 4), **_POINTS)
    axis.annotate(f"copy, {copy:.2f} TB/s", (low, low * copy), (24, 8), **_POINTS)
    for x, y, color, name in drawn:
        marker = MARKERS[name]
        axis.plot(x, y, marker, color=color, markersize=6, markeredgecolor="white")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_yticks(TICKS, [str(tick) for tick in TICKS], minor=False)
    axis.yaxis.set_minor_formatter("")
    axis.set_ylim(0.7 * min(y for _, y, *_ in drawn), 1.4 * matmul)
    axis.set_xlabel("FLOP a byte (q, k, v, out and gradients moved once)")
    axis.set_ylabel("TFLOP/s")
    for label, color in (("ours", OURS), ("masked", MASKED), ("unmasked", UNMASKED)):
        axis.plot([], [], "o", color=color, label=label)
    for label, marker in MARKERS.items():
        axis.plot([], [], marker, color="none", markeredgecolor=INK, label=label)
    axis.legend(frameon=False, loc="lower right")
    axis.grid(which="both", linewidth=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
