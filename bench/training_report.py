"""What became of ``bench training`` and ``bench scaling``: goals and tables, from records alone."""

from collections.abc import Callable, Iterable, Sequence

from bench.flux_report import GIB
from bench.records import Record
from bench.scaling_report import scaling_tables
from bench.sides import Goal, Side, Sides, amount, left_out, not_measured, number, run_line, sides
from bench.tables import table
from bench.training_step import PARTS

BOTH = "forward+backward"
OURS = ("ours", "ours-attention-out")
TRAINER = "ours-trainer"
SMALL, LARGE, RUN = "training-512-b8", "training-1024-b2", "trainer-512-b8"


class TrainingSide(Side):
    """Ways to a training step beside one another, or the trainer alone."""

    def best(self, variants: Sequence[str] = OURS) -> Record | None:
        """The record of the fastest of those that were timed."""
        timed = [r for r in (self.of(name, BOTH) for name in variants) if r is not None]
        return min(timed, key=lambda record: record["p50_ms"], default=None)

    def over_ours(self, variant: str) -> float | None:
        """Its time ÷ that of the fastest of ours."""
        theirs, mine = self.ms(variant, BOTH), self.best()
        return None if theirs is None or mine is None else theirs / mine["p50_ms"]


Measure = Callable[[Sides], float | None]


def _at(case: str, measure: Callable[[TrainingSide], float | None]) -> Measure:
    return lambda found: measure(found[case]) if case in found else None


def _told(what: str) -> Measure:
    """A field of the trainer's record."""
    return _at(RUN, lambda side: (side.best([TRAINER]) or {}).get(what))


def _percent(measure: Measure) -> Measure:
    def of(found: Sides) -> float | None:
        share = measure(found)
        return None if share is None else 100 * share

    return of


def _goals() -> Iterable[Goal]:
    for case, least in ((SMALL, 2.0), (LARGE, 1.7)):
        lead = lambda side: side.over_ours("stock")
        yield Goal("a whole step: stock ÷ ours", case, least, False, _at(case, lead), digits=1)
    share = _percent(_at(SMALL, lambda side: (side.best() or {}).get("mfu")))
    text = "FLUX forward + dX, share of the measured matmul roof"
    yield Goal(text, SMALL, 55, False, share, " %", digits=0)
    wait = _percent(_told("data_wait"))
    yield Goal("share of the time that waits for data", RUN, 2, True, wait, " %", digits=0)
    stall = _told("checkpoint_stall_steps")
    yield Goal("a checkpoint stops training for", RUN, 1, True, stall, " steps", digits=0)


GOALS = tuple(_goals())


def training_tables(records: Sequence[Record]) -> str:
    """Goals, whole steps, shares, the trainer, and ranks on a CPU, in markdown.

    Args:
        records: of suites "training" and "scaling", oldest first; the latest run of each case
            counts.
    """
    of_gpu = [r for r in records if r["suite"] == "training"]
    found = sides(of_gpu, TrainingSide, [*OURS, TRAINER])
    ranks = scaling_tables([r for r in records if r["suite"] == "scaling"])
    if not found:
        return "\n\n".join([not_measured(of_gpu, "training", "training"), ranks])
    steps = [side for case, side in found.items() if case != RUN]
    parts = [table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])]
    parts += [_steps(side) for side in steps]
    parts += [_shares(steps)] if steps else []
    parts += [_trainer(found[RUN])] if RUN in found else []
    return "\n\n".join([*parts, left_out(found.values()), *_circumstances(found.values()), ranks])


def _timed(side: TrainingSide) -> list[Record]:
    return [record for record in side.records.values() if record["p50_ms"] is not None]


def _steps(side: TrainingSide) -> str:
    rows = []
    for record in _timed(side):
        held, peak = record["held_bytes"], record["peak_bytes"]
        rows.append(
            [
                record["label"],
                f"{record['pictures_per_s']:.2f}",
                f"{record['p50_ms']:.1f}",
                _of_hundred(record["mfu"], 0),
                number(side.over_ours(record["variant"]), 2),
                amount(peak, GIB),
                amount(None if peak is None or held is None else held + peak, GIB),
                _of_hundred(record["error"], 1),
            ]
        )
    head = [f"`{side.case}`", "pictures/s", "ms", "of roof", "÷ ours", "step's peak, GiB"]
    return table([*head, "with all models, GiB", "gradients off by"], rows)


def _shares(steps: Iterable[TrainingSide]) -> str:
    rows = [
        [f"`{side.case}`", record["label"], *_parts(record["parts_ms"])]
        for side in steps
        for record in _timed(side)
        if record["parts_ms"]
    ]
    return table(["where a step's time goes, ms", "", *PARTS], rows)


def _parts(parts: dict[str, float]) -> list[str]:
    whole = sum(parts.values())
    return [f"{parts[part]:.1f} ({100 * parts[part] / whole:.0f} %)" for part in PARTS]


def _trainer(side: TrainingSide) -> str:
    rows = [
        [
            record["label"],
            number(record["pictures_per_s"], 2),
            f"{record['p50_ms']:.1f}",
            _of_hundred(record["mfu"], 0),
            number(record["memory_gib"], 1),
            _of_hundred(record["data_wait"], 2),
            number(record["checkpoint_stall_s"], 3),
        ]
        for record in _timed(side)
    ]
    head = [f"`{side.case}`", "pictures/s", "ms a step", "of roof", "peak in all, GiB"]
    return table([*head, "waits for data", "a checkpoint stops it, s"], rows)


def _of_hundred(share: float | None, digits: int) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _circumstances(found: Iterable[TrainingSide]) -> list[str]:
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    how = (
        "Medians of interleaved steps on one card: pictures to encoders, latents, adapter, frozen "
        "FLUX forward and backward, clipping, fused AdamW and average, models of FLUX.1-dev's, "
        "DFN ViT-H/14's and DINOv2-L's full size with random weights in bf16, adapter in float32 "
        "under autocast. Of roof counts FLOPs of FLUX's forward and dX alone, nothing recomputed, "
        "over a large bf16 matmul on the same card; off by is against float32; parts come from "
        "steps of their own. The trainer is `python -m train rehearse` on JPEGs of 1024 pixels, "
        "in a process of its own."
    )
    return [how, *(run_line(record) for _, record in sorted(by_run.items()))]
