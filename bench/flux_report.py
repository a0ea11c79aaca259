"""What became of ``bench flux`` and ``bench flux-train``: goals and tables, from records alone."""

from collections.abc import Callable, Iterable, Sequence

from bench.flux_cases import STEPS
from bench.flux_levers import LEVERS
from bench.records import Record
from bench.sides import Goal, Side, Sides, amount, left_out, not_measured, number, run_line, sides
from bench.tables import table

GIB = 2**30
SPEC = 989e12
"""Dense bf16 FLOP a second of an H100 SXM. Source: its data sheet."""
BF16 = ("ours-ahead", "ours-graph", "ours")
UNMASKED = ("recipe", "compiled")
ROPE = "ours-norm-rope"
FORWARD, BOTH = "forward", "forward+backward"


class FluxSide(Side):
    """Beside one another: ways to a step, to a training step, or to norm and rotation."""

    def best(self, variants: Sequence[str], pass_name: str = FORWARD) -> Record | None:
        """The record of the fastest of those that were timed."""
        timed = [r for r in (self.of(name, pass_name) for name in variants) if r is not None]
        return min(timed, key=lambda record: record["p50_ms"], default=None)

    def over(self, variants: Sequence[str], ours: Sequence[str]) -> float | None:
        """Time of the fastest of the one ÷ that of the others."""
        theirs, mine = self.best(variants), self.best(ours)
        return None if theirs is None or mine is None else theirs["p50_ms"] / mine["p50_ms"]


Measure = Callable[[FluxSide], float | None]


def _of_roof(record: Record | None, what: str, roof: float | None = None) -> float | None:
    """FLOPs or bytes a second over what the card was measured to do, or over a given rate."""
    if record is None:
        return None
    key = {"flops": "matmul", "bytes": "copy"}[what]
    return record[what] / record["p50_ms"] * 1e3 / (roof or record["roofs"][key])


def _speed(record: Record | None) -> float | None:
    """Pictures a second."""
    return None if record is None else 1e3 * record["batch"] / record["p50_ms"]


def _at(case: str, measure: Measure) -> Callable[[Sides], float | None]:
    return lambda found: measure(found[case]) if case in found else None


def _worst_rope(pixels: int) -> Callable[[Sides], float | None]:
    """In the form of either block, both of which a step needs."""
    cases = f"norm-rope-{pixels}-b1", f"norm-rope-single-{pixels}-b1"

    def measure(found: Sides) -> float | None:
        shares = [_of_roof(found[c].best([ROPE]), "bytes") if c in found else None for c in cases]
        known = [share for share in shares if share is not None]
        return min(known) if len(known) == len(cases) else None

    return measure


def _most_pictures(cases: Sequence[str]) -> Callable[[Sides], float | None]:
    def measure(found: Sides) -> float | None:
        timed = [found[c].best(["ours-none"], BOTH) for c in cases if c in found]
        return max((s for s in map(_speed, timed) if s is not None), default=None)

    return measure


def _goals() -> Iterable[Goal]:
    took = lambda side: (side.best(BF16) or {}).get("p50_ms")
    share = lambda side: _of_roof(side.best(BF16), "flops")
    steps: tuple[tuple[str, tuple[float, float], bool, Measure, str, int], ...] = (
        ("a step, bf16", (25, 105), True, took, " ms", 0),
        ("share of the measured matmul roof", (0.80, 0.83), False, share, "", 2),
        ("best compiled stock without mask ÷ ours", (1.20, 1.10), False,
         lambda side: side.over(UNMASKED, BF16), "", 2),
        ("stock eager with dense mask ÷ ours", (2.0, 1.8), False,
         lambda side: side.over(["stock"], BF16), "", 1),
        ("ours bf16 ÷ ours fp8", (1.3, 1.35), False,
         lambda side: side.over(BF16, ["ours-fp8"]), "", 2),
    )  # fmt: skip
    for text, wanted, at_most, measure, unit, digits in steps:
        for pixels, bound in zip((512, 1024), wanted, strict=True):
            case = f"step-{pixels}-b1"
            yield Goal(text, case, bound, at_most, _at(case, measure), unit, digits)
    for pixels, cases, bound in (
        (512, ("train-512-b4", "train-512-b8"), 17),
        (1024, ("train-1024-b1", "train-1024-b2"), 3.7),
    ):
        text = "pictures/s, forward and gradient, bf16, nothing recomputed"
        yield Goal(text, f"train-{pixels}", bound, False, _most_pictures(cases), digits=1)
    for pixels, bound in ((512, 0.75), (1024, 0.80)):
        text = "norm and rotation of q and k, share of the measured copy"
        yield Goal(text, f"norm-rope-{pixels}", bound, False, _worst_rope(pixels))


GOALS = tuple(_goals())


