"""docs/claims.md: a verdict and tables for each claim, made from the records alone."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.claims_interval import Interval, Sample, interval, less
from bench.claims_list import CLAIMS, EDITING, METRICS, VARIANTS, Claim, Contrast, Verdict, overall
from bench.edit_report import latest_edits
from bench.records import Record
from bench.tables import table
from sda_fast.files import write_whole

NAME = "claims.md"
Seeds = dict[str, dict[int, Record]]
"""Records by variant and seed."""
INTRODUCTION = """\
# The claims, tested

Made by `python -m bench report` from `bench/results/claims.jsonl` and `edit.jsonl`; measured by
`python -m bench claims` and `python -m bench edit`. All of it is in the world of scenes, where a
picture is parsed back into what it shows: nothing here is about FLUX.1.

± is half of a 95 % interval over seeds and scenes. Variants are compared on the same scenes with
the same noise, seed by seed: a seed is that of a training, of the noise, of a probe. Scenes are
resampled a thousand times for all seeds at once; the mean over seeds has Student's interval, which
three seeds make wide (its t is 4.3); the two distances from the mean add up in squares. A part is
*confirmed* if its whole interval is where it is wanted, *not confirmed* if the whole interval is
where the claim is wrong or too small to matter, else *undecided*; a claim is what the worst of its
parts is. What would matter is a share of the rate compared with: `bench/claims_list.py` has all
margins and levels. Adapters are trained alike for as long as is told below, the shipped one was for
4,400 steps of 64 pictures: what is found holds for so long a training."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A part of a claim and what became of it.

    Attributes:
        contrast: the part.
        value: of the difference; None where it was not measured.
        margin: of the contrast, as a difference.
    """

    contrast: Contrast
    value: Interval | None
    margin: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether it holds."""
        if self.value is None:
            return "not measured"
        return self.contrast.verdict(self.value.low, self.value.high, self.margin)

    def row(self) -> list[str]:
        """part, wanted, measured, verdict."""
        contrast, digits = self.contrast, METRICS[self.contrast.metric].digits
        compared = contrast.second is not None
        if contrast.sense == "near":
            wanted = f"difference within ±{contrast.margin:.0%}"
        else:
            sign = ">" if contrast.sense == "above" else "<"
            wanted = f"difference {sign} 0" if compared else f"{sign} {contrast.level:g}"
        measured = "–"
        if self.value is not None:
            shift, sign = (0.0, "+") if compared else (contrast.level, "")
            shown = [
                f"{value + shift:{sign}.{digits}f}"
                for value in (self.value.mean, self.value.low, self.value.high)
            ]
            measured = f"{shown[0]} [{shown[1]}, {shown[2]}]"
        return [contrast.text, wanted, measured, self.verdict]


@dataclass(frozen=True, slots=True)
class Answer:
    """What there is to say of a claim.

    Attributes:
        claim: the claim.
        findings: of its contrasts, in their order.
        rows: of its table of variants.
        about: a sentence on what was measured.
    """

    claim: Claim
    findings: list[Finding]
    rows: list[list[str]]
    about: str

    @property
    def verdict(self) -> Verdict:
        """Of the whole."""
        return overall([finding.verdict for finding in self.findings])

    def markdown(self, name: str) -> str:
        """Its part of the page."""
        head = [f"## {name}: {self.verdict}", f"*{self.claim.text}*. {self.claim.how}"]
        if self.rows:
            labels = [METRICS[metric].label for metric in self.claim.metrics]
            head.append(table(["", *labels], self.rows))
        parts = [finding.row() for finding in self.findings]
        head.append(table(["part", "wanted", "measured, 95 % interval", ""], parts))
        return "\n\n".join([*head, self.about])


