"""What became of ``bench attention``: goals, tables and pictures, from its records alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.records import Record
from bench.tables import table

GPU = "H100"
"""The goals are for this card, so only records of it are shown."""
OURS = "ours-auto"
THREE_LEVELS, FIVE_LEVELS = "tree32.8.4", "tree32.8.4.2.1"
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

    def best_unmasked(self, pass_name: str) -> Record | None:
        """The fastest kernel that knows no mask."""
        found = [
            record
            for (_, passed), record in self.records.items()
            if passed == pass_name and not record["masked"] and record["p50_ms"] is not None
        ]
        return min(found, key=lambda record: record["p50_ms"], default=None)

    def ratio(self, variant: str, pass_name: str) -> float | None:
        """Time of a variant ÷ that of the best unmasked kernel."""
        best, mine = self.best_unmasked(pass_name), self.ms(variant, pass_name)
        return None if best is None or mine is None else mine / best["p50_ms"]

    def lead(self, variant: str, pass_name: str) -> float | None:
        """Time of a variant ÷ ours."""
        theirs, ours = self.ms(variant, pass_name), self.ms(OURS, pass_name)
        return None if theirs is None or ours is None else theirs / ours

    def mask_kib(self) -> float | None:
        """What we hold on the device to know the mask, KiB."""
        record = self.of(OURS, "forward")
        held = None if record is None else record["mask_bytes"]
        return None if held is None else held / KIB


Sides = dict[str, Side]
"""By the case's name."""


