"""Records of a suite side by side: the latest run of each case, goals and what became of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.records import Record

GPU = "H100"
"""The goals are for this card, so only records of it are shown."""
PASSES = ("forward", "forward+backward")
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True, slots=True)
class Side:
    """Everything measured of one case side by side, in one run.

    Attributes:
        case: its name.
        records: in the order of the file, the latest of each variant and pass.
    """

    case: str
    records: dict[tuple[str, str], Record]

    @property
    def run(self) -> str:
        """Of all its records."""
        return next(iter(self.records.values()))["run"]

    def of(self, variant: str, pass_name: str) -> Record | None:
        """A timed record, None if that was not timed."""
        record = self.records.get((variant, pass_name))
        return record if record is not None and record["p50_ms"] is not None else None

    def ms(self, variant: str, pass_name: str) -> float | None:
        """Median time."""
        record = self.of(variant, pass_name)
        return None if record is None else record["p50_ms"]


Sides = Mapping[str, Any]
"""By the case's name."""


AnySide = TypeVar("AnySide", bound=Side)


def sides(
    records: Iterable[Record], kind: type[AnySide], ours: Sequence[str], card: str | None = GPU
) -> dict[str, AnySide]:
    """The latest run of each case on a card in which one of ours was timed.

    Args:
        records: oldest first.
        kind: of Side.
        ours: names of variants.
        card: part of its name, the goals' one unless given; None: on a CPU.
    """
    by_run: dict[str, dict[str, dict[tuple[str, str], Record]]] = {}
    for record in records:
        found_on = record.get("gpu")
        if found_on is None if card is None else card in (found_on or ""):
            runs = by_run.setdefault(record["case"], {})
            runs.setdefault(record["run"], {})[record["variant"], record["pass"]] = record
    found = {}
    for case, runs in by_run.items():
        timed = [kind(case, of_run) for of_run in runs.values()]
        timed = [s for s in timed if any(s.of(who, name) for who in ours for name in PASSES)]
        if timed:
            found[case] = timed[-1]
    return found


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to reach.

    Attributes:
        text: what.
        case: where.
        wanted: the bound.
        at_most: the value may not be above it, else not below.
        measure: the value, None where it was not measured.
        unit: behind the numbers.
        digits: of the wanted number; one more is shown of the value.
    """

    text: str
    case: str
    wanted: float
    at_most: bool
    measure: Callable[[Sides], float | None]
    unit: str = ""
    digits: int = 2

    def row(self, found: Sides) -> list[str]:
        """goal, case, wanted, measured, verdict."""
        value = self.measure(found)
        wanted = f"{'≤' if self.at_most else '≥'} {self.wanted:.{self.digits}f}{self.unit}"
        if value is None:
            return [self.text, self.case, wanted, "–", "not measured"]
        # as exact as it takes: 1.004 is not shown as the 1.00 that it misses
        met = value <= self.wanted if self.at_most else value >= self.wanted
        measured = f"{value:.{self.digits + 1}f}{self.unit}"
        return [self.text, self.case, wanted, measured, "met" if met else "missed"]


def number(value: float | None, digits: int) -> str:
    """A dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def amount(value: int | None, unit: int) -> str:
    """Bytes in a unit, a dash for what is not known."""
    return "–" if value is None else f"{value / unit:.1f}"


def left_out(found: Iterable[Side]) -> str:
    """Who was not timed, and why; each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for side in found:
        for record in side.records.values():
            if record["p50_ms"] is None:
                key = record["label"].strip("*"), f"{record['status']}: {record['reason']}"
                reasons.setdefault(key, []).append(f"{record['case']} {record['pass']}")
    if not reasons:
        return "Every variant was timed."
    lines = []
    for (label, reason), where in reasons.items():
        text = " ".join(reason.replace("|", "/").split())
        places = where[0] if len(where) == 1 else f"{len(where)} measurements"
        lines.append(f"- {label} ({places}): {text[:200]}")
    return "\n".join(["Not timed:", "", *lines])


def run_line(record: Record) -> str:
    """A sentence on the card, roofs and versions of a run, from any record of it."""
    roofs, versions = record["roofs"], dict(record["versions"])
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    before = (record["nvml"] or {}).get("before") or {}
    clocks = f", SM at {before['sm_clock_mhz']} MHz" if before.get("sm_clock_mhz") else ""
    return (
        f"Run {record['run']}: {record['gpu']}, driver {record['driver']}{clocks}, copy "
        f"{roofs['copy'] / 1e12:.2f} TB/s, matmul {roofs['matmul'] / 1e12:.0f} TFLOP/s; "
        f"{named}; commit {record['commit']}."
    )


def not_measured(records: Sequence[Record], name: str, suites: str) -> str:
    """What the README says where no record of the card is."""
    kind = f" of an {GPU}" if records else ""
    return (
        f"Not measured: no record{kind} in bench/results/{name}.jsonl yet; "
        f"`bench/h100.sh {suites}` takes them on one H100."
    )