@dataclass(frozen=True, slots=True)
class Page:
    """The whole page; written like a picture of ``bench report``.

    Attributes:
        text: of the file.
    """

    text: str
    name: str = NAME

    def is_current(self, folder: Path) -> bool:
        """Whether the file in the folder says just this."""
        file = folder / self.name
        return file.is_file() and file.read_text(encoding="utf-8") == self.text

    def write(self, folder: Path) -> Path:
        """Write it into the folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        return write_whole(folder / self.name, self.text)


def claims_pages(records: Sequence[Record]) -> list[Page]:
    """The page, if any record of suite "claims" is there.

    Args:
        records: of suites "claims" and "edit", oldest first; others are passed over.
    """
    if not any(record["suite"] == "claims" for record in records):
        return []
    found = answers(records)
    rows = [[a.claim.text, name, a.verdict] for name, a in found.items()]
    parts = [INTRODUCTION, table(["claim", "", "verdict"], rows)]
    parts += [answer.markdown(name) for name, answer in found.items()]
    return [Page("\n\n".join(parts) + "\n")]


def verdict_lines(records: Sequence[Record], names: Iterable[str]) -> list[str]:
    """For a terminal: a line a claim."""
    found = answers(records)
    return [f"{name}: {found[name].verdict}: {found[name].claim.text}" for name in names]


def answers(records: Sequence[Record]) -> dict[str, Answer]:
    """Of every claim, from the newest records that fit together."""
    claims = [record for record in records if record["suite"] == "claims"]
    found = {name: answer(claim, together(claims, claim)) for name, claim in CLAIMS.items()}
    found["editing"] = editing([record for record in records if record["suite"] == "edit"])
    return found


def together(records: Iterable[Record], claim: Claim) -> Seeds:
    """The newest set of records of one setting that has all variants of a claim; else nothing.

    A setting names models, training and number of scenes, so that runs of other budgets or models
    are not mixed; runs of the same add their seeds up. Of a variant and seed the latest counts.
    """
    sets: dict[str, Seeds] = {}
    for record in records:
        if record["variant"] in claim.variants:
            key = json.dumps(record["setting"], sort_keys=True)
            # the set of the newest record comes last
            sets[key] = sets.pop(key, {})
            sets[key].setdefault(record["variant"], {})[record["seed"]] = record
    whole = [found for found in sets.values() if found.keys() == set(claim.variants)]
    return whole[-1] if whole else {}


def answer(claim: Claim, found: Seeds) -> Answer:
    """What records of one setting say of a claim."""
    findings = [_finding(contrast, found) for contrast in claim.contrasts]
    rows = [
        [VARIANTS[variant], *(_cell(found[variant], metric) for metric in claim.metrics)]
        for variant in claim.variants
        if variant in found
    ]
    return Answer(claim, findings, rows, _about(found))


def editing(records: Sequence[Record]) -> Answer:
    """What ``bench edit`` says of the shipped editor: intervals there are over scenes."""
    latest = latest_edits(records)
    of = {variant: latest.get(("test", variant, 0)) for variant in ("shipped", "source")}
    value = lambda variant, metric: _interval_of(of[variant], metric)
    findings = []
    for contrast in EDITING.contrasts:
        first = value(contrast.first, contrast.metric)
        level = Interval(*3 * (contrast.level,))
        second = value(contrast.second, contrast.metric) if contrast.second else level
        findings.append(Finding(contrast, less(first, second) if first and second else None))
    rows = [
        [
            VARIANTS[variant],
            *(_shown(value(variant, m), METRICS[m].digits) for m in EDITING.metrics),
        ]
        for variant in EDITING.variants
        if of[variant] is not None
    ]
    about = "Not measured: `python -m bench edit` takes the records."
    if (record := of["shipped"]) is not None:
        about = (
            f"{record['n']} edits, {record['seeds']} noise seeds; intervals over scenes. "
            f"Editor {record.get('editor')}, decoder {record['decoder']}, commit "
            f"{record['commit']}. More in the README's section on editing."
        )
    return Answer(EDITING, findings, rows, about)


def _interval_of(record: Record | None, metric: str) -> Interval | None:
    found = (record or {"metrics": {}})["metrics"].get(metric)
    if found is None:
        return None
    return Interval(found["mean"], found["low"], found["high"])


def _finding(contrast: Contrast, found: Seeds) -> Finding:
    """Of the seeds that both variants have."""
    compared = [variant for variant in (contrast.first, contrast.second) if variant is not None]
    seeds = set.intersection(*(set(found.get(variant, {})) for variant in compared))
    if not seeds:
        return Finding(contrast, None)
    samples = [
        sample([found[v][seed] for seed in sorted(seeds)], contrast.metric) for v in compared
    ]
    base = interval(samples[-1])
    margin = 0.0 if base is None else contrast.margin * abs(base.mean)
    return Finding(contrast, interval(*samples, level=contrast.level), margin)


def sample(records: Sequence[Record], metric: str) -> Sample:
    """The sums behind a metric, a row for each record."""
    of = METRICS[metric]
    top, bottom = (
        torch.tensor([record["scenes"][name] for record in records], dtype=torch.float64)
        for name in (of.top, of.bottom)
    )
    return Sample(top, bottom)


def _cell(records: dict[int, Record], metric: str) -> str:
    return _shown(interval(sample(list(records.values()), metric)), METRICS[metric].digits)


def _shown(value: Interval | None, digits: int) -> str:
    """Mean and half the width of its interval."""
    if value is None:
        return "–"
    half = f" ±{value.half:.{digits}f}" if math.isfinite(value.half) else ""
    return f"{value.mean:.{digits}f}{half}"


def _about(found: Seeds) -> str:
    """Of one setting: seeds, scenes, training, what made them."""
    records = [record for seeds in found.values() for record in seeds.values()]
    if not records:
        return "Not measured: `python -m bench claims` takes the records."
    setting, last = records[-1]["setting"], records[-1]
    counts = sorted({len(seeds) for seeds in found.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    numbers = {len(next(iter(record["scenes"].values()))) for record in records}
    trained = (
        f"trained for {setting['steps']} steps of {setting['batch']} pictures, "
        if "steps" in setting
        else ""
    )
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(sorted({record["commit"] for record in records}))
    where = ", ".join(sorted({r["gpu"] or f"{r['processor']} CPU" for r in records}))
    return (
        f"Seeds: {seeds}; {', '.join(map(str, sorted(numbers)))} scenes, {trained}"
        f"{setting['denoise']} steps of denoising. Decoder {setting['decoder']}, {where}, "
        f"{versions}, commit {commits}."
    )
