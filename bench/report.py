"""README tables and pictures, made from the records in bench/results alone: ``bench report``."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.attention_plots import Picture, attention_pictures
from bench.attention_report import attention_tables
from bench.claims_report import claims_pages
from bench.edit_report import edit_section
from bench.flux_report import flux_tables
from bench.qformer_report import qformer_tables
from bench.records import Record, read_records
from bench.tables import table
from bench.training_report import training_tables
from sda_fast.files import write_whole

VARIANTS = {
    "parser_clean": "parser ceiling, clean render",
    "parser_noise": "parser ceiling, noise σ = 0.05",
    "caption": "caption ceiling: text → picture",
    "reconstruction": "**reconstruction from the embedding**",
    "flat": "flat QFormer: no hierarchy, mask or RoPE",
    "held_out_pairs": "reconstruction, held-out colour × shape",
    "held_out_count": "reconstruction, held-out count",
    "inversion": "prompt inversion, picture by picture",
    "reconstruction_of_inverted": "reconstruction of those pictures",
}
"""Rows of the quality table, in their order."""
NEEDED = {"parser_clean", "parser_noise", "caption", "reconstruction"}
"""What a run must have measured to be shown."""

METRICS = {
    "precision": "precision",
    "recall": "recall",
    "count": "count",
    "color": "colour",
    "shape": "shape",
    "size": "size",
    "background": "background",
    "miou": "layout mIoU",
    "psnr": "PSNR, dB (secondary)",
}
"""Columns of the quality table, in their order."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What the reconstruction should reach.

    Attributes:
        text: how the README names it.
        metric: a key of METRICS.
        least: of the metric's mean, or of its lead over the variant ``over``.
        over: a key of VARIANTS, or None for the metric as it is.
    """

    text: str
    metric: str
    least: float
    over: str | None = None


AIMS = (
    Aim("layout mIoU", "miou", 0.60),
    Aim("colour of matched objects", "color", 0.95),
    Aim("shape of matched objects", "shape", 0.85),
    Aim("layout mIoU above the flat QFormer", "miou", 0.10, over="flat"),
)


def quality_tables(records: Iterable[Record]) -> str:
    """The measurements and what became of the aims, in markdown.

    Args:
        records: of suite "quality", oldest first; the latest finished run counts.

    Raises:
        ValueError: there are no records.
    """
    latest = latest_records(records)
    return "\n\n".join([_measurements(latest), _aims(latest), _circumstances(latest)])


def latest_records(records: Iterable[Record]) -> dict[str, Record]:
    """The records of the latest finished run by variant: no table mixes models or sample sizes.

    A run is finished when it has measured every variant of NEEDED; the others may be left out.

    Raises:
        ValueError: there are no records, or no run was finished.
    """
    records = list(records)
    if not records:
        raise ValueError("records must hold at least one record, got none")
    runs: dict[str, dict[str, Record]] = {}
    for record in records:
        runs.setdefault(record["run"], {})[record["variant"]] = record
    finished = [run for run in runs.values() if run.keys() >= NEEDED]
    if not finished:
        raise ValueError(f"no run measured all of {', '.join(sorted(NEEDED))}")
    return finished[-1]


def _measurements(latest: dict[str, Record]) -> str:
    rows = [
        [label, str(latest[variant]["n"])]
        + [_value(latest[variant]["metrics"].get(metric), metric) for metric in METRICS]
        for variant, label in VARIANTS.items()
        if variant in latest
    ]
    return table(["", "scenes", *METRICS.values()], rows)


def _value(metric: dict[str, float] | None, name: str) -> str:
    """Mean and half the width of the 95 % interval."""
    if metric is None:
        return "–"
    digits = 1 if name == "psnr" else 3
    half = (metric["high"] - metric["low"]) / 2
    return f"{metric['mean']:.{digits}f} ±{half:.{digits}f}"


def _aims(latest: dict[str, Record]) -> str:
    rows = []
    for aim in AIMS:
        found = _mean(latest, "reconstruction", aim.metric)
        if aim.over is not None and found is not None:
            base = _mean(latest, aim.over, aim.metric)
            found = None if base is None else found - base
        verdict = "not measured" if found is None else "met" if found >= aim.least else "missed"
        measured = "–" if found is None else f"{found:.3f}"
        rows.append([aim.text, f"≥ {aim.least:.2f}", measured, verdict])
    return table(["aim of the reconstruction", "wanted", "measured", ""], rows)


def _mean(latest: dict[str, Record], variant: str, metric: str) -> float | None:
    found = latest.get(variant, {}).get("metrics", {}).get(metric)
    return None if found is None else found["mean"]


def _circumstances(latest: dict[str, Record]) -> str:
    last = list(latest.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(sorted({r["commit"] for r in latest.values()}))
    drawn = sorted({(r["seeds"], r["steps"]) for r in latest.values() if r["steps"]})
    how = "; ".join(f"{seeds} noise seeds of {steps} steps" for seeds, steps in drawn)
    return (
        f"Unseen scenes, {how or 'no pictures drawn'}; ± is half of a 95 % bootstrap interval over "
        f"scenes. Decoder {last['decoder']}, {versions}, commit {commits}."
    )


@dataclass(frozen=True, slots=True)
class Section:
    """A generated part of the README, and the pictures in docs/ beside it.

    Attributes:
        tables: its markdown, from the records.
        pictures: what there is to draw of them.
        required: the README must have it, and there must be results; else it is written where the
            markers are, from no records if there are no results.
        beside: names of more results files that its records come from, where they are there.
    """

    tables: Callable[[Sequence[Record]], str]
    pictures: Callable[[Sequence[Record]], list[Picture]] = lambda records: []
    required: bool = True
    beside: tuple[str, ...] = ()


SECTIONS = {
    "quality": Section(quality_tables),
    "attention": Section(attention_tables, attention_pictures, required=False),
    "qformer": Section(qformer_tables, required=False, beside=("encode",)),
    "flux": Section(flux_tables, required=False, beside=("flux-train",)),
    "edit": Section(edit_section, required=False, beside=("edit-speed",)),
    "training": Section(training_tables, required=False, beside=("scaling",)),
}
"""By the name of their markers and their results file."""


def replace_section(text: str, name: str, body: str) -> str:
    """Put body between ``<!-- generated:name -->`` and ``<!-- /generated:name -->``.

    Raises:
        ValueError: text does not hold each marker once, in this order.
    """
    opening, closing = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    before, found, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not (found and closed) or text.count(opening) != 1 or text.count(closing) != 1:
        raise ValueError(f"the text must hold {opening} and then {closing}, each once")
    return f"{before}{opening}\n{body}\n{closing}{after}"


def main(
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = Path("README.md"),
    results: Annotated[Path, typer.Option(help="The folder of the records.")] = Path(
        "bench/results"
    ),
    check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if it is stale.")] = False,
) -> None:
    """Write the README's generated tables and pictures, and docs/claims.md, anew from records."""
    pictures: list[Picture] = []
    try:
        old = new = readme.read_text(encoding="utf-8")
        for name, section in SECTIONS.items():
            if not section.required and f"generated:{name} " not in old:
                continue
            records = []
            for stem in (name, *section.beside):
                file = results / f"{stem}.jsonl"
                records += read_records(file) if section.required or file.exists() else []
            drawn = section.pictures(records)
            pictures += drawn
            shown = [f"![{picture.title}](docs/{picture.name})" for picture in drawn]
            new = replace_section(new, name, "\n\n".join([section.tables(records), *shown]))
        told = [results / f"{stem}.jsonl" for stem in ("claims", "edit")]
        pages = claims_pages([r for file in told if file.exists() for r in read_records(file)])
    except (OSError, ValueError) as error:
        print(f"bench report: {error}")
        raise typer.Exit(2) from error
    docs, made = readme.parent / "docs", [*pictures, *pages]
    stale = [str(docs / m.name) for m in made if not m.is_current(docs)]
    stale += [str(readme)] if new != old else []
    if check and stale:
        print(f"bench report: {', '.join(stale)} is stale: run `python -m bench report`")
        raise typer.Exit(1)
    if not check:
        for one in made:
            one.write(docs)
        write_whole(readme, new)
    print(f"{readme} is up to date")