def flux_tables(records: Sequence[Record]) -> str:
    """Goals, times, levers, training and what they were measured on, in markdown.

    Args:
        records: of suites "flux" and "flux-train", oldest first; the latest run of each case
            counts.
    """
    # none of ours has other text than positions
    shown = {r["variant"] for r in records if r["variant"][:4] == "ours" or r["kind"] == "text"}
    found = sides(records, FluxSide, sorted(shown))
    if not found:
        return not_measured(records, "flux", "flux flux-train")
    kinds: dict[str, list[FluxSide]] = {}
    for side in found.values():
        kinds.setdefault(next(iter(side.records.values()))["kind"], []).append(side)
    parts = [table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])]
    parts += [_steps(side) for kind in ("step", "text") for side in kinds.get(kind, [])]
    parts += [_loops(kinds["loop"])] if "loop" in kinds else []
    parts += [_levers(side) for side in kinds.get("levers", [])]
    ropes = [side for kind in ("norm-rope", "norm-rope-single") for side in kinds.get(kind, [])]
    parts += [_ropes(ropes)] if ropes else []
    for side in kinds.get("train", []):
        parts += [_training(side), *_largest(side)]
    return "\n\n".join([*parts, left_out(found.values()), *_circumstances(found.values())])


def _timed(side: FluxSide, pass_name: str = FORWARD) -> list[Record]:
    records = [side.of(name, pass_name) for name, of_pass in side.records if of_pass == pass_name]
    return [record for record in records if record is not None]


def _steps(side: FluxSide) -> str:
    rows = []
    for record in _timed(side):
        took = record["p50_ms"]
        rows.append(
            [
                record["label"],
                f"{took:.2f}",
                f"{took * STEPS / 1e3:.2f}",
                f"{record['flops'] / took / 1e9:.0f}",
                number(_of_roof(record, "flops"), 2),
                number(side.over([record["variant"]], BF16), 2),
                _error(record),
                amount(record["peak_bytes"], GIB),
            ]
        )
    head = [f"`{side.case}`", "ms a step", f"{STEPS} steps, s", "TFLOP/s", "of roof", "÷ ours"]
    return table([*head, "off by", "peak, GiB"], rows)


def _error(record: Record) -> str:
    return "–" if record["error"] is None else f"{100 * record['error']:.2f} %"


def _loops(found: Iterable[FluxSide]) -> str:
    rows = [
        [
            f"`{side.case}`",
            record["label"],
            f"{record['p50_ms'] / 1e3:.3f}",
            f"{record['p50_ms'] / record['steps']:.2f}",
        ]
        for side in found
        for record in _timed(side)
    ]
    return table(["whole loop", "", "s", "ms a step"], rows)


def _levers(side: FluxSide) -> str:
    """Each lever alone, against none, and after all above it, against these."""
    base = side.ms("ours-none", FORWARD)
    rows = [["none", number(base, 2), "", number(base, 2), ""]]
    before = base
    for i, (lever, what) in enumerate(LEVERS.items()):
        alone = side.ms(f"ours-only-{lever}", FORWARD)
        added = side.ms(f"ours-{'to' if i else 'only'}-{lever}", FORWARD)
        rows.append(
            [what, number(alone, 2), _saved(base, alone), number(added, 2), _saved(before, added)]
        )
        before = added
    return table([f"`{side.case}`", "alone, ms", "saves", "added in turn, ms", "saves"], rows)


def _saved(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before - after:.2f}"


def _ropes(found: Iterable[FluxSide]) -> str:
    rows = [
        [
            f"`{side.case}`",
            record["label"],
            f"{1e3 * record['p50_ms'] / record['launches']:.1f}",
            f"{record['bytes'] / record['p50_ms'] / 1e9:.2f}",
            number(_of_roof(record, "bytes"), 2),
        ]
        for side in found
        for record in _timed(side)
    ]
    return table(["norm and rotation of q and k", "", "µs", "TB/s", "of copy"], rows)


def _training(side: FluxSide) -> str:
    rows = []
    for record in _timed(side, BOTH):
        peak = record["peak_bytes"]
        rows.append(
            [
                record["label"],
                number(_speed(record), 2),
                f"{record['p50_ms']:.1f}",
                number(_of_roof(record, "flops"), 2),
                number(_of_roof(record, "flops", SPEC), 2),
                amount(None if peak is None else peak / record["batch"], GIB),
                _error(record),
            ]
        )
    head = [f"`{side.case}`", "pictures/s", "ms", "of roof", f"of {SPEC / 1e12:.0f} TFLOP/s"]
    return table([*head, "peak a picture, GiB", "off by"], rows)


def _largest(side: FluxSide) -> list[str]:
    """How many pictures fit, where that was looked for."""
    said = []
    for record in _timed(side, BOTH):
        most, by = record["largest_batch"], record["largest_batch_by"]
        if most is not None:
            more = "" if by == "memory" else f" or more (the search ended by {by})"
            said.append(
                f"{record['label'].strip('*')}: {most} pictures{more} fit at the size of "
                f"`{side.case}`."
            )
    return said


def _circumstances(found: Iterable[FluxSide]) -> list[str]:
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    how = (
        "Medians of interleaved runs, random bf16 weights of FLUX.1-dev's full size; without the "
        f"mask in italics, {STEPS} steps as so many times one where not measured as a loop. Levers "
        "are undone by plain torch; nothing of the library is switched. FLOPs count all pairs of "
        "tokens; the roof is a large bf16 matmul on the same card; off by is the norm of the "
        "error against float32 over that of the result; peak is above weights and inputs."
    )
    return [how, *(run_line(record) for _, record in sorted(by_run.items()))]
