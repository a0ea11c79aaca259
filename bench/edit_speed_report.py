"""What became of ``bench edit-speed``: goals and tables, from records alone."""

from collections.abc import Callable, Iterable, Sequence

from bench.records import Record
from bench.sides import GPU, MIB, Goal, Side, Sides, amount, left_out, number, run_line, sides
from bench.tables import table
from sda_fast.editors.t5_config import MODES

FORWARD = "forward"
FIRST = MODES[0]
"""The mode that the others are held against."""
ON_GPU, ON_CPU = "t5-large-128-b1", "t5-base-128-b1"
GRAPH = f"ours-{FIRST}-graph"


class EditSpeedSide(Side):
    """Modes side by side."""

    def best(self, mode: str) -> float | None:
        """Milliseconds of the fastest way to write in a mode."""
        timed = [r for (name, _), r in self.records.items() if self.of(name, FORWARD)]
        return min((r["p50_ms"] for r in timed if r["mode"] == mode), default=None)

    def lead(self, took: float | None) -> float | None:
        """The fastest autoregression by some time."""
        first = self.best(FIRST)
        return None if first is None or not took else first / took


Measure = Callable[[EditSpeedSide], float | None]


def _at(case: str, measure: Measure) -> Callable[[Sides], float | None]:
    return lambda found: measure(found[case]) if case in found else None


def _goals() -> Iterable[Goal]:
    for case in (ON_GPU, ON_CPU):
        for mode, least in (("level", 10), ("prefilled", 25)):
            lead = lambda side, mode=mode: side.lead(side.best(mode))
            yield Goal(f"{FIRST} ÷ {mode}", case, least, False, _at(case, lead), digits=1)
    took = lambda side: side.ms(GRAPH, FORWARD)
    yield Goal(f"{FIRST}, CUDA graph", ON_GPU, 250, True, _at(ON_GPU, took), " ms", digits=0)


GOALS = tuple(_goals())


def speed_tables(records: Sequence[Record]) -> str:
    """Goals, times, memory and what they were measured on, in markdown.

    Args:
        records: of suite "edit-speed", oldest first; the latest run of each case counts, on the
            goals' card or on a CPU.
    """
    ours = sorted({record["variant"] for record in records})
    on_gpu = sides(records, EditSpeedSide, ours)
    on_cpu = sides(records, EditSpeedSide, ours, card=None)
    found = {**on_cpu, **on_gpu}
    if not found:
        return (
            "Speed: not measured, no record in bench/results/edit-speed.jsonl yet; "
            "`bench/h100.sh edit-speed` takes them on one H100, `python -m bench edit-speed` "
            "smaller ones on a CPU."
        )
    parts = [table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])]
    parts += [_times(side) for side in found.values()]
    if not on_gpu:
        parts += [f"No record of an {GPU} yet: `bench/h100.sh edit-speed` takes them."]
    return "\n\n".join([*parts, left_out(found.values()), *_circumstances(found.values())])


def _times(side: EditSpeedSide) -> str:
    rows = []
    for name, _ in side.records:
        record = side.of(name, FORWARD)
        if record is None:
            continue
        took = record["p50_ms"]
        rows.append(
            [
                record["label"],
                f"{took:.2f}",
                f"{record['p20_ms']:.2f} – {record['p80_ms']:.2f}",
                number(took / record["batch"], 2),
                number(side.lead(took), 1),
                amount(record["peak_bytes"], MIB),
            ]
        )
    head = [f"`{side.case}`", "ms", "p20 – p80", "ms an embedding", f"{FIRST} ÷ this", "peak, MiB"]
    return table(head, rows)


def _circumstances(found: Iterable[EditSpeedSide]) -> list[str]:
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    how = (
        "Names say the decoder, positions and batch; medians of interleaved runs, with random "
        "weights, from embedding and encoded instruction to embedding; the factor is over the "
        f"fastest {FIRST} way. Keys and values of what is written are kept, unless nothing is: "
        "then each pass goes over all positions again. Before it is timed, what a way writes is "
        "held to one teacher-forced pass over it in a wider dtype."
    )
    return [how, *(_run_line(record) for _, record in sorted(by_run.items()))]


def _run_line(record: Record) -> str:
    if record["gpu"]:
        return run_line(record)
    named = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Run {record['run']}: {record['processor']} CPU, {record['threads']} threads; {named}; "
        f"commit {record['commit']}."
    )
