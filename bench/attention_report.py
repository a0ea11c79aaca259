"""What became of ``bench attention``: goals, tables and pictures, from its records alone."""

from collections.abc import Callable, Iterable, Sequence

from bench.records import Record
from bench.sides import (
    KIB,
    MIB,
    PASSES,
    Goal,
    Side,
    Sides,
    amount,
    left_out,
    not_measured,
    number,
    run_line,
    sides,
)
from bench.tables import table

OURS = "ours-auto"
THREE_LEVELS, FIVE_LEVELS = "tree32.8.4", "tree32.8.4.2.1"


class AttentionSide(Side):
    """Beside kernels that know no mask."""

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


def attention_sides(records: Iterable[Record]) -> dict[str, AttentionSide]:
    """The latest run of each case in which our operator was timed."""
    return sides(records, AttentionSide, [OURS])


def _flux(size: int, tree: str = THREE_LEVELS) -> str:
    return f"flux-{size}-b1-{tree}"


def _at(
    size: int, measure: Callable[[AttentionSide], float | None]
) -> Callable[[Sides], float | None]:
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
        yield Goal(text, _flux(size), most, True, _at(size, AttentionSide.mask_kib), " KiB", 0)
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
    found = attention_sides(records)
    if not found:
        return not_measured(records, "attention", "attention")
    goals = table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])
    parts = [goals, *(_measurements(found[case]) for case in GOAL_CASES if case in found)]
    others = [side for case, side in found.items() if case not in GOAL_CASES]
    parts += [_summary(others)] if others else []
    return "\n\n".join([*parts, left_out(found.values()), _circumstances(found.values())])


def _summary(others: Iterable[AttentionSide]) -> str:
    """A line a case: ours, and what the others take for each of our milliseconds."""
    head = ["case"]
    for short in ("fwd", "fwd+bwd"):
        head += [f"ours {short}, ms", "÷ unmasked", "SDPA ÷ ours", "Flex ÷ ours"]
    rows = []
    for side in others:
        cells = [side.case]
        for name in PASSES:
            cells.append(number(side.ms(OURS, name), 3))
            cells.append(number(side.ratio(OURS, name), 2))
            cells += [number(side.lead(other, name), 2) for other in ("sdpa-mask", "flex")]
        rows.append(cells)
    return table(head, rows)


def _measurements(side: AttentionSide) -> str:
    variants = {name: record for (name, _), record in side.records.items()}
    rows = []
    for name, record in variants.items():
        if not any(side.of(name, pass_name) for pass_name in PASSES):
            continue
        cells = [record["label"] if record["masked"] else f"*{record['label']}*"]
        for pass_name in PASSES:
            cells += _cells(side, name, pass_name)
        rows.append([*cells, amount(record["mask_bytes"], KIB), number(record["setup_ms"], 1)])
    head = [f"`{side.case}`"]
    for short in ("fwd", "fwd+bwd"):
        head += [f"{short}, ms", "% of roof", "÷ unmasked", "peak, MiB"]
    return table([*head, "mask, KiB", "its set-up, ms"], rows)


def _cells(side: AttentionSide, name: str, pass_name: str) -> list[str]:
    record = side.of(name, pass_name)
    if record is None:
        return ["–"] * 4
    ratio = side.ratio(name, pass_name)
    return [
        f"{record['p50_ms']:.3f}",
        f"{100 * of_roof(record):.0f}",
        number(ratio, 2),
        amount(record["peak_bytes"], MIB),
    ]


def of_roof(record: Record) -> float:
    """Achieved FLOP/s ÷ those of the large matrix product on the same card in the same run."""
    return record["flops"] / record["p50_ms"] * 1e3 / record["roofs"]["matmul"]


def _circumstances(found: Iterable[AttentionSide]) -> str:
    """Cards, roofs and versions, a sentence a run."""
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    lines = [
        "Medians of interleaved runs, each as a CUDA graph where it can be captured; % of roof is "
        "of a large bf16 matrix product on the same card in the same run, allowed pairs counted; "
        "peak is above inputs and mask; unmasked kernels in italics."
    ]
    for _, record in sorted(by_run.items()):
        lines.append(run_line(record))
    return "\n\n".join(lines)