def sides(records: Iterable[Record]) -> Sides:
    """The latest run of each case on the goals' card in which our operator was timed."""
    by_run: dict[str, dict[str, dict[tuple[str, str], Record]]] = {}
    for record in records:
        if GPU in (record.get("gpu") or ""):
            runs = by_run.setdefault(record["case"], {})
            runs.setdefault(record["run"], {})[record["variant"], record["pass"]] = record
    found = {}
    for case, runs in by_run.items():
        timed = [Side(case, of_run) for of_run in runs.values()]
        timed = [side for side in timed if any(side.of(OURS, name) for name in PASSES)]
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
    """

    text: str
    case: str
    wanted: float
    at_most: bool
    measure: Callable[[Sides], float | None]
    unit: str = ""

    def row(self, found: Sides) -> list[str]:
        """goal, case, wanted, measured, verdict."""
        value = self.measure(found)
        digits = 0 if self.unit else 2
        wanted = f"{'≤' if self.at_most else '≥'} {self.wanted:.{digits}f}{self.unit}"
        if value is None:
            return [self.text, self.case, wanted, "–", "not measured"]
        # as exact as it takes: 1.004 is not shown as the 1.00 that it misses
        met = value <= self.wanted if self.at_most else value >= self.wanted
        measured = f"{value:.{1 if self.unit else 3}f}{self.unit}"
        return [self.text, self.case, wanted, measured, "met" if met else "missed"]


def _flux(size: int, tree: str = THREE_LEVELS) -> str:
    return f"flux-{size}-b1-{tree}"


def _at(size: int, measure: Callable[[Side], float | None]) -> Callable[[Sides], float | None]:
    return lambda found: measure(found[_flux(size)]) if _flux(size) in found else None


def _growth(pass_name: str, by_pair: bool) -> Callable[[Sides], float | None]:
    """Our time under five levels ÷ under three, both of one run."""

    def measure(found: Sides) -> float | None:
        three, five = found.get(_flux(1024)), found.get(_flux(1024, FIVE_LEVELS))
        if three is None or five is None or three.run != five.run:
            return None
        one, other = three.of(OURS, pass_name), five.of(OURS, pass_name)
        if one is None or other is None:
            return None
        ratio = other["p50_ms"] / one["p50_ms"]
        return ratio * one["flops"] / other["flops"] if by_pair else ratio

    return measure


def _goals() -> Iterable[Goal]:
    unmasked = {
        "forward": {512: 1.05, 1024: 1.00, 2048: 1.00},
        "forward+backward": {512: 1.08, 1024: 1.03, 2048: 1.02},
    }
    for name, bounds in unmasked.items():
        for size, most in bounds.items():
            value = _at(size, lambda side, name=name: side.ratio(OURS, name))
            yield Goal(f"{name} ÷ best unmasked kernel", _flux(size), most, True, value)
    for size in (512, 1024, 2048):
        value = _at(size, lambda side: side.lead("sdpa-mask", "forward"))
        yield Goal("SDPA with the bool mask ÷ ours, forward", _flux(size), 1.5, False, value)
    for name in PASSES:
        for size in (512, 1024, 2048):
            value = _at(size, lambda side, name=name: side.lead("flex", name))
            yield Goal(f"compiled FlexAttention ÷ ours, {name}", _flux(size), 1.3, False, value)
    for size, most in {512: 64, 1024: 64, 2048: 256}.items():
        text = "extra memory for the mask"
        yield Goal(text, _flux(size), most, True, _at(size, Side.mask_kib), " KiB")
    five = _flux(1024, FIVE_LEVELS)
    for name in PASSES:
        text = f"five levels ÷ three levels, {name}"
        yield Goal(text, five, 1.03, True, _growth(name, by_pair=False))
        yield Goal(f"{text}, per allowed pair", five, 1.03, True, _growth(name, by_pair=True))


GOALS = tuple(_goals())
GOAL_CASES = tuple(dict.fromkeys(goal.case for goal in GOALS))
"""Those are shown in full."""


def attention_tables(records: Sequence[Record]) -> str:
    """Goals, times, memory and what they were measured on, in markdown.

    Args:
        records: of suite "attention", oldest first; the latest run of each case counts.
    """
    found = sides(records)
    if not found:
        kind = f" of an {GPU}" if records else ""
        return (
            f"Not measured: no record{kind} in bench/results/attention.jsonl yet; "
            "`bench/h100.sh attention` takes them on one H100."
        )
    goals = table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])
    parts = [goals, *(_measurements(found[case]) for case in GOAL_CASES if case in found)]
    others = [side for case, side in found.items() if case not in GOAL_CASES]
    parts += [_summary(others)] if others else []
    return "\n\n".join([*parts, _left_out(found.values()), _circumstances(found.values())])


def _summary(others: Iterable[Side]) -> str:
    """A line a case: ours, and what the others take for each of our milliseconds."""
    head = ["case"]
    for short in ("fwd", "fwd+bwd"):
        head += [f"ours {short}, ms", "÷ unmasked", "SDPA ÷ ours", "Flex ÷ ours"]
    rows = []
    for side in others:
        cells = [side.case]
        for name in PASSES:
            cells.append(_number(side.ms(OURS, name), 3))
            cells.append(_number(side.ratio(OURS, name), 2))
            cells += [_number(side.lead(other, name), 2) for other in ("sdpa-mask", "flex")]
        rows.append(cells)
    return table(head, rows)


def _measurements(side: Side) -> str:
    variants = {name: record for (name, _), record in side.records.items()}
    rows = []
    for name, record in variants.items():
        if not any(side.of(name, pass_name) for pass_name in PASSES):
            continue
        cells = [record["label"] if record["masked"] else f"*{record['label']}*"]
        for pass_name in PASSES:
            cells += _cells(side, name, pass_name)
        rows.append([*cells, _size(record["mask_bytes"], KIB), _number(record["setup_ms"], 1)])
    head = [f"`{side.case}`"]
    for short in ("fwd", "fwd+bwd"):
        head += [f"{short}, ms", "% of roof", "÷ unmasked", "peak, MiB"]
    return table([*head, "mask, KiB", "its set-up, ms"], rows)


def _cells(side: Side, name: str, pass_name: str) -> list[str]:
    record = side.of(name, pass_name)
    if record is None:
        return ["–"] * 4
    ratio = side.ratio(name, pass_name)
    return [
        f"{record['p50_ms']:.3f}",
        f"{100 * of_roof(record):.0f}",
        _number(ratio, 2),
        _size(record["peak_bytes"], MIB),
    ]


def of_roof(record: Record) -> float:
    """Achieved FLOP/s ÷ those of the large matrix product on the same card in the same run."""
    return record["flops"] / record["p50_ms"] * 1e3 / record["roofs"]["matmul"]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _size(value: int | None, unit: int) -> str:
    return "–" if value is None else f"{value / unit:.1f}"


def _left_out(found: Iterable[Side]) -> str:
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


def _circumstances(found: Iterable[Side]) -> str:
    """Cards, roofs and versions, a sentence a run."""
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    lines = [
        "Medians of interleaved runs, each as a CUDA graph where it can be captured; % of roof is "
        "of a large bf16 matrix product on the same card in the same run, allowed pairs counted; "
        "peak is above inputs and mask; unmasked kernels in italics."
    ]
    for run, record in sorted(by_run.items()):
        roofs, versions = record["roofs"], dict(record["versions"])
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        before = (record["nvml"] or {}).get("before") or {}
        clocks = f", SM at {before['sm_clock_mhz']} MHz" if before.get("sm_clock_mhz") else ""
        lines.append(
            f"Run {run}: {record['gpu']}, driver {record['driver']}{clocks}, copy "
            f"{roofs['copy'] / 1e12:.2f} TB/s, matmul {roofs['matmul'] / 1e12:.0f} TFLOP/s; "
            f"{named}; commit {record['commit']}."
        )
    return "\n\n".join(lines)
