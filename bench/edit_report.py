"""What became of ``bench edit`` and ``bench edit-speed``: tables, from records alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.edit_speed_report import speed_tables
from bench.records import Record
from bench.sides import number
from bench.tables import table
from sda_fast.scenes.edits import OPERATIONS, EditSplit

HEADS: dict[EditSplit, str] = {
    "test": "unseen scenes",
    "held_out_pairs": "held-out colour × shape",
    "held_out_operations": "held-out operation × shape",
    "held_out_count": "held-out count",
}
SPLITS = tuple(HEADS)
"""In the order of tables and runs."""
CHAINS = "chains"
"""The part beside these: edits one after the other."""
LENGTH = 5
"""Edits of a chain."""
BASELINES = {
    "source": "no edit",
    "target": "the target picture's own embedding",
    "caption": "caption rewritten, drawn anew",
    "rf-inversion": "RF inversion, target caption",
    "inversion": "prompt inversion of the target",
}
"""What takes part beside editors, in its order."""
SHIPPED = "shipped"
"""The variant of the model's own editor."""
METRICS = {
    "preserved": "preserved",
    "kept": "kept",
    "over_edit": "over-edit",
    "place": "place, IoU",
    "psnr": "untouched, dB",
    "leakage": "leakage",
    "same": "same positions",
}
"""Columns after success and its parts, in their order."""
NEEDED = {"source", "target", "caption"}
"""What must have been measured on the test split of a model to be shown before older results."""
Key = tuple[str, str, int]
"""(part, variant, step)."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What an editor should reach.

    Attributes:
        text: how the README names it.
        metric: a key of METRICS, or "success".
        least: of its mean, or of its lead over the variant ``over``.
        part: a key of HEADS.
        operation: of these edits alone; None for all.
        over: a variant; None for the metric as it is.
        mode: only an editor of this mode is meant; None for any.
    """

    text: str
    metric: str
    least: float
    part: EditSplit = "test"
    operation: str | None = None
    over: str | None = None
    mode: str | None = None


AIMS = (
    Aim("add, success", "success", 0.80, operation="add"),
    Aim("remove, success", "success", 0.80, operation="remove"),
    *(
        Aim(f"{operation}, {HEADS[split]}, success", "success", 0.60, split, operation)
        for split in ("held_out_pairs", "held_out_operations")
        for operation in ("add", "remove")
    ),
    Aim("preserved, against the true scene", "preserved", 0.90),
    Aim("kept, against the picture without the edit", "kept", 0.90),
    Aim("preserved, above the caption rewritten", "preserved", 0.20, over="caption"),
    Aim("kept, above the caption rewritten", "kept", 0.20, over="caption"),
    Aim("positions bit-identical in mode delta", "same", 0.70, mode="delta"),
)


def edit_section(records: Sequence[Record]) -> str:
    """All tables of the README's section, in markdown.

    Args:
        records: of suites "edit" and "edit-speed", oldest first.
    """
    quality, speed = (
        [r for r in records if r["suite"] == suite] for suite in ("edit", "edit-speed")
    )
    return f"{edit_tables(quality)}\n\n{speed_tables(speed)}"


def edit_tables(records: Sequence[Record]) -> str:
    """What was measured split by split, in chains, and what became of the aims, in markdown.

    Args:
        records: of suite "edit", oldest first; see ``latest_edits``.
    """
    latest = latest_edits(records)
    if not latest:
        return (
            "Not measured: no record in bench/results/edit.jsonl yet; "
            "`python -m bench edit` takes them on any machine."
        )
    parts = [_split(latest, split) for split in SPLITS if any(key[0] == split for key in latest)]
    parts += [_chains(latest)] if any(key[0] == CHAINS for key in latest) else []
    subject = _subject(latest)
    parts += [] if subject is None else [_aims(latest, subject)]
    return "\n\n".join([*parts, _circumstances(latest)])


def latest_edits(records: Iterable[Record]) -> dict[Key, Record]:
    """The latest records of one model, at one number of scenes, seeds and steps.

    Several runs may have measured them: the newest such set counts whose test split has all of
    NEEDED, or the newest of all if none has. Of an editor only records of its newest weights are
    taken.
    """
    sets: dict[tuple, list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("decoder", "reader", "scenes", "seeds", "steps"))
        # the set of the newest record comes last
        sets[key] = [*sets.pop(key, []), record]
    whole = [s for s in sets.values() if {r["variant"] for r in s if r["part"] == "test"} >= NEEDED]
    chosen = (whole or list(sets.values()) or [[]])[-1]
    weights = {record["variant"]: record.get("editor") for record in chosen}
    current = [record for record in chosen if record.get("editor") == weights[record["variant"]]]
    return {(record["part"], record["variant"], record["step"]): record for record in current}


def _variants(latest: dict[Key, Record], part: str) -> list[str]:
    """Those measured on a part: what is no editor first, then editors, the shipped one first."""
    found = dict.fromkeys(variant for of, variant, _ in latest if of == part)
    order = [*BASELINES, SHIPPED]
    return [v for v in order if v in found] + [v for v in found if v not in order]


def _label(record: Record) -> str:
    name = record["variant"]
    if name in BASELINES:
        return BASELINES[name]
    return f"**{name}** ({record['mode']})"


def _split(latest: dict[Key, Record], split: EditSplit) -> str:
    rows = []
    for variant in _variants(latest, split):
        record = latest[split, variant, 0]
        metrics = record["metrics"]
        rows.append(
            [_label(record), str(record["n"]), _value(metrics, "success")]
            + [number(_mean(record, "success", operation), 2) for operation in OPERATIONS]
            + [_value(metrics, name) for name in METRICS]
        )
    head = [HEADS[split], "edits", "success", *OPERATIONS, *METRICS.values()]
    return table(head, rows)


def _chains(latest: dict[Key, Record]) -> str:
    rows = []
    for variant in _variants(latest, CHAINS):
        steps = [latest.get((CHAINS, variant, step)) for step in range(1, LENGTH + 1)]
        known = next(record for record in steps if record is not None)
        cells = [
            "–"
            if record is None
            else " / ".join(number(_mean(record, m), 2) for m in ("success", "preserved", "kept"))
            for record in steps
        ]
        rows.append([_label(known), str(known["n"]), *cells])
    edits = [f"edit {step}" for step in range(1, LENGTH + 1)]
    return table(["success / preserved / kept in chains", "chains", *edits], rows)


def _subject(latest: dict[Key, Record]) -> str | None:
    """The editor that aims are about: the shipped one, else the best of the test split."""
    editors = [v for v in _variants(latest, "test") if v not in BASELINES]
    if SHIPPED in editors or not editors:
        return SHIPPED if editors else None
    return max(editors, key=lambda v: _mean(latest["test", v, 0], "success") or 0.0)


def _aims(latest: dict[Key, Record], subject: str) -> str:
    rows = []
    for aim in AIMS:
        found = _mean(_meant(latest, aim, subject), aim.metric, aim.operation)
        if aim.over is not None and found is not None:
            base = _mean(latest.get((aim.part, aim.over, 0), {}), aim.metric, aim.operation)
            found = None if base is None else found - base
        verdict = "not measured" if found is None else "met" if found >= aim.least else "missed"
        rows.append([aim.text, f"≥ {aim.least:.2f}", number(found, 3), verdict])
    return table([f"aim of the editor {subject}", "wanted", "measured", ""], rows)


def _meant(latest: dict[Key, Record], aim: Aim, subject: str) -> Record:
    """The record that an aim is about: the subject's, or that of the first of the aim's mode."""
    if aim.mode is None:
        return latest.get((aim.part, subject, 0), {})
    found = (latest[aim.part, v, 0] for v in _variants(latest, aim.part))
    return next((record for record in found if record.get("mode") == aim.mode), {})


def _mean(record: Record, metric: str, operation: str | None = None) -> float | None:
    of = record if operation is None else record.get("operations", {}).get(operation, {})
    found = of.get("metrics", {}).get(metric)
    return None if found is None else found["mean"]


def _value(metrics: dict[str, dict[str, float]], name: str) -> str:
    """Mean and half the width of the 95 % interval."""
    if name not in metrics:
        return "–"
    metric, digits = metrics[name], 1 if name == "psnr" else 3
    half = (metric["high"] - metric["low"]) / 2
    return f"{metric['mean']:.{digits}f} ±{half:.{digits}f}"


def _circumstances(latest: dict[Key, Record]) -> str:
    last = list(latest.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(sorted({record["commit"] for record in latest.values()}))
    weights = {r["variant"]: r["editor"] for r in latest.values() if r.get("editor")}
    editors = "".join(f", editor {name} {found}" for name, found in weights.items())
    return (
        f"Every edit is drawn from {last['seeds']} noise seeds in {last['steps']} steps, with and "
        "without it, and parsed; ± is half of a 95 % bootstrap interval over scenes. Success: the "
        "named object is exactly as it was to be. Preserved: all others have their attributes and "
        "an IoU of 0.7 with where they truly are, and the ground is right; kept: likewise, with "
        "what the same noise gives without the edit. Over-edit: successful edits after which "
        "something else differs from that picture. Untouched: PSNR to it outside the boxes that "
        "the edit concerns; leakage: mean change outside by inside. In a chain each edit starts "
        "from the embedding of the one before, and is compared with its picture. "
        f"Decoder {last['decoder']}, adapter {last['reader']}{editors}, {versions}, "
        f"commit {commits}."
    )
